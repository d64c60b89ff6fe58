"""Several processes take the steps that one would, and a run goes on in any number of them."""

import contextlib
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

import score
from model import Cache
from scale import processes, steps, train
from tests.scale import wide
from tests.truth import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:os.fork")  # JAX's, where it was used before
KINDS = {
    "score": dict(offline=0.4, eval_every=4),
    "multi_turn": dict(chunk=0, recompute=0),
    "star_stage2": dict(micro_batch=0),
    "pair_sft": dict(sample_batch=0),
}


def in_two(work, *words):
    """Do some work in two processes, as torchrun starts them: if one fails, the other is killed.
    Return their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def begin(i):
        os.environ |= dict(RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE="2",
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=port)  # fmt: skip
        sys.exit(work(*words))

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=begin, args=(i,)) for i in range(2)]
    for process in started:
        process.start()
    while all(process.is_alive() for process in started):
        time.sleep(0.05)
    for process in started:
        if any(other.exitcode for other in started):
            process.kill()
        process.join(60)
    return [process.exitcode for process in started]


def go_on(folder, steps=99):
    """Go on with a run, and be stopped after some steps."""
    run, left = processes.shard(score.open_run(folder)), iter(range(steps))

    def counted(step, run):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(run)

    run.phases = [x._replace(step=partial(counted, x.step)) for x in run.phases]
    with contextlib.suppress(KeyboardInterrupt):
        train.drive(run)


def several(jobs):
    with processes.together():
        for job in jobs:
            go_on(*job)


def test_two_processes_do_what_one_does_and_take_turns_with_it(tmp_path, monkeypatch, capsys):
    """Log, weights and files, of each kind of step. Some are stopped after 9 and 12, or 12, of 13
    steps, and go on in the other number."""
    monkeypatch.setattr(score, "BLOCK", 2)
    for method, settings in KINDS.items():
        settings = wide.SMALL | wide.PARTS | dict(save_every=1, method=method) | settings
        for name in ("one", "two", "early", "late")[: 4 if method == "score" else 2]:
            score.create(wide.Config(**settings), tmp_path / name / method)
        go_on(tmp_path / "one" / method)
    go_on(tmp_path / "early/score", 9)
    go_on(tmp_path / "late/score", 12)
    jobs = [[tmp_path / "two" / method] for method in KINDS]
    jobs += [[tmp_path / "early/score", 3], [tmp_path / "late/score"]]
    assert in_two(several, jobs) == [0, 0]
    go_on(tmp_path / "early/score")

    for name in ("two", "early", "late"):
        for folder in (tmp_path / name).iterdir():
            wide.assert_same(tmp_path / "one" / folder.name, folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--batch", "6"], "--batch must be a multiple of 2 times 2 processes: 6"),
        (["--preset", "mat"], "--preset must be one of"),
    ],
    ids=["batch", "preset"],
)
def test_what_two_processes_cannot_do_is_said_once(tmp_path, capfd, settings, words):
    argv = ["--run", str(tmp_path / "run"), "--group", "2", *settings]
    assert in_two(train.main, argv)[0] == 2
    out, error = capfd.readouterr()
    assert error.startswith("scale.train: error: ") and error.count("\n") == 1 and words in error
    assert not out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_told_is_that_of_a_real_copy_cache_and_optimizer(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(processes, "round", lambda x, _: x * 2**30, raising=False)  # bytes
    run = train.new_run(train.Config(dtype=dtype, d_model=128, d_ff=96), tmp_path)
    ids = torch.zeros(900, 1, dtype=torch.long)
    copy = steps.frozen(run.policy, dict(run.policy.state_dict()), run.config)
    copy.hidden(ids, cache := Cache(copy, 900, 15))
    run.policy(ids).sum().backward()
    run.optimizer.step()
    moments = [x for state in run.optimizer.state.values() for x in state.values() if x.dim()]
    trained = [*run.policy.parameters(), *(x.grad for x in run.policy.parameters()), *moments]
    found = processes.needs(run.policy, run.base, 4, 900, 15)
    held = (trained, [*copy.parameters()], [*copy.parameters()], cache.k + cache.v)
    part, *others = (sum(x.nbytes for x in tensors) for tensors in held)
    assert list(found.values()) == [part / 4, *others]
    whole = sum(x.nbytes for x in run.policy.parameters())  # gathered, before it is rounded
    assert processes.needs(run.policy, run.base, 4, 1, 1)["cache"] < whole or dtype == "bfloat16"


def test_what_does_not_fit_is_refused_before_a_step(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10**9))  # of a machine that many share
    small = {key: x for key, x in wide.SMALL.items() if key != "iterations"}
    small |= dict(d_model=1024, eval_n=2, sft_steps=1, stage1_steps=1, stage2_steps=1)
    argv = ["--run", str(tmp_path / "run")]
    argv += [word for key, x in small.items() for word in (f"--{key.replace('_', '-')}", str(x))]
    assert in_two(train.main, argv)[0] == 2
    error = capfd.readouterr().err
    numbers = r"'part': ([\d.]+), 'base': ([\d.]+), 'copy': ([\d.]+), 'cache': ([\d.]+)}"
    line = rf"GiB that each of 2 processes needs: {{{numbers}, in all ([\d.]+); free: ([\d.]+)\n"
    *parts, total, free = map(float, re.fullmatch(f"scale.train: error: {line}", error).groups())
    here = parts[1] + parts[0] / 2  # the base, and whole weights: a quarter of both parts
    assert total == pytest.approx(sum(parts)) and free == pytest.approx(here, abs=0.002)
    assert free < total and not (tmp_path / "run/log.jsonl").exists()


def test_torchrun_trains_and_shows_its_table_once(tmp_path):
    command = "torch.distributed.run --standalone --nproc-per-node 2 -m -- scale.train"
    settings = {key: x for key, x in wide.SMALL.items() if key != "iterations"} | dict(sft_steps=1)
    options = [f"--{key.replace('_', '-')}={x}" for key, x in settings.items()]
    command = [sys.executable, "-m", *command.split(), "--run", str(tmp_path / "run"), *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| SCoRe |") == 1
    assert done.stdout.count("GiB that each of 2 processes needs: ") == 1
    assert sum(line.startswith("    stage1") for line in done.stdout.splitlines()) == 2
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 6
