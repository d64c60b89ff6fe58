"""What is a policy trained on, if problems come from files and the model from a folder?

A data set is a `rollout.Task`, as addition is: files of MATH, GSM8K, MBPP or HumanEval as
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


def read(path: str, task: str) -> list[tuple[verify.Problem, str]]:
    """Return the problems of a file, each with its worked answer, or "" where there is none."""
    try:
        rows = files.read(Path(path))
    except OSError as error:
        raise ValueError(f"--train and --test must be files of problems: {error}") from None
    if {problem.verifier is verify.math for problem, _ in rows} != {task == "math"}:
        raise ValueError(f"{path} holds problems of another kind than {task}")
    return rows


def read_splits(c) -> dict[str, list[tuple[verify.Problem, str]]]:
    """Return the rows of c.train and c.test by split: of the first file every tenth is "dev"; what
    stands in it twice, or in the second, too, white space aside, is left out."""
    train, test = read(c.train, c.task), read(c.test, c.task)
    seen, kept = {" ".join(problem.prompt.split()) for problem, _ in test}, []
    for problem, answer in train:
        words = " ".join(problem.prompt.split())
        if words not in seen:
            seen.add(words)
            kept.append((problem, answer))
    others = [row for i, row in enumerate(kept) if i % 10]
    return {"train": others, "dev": kept[::10], "test": test}


def task(c) -> Task:
    """Return the task of a run.

    c: settings, of which task ("math" or "code"), checkpoint, train, test, max_new, batch, group,
    sft_steps and sft_batch.

    Raises:
      ValueError: a file cannot be used, or does not suffice for these settings.
    """
    sizes, tokenizer = pretrained.read_config(c.checkpoint), chat.read_tokenizer(c.checkpoint)
    form, splits = chat.format_of(tokenizer), read_splits(c)
    end_id = tokenizer.token_to_id(form.end)
    system = chat.fill(tokenizer, form.system, chat.SYSTEM[c.task])

    def draw(n, split, rng):
        rows = [splits[split][i] for i in rng.permutation(len(splits[split]))[:n]]
        return [asked(problem) for problem, _ in rows], [answer for _, answer in rows]

    def encode(text):
        return system + chat.fill(tokenizer, form.user, text)

    def documents(n, rng, clean):
        problems, answers = draw(n, "train", rng)
        answers = [[*chat.encode(tokenizer, answer), end_id] for answer in answers]
        return [encode(problem.prompt) for problem in problems], [answers]

    made = Task(
        draw=lambda n, split, rng: draw(n, split, rng)[0],
        documents=documents,
        encode=encode,
        decode=partial(chat.decode, tokenizer),
        instruction=chat.fill(tokenizer, form.after + form.user, chat.REVISION[c.task]),
        end_id=end_id,
        vocab_size=sizes["vocab_size"],
        max_new=c.max_new,
        max_positions=sizes["max_positions"],
    )
    check(c, made, splits)
    return made


def check(c, made: Task, splits: dict) -> None:
    """Raise ValueError if a step needs more problems than there are, if there is no worked answer
    where one is to be imitated, or if a problem with its answers does not fit the model."""
    rows, rng, most = splits["train"], np.random.default_rng(0), 0
    needed = max(c.batch // c.group, c.sft_batch if c.sft_steps else 0)
    if len(rows) < needed:
        raise ValueError(
            f"--train {c.train}: a step needs {needed} problems (--batch / --group, --sft-batch); "
            f"it has {len(rows)}, without a tenth for dev and those in --test"
        )
    if c.sft_steps:
        if not all(answer for _, answer in rows):
            raise ValueError(f"--train {c.train} has problems without a worked answer to imitate: "
                             f"--sft-steps must be 0, got {c.sft_steps}")  # fmt: skip
        prompts, (answers,) = made.documents(len(rows), rng, True)
        most = max(len(ids) + len(answer) for ids, answer in zip(prompts, answers, strict=True))
    for split, rows in splits.items():
        for problem in made.draw(len(rows), split, rng):
            n = len(made.encode(problem.prompt)) + 2 * made.max_new + len(made.instruction)
            most = max(most, n)
    if most > made.max_positions:
        raise ValueError(
            f"--max-new {c.max_new}: a problem with its answers takes up to {most} tokens, "
            f"--checkpoint {c.checkpoint} reads {made.max_positions}"
        )
