"""How are many runs trained and measured? What the study and its map share.

Runs are trained and measured one process each, on one thread, so that figures do not depend on the
number of cores; a finished run is kept, a killed one resumed. All of a seed start from one base.
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from eval import report
from score import ROOT, create, drive, open_run
from study.methods import Config


def mean(rows: list[dict], keys) -> dict:
    """Return the means over steps. What no step has is left out."""
    columns = {key: [row[key] for row in rows if key in row] for key in keys}
    return {key: float(f"{sum(x) / len(x):.4g}") for key, x in columns.items() if x}


def curve(folder: Path, keys, of: int) -> list[dict]:
    """Return the means over each so many of a run's steps, if there are any, but the base's."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    found = enumerate((row for row in rows if row["phase"] != "base"), start=1)
    blocks = groupby(found, lambda x: (x[1]["phase"], (x[1]["step"] - 1) // of))
    blocks = (list(zip(*block, strict=True)) for _, block in blocks)
    return [dict(phase=x[0]["phase"], step=at[-1]) | m for at, x in blocks if (m := mean(x, keys))]


class Job(NamedTuple):
    """One run of a study, and on how many problems of which split it is measured."""

    name: str
    config: Config
    folder: Path
    n: int
    split: str
    commit: str


def work(job: Job) -> dict:
    """Train a run, or what is left of it, and return eval.py's report, and the curve of training;
    of a finished one what was measured. ValueError if the folder holds a run of other settings."""
    path, new, start = job.folder / "measured.json", not job.folder.exists(), time.monotonic()
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{job.folder}.txt", "a") as out, redirect_stdout(out):
        run = open_run(create(job.config, job.folder) if new else job.folder)
        if run.config != job.config:
            raise ValueError(f"{job.folder} is a run of other settings: remove it, or name other "
                             "--runs")  # fmt: skip
        if path.exists():
            return json.loads(path.read_text())
        drive(run)
        found = dict(name=job.name, commit=job.commit, threads=torch.get_num_threads())
        found |= report(run, job.split, job.n)[0] | dict(config=asdict(run.config))
        found["curve"] = curve(run.folder, ("acc_t1", "acc_t2", "changed"), of=5)
        del found["examples"]
    found["wall_seconds"] = round(time.monotonic() - start, 1) if new else None
    path.with_suffix(".part").write_text(json.dumps(found) + "\n")
    path.with_suffix(".part").replace(path)
    return found


def jobs(c: Config, levels: list, seeds, runs: Path, split: str) -> tuple[list[Job], list[Job]]:
    """Return the bases, and the runs that start from them, each once.

    levels: what the names of its folders begin with; the settings of its bases; and of its runs
    name and further settings by the folder's name.
    """
    words = f"git -C '{ROOT}' describe --always --exclude='*' --dirty=+"
    failed, commit = subprocess.getstatusoutput(words)
    about = dict(n=c.eval_n, split=split, commit="unknown" if failed else commit)
    bases, rest = [], []
    for place, shared, rows in levels:
        for seed in dict.fromkeys(seeds):
            base = replace(c, method="base", seed=seed, **shared)
            folder = runs / f"{place}base-seed{seed}"
            bases.append(Job("base", base, folder, **about))
            for end, (name, own) in rows.items():
                mine = replace(base, base=str(folder), **own)
                rest.append(Job(name, mine, runs / f"{place}{end}-seed{seed}", **about))
    return bases, rest


def begin() -> None:
    """Prepare a process that does jobs: one thread; it ends with Ctrl-C and with its parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_all(waves, workers: int) -> list[dict]:
    """Do all jobs, wave by wave; return what was measured, in the jobs' order."""
    context = multiprocessing.get_context("spawn")
    pool, found = futures.ProcessPoolExecutor(workers, context, begin), []
    try:
        for wave in waves:
            started = {pool.submit(work, job): job for job in wave}
            for done, future in enumerate(futures.as_completed(started), start=len(found) + 1):
                last = list(future.result()["phases"].values())[-1]
                print(f"{done:>4}/{sum(map(len, waves))}  {started[future].folder.name:<36} t1 "
                      f"{last['acc_t1']:6.1%}  t2 {last['acc_t2']:6.1%}", flush=True)  # fmt: skip
            found += [future.result() for future in started]
    finally:
        pool.shutdown(cancel_futures=True)
    return found


OPTIONS = {
    "--table": dict(type=Path, metavar="JSON", help="train nothing: show this study"),
    "--seeds": dict(type=int, nargs="+", help="default: 0 1 2 3 4, or fewer"),
    "--runs": dict(type=Path, help="folder of all runs, by default one in runs/"),
    "--workers": dict(type=int, default=os.cpu_count(), help="runs at a time"),
}
REFUSED = "--run", "--resume", "--base", "--seed", "--method", "--threads"  # a study's own


def command(argv, prog: str, options: dict, collect, text) -> int:
    """Do a study, or go on with it; write its JSON and its tables. Return the exit status.

    options: its own. collect: `(args, words) -> (path, data)`, which trains and measures what is
    asked for. text: of the data, its tables.
    """
    about = "Further options, for all runs: those of study.methods."
    parser = argparse.ArgumentParser(f"python -m {prog}", description=about, allow_abbrev=False)
    for option, more in (options | OPTIONS).items():
        parser.add_argument(option, **more)
    args, words = parser.parse_known_args(argv)
    try:
        if refused := {word.split("=")[0] for word in words} & {*REFUSED}:
            raise ValueError(f"{min(refused)} is not for a study, which sets it: see --help")
        path, data = (args.table, None) if args.table else collect(args, words)
        if data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(data) + "\n")
        data = json.loads(path.read_text())
        path.with_suffix(".md").write_text(text(data))
        print("\n" + text(data))
    except KeyboardInterrupt:
        print("stopped; finished runs are kept: the same command goes on", file=sys.stderr)
        return 130
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0
