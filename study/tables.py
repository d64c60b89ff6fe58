"""What does the study compare, and what does it say? Tables and paired tests, from its JSON.

Means are over seeds, with their standard error. Tests are paired over seeds, as all methods of a
seed share its base: Student's t, two-sided, Holm's correction over the rows of a table.

    python -m study --table study/results/study.json    # prints them, and writes study.md beside it
"""

from typing import NamedTuple

import mpmath
import numpy as np

from eval import COLUMNS


class Variant(NamedTuple):
    """A row of the study: its title and the table that it belongs to; the paper's Acc@t1, Acc@t2
    and Δ on MATH (arXiv 2409.12917v2, tables 1, 2 and 4); settings, none: the method of its name.
    """

    title: str
    part: str
    paper: tuple = ()
    options: dict = {}


VARIANTS = {
    "base": Variant("base", "main", (52.6, 41.4, -11.2)),
    "score": Variant("SCoRe", "main", (60.0, 64.4, 4.4)),
    "multi_turn": Variant("multi-turn RL", "main"),
    "single_turn": Variant("single-turn RL", "main", (61.8, 59.4, -2.4)),
    "star": Variant("STaR", "main", (55.4, 41.2, -14.2)),
    "star_plus": Variant("STaR, with right → right", "main", (53.6, 54.0, 0.4)),
    "pair_sft": Variant("Pair-SFT", "main", (52.4, 54.2, 1.8)),
    "pair_sft_plus": Variant("Pair-SFT, with right → right", "main", (55.0, 55.0, 0.0)),
    "no_stage1": Variant("w/o Stage I", "ablation", (59.2, 61.4, 2.2)),
    "no_bonus": Variant("w/o reward shaping (α = 0)", "ablation", (60.0, 62.6, 2.6)),
    "star_stage2": Variant("w/ STaR in Stage II", "ablation", (56.2, 58.4, 2.2)),
    "offline": Variant(  # the paper's row is of its ICLR version: "w/o online turn 1 samples"
        "w/o on-policy first attempts", "ablation", (60.4, 60.6, 0.2), dict(offline=1.0)
    ),
    "alpha30": Variant("α = 30", "more", (), dict(alpha=30.0)),
    "leak": Variant("bonus on both turns", "more", (), dict(leak=1)),
    "second": Variant(  # Stage I without the hold is multi-turn RL without r1
        "attempt 2 alone is paid", "more", (), dict(beta2=0.0, stage1_steps=130, stage2_steps=0)
    ),
}
TITLES = {name: variant.title for name, variant in VARIANTS.items()}
TITLES["stage1"] = "SCoRe's Stage I alone"


def names_of(part: str) -> list[str]:
    """Return the names of the study's rows that belong to a part of it."""
    return [name for name, variant in VARIANTS.items() if variant.part == part]


def mean_error(x: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error; the error of a single value is nan."""
    error = np.std(x, ddof=1) / len(x) ** 0.5 if len(x) > 1 else float("nan")
    return float(np.mean(x)), float(error)


def paired_t(x: list[float], y: list[float]) -> float:
    """Return the two-sided p of Student's paired t test that x and y have the same mean.

    >>> round(paired_t([1.0, 2.0, 3.0, 4.0, 5.5], [0.0, 0.0, 0.0, 0.0, 0.0]), 4)
    0.0166
    """
    mean, error = mean_error([a - b for a, b in zip(x, y, strict=True)])
    if not error > 0:  # one pair; or the same difference in all
        return float("nan") if error != 0 else float(mean == 0)
    n = len(x) - 1
    return float(mpmath.betainc(n / 2, 0.5, 0, n / (n + (mean / error) ** 2), regularized=True))


def holm(p: list[float]) -> list[float]:
    """Return Holm's adjusted p values: the k-th smallest of m times m - k + 1, made monotone; nan
    for all if one is nan.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, least = [float("nan")] * len(p), 0.0
    for k, i in enumerate(np.argsort(p) if not np.isnan(p).any() else ()):
        adjusted[i] = least = max(least, min(1.0, p[i] * (len(p) - k)))
    return adjusted


def grouped(runs: list[dict]) -> dict[str, list[dict]]:
    """Return the runs of each name, by seed. Where there are none of the base and of Stage I alone,
    these are SCoRe's as they stood then."""
    found = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        found.setdefault(run["name"], []).append(run)
    for name in ("base", "stage1"):
        there = [run for run in found.get("score", []) if name in run["phases"]]
        if there:
            found.setdefault(name, [run | {"phases": {name: run["phases"][name]}} for run in there])
    return found


def values(runs: list[dict], key: str, sampled: bool = False) -> list[float]:
    """Return a metric of each run's last phase, in per cent; nan for a rate among none."""
    last = [list(run["phases"].values())[-1] for run in runs]
    found = [m["sampled"][key] if sampled else m[key] for m in last]
    return [float("nan") if x is None else 100 * x for x in found]


def cell(x: list[float], key: str = "") -> str:
    """Return mean ± standard error as a table cell, with its sign if it is a delta."""
    mean, error = mean_error(x)
    return f"{mean:{'+' if key == 'delta' else ''}.1f} ± {error:.1f}"


def markdown(titles: str, rows: list[list[str]]) -> str:
    """Return a table; `titles` is its first line."""
    lines = [titles, "|---" * (titles.count("|") - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


METRICS = "| | " + " | ".join(COLUMNS.values()) + " |"


def means(group: dict, names: list[str]) -> list[list[str]]:
    """Return a row for each method: its title and its five metrics, for a table of METRICS."""
    return [[f"**{TITLES[name]}**" if name == "score" else TITLES[name],
             *(cell(values(group[name], key), key) for key in COLUMNS)]
            for name in names]  # fmt: skip


def compared(group: dict, names: list[str]) -> str:
    """Return a table of methods: the five metrics, the difference from SCoRe, and the paper's."""
    names = [name for name in names if name in group]
    rows = means(group, names)
    for key in ("acc_t2", "delta"):
        ours = values(group["score"], key)
        theirs = {x: values(group[x], key) for x in names if x not in ("base", "score")}
        p = dict(zip(theirs, holm([paired_t(x, ours) for x in theirs.values()]), strict=True))
        for name, row in zip(names, rows, strict=True):
            gap = f"{np.mean(theirs[name]) - np.mean(ours):+.1f}" if name in p else ""
            row.append(gap + (f" (p {p[name]:.3f})" if p.get(name, np.nan) >= 0 else ""))
    for name, row in zip(names, rows, strict=True):
        paper = VARIANTS[name].paper if name in VARIANTS else ()
        row.append("{:.1f} → {:.1f}, {:+.1f}".format(*paper) if paper else "")
    more = " Acc@t2 less SCoRe's | Δ less SCoRe's | paper: t1 → t2, Δ |"
    return markdown(METRICS + more, rows)


def by_seed(group: dict) -> str:
    """Return both accuracies and the delta of each seed, greedy; of SCoRe's delta its interval."""
    rows = []
    for runs in zip(*(group[x] for x in ("base", "stage1", "score", "multi_turn")), strict=True):
        t1, t2, delta = (values(runs, key) for key in ("acc_t1", "acc_t2", "delta"))
        pairs = [f"{x:.1f} / {y:.1f}" for x, y in zip(t1, t2, strict=True)]
        low, high = (100 * x for x in runs[2]["phases"]["score"]["delta_interval"])
        interval = f"{delta[2]:+.1f} [{low:+.1f}, {high:+.1f}]"
        rows.append([str(runs[2]["seed"]), *pairs, interval, f"{delta[3]:+.1f}"])
    return markdown("| seed, t1 / t2 | base | Stage I | SCoRe | multi-turn RL | SCoRe's Δ [95 %] | "
                    "multi-turn RL's Δ |", rows)  # fmt: skip


def tuning(runs: list[dict]) -> str:
    """Return the table of learning rates: mean Acc@t2 and delta, each method's best Acc@t2 bold."""
    rates, rows = sorted({run["config"]["lr"] for run in runs if run["name"] != "base"}), []
    for name in names_of("main")[1:]:
        some = [[x for x in runs if (x["name"], x["config"]["lr"]) == (name, lr)] for lr in rates]
        if all(some):
            t2, delta = ([np.mean(values(x, key)) for x in some] for key in ("acc_t2", "delta"))
            row = [f"{a:.1f} ({b:+.1f})" for a, b in zip(t2, delta, strict=True)]
            row[np.argmax(t2)] = f"**{row[np.argmax(t2)]}**"
            rows.append([TITLES[name], *row])
    return markdown("| Acc@t2 (Δ) | " + " | ".join(f"{lr:g}" for lr in rates) + " |", rows)


def sections(runs: list[dict]) -> dict[str, str]:
    """Return the tables that there are data for, by title."""
    if len({run["config"]["lr"] for run in runs}) > 1:
        return {"Learning rates": tuning(runs)}
    group, main = grouped(runs), ["base", "stage1", *names_of("main")[1:]]
    found = {"Methods": compared(group, main)}
    ablations, more = names_of("ablation"), names_of("more")
    if group.keys() & ablations:
        found["Ablations"] = compared(group, ["score", *ablations, "single_turn"])
    if group.keys() & more:
        found["Further variants"] = compared(group, ["score", *more, "no_bonus"])
    if "multi_turn" in group:
        found["Seed by seed"] = by_seed(group)
    return found


def text(runs: list[dict]) -> str:
    """Return what was run, in a line, and all tables, as Markdown."""
    seeds, commits, threads = (
        ", ".join(map(str, sorted({run[key] for run in runs})))
        for key in ("seed", "commit", "threads")
    )
    cost = [run["wall_seconds"] for run in runs if run["wall_seconds"]]
    about = (f"{len(runs)} runs, seeds {seeds}; {runs[0]['n']:,} problems of split "
             f"'{runs[0]['split']}'; threads a run: {threads}; commit {commits}; "
             f"{sum(cost) / 3600:.1f} hours of one core for {len(cost)} of them.")  # fmt: skip
    tables = (f"\n\n## {title}\n\n{table}" for title, table in sections(runs).items())
    return about + "".join(tables) + "\n"
