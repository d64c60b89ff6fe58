"""Several processes take the steps that one would, and a run goes on in any number of them."""

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from functools import partial

import pytest

import score
from scale import processes, train
from tests.scale import wide
from tests.truth import ROOT

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


def test_torchrun_trains_and_shows_its_table_once(tmp_path):
    command = "torch.distributed.run --standalone --nproc-per-node 2 -m -- scale.train"
    settings = {key: x for key, x in wide.SMALL.items() if key != "iterations"} | dict(sft_steps=1)
    options = [f"--{key.replace('_', '-')}={x}" for key, x in settings.items()]
    command = [sys.executable, "-m", *command.split(), "--run", str(tmp_path / "run"), *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| SCoRe |") == 1
    assert sum(line.startswith("    stage1") for line in done.stdout.splitlines()) == 2
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 6
