"""What do all methods show, side by side? The paper's study on the toy: train, measure, collect.

Every run of a seed starts from the same base and has the same budget: as many steps, samples and
updates as SCoRe has in both stages. Runs are trained and measured one process each, on one thread,
so that figures do not depend on the number of cores; a finished run is kept, a killed one resumed.

    python -m study                # all methods and variants, five seeds
    python -m study --quick        # two seeds, four methods
    python -m study --tune         # what other learning rates would have given each method
    python -m study --task countdown --only score multi_turn
    python -m study --table study/results/study.json
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from score import ROOT, parse
from study import figures, tables
from study.measure import Job, begin, work
from study.methods import Config
from study.tables import VARIANTS

NAMES, RATES = list(VARIANTS)[1:], (3.5e-4, 7e-4, 1.4e-3)  # the study uses the middle one for all
KINDS = {  # methods, seeds, split, learning rates
    "study": (NAMES, (0, 1, 2, 3, 4), "test", (None,)),
    "quick": (("score", "multi_turn", "star_plus", "pair_sft"), (0, 1), "test", (None,)),
    "tune": (tables.names_of("main")[1:], (120,), "dev", RATES),
}


def jobs(c: Config, names, seeds, split: str, rates, runs: Path) -> tuple[list[Job], list[Job]]:
    """Return the bases, and the runs that start from them, each once: SCoRe's always."""
    words = f"git -C '{ROOT}' describe --always --exclude='*' --dirty=+"
    failed, commit = subprocess.getstatusoutput(words)
    bases, rest, about = [], [], (c.eval_n, split, "unknown" if failed else commit)
    for seed in dict.fromkeys(seeds):
        base = runs / f"base-seed{seed}"
        bases.append(Job("base", replace(c, method="base", seed=seed), base, *about))
        for name in dict.fromkeys(("score", *names)):
            given = dict(seed=seed, base=str(base)) | (VARIANTS[name].options or dict(method=name))
            for rate in rates:
                more, end = ({}, "") if rate is None else (dict(lr=rate), f"-lr{rate:g}")
                folder = runs / f"{name}{end}-seed{seed}"
                rest.append(Job(name, replace(c, **given | more), folder, *about))
    return bases, rest


def run_all(waves, workers: int) -> list[dict]:
    """Do all jobs, wave by wave; return what was measured, in the jobs' order."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin)
    found, total = [], sum(map(len, waves))
    try:
        for wave in waves:
            futures = {pool.submit(work, job): job for job in wave}
            for done, future in enumerate(as_completed(futures), start=len(found) + 1):
                last = list(future.result()["phases"].values())[-1]
                print(f"{done:>4}/{total}  {futures[future].folder.name:<28} t1 "
                      f"{last['acc_t1']:6.1%}  t2 {last['acc_t2']:6.1%}", flush=True)  # fmt: skip
            found += [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def collect(args, rest: list[str]) -> Path:
    """Train and measure what is asked for; return the file of what was collected."""
    kind = "tune" if args.tune else "quick" if args.quick else "study"
    for option in ("--run", "--resume", "--base", "--seed", "--method"):
        if any(word.split("=")[0] == option for word in rest):
            raise ValueError(f"{option} is not for a study, which sets it: see --help")
    c, (names, seeds, *more) = parse(rest, Config)[1], KINDS[kind]
    runs = args.runs or Path("runs") / f"study-{c.task}"
    waves = jobs(c, args.only or names, args.seeds or seeds, *more, runs)
    kind += "-part" if args.only or args.seeds else ""
    path = runs / f"{kind}-results" / f"{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run_all(waves, args.workers)) + "\n")
    return path


def main(argv: list[str]) -> int:
    """Do the study, or go on with it; write its JSON, tables and figures. Return the status."""
    parser = argparse.ArgumentParser(
        prog="python -m study", allow_abbrev=False,
        description="Compare all methods. Further options: those of study.train.")  # fmt: skip
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="two seeds, four methods")
    kind.add_argument("--tune", action="store_true", help="three learning rates, split dev")
    kind.add_argument("--table", type=Path, metavar="JSON", help="train nothing: show this study")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2 3 4; to tune 120")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="some methods, and SCoRe")
    parser.add_argument("--runs", type=Path, help="folder of all runs (default: runs/study-TASK)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    args, rest = parser.parse_known_args(argv)
    try:
        path = args.table or collect(args, rest)
        runs = json.loads(path.read_text())
        path.with_suffix(".md").write_text(tables.text(runs))
        print("\n" + tables.text(runs))
        figures.draw(runs, path.parent)
    except KeyboardInterrupt:
        print("stopped; finished runs are kept: the same command goes on", file=sys.stderr)
        return 130
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        print(f"python -m study: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
