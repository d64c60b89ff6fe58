"""What does a run do beyond two greedy attempts? All that the study keeps of it.

Re-rolls, further attempts, curves, and how well it repairs the base's first attempts and its own.

Dimension key: N problems, K attempts at each, M tokens at most.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from eval import metrics, report
from model import GPT
from rollout import Task, grade, rollout
from score import Run, create, drive, open_run
from study.methods import Config, left_by
from study.tables import names_of

# --- measures -------------------------------------------------------------------------------------


def say(model: GPT, task: Task, problems, temperature: float, seed: int, K=1, ids=None):
    """Return attempts, a Rollout of a row for each problem, and which are right: bool [K, N].
    The first attempts begin after `ids`, by problem; None: after the problem."""
    ids = ids or [task.encode(problem.prompt) for problem in problems]
    noise_KNM = np.random.default_rng(seed).random((K, len(problems), task.max_new))
    r = rollout(model, task, ids, torch.tensor(noise_KNM, device=model.cos.device), temperature)
    return r, (grade(r, problems, task) == 1).cpu().numpy()


def after(problems, attempts: list[list[int]], task: Task) -> list[list[int]]:
    """Return the ids after which the attempt that follows one at each problem begins."""
    pairs = zip(problems, attempts, strict=True)
    return [task.encode(problem.prompt) + ids + task.instruction for problem, ids in pairs]


def resampled(model: GPT, task: Task, problems, temperature: float) -> dict:
    """Return the metrics of a "second attempt" that is a first one drawn afresh: re-rolling."""
    return metrics(*(say(model, task, problems, temperature, seed)[1][0] for seed in (0, 1)))


def repairs(model: GPT, author: GPT, task: Task, problems, temperature: float) -> dict:
    """Return the metrics of the model's second attempts after the author's first ones."""
    r, right1_1N = say(author, task, problems, temperature, 0)
    ids = after(problems, r.attempts[0], task)
    return metrics(right1_1N[0], say(model, task, problems, temperature, 2, ids=ids)[1][0])


def many_attempts(model: GPT, task: Task, problems, K: int = 10) -> dict:
    """Return the accuracy at attempts 1 to K, greedy.

    whole: the conversation grows, all attempts in sight. last: problem and last attempt alone, the
    layout that was trained, so that each attempt is a second one.
    """
    whole, last, ids = say(model, task, problems, 0, 0, K)[1].mean(axis=1).tolist(), [], None
    for _ in range(K):
        r, right_1N = say(model, task, problems, 0, 0, ids=ids)
        ids = after(problems, r.attempts[0], task)
        last.append(float(right_1N.mean()))
    return dict(whole=whole, last=last)


def curve(rows: list[dict], mean_of: int = 5) -> list[dict]:
    """Return the training samples' accuracies and share of changed answers, by means of steps."""
    found, keys = [], ("acc_t1", "acc_t2", "changed")
    for i in range(0, len(rows), mean_of):
        block = rows[i : i + mean_of]
        means = {key: round(sum(row[key] for row in block) / len(block), 4) for key in keys}
        found.append(dict(step=i + len(block), phase=block[-1]["phase"]) | means)
    return found


def shift(run: Run, n: int) -> dict:
    """Return the shares of the base's wrong first attempts that the policy repairs, and of its own,
    sampled."""
    about = run.task, run.task.draw(n, "test", np.random.default_rng(2)), run.config.temperature
    fixed, own = (repairs(run.policy, x, *about)["repair_rate"] for x in (run.base, run.policy))
    return dict(fixed_sampled=fixed, own_sampled=own)


# --- a run of the study ---------------------------------------------------------------------------


class Job(NamedTuple):
    """One run of the study, and on how many problems of which split it is measured."""

    name: str
    config: Config
    folder: Path
    n: int
    split: str
    commit: str


def watched(run: Run, step, n: int) -> dict:
    """Take a step, before every tenth measure the shift; return what is logged."""
    return ({} if run.step % 10 else shift(run, n)) | step(run)


def measure(run: Run, job: Job) -> dict:
    """Return all that the study keeps of a finished run; of a run of the main table, how it behaves
    beyond two greedy attempts, too."""
    c, task, n = run.config, run.task, job.n
    rows = map(json.loads, (run.folder / "log.jsonl").read_text().splitlines())
    rows = [row for row in rows if row["phase"] != "base"]
    found = {key: x for key, x in report(run, job.split, n).items() if key != "examples"}
    found |= dict(name=job.name, commit=job.commit, threads=torch.get_num_threads())
    found |= dict(config=asdict(c), curve=curve(rows))
    problems = task.draw(n, job.split, np.random.default_rng(0))
    models = {phase.name: left_by(run, phase.name) for phase in run.phases}
    if job.name == "three_turn":
        found["three"] = {name: many_attempts(model, task, problems, 3)["whole"]
                          for name, model in models.items()}  # fmt: skip
    if job.split != "test" or job.name not in names_of("main"):
        return found
    model, few = models[run.phases[-1].name], problems[: max(1, n // 4)]
    found |= dict(
        resampled=resampled(model, task, problems, c.temperature),
        repairs_of_base=repairs(model, models["base"], task, problems, c.temperature),
        attempts=many_attempts(model, task, few),
    )
    seen = [row | dict(step=i) for i, row in enumerate(rows) if "own_sampled" in row]
    if seen:  # and at the end, of the weights that the run keeps
        seen.append(dict(step=len(rows)) | shift(run, len(few)))
        keys = ("step", "fixed_sampled", "own_sampled")
        found["watched"] = [{key: row[key] for key in keys} for row in seen]
    return found


def work(job: Job) -> dict:
    """Train a run, or what is left of it, and return what was measured; of a finished one that.
    ValueError if the folder holds a run of other settings."""
    path, new, start = job.folder / "measured.json", not job.folder.exists(), time.monotonic()
    with open(f"{job.folder}.txt", "a") as out, redirect_stdout(out):
        run = open_run(create(job.config, job.folder) if new else job.folder)
        if run.config != job.config:
            raise ValueError(f"{job.folder} is a run of other settings: remove it, or name other "
                             "--runs")  # fmt: skip
        if path.exists():
            return json.loads(path.read_text())
        if job.name in ("score", "pair_sft") and job.split == "test":
            step = partial(watched, n=max(1, job.n // 4))
            run.phases[1:] = [x._replace(step=partial(step, step=x.step)) for x in run.phases[1:]]
        drive(run)
        found = measure(run, job)
    found["wall_seconds"] = round(time.monotonic() - start, 1) if new else None
    path.with_suffix(".part").write_text(json.dumps(found) + "\n")
    path.with_suffix(".part").replace(path)
    return found


def begin() -> None:
    """Prepare a process that does jobs: one thread; it ends with Ctrl-C and with its parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
