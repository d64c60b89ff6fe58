"""Several processes take the step that one would, and a run goes on in any number of them."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_run import StopAfter, options, refused
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


def in_processes(n, work, *words, together=parallel.together):
    """Do some work in n processes, as torchrun starts them; return their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def begin(i):
        os.environ |= dict(RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(n),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
        with together():
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
    score.grade, score.descend, score.BLOCK = grade, descend, 2
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
    assert spent(found) == spent(expected)


def spent(folder):
    """Return what the steps took, of what is the same at all times; steps taken twice, once."""
    rows = [json.loads(line) for line in (folder / "speed.jsonl").read_text().splitlines()]
    return {
        (row["phase"], row["step"]): [row.get(x) for x in ("tokens", "episodes", "timeouts")]
        for row in rows
    }


@pytest.mark.parametrize(
    ("n", "settings", "tied", "half"),
    [
        (2, {}, False, False),
        (3, dict(recompute=False, chunk=0, micro_batch=0, offline=0.0, method="three_turn"),
         True, False),
        (2, dict(base_attempts=3, kl="k1", qkv_bias=False, method="multi_turn"), True, True),
        (2, dict(recompute=False, n_kv_head=4, method="star"), False, False),
    ],
    ids=["all memory savers", "three, tied", "no verdict", "imitation"],
)  # fmt: skip
def test_many_processes_do_what_one_does(tmp_path, n, settings, tied, half):
    """All gradients, the log, every phase's weights; "no verdict": in all rows of a process."""
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
    done = score.train(run, StopAfter(steps - 1 if last else 1000))
    assert done == (steps >= STEPS)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel") / "whole"
    assert in_processes(1, some_steps, folder, 1000) == [0]
    return folder


@pytest.mark.parametrize(
    "parts", [((1, 2), (2, 3), (3, 4), (1, 1000)), ((2, 2), (1, 7), (2, 1000))], ids=["1231", "212"]
)
def test_a_run_goes_on_in_another_number_of_processes(tmp_path, uninterrupted, parts):
    """In every phase, and after the ninth step, when there are best weights to remember."""
    folder = tmp_path / "run"
    for n, steps in parts:
        assert in_processes(n, some_steps, folder, steps) == [0] * n
        kept = {path.name for path in folder.glob("checkpoint*")}
        assert kept == {"checkpoint.pt" if n == 1 else "checkpoint"}
    assert_same_run(folder, uninterrupted)


def die_writing(folder, how):
    """Go on with a run until its next checkpoint, of which only a part gets written."""
    settle({})
    run = runs.restore(folder)
    if how == "parts":  # one process is killed before its part is written
        if parallel.processes()[0] == 1:
            dcp.save = lambda *_, **__: os._exit(9)
    else:  # the first process is killed between the two renamings, or the disk fails there
        real = os.rename

        def rename(old, new):
            if Path(new).name == "checkpoint":
                if how == "disk":
                    raise OSError("disk full")
                os._exit(9)
            real(old, new)

        os.rename = rename
    score.train(run, threading.Event())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel") / "stopped"
    assert in_processes(2, some_steps, folder, 5) == [0, 0]
    return folder


@pytest.mark.parametrize("how", ["parts", "between", "disk"])
def test_a_folder_of_parts_is_whole_or_the_one_before(tmp_path, uninterrupted, stopped, how):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    before = log(folder)
    ends = in_processes(2, die_writing, folder, how)
    assert 0 not in ends and len(log(folder)) > len(before)
    assert (folder / "checkpoint").exists() == (how == "parts")  # else the last has another name
    if how == "disk":
        assert ends == [1, 1]  # both processes were told
    assert in_processes(2, some_steps, folder, 1000) == [0, 0]
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("damage", ["metadata", "part", "rest", "none"])
def test_a_damaged_folder_of_parts_is_refused_in_one_line(tmp_path, stopped, capsys, damage):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    for path in folder.glob("checkpoint/*"):
        if damage in ("part", path.name.strip(".").split(".")[0]) and path.suffix != ".pt":
            path.write_bytes(path.read_bytes()[:100])
    if damage == "rest":
        (folder / "checkpoint" / "rest.pt").unlink()
    if damage == "none":
        shutil.rmtree(folder / "checkpoint")
    refused(capsys, ["--resume", str(folder)], str(folder))


# --- the command ----------------------------------------------------------------------------------

ENV = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


def test_torchrun_stops_goes_on_and_shows_its_table_once(tmp_path):
    folder = tmp_path / "run"
    command = [*TORCHRUN, "--", str(ROOT / "score.py")]
    longer = options(**TINY | dict(sft_steps=40, save_every=10**6))
    process = subprocess.Popen(
        [*command, "--run", str(folder), *longer], env=ENV, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    with process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if " 20/40" in line:
                break
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all
        lines += process.stdout
    assert process.returncode != 0 and lines[0].startswith(f"{folder}: ")
    assert sum(" 20/40" in line for line in lines) == 1
    assert lines[-1] == f"stopped and saved; continue with: python score.py --resume {folder}\n"
    assert 20 <= len(log(folder)) < 40
    command += ["--resume", str(folder)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| SCoRe |") == 1 and done.stdout.count(" parameters, cpu") == 1
    assert len(log(folder)) == 46 and (folder / "report.json").is_file()


def refuse(argv):
    sys.exit(score.main(argv))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(batch=12, group=4), "--batch must be a multiple of 4 times 2 processes, got 12"),
        (dict(sample_batch=6), "--sample-batch must be a multiple of 2 times 2 processes, got 6"),
        (dict(sft_batch=6, base_attempts=3), "--sft-batch must be a multiple of 2 times 2"),
        (dict(method="pair_sft"), "--method pair_sft runs in one process only, got 2"),
        (dict(device="cuda"), "--device"),
        (dict(colour="red"), "--colour"),
        (dict(lr="high"), "--lr"),
        (dict(run=ROOT / "tests"), "is left alone"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)
def test_what_many_processes_cannot_do_is_said_once(tmp_path, capfd, settings, words):
    argv = options(**TINY | dict(run=tmp_path / "run") | settings)
    assert in_processes(2, refuse, argv, together=nullcontext) == [2, 2]
    out, error = capfd.readouterr()
    assert error.startswith("score.py: error: ") and error.count("\n") == 1 and words in error
    assert not out and not (tmp_path / "run").exists()


def test_one_process_is_no_group():
    code = "import score, torch; print(torch.distributed.is_initialized(), score.processes())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False (0, 1)\n"
    with parallel.together() as process:
        assert process == 0 and not torch.distributed.is_initialized()
    rows = list(range(5))
    assert parallel.share(rows) == parallel.share(rows, 2) == rows
    assert parallel.total(3) == parallel.largest(3) == 3
