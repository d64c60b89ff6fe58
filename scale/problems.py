"""What is a policy trained on, if problems come from files and the model from a folder?

A data set is a `rollout.Task`, as the toy is: files of MATH, GSM8K, MBPP or HumanEval as
published, asked and answered in the format of the checkpoint's tokenizer. A tenth of the training
file is split "dev"; what stands in it twice, or in the test file, too, is left out. Here is also
checked, before a run begins, that every problem and its answers fit the model.

    python -c "from scale import problems; help(problems.task)"
"""

import hashlib
from functools import partial
from pathlib import Path

import numpy as np

import verify
from rollout import Task
from scale import chat, pretrained
from tasks import files


def digests(c) -> dict[str, str]:
    """Return the SHA-256 of the files of problems, which a run is bound to."""
    for option, path in (("train", c.train), ("test", c.test)):
        if not Path(path).is_file():
            raise ValueError(f"--{option} {path} is not a file; a run goes on with files that have "
                             f"moved by --resume RUN --{option} FILE")  # fmt: skip
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in (c.train, c.test)}


def asked(problem: verify.Problem) -> verify.Problem:
    """Return the problem with what the user says as its prompt.

    MBPP's texts do not name the function that is tested: they are followed by the first of the
    tests, one of three, as others do. HumanEval's problem is the head of a function.
    """
    text = problem.prompt.strip()
    tests = [line.rstrip() for line in problem.gold.splitlines() if line.startswith("assert")]
    if isinstance(problem.verifier, partial):  # HumanEval's, which holds the function's name
        text = f"Write this function:\n```python\n{problem.prompt.rstrip()}\n```"
    elif problem.verifier is not verify.math and tests:
        text += f"\n\nFor example:\n```python\n{tests[0]}\n```"
    return problem._replace(prompt=text)


def read_splits(c) -> dict[str, list[tuple[verify.Problem, str]]]:
    """Return by split what is asked, each problem with its worked answer, or "" if it has none."""
    train, test = (files.read(Path(x)) if x else [] for x in (c.train, c.test))
    for path, rows in ((c.train, train), (c.test, test)):
        if path and {x.verifier is verify.math for x, _ in rows} != {c.task == "math"}:
            raise ValueError(f"{path} holds problems of another kind than {c.task}")
    by_words = {" ".join(row[0].prompt.split()): row for row in train}
    for problem, _ in test:
        by_words.pop(" ".join(problem.prompt.split()), None)
    kept = list(by_words.values())
    others = [row for i, row in enumerate(kept) if i % 10]
    splits = {"train": others, "dev": kept[::10], "test": test}
    return {name: [(asked(x), answer) for x, answer in rows] for name, rows in splits.items()}


def task(c) -> Task:
    """Return the task of a run; ValueError if a file cannot be used, or does not suffice.

    c: settings, of which task ("math" or "code"), checkpoint, train, test, max_new, batch, group,
    sft_steps and sft_batch. Without train there is split test alone.
    """
    sizes, tokenizer = pretrained.read_config(c.checkpoint), chat.read_tokenizer(c.checkpoint)
    form, splits = chat.format_of(tokenizer), read_splits(c)
    end_id = tokenizer.token_to_id(form.end)
    system = chat.fill(tokenizer, form.system, chat.SYSTEM[c.task])

    def draw(n, split, rng):
        if not splits[split]:
            raise ValueError(f"split {split} has no problem: it is taken from --train")
        return [splits[split][i] for i in rng.permutation(len(splits[split]))[:n]]

    def encode(text):
        return system + chat.fill(tokenizer, form.user, text)

    def documents(n, rng):
        rows = draw(n, "train", rng)
        answers = [[*tokenizer.encode(answer).ids, end_id] for _, answer in rows]
        return [encode(problem.prompt) for problem, _ in rows], [answers]

    made = Task(
        draw=lambda n, split, rng: [problem for problem, _ in draw(n, split, rng)],
        documents=documents, encode=encode, end_id=end_id,
        decode=partial(tokenizer.decode, skip_special_tokens=False),  # an id without token: ""
        instruction=chat.fill(tokenizer, form.after + form.user, chat.REVISION[c.task]),
        vocab_size=sizes["vocab_size"], max_new=c.max_new, max_positions=sizes["max_positions"],
    )  # fmt: skip
    check(c, made, splits)
    return made


def check(c, made: Task, splits: dict) -> None:
    """Raise ValueError if a step needs more problems than there are, if there is no worked answer
    where one is to be imitated, or if a problem with its answers does not fit the model."""
    rows = splits["train"]
    needed = max(c.batch // c.group, c.sft_batch if c.sft_steps else 0)
    if c.train and len(rows) < needed:
        raise ValueError(f"--train {c.train}: a step needs {needed} problems (--batch / --group, "
                         f"--sft-batch); it has {len(rows)}, without a tenth for dev and those in "
                         "--test")  # fmt: skip
    if c.sft_steps and not all(answer for _, answer in rows):
        raise ValueError(f"--train {c.train} has problems without a worked answer to imitate: "
                         f"--sft-steps must be 0, got {c.sft_steps}")  # fmt: skip
    most = max(len(made.encode(problem.prompt)) for rows in splits.values() for problem, _ in rows)
    most += 2 * made.max_new + len(made.instruction)
    if c.sft_steps:
        prompts, (answers,) = made.documents(len(rows), np.random.default_rng(0))
        most = max(most, *(len(x) + len(y) for x, y in zip(prompts, answers, strict=True)))
    if most > made.max_positions:
        raise ValueError(f"--max-new {c.max_new}: a problem with its answers takes up to {most} "
                         f"tokens, --checkpoint {c.checkpoint} reads "
                         f"{made.max_positions}")  # fmt: skip
