"""Files of problems and a checkpoint become a task: what is asked, and what is kept apart."""

import gzip
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

import rollout
import verify
from scale import chat, problems
from tests.scale import tiny

GSM8K = [
    {"question": f"Ann has {a} pens and buys {b} more. How many has she?",
     "answer": f"She has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} pens.\n#### {a + b}"}
    for a in range(2, 9) for b in range(2, 9)
]  # fmt: skip
MBPP = [
    {"text": f"Write a function to add {k} to a number.\n",
     "code": f"def add_{k}(x):\r\n    return x + {k}",
     "test_setup_code": "import math",
     "test_list": [f"assert add_{k}(1) == {k + 1}", f"assert add_{k}(5) == {k + 5}"]}
    for k in range(40)
]  # fmt: skip
HUMANEVAL = [
    {"prompt": f'def times_{k}(x):\n    """Return {k} times x."""\n', "entry_point": f"times_{k}",
     "test": f"def check(candidate):\n    assert candidate(2) == {2 * k}\n"}
    for k in range(12)
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def settings(tmp_path, checkpoint):
    """Return a function that writes rows of two files, and returns settings with changes."""

    def write(train, test, /, **changes):
        paths = tmp_path / "train.jsonl", tmp_path / "test.jsonl.gz"
        texts = ["\n".join(map(json.dumps, rows)).encode() for rows in (train, test)]
        paths[0].write_bytes(texts[0])
        paths[1].write_bytes(gzip.compress(texts[1]))
        usual = dict(
            task="math", checkpoint=str(checkpoint), train=str(paths[0]), test=str(paths[1]),
            max_new=24, batch=8, group=2, sft_steps=6, sft_batch=4,
        )  # fmt: skip
        return SimpleNamespace(**usual | changes)

    return write


def drawn(task, split, seed=0):
    return task.draw(10**6, split, np.random.default_rng(seed))


def test_a_tenth_is_dev_and_what_is_tested_is_not_trained_on(settings):
    """40 rows, of which 5 stand in the test file, too; and all of them once more, respaced."""
    twice = [row | {"question": row["question"].replace(" ", "\n ")} for row in GSM8K[:40]]
    task = problems.task(settings(GSM8K[:40] + twice, GSM8K[35:]))
    said = {split: {" ".join(p.prompt.split()) for p in drawn(task, split)}
            for split in ("train", "dev", "test")}  # fmt: skip
    kept = [row["question"] for row in GSM8K[:35]]
    assert said["dev"] == set(kept[::10]) and said["train"] == set(kept) - said["dev"]
    assert said["test"] == {row["question"] for row in GSM8K[35:]}


def test_draws_are_without_repetition_and_differ_by_the_generator(settings):
    task = problems.task(settings(GSM8K[:40], GSM8K[40:]))
    few = task.draw(20, "train", np.random.default_rng(0))
    assert len(set(few)) == 20 and few == drawn(task, "train")[:20]
    assert drawn(task, "train") != drawn(task, "train", seed=1)
    assert {p.verifier(f"\\boxed{{{p.gold}}}", p.gold).reward for p in few} == {1}


def test_a_row_is_the_conversation_with_the_attempts_between(settings, checkpoint):
    """What a base imitates, and what a policy samples: both are laid out the same."""
    task, tokenizer = problems.task(settings(GSM8K, GSM8K[:1])), chat.read_tokenizer(checkpoint)
    prompts, attempts = task.documents(5, np.random.default_rng(3))
    asked = task.draw(5, "train", np.random.default_rng(3))
    r = rollout.make_rows(prompts, attempts, task.instruction, "cpu")
    for b, problem in enumerate(asked):
        assert prompts[b] == task.encode(problem.prompt)
        text = tokenizer.decode(prompts[b], skip_special_tokens=False)
        assert text == (
            f"<|im_start|>system\n{chat.SYSTEM['math']}<|im_end|>\n<|im_start|>user\n"
            f"{problem.prompt}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = r.ids_BT[b, 1:][r.turn_BS[b] == 1].tolist()
        assert ids[-1] == task.end_id == tokenizer.token_to_id("<|im_end|>")
        said = task.decode(ids[:-1])
        assert said.startswith("She has ") and "<<" not in said
        assert verify.judge(problem, said, truncated=False).reward == 1
    assert task.decode(task.instruction) == (
        f"\n<|im_start|>user\n{chat.REVISION['math']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (task.vocab_size, task.max_new, task.max_positions) == (384, 24, 512)
    half, padded = tokenizer.encode("é").ids[0], 383  # one of two bytes; no token has this id
    assert task.decode([half, padded]) == "\ufffd"


def test_a_program_is_asked_for_with_the_name_that_is_tested(settings):
    task = problems.task(settings(MBPP, HUMANEVAL, task="code"))
    asked, gold, _ = drawn(task, "train")[0]
    first, second = [line for line in gold.split("\n") if line.startswith("assert")]
    assert asked.startswith("Write a function to add ") and second not in asked
    assert asked.endswith(f" to a number.\n\nFor example:\n```python\n{first}\n```")
    for problem in drawn(task, "test"):
        head = next(row["prompt"] for row in HUMANEVAL if row["test"] == problem.gold)
        assert problem.prompt == f"Write this function:\n```python\n{head.strip()}\n```"
        assert problem.verifier.keywords["prompt"] == head  # the tests still know it as it was
    assert chat.REVISION["code"] in task.decode(task.instruction)


LONG = {"question": "How many? " * 300, "answer": "#### 5"}
WORKED = {"problem": "How many?", "solution": "assert one. " * 300 + "\\boxed{5}"}
MATH500 = [{"problem": "How many? " * 20, "answer": "5"}]


@pytest.mark.parametrize(
    ("train", "test", "changes", "message"),
    [
        (GSM8K[:40], MBPP, {}, "test.jsonl.gz holds problems of another kind than math"),
        (GSM8K[:40], GSM8K, dict(task="code"), "train.jsonl holds problems of another"),
        (GSM8K[:40], GSM8K[40:], dict(batch=74), "a step needs 37 problems .* it has 36,"),
        (GSM8K[:40], GSM8K[40:], dict(sft_batch=37), "a step needs 37 problems .* it has 36,"),
        (GSM8K + MATH500, GSM8K[:1], {}, "without a worked answer .* got 6"),
        (GSM8K, [LONG], {}, "takes up to [0-9]+ tokens, --checkpoint .*model reads 512"),
        ([*GSM8K, WORKED], GSM8K[:1], {}, "takes up to [0-9]+ tokens, --checkpoint"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(settings, train, test, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        problems.task(settings(train, test, **changes))
    assert "\n" not in str(error.value)


def test_what_is_not_imitated_needs_no_worked_answer(settings):
    c = settings([*GSM8K, WORKED], GSM8K[:1], sft_steps=0, sft_batch=10**6)
    assert "How many?" in {problem.prompt for problem in drawn(problems.task(c), "train")}


def test_two_attempts_may_just_fill_the_model(settings):
    task = problems.task(settings(GSM8K, MATH500))
    longest = max(len(task.encode(problem.prompt)) for problem in drawn(task, "test"))
    fits = (512 - longest - len(task.instruction)) // 2
    assert problems.task(settings(GSM8K, MATH500, max_new=fits)).max_new == fits
    with pytest.raises(ValueError, match=f"--max-new {fits + 1}: a problem with its answers takes"):
        problems.task(settings(GSM8K, MATH500, max_new=fits + 1))


def test_a_run_can_be_bound_to_its_files(settings):
    c = settings(GSM8K[:40], GSM8K[40:])
    with open(c.train, "rb") as file:
        theirs = hashlib.file_digest(file, "sha256").hexdigest()
    found = problems.digests(c)
    assert list(found) == [c.train, c.test] and found[c.train] == theirs
