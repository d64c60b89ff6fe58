"""Runs of scale/train.py in float64, paid by a lottery that even an untrained policy wins."""

from dataclasses import dataclass, replace

import pytest

import verify
from scale import train

SMALL = dict(
    size=2, n_layer=2, d_model=16, d_ff=24, sft_steps=8, sft_batch=6, sft_lr=3e-2, stage1_steps=2,
    stage2_steps=3, batch=12, group=2, iterations=2, eval_n=4,
)  # fmt: skip
PARTS = dict(micro_batch=5, sample_batch=6, chunk=4, recompute=1, save_every=3, sft_warmup=0)


def assert_same(rows, others):
    """Assert that the logs of two runs are the same, but for what only the second tells."""
    for row, other in zip(rows, others, strict=True):
        same = {key: other[key] for key in row}
        assert same.pop("phase") == row["phase"] and same == pytest.approx(
            {key: x for key, x in row.items() if key != "phase"}, rel=1e-9, abs=1e-9
        )


def lottery(answer: str, gold: str) -> verify.Verdict:
    """Return a verdict that hangs on each character, and none on a fifth of the problems."""
    if int(gold) % 5 == 0:
        return verify.Verdict(None, "error")
    return verify.Verdict(int(sum(map(ord, answer)) % 2), "right")


def widened(run):
    """Return the run in float64, its problems with this verifier."""
    task = run.task

    def draw(n, split, rng):
        return [problem._replace(verifier=lottery) for problem in task.draw(n, split, rng)]

    for gpt in (run.policy, run.base):
        gpt.double()
    return replace(run, task=task._replace(draw=draw))


@dataclass(frozen=True)
class Config(train.Config):
    """The settings of scale/train.py."""


def new_run(c, folder):
    """Return a run at its first step."""
    return widened(train.new_run(c, folder))
