"""Runs of scale/train.py in float64, paid by a lottery that even an untrained policy wins."""

import json
import zlib
from dataclasses import dataclass, replace

import pytest
import torch

import verify
from model import load
from scale import train
from study import methods

SMALL = dict(
    size=4, n_layer=2, d_model=16, d_ff=24, sft_steps=8, sft_batch=6, sft_lr=3e-2, stage1_steps=2,
    stage2_steps=3, batch=12, group=2, iterations=2, eval_n=4,
)  # fmt: skip
PARTS = dict(micro_batch=5, sample_batch=6, chunk=4, recompute=1, save_every=3, sft_warmup=0)


def assert_same(expected, found):
    """Assert that two folders hold the same log, but for what only the second tells, and the same
    weights; return the first one's log."""
    logs = [(x / "log.jsonl").read_text().splitlines() for x in (expected, found)]
    rows, others = (list(map(json.loads, lines)) for lines in logs)
    for row, other in zip(rows, others, strict=True):
        assert other["phase"] == row["phase"]
        numbers = {key: row[key] for key in row.keys() - {"phase", *methods.KEYS}}
        assert {key: other[key] for key in numbers} == pytest.approx(numbers, rel=1e-9, abs=1e-9)
    assert {x.name for x in expected.glob("*.pt")} == {x.name for x in found.glob("*.pt")}
    for path in expected.glob("*.pt"):
        weights, same = (load(x / path.name) for x in (expected, found))
        assert weights.get("step") == same.get("step")
        for kind in {"model", "policy", "base"} & weights.keys():
            for name, x in weights[kind].items():
                torch.testing.assert_close(same[kind][name], x, rtol=1e-9, atol=1e-9)
    return rows


def lottery(answer: str, gold: str) -> verify.Verdict:
    """Return a verdict that hangs on each character, and none on about a fifth of the problems."""
    if sum(verify.signed(gold)) % 5 == 0:
        return verify.Verdict(None, "error")
    return verify.Verdict(int(zlib.crc32(answer.encode()) % 3 > 0), "right")


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
