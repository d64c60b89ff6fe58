"""Several processes take the step that one would, and a run goes on in any number of them."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_run import StopAfter, options
from test_score import TINY
from truth import ROOT

import parallel
import run as runs
import score
from model import GPT

SMALL = TINY | dict(
    n_layer=2, n_head=4, n_kv_head=2, batch=24, sample_batch=12, sft_batch=12, micro_batch=4,
    chunk=5, recompute=True, adaptive_beta2=True, offline=0.25, save_every=2,
)  # fmt: skip
STEPS = 4 + 3 + 3


def in_processes(n, work, *words):
    """Do some work in n processes, started as torchrun does; return their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def begin(i):
        os.environ |= dict(RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(n),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
        with parallel.together():
            work(*words)

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=begin, args=(i,)) for i in range(n)]
    for process in started:
        process.start()
    for process in started:
        process.join(30)
        process.kill()
    return [process.exitcode for process in started]


def judge(r, problems, half):
    """Return rewards that depend on all tokens, and no verdict on some problems: half of them
    stand in the first process's share, where two processes share the rows."""
    rows = parallel.share(range(SMALL["batch"]), SMALL["sample_batch"])
    rewards = []
    for k in range(1, r.truncated_BK.shape[1] + 1):
        sum_B = (r.ids_BT[:, 1:] * (r.turn_BS == k)).sum(dim=1)
        rewards.append((sum_B % 3 == 0).double())
    for b, problem in enumerate(problems):
        if rows[b] % 12 < 6 if half else problem.prompt[0] in "05":
            rewards[0][b] = float("nan")
    return rewards


def settle(settings, tied=False, half=False):
    """Let this process compute in float64, judge by `judge` and keep each step's gradients in a
    list, whole; return the settings and the list. half: every other step judges one half."""
    calls, gradients = [], []
    descends, frozen = score.descend, runs.frozen

    def grade(r, problems, *_):
        calls.append(0)
        return judge(r, problems, half and len(calls) % 2)

    def descend(run):
        weights = run.policy.named_parameters()
        gradients.append({name: parallel.whole_tensor(w.grad).clone() for name, w in weights})
        return descends(run)

    runs.GPT = lambda c, **more: GPT(replace(c, tied_head=tied), **more).double()
    score.grade, score.descend = grade, descend
    score.frozen = runs.frozen = lambda policy, c: frozen(policy, SimpleNamespace(**wide(c)))
    return runs.Config(**SMALL | settings), gradients


def wide(c):
    return vars(c) | dict(dtype="float64")


def whole_run(folder, settings, tied, half):
    config, gradients = settle(settings, tied, half)
    assert score.train(runs.create(config, folder), threading.Event())
    parallel.first(torch.save, gradients, folder / "gradients.pt")


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(found, expected, method="score", bound=1e-9):
    """Assert that two folders hold the same log, weights and, where kept, gradients."""
    a, b = log(found), log(expected)
    assert [row.keys() for row in a] == [row.keys() for row in b]
    for x, y in zip(a, b, strict=True):
        at = x.pop("phase"), x["step"]
        assert at[0] == y.pop("phase") and x == pytest.approx(y, rel=bound, abs=bound), at
    for phase in runs.schedule(runs.Config(**SMALL | dict(method=method))):
        x, y = (runs.load(folder / f"{phase.name}.pt") for folder in (found, expected))
        assert x["problem_rng"] == y["problem_rng"]
        for name, weight in y["model"].items():
            torch.testing.assert_close(x["model"][name], weight, rtol=bound, atol=bound)
    if (found / "gradients.pt").exists():
        x, y = (torch.load(folder / "gradients.pt") for folder in (found, expected))
        assert len(x) == len(y) > 5 and max(g.abs().max() for g in y[-1].values()) > 1e-6
        for step, gradient in enumerate(y):
            for name, g in gradient.items():
                torch.testing.assert_close(x[step][name], g, rtol=bound, atol=bound)
    spent = [[json.loads(line) for line in (folder / "speed.jsonl").read_text().splitlines()]
             for folder in (found, expected)]  # fmt: skip
    for x, y in zip(*spent, strict=True):
        for name in ("phase", "step", "tokens", "episodes", "timeouts"):
            assert x.get(name) == y.get(name)


@pytest.mark.parametrize(
    ("n", "settings", "tied", "half"),
    [
        (2, {}, False, False),
        (3, dict(recompute=False, chunk=0, micro_batch=0, offline=0.0), True, False),
        (2, dict(offline=0.0, sample_batch=12, n_kv_head=4), False, True),
        (2, dict(method="star", recompute=False), False, False),
        (2, dict(method="three_turn", offline=0.0), True, False),
        (2, dict(base_attempts=3, kl="k1", method="multi_turn", qkv_bias=False), True, False),
    ],
    ids=["all memory savers", "three, tied", "no verdict", "imitation", "three turns", "k1"],
)  # fmt: skip
def test_many_processes_do_what_one_does(tmp_path, n, settings, tied, half):
    """All gradients, the log and every phase's weights; "no verdict": in all rows of one process."""
    for name, m in (("one", 1), ("many", n)):
        assert in_processes(m, whole_run, tmp_path / name, settings, tied, half) == [0] * m
    assert_same_run(tmp_path / "many", tmp_path / "one", settings.get("method", "score"))
    rows = log(tmp_path / "one")
    assert any(row.get("dropped") for row in rows) and any(row.get("acc_t2") for row in rows)
    if half:
        assert any(row.get("dropped") == 0.5 for row in rows)


# --- checkpoints ----------------------------------------------------------------------------------


def some_steps(folder, steps):
    """Go on with a run, or start it, and be asked to stop, in one process only, after some steps;
    end as a failure if it was not finished or stopped as it should be."""
    config, _ = settle({})
    run = runs.restore(folder) if folder.exists() else runs.create(config, folder)
    last = parallel.processes()[0] == parallel.processes()[1] - 1
    done = score.train(run, StopAfter(steps if last else 1000))
    assert done == (steps >= STEPS)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel") / "whole"
    assert in_processes(1, some_steps, folder, 1000) == [0]
    return folder


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1), (2, 3, 1, 2)])
def test_a_run_goes_on_in_another_number_of_processes(tmp_path, uninterrupted, numbers):
    """Stopped after two steps each time: in every phase, in the middle and at the seam."""
    for n in numbers:
        steps = 1 if len(numbers) > 2 else 5
        if n is not numbers[-1]:
            assert in_processes(n, some_steps, tmp_path / "run", steps) == [0] * n
            kept = {path.name for path in (tmp_path / "run").glob("checkpoint*")}
            assert kept == {"checkpoint.pt" if n == 1 else "checkpoint"}
    assert in_processes(numbers[-1], some_steps, tmp_path / "run", 1000) == [0] * numbers[-1]
    assert_same_run(tmp_path / "run", uninterrupted)
