"""When does multi-turn RL collapse, and where does SCoRe help? A map of the toys, and the reason.

The fewer right revisions the base has read, the more rarely it repairs a wrong first attempt. For
levels of that, and for some of how often it spoils a right one, each seed's base is trained once
and all methods start from it. Runs are done, kept and resumed as those of `python -m study`.

    python -m study.map            # both tasks, five seeds
    python -m study.map --table study/results/map.json    # its tables again
"""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from score import parse
from study.measure import Job, command, curve, jobs, run_all
from study.methods import EACH, KEYS, KINDS, Config
from study.tables import TITLES, markdown, values

METHODS = ("multi_turn", "score", "no_stage1", "no_bonus", "pair_sft")
PAIR, SEEDS, TASKS = METHODS[:2], (0, 1, 2, 3, 4), ("signs", "addition")
RIGHTS = (0.002, 0.005, 0.01, 0.03, 0.1, 0.3)  # shares of right revisions: the levels
CARELESS, AT = (0.1, 0.3), 0.01  # the second map: of PAIR on TASKS[0], with AT right ones
OWN = ("right_revisions", "careless")  # settings that make a level
METRICS = ("acc_t1", "acc_t2", "delta", "delta_c_to_i", "changed")
RATES = ("repair_rate", "spoil_rate")  # of the base, sampled
MORE = 2.5  # times as many problems are they measured on


def level(task: str, right: float, careless: float, methods) -> tuple[str, dict, dict]:
    """Return a level as `jobs` takes it: shares of right and of careless revisions, and methods."""
    place = f"{task}-r{right:g}-" + (f"c{careless:g}-" if careless else "")
    shared = dict(right_revisions=right, careless=careless)
    return place, shared, {name: (name, dict(method=name)) for name in methods}


def short(job: Job, run: dict) -> dict:
    """Return what the map keeps of what was measured of a run, and the curves of its reasons."""
    phases, own = {}, {key: getattr(job.config, key) for key in ("task", "seed", *OWN)}
    for name, m in run["phases"].items():
        if name != "base" or job.name == "base":
            sampled = {key: m["sampled"][key] for key in RATES}
            phases[name] = {key: m[key] for key in METRICS} | {"sampled": sampled}
    seen = curve(job.folder, KEYS, EACH) if job.name in PAIR else []
    for row, kind in product(seen, KINDS):  # the mean advantage of rows of a kind, if there are any
        pay, share = row.pop(kind), row[f"{kind}_n"]
        row |= {kind: pay / share} if share else {}
    return own | dict(name=job.name, commit=run["commit"], phases=phases, curve=seen)


def collect(args, words: list[str]) -> tuple[Path, dict]:
    """Train and measure what is asked for; return it, and the file that it is for."""
    bases, rest, runs = [], [], args.runs or Path("runs/map")
    if any(word.startswith(("--right-revisions", "--careless")) for word in words):
        raise ValueError("--right-revisions and --careless make the levels: give neither")
    for task in dict.fromkeys(args.task or TASKS):
        c = parse([*words, "--task", task], Config)[1]
        levels = [level(task, right, 0.0, METHODS) for right in RIGHTS]
        levels += [level(task, AT, x, PAIR) for x in CARELESS if task == TASKS[0]]
        found, n = jobs(c, levels, args.seeds or SEEDS, runs, "test"), int(MORE * c.eval_n)
        for job in found[0]:
            bases.append(job._replace(n=n, config=replace(job.config, eval_n=n)))
        rest += found[1]
    measured = run_all((bases, rest), args.workers)
    found = [short(job, run) for job, run in zip(bases + rest, measured, strict=True)]
    kind = "part-" if args.seeds or args.task else ""
    path = runs / f"{kind}results" / "map.json"
    return path, dict(options=" ".join(words), runs=found)


def by_level(runs: list[dict], spoils: bool) -> dict:
    """Return {task: {level: {method: runs by seed}}} of one of the two maps."""
    found, key = {}, OWN[spoils]
    for run in sorted(runs, key=lambda run: (run[key], run["seed"])):
        here = run["right_revisions"] == AT and run["name"] in ("base", *PAIR)
        if here if spoils else not run["careless"]:
            group = found.setdefault(run["task"], {}).setdefault(run[key], {})
            group.setdefault(run["name"], []).append(run)
    return {task: levels for task, levels in found.items() if not spoils or len(levels) > 1}


def collapsed(run: dict) -> bool:
    """Return whether a run ended with copies: at most 3 % differ, and the accuracy by 2 points."""
    m = list(run["phases"].values())[-1]
    return abs(m["delta"]) <= 0.02 and m["changed"] <= 0.03


def table(levels: dict, spoils: bool) -> str:
    """Return the table of a task's levels."""
    rows, names = [], [x for x in ("base", *METHODS) if all(x in y for y in levels.values())]
    for level, group in levels.items():
        rates = [values(group["base"], rate, sampled=True) for rate in RATES]
        t2, ours = (values(group[name], "acc_t2") for name in PAIR)
        better = sum(a > b for a, b in zip(ours, t2, strict=True))
        row = [f"{level:g}", *(f"{np.mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in rates)]
        row += [f"{k} of {len(t2)}" for k in (sum(map(collapsed, group["multi_turn"])), better)]
        for name in names:
            m = (np.mean(values(group[name], key)) for key in ("acc_t1", "acc_t2", "changed"))
            row.append("{:.1f} / {:.1f} ({:.1f})".format(*m))
        rows.append(row)
    titles = [OWN[spoils].replace("_", " "), "base repairs, % (range)", "base spoils, % (range)",
              "multi-turn RL collapsed", "SCoRe's Acc@t2 higher"]  # fmt: skip
    titles += [f"{TITLES[name]}: t1 / t2 (changed)" for name in names]
    return markdown(f"| {' | '.join(titles)} |", rows)


def text(data: dict) -> str:
    """Return what was run, and all tables, as Markdown."""
    runs, about = data["runs"], f"options: {data['options'] or 'none'}"
    for key in ("commit", "seed"):
        about = f"{key} {', '.join(sorted({str(run[key]) for run in runs}))}; {about}"
    parts = [f"{len(runs)} runs; {about}. Means over seeds, in per cent."]
    for spoils, rate in enumerate(("repairs", "spoils")):
        for task, levels in by_level(runs, spoils).items():
            parts += [f"## {task}: how often the base {rate}", table(levels, spoils)]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> int:
    """Make the map, or go on with it; return the exit status."""
    return command(argv, "study.map", {"--task": dict(nargs="+")}, collect, text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
