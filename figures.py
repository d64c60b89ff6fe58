"""What does the study say? Tables, paired tests over seeds and figures, from its JSON.

    python figures.py runs/study-addition/quick-results/quick.json   # again, from what was kept

Means are over seeds, with their standard error. Tests are paired over seeds, as all methods of a
seed share its base: Student's t, two-sided, Holm's correction over the rows of a table. The tables
need no more than the program does; the figures need matplotlib.
"""

import json
import sys
from pathlib import Path

import mpmath
import numpy as np

from eval import COLUMNS
from study import VARIANTS

PAPER = {  # Acc@t1, Acc@t2, delta, i->c, c->i on MATH: arXiv 2409.12917v2, tables 1, 2 and 4
    "base": (52.6, 41.4, -11.2, 4.6, 15.8),
    "star": (55.4, 41.2, -14.2, 5.4, 19.6),
    "star_plus": (53.6, 54.0, 0.4, 2.6, 2.2),
    "pair_sft": (52.4, 54.2, 1.8, 5.4, 3.6),
    "pair_sft_plus": (55.0, 55.0, 0.0, 0.0, 0.0),
    "score": (60.0, 64.4, 4.4, 5.8, 1.4),
    "single_turn": (61.8, 59.4, -2.4),
    "no_stage1": (59.2, 61.4, 2.2),
    "no_bonus": (60.0, 62.6, 2.6),
    "star_stage2": (56.2, 58.4, 2.2),
    "offline": (60.4, 60.6, 0.2),  # ICLR version only: "w/o online turn 1 samples"
}
TITLES = {"base": "base", "stage1": "SCoRe's Stage I alone"} | {
    name: variant.title for name, variant in VARIANTS.items()
}
COLOURS = {  # Okabe and Ito's, told apart by the colour-blind
    "base": "#555555", "score": "#0072B2", "multi_turn": "#D55E00", "single_turn": "#E69F00",
    "star": "#56B4E9", "star_plus": "#009E73", "pair_sft": "#CC79A7",
}  # fmt: skip

# --- statistics -----------------------------------------------------------------------------------


def mean_error(x: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error; the error of a single value is nan.

    >>> mean_error([1.0, 2.0, 3.0])[0], round(mean_error([1.0, 2.0, 3.0])[1], 4)
    (2.0, 0.5774)
    """
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
    """Return Holm's adjusted p values: the k-th smallest of m times m - k + 1, made monotone.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    if any(x != x for x in p):
        return [float("nan")] * len(p)  # too few seeds to test
    order, adjusted, least = sorted(range(len(p)), key=lambda i: p[i]), [0.0] * len(p), 0.0
    for k, i in enumerate(order):
        least = max(least, min(1.0, p[i] * (len(p) - k)))
        adjusted[i] = least
    return adjusted


# --- tables ---------------------------------------------------------------------------------------


def grouped(runs: list[dict]) -> dict[str, list[dict]]:
    """Return the runs of each name, by seed; under "stage1" SCoRe's as they stood after Stage I."""
    found = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        found.setdefault(run["name"], []).append(run)
        if run["name"] == "score" and "stage1" in run["phases"]:
            halfway = {name: run["phases"][name] for name in ("base", "stage1")}
            found.setdefault("stage1", []).append(run | {"phases": halfway})
    return found


def points(x: float | None) -> float:
    """Return a share in per cent; nan for a rate among none."""
    return float("nan") if x is None else 100 * x


def values(runs: list[dict], key: str, sampled: bool = False) -> list[float]:
    """Return a metric of each run's last phase, in per cent."""
    last = [list(run["phases"].values())[-1] for run in runs]
    return [points((m["sampled"] if sampled else m)[key]) for m in last]


def cell(x: list[float], key: str = "") -> str:
    """Return mean ± standard error as a table cell, with its sign if it is a delta."""
    mean, error = mean_error(x)
    return f"{mean:{'+' if key == 'delta' else ''}.1f} ± {error:.1f}"


def compared(group: dict, names: list[str], sampled: bool = False) -> str:
    """Return a table of methods: the five metrics, the paper's, and the difference from SCoRe."""
    names = [name for name in names if name in group]
    tested = [name for name in names if name not in ("base", "score")]
    differences = {}
    for key in ("acc_t2", "delta"):
        ours = values(group["score"], key, sampled)
        theirs = {name: values(group[name], key, sampled) for name in tested}
        p = holm([paired_t(theirs[name], ours) for name in tested])
        for name, chance in zip(tested, p, strict=True):
            gap = np.mean(theirs[name]) - np.mean(ours)
            differences[name, key] = f"{gap:+.1f}" + (
                f" (p {chance:.3f})" if chance == chance else ""
            )
    lines = [
        "| | " + " | ".join(title for title, _ in COLUMNS) + " | Acc@t2 less SCoRe's "
        "| Δ less SCoRe's | paper: t1 → t2, Δ |",
        "|---" * 9 + "|",
    ]
    for name in names:
        row = [cell(values(group[name], key, sampled), key) for _, key in COLUMNS]
        row += [differences.get((name, key), "") for key in ("acc_t2", "delta")]
        paper = PAPER.get(name)
        row.append(f"{paper[0]:.1f} → {paper[1]:.1f}, {paper[2]:+.1f}" if paper else "")
        title = f"**{TITLES[name]}**" if name == "score" else TITLES[name]
        lines.append(f"| {title} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def names_of(*parts: str) -> list[str]:
    """Return the names of the study's rows that belong to parts of it."""
    return [name for name, variant in VARIANTS.items() if variant.part in parts]


def rerolled(group: dict) -> str:
    """Return a table of what correcting adds to drawing a first attempt afresh."""
    lines = [
        "| sampled at the training temperature | Acc@t1 | Acc@t2 | Δ | repair rate "
        "| Acc of a fresh draw | Δ | repair rate |",
        "|---" * 8 + "|",
    ]
    for name in ("base", "multi_turn", "pair_sft", "score"):
        if name not in group:
            continue
        row = [TITLES[name]]
        sampled = [list(run["phases"].values())[-1]["sampled"] for run in group[name]]
        for source in (sampled, [run["resampled"] for run in group[name]]):
            for key in ("acc_t1", "acc_t2", "delta", "repair_rate")[source is not sampled :]:
                row.append(cell([points(m[key]) for m in source], key))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def three_attempts(group: dict) -> str:
    """Return the table of the schedule with three attempts, beside the paper's Gemma 2 2B."""
    paper = {
        "base": "16.8 / 16.8 / 17.0", "stage1": "17.6 / 20.0 / 19.8",
        "stage1b": "16.6 / 18.4 / 23.2", "three_turn": "23.0 / 24.0 / 24.0",
    }  # fmt: skip
    titles = {"stage1": "Stage I (a)", "stage1b": "Stage I (b)", "three_turn": "Stage II"}
    lines = ["| | Acc@t1 | Acc@t2 | Acc@t3 | paper (MATH): t1 / t2 / t3 |", "|---" * 5 + "|"]
    for phase in paper:
        row = []
        for turn in range(3):
            row.append(cell([100 * run["three"][phase][turn] for run in group["three_turn"]]))
        lines.append(f"| {titles.get(phase, phase)} | " + " | ".join(row) + f" | {paper[phase]} |")
    return "\n".join(lines)


def shifted(group: dict) -> str:
    """Return a table of how many wrong first attempts are repaired: the base's, fixed, and own."""
    lines = [
        "| sampled | repairs of the base's | of its own | spoils of the base's | of its own |",
        "|---" * 5 + "|",
    ]
    for name in ("base", *names_of("main")):
        if name not in group:
            continue
        row = []
        for key in ("repair_rate", "spoil_rate"):
            row.append(cell([points(run["repairs_of_base"][key]) for run in group[name]]))
            row.append(cell(values(group[name], key, sampled=True)))
        lines.append(f"| {TITLES[name]} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def claim(words: str, x: list[float], y: list[float], level: float = 0.05) -> tuple[str, str, str]:
    """Return the claim that x is above y, what was found, and a verdict: "yes", "no", or "not
    shown" where x is above y on average, and the paired test does not reach the level."""
    p = paired_t(x, y) if len(x) > 2 else float("nan")
    tested = f", p {p:.4f} (level {level})" if p == p else ""
    verdict = "no" if np.mean(x) <= np.mean(y) else "yes" if p < level else "not shown"
    return words, f"{np.mean(x):.1f} against {np.mean(y):.1f}{tested}", verdict


def claims(group: dict) -> list[tuple[str, str, str]]:
    """Return the paper's claims that the runs can speak to, as `claim` does."""
    found, score = [], group["score"]
    trained = [name for name in names_of("main") if name in group and name != "score"]
    for key, title in (("acc_t2", "Acc@t2"), ("delta", "Δ")) if trained else ():
        best = max(trained, key=lambda name, key=key: np.mean(values(group[name], key)))
        words = (
            f"SCoRe has the highest {title} of the trained methods (next or best: {TITLES[best]})"
        )
        found.append(claim(words, values(score, key), values(group[best], key)))
    for name, level in (("multi_turn", 0.01), ("pair_sft", 0.01)):
        if name in group:
            words = f"SCoRe's Δ is above that of {TITLES[name]}"
            found.append(claim(words, values(score, "delta"), values(group[name], "delta"), level))
    for name in [name for name in names_of("ablation") if name in group]:
        words = f"SCoRe's Δ is above that {TITLES[name]}"
        found.append(claim(words, values(score, "delta"), values(group[name], "delta")))
    if "multi_turn" in group:
        ends = [[100 * run["curve"][i]["changed"] for run in group["multi_turn"]] for i in (0, -1)]
        found.append(claim("multi-turn RL comes to change fewer of its answers", *ends))
    votes = [[100 * run["votes"][k][-1] for run in score] for k in ("sequential", "parallel")]
    found.append(claim("of 32 answers, 16 corrected ones vote better than 32 first ones", *votes))
    for kind, title in (("last", "the last attempt"), ("whole", "all attempts")):
        tries = [[100 * run["attempts"][kind][i] for run in score] for i in (9, 1)]
        words, text, _ = claim(f"attempt 10 is not below attempt 2, {title} in sight", *tries)
        lower, p = np.mean(tries[0]) < np.mean(tries[1]), paired_t(*tries)
        found.append((words, text, "yes" if not lower else "no" if p < 0.05 else "not shown"))
    rows = [run.get("watched", [{"step": None}]) for run in group.get("pair_sft", [])]
    if rows and all(row[0]["step"] == 0 for row in rows):
        fixed, own = (
            [[points(row[i][f"{kind}_sampled"]) for row in rows] for i in (0, -1)]
            for kind in ("fixed", "own")
        )
        words = "Pair-SFT comes to repair more of the base's fixed first attempts"
        found.append(claim(words, fixed[1], fixed[0]))
        found.append(claim("Pair-SFT comes to repair less of its own first attempts", *own))
    return found


def sections(runs: list[dict]) -> dict[str, str]:
    """Return all tables, by title."""
    group = grouped(runs)
    main = ["base", "stage1", *names_of("main")]
    found = {
        "Methods, greedy": compared(group, main),
        "Methods, sampled at temperature 1": compared(group, main, sampled=True),
    }
    for title, names in (
        ("Ablations, greedy", [*names_of("ablation"), "single_turn"]),
        ("Further variants, greedy", ["no_bonus", *names_of("more")]),
    ):
        if any(name in group for name in names):
            found[title] = compared(group, ["score", *names])
    found["Correction or re-rolling"] = rerolled(group)
    found["Fixed and own first attempts"] = shifted(group)
    if "three_turn" in group:
        found["Three attempts, greedy"] = three_attempts(group)
    found["Claims"] = "\n".join(
        ["| claim | found here (paired over seeds, p not corrected) | holds |", "|---|---|---|"]
        + [f"| {a} | {b} | {c if c == 'yes' else f'**{c}**'} |" for a, b, c in claims(group)]
    )
    return found


def about(runs: list[dict]) -> str:
    """Return one line on what was run."""
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
    commits = sorted({run[key] or "unknown" for run in runs
                      for key in ("commit", "evaluation_commit")})  # fmt: skip
    threads = ", ".join(str(x) for x in sorted({run["threads"] for run in runs}))
    cost = [run["wall_seconds"] for run in runs if run["wall_seconds"]]
    return (
        f"{len(runs)} runs, seeds {seeds}; {runs[0]['n']:,} problems of split "
        f"'{runs[0]['split']}'; threads a run: {threads}; commit {', '.join(commits)}; "
        f"{sum(cost) / 3600:.1f} hours of one core for {len(cost)} of them."
    )


def tuning(runs: list[dict]) -> str:
    """Return the table of learning rates: mean Acc@t2 and delta, each method's best Acc@t2 bold."""
    rates = sorted({run["config"]["lr"] for run in runs if run["name"] != "base"})
    lines = [
        "| Acc@t2 (Δ) | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    group = grouped(runs)
    for name in [name for name in VARIANTS if name in group]:
        found = []
        for rate in rates:
            some = [run for run in group[name] if run["config"]["lr"] == rate]
            found.append([np.mean(values(some, key)) for key in ("acc_t2", "delta")])
        best = max(range(len(rates)), key=lambda i, found=found: found[i][0])
        row = [f"{t2:.1f} ({delta:+.1f})" for t2, delta in found]
        row[best] = f"**{row[best]}**"
        lines.append(f"| {TITLES[name]} | " + " | ".join(row) + " |")
    return "\n".join(lines)


# --- figures --------------------------------------------------------------------------------------


def matplotlib():
    """Return matplotlib.pyplot, set up for files that are the same each time.

    Raises:
      ValueError: it is not installed; the message says how to install it.
    """
    try:
        import matplotlib as library
    except ImportError:
        raise ValueError("the figures need matplotlib: pip install matplotlib==3.11.2") from None
    library.use("Agg")
    library.rcParams.update({
        "svg.hashsalt": "score", "font.size": 10, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "lines.linewidth": 2,
        "legend.frameon": False, "figure.constrained_layout.use": True,
    })  # fmt: skip
    import matplotlib.pyplot

    return matplotlib.pyplot


def panels(plt, n: int, width: float = 3.6, height: float = 3.0, **shared):
    """Return a figure of n panels side by side."""
    return plt.subplots(1, n, figsize=(width * n, height), squeeze=False, **shared)


def band(axis, x, rows, colour, label=None, style="-", marker=None):
    """Draw the mean of rows (one a seed) with a band of one standard error."""
    rows = 100 * np.asarray(rows, dtype=float)
    mean = rows.mean(axis=0)
    axis.plot(x, mean, style, color=colour, label=label, marker=marker, markersize=4)
    if len(rows) > 1:
        error = rows.std(axis=0, ddof=1) / len(rows) ** 0.5
        axis.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)


def plot_curves(plt, group):
    """Both attempts and the share of changed answers along training: SCoRe and multi-turn RL."""
    names = [name for name in ("score", "multi_turn") if name in group]
    figure, axes = panels(plt, len(names) + 1)
    for axis, name in zip(axes[0], names, strict=False):
        steps = [point["step"] for point in group[name][0]["curve"]]
        for key, style, label in (("acc_t2", "-", "attempt 2"), ("acc_t1", "--", "attempt 1")):
            rows = [[point[key] for point in run["curve"]] for run in group[name]]
            band(axis, steps, rows, COLOURS[name], label, style)
        axis.set(title=TITLES[name], xlabel="step", ylabel="right, % of training samples")
        axis.set(ylim=(0, 100))
        axis.legend(loc="lower right")
        rows = [[point["changed"] for point in run["curve"]] for run in group[name]]
        band(axes[0, -1], steps, rows, COLOURS[name], TITLES[name])
    stage2 = group["score"][0]["config"]["stage1_steps"]
    for axis in (axes[0, 0], axes[0, -1]):
        axis.axvline(stage2, color="black", linewidth=1, linestyle=":")
        axis.text(stage2 + 1, 94, "SCoRe's\nStage II", fontsize=8, va="center")
    axes[0, -1].set(title="second answers that differ", xlabel="step", ylim=(0, 100))
    axes[0, -1].set(ylabel="changed, % of training samples")
    axes[0, -1].legend(loc="upper left")
    return figure


def plot_edits(plt, group):
    """Histograms of the edit distance ratio of the two attempts."""
    names = [name for name in ("base", "star_plus", "pair_sft", "score") if name in group]
    figure, axes = panels(plt, len(names), width=2.7, sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        counts = sum(np.array(run["edits"]["t1"]) for run in group[name])
        share = 100 * counts / counts.sum()
        axis.bar(np.arange(20) / 20 + 0.025, share, width=0.05, color=COLOURS[name])
        axis.set(title=TITLES[name], xlabel="edit distance ratio", xlim=(0, 0.5))
    axes[0, 0].set(ylabel="% of problems, sampled", ylim=(0, 100))
    return figure


def plot_shift(plt, group):
    """How the repair rate moves on fixed and on self-generated first attempts."""
    names = [name for name in ("pair_sft", "score") if "watched" in group.get(name, [{}])[0]]
    figure, axes = panels(plt, len(names), sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        steps = [row["step"] for row in group[name][0]["watched"]]
        for kind, style, label in (("fixed", "-", "the base's, fixed"), ("own", "--", "its own")):
            rows = [[row[f"{kind}_sampled"] for row in run["watched"]] for run in group[name]]
            band(axis, steps, rows, COLOURS[name], f"first attempts: {label}", style)
        axis.set(title=TITLES[name], xlabel="step")
        axis.legend()
    axes[0, 0].set(ylabel="repaired, % of wrong first attempts", ylim=(0, 100))
    return figure


def plot_votes(plt, group):
    """Accuracy of majority votes against the number of answers, parallel and corrected."""
    names = [name for name in ("base", "multi_turn", "score") if name in group]
    figure, axes = panels(plt, len(names), sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        budget = group[name][0]["votes"]["budget"]
        for kind, style, label in (
            ("sequential", "-", "half as many, each corrected once"),
            ("parallel", "--", "first attempts"),
        ):
            band(axis, budget, [run["votes"][kind] for run in group[name]], COLOURS[name], label,
                 style, "o")  # fmt: skip
        axis.set(title=TITLES[name], xlabel="answers sampled a problem (T = 0.7)", xscale="log")
        axis.set_xticks(budget, [str(b) for b in budget])
        axis.minorticks_off()
        axis.legend(loc="lower right", fontsize=8)
    axes[0, 0].set(ylabel="majority vote right, %", ylim=(0, 100))
    return figure


def plot_attempts(plt, group):
    """Accuracy at attempts 1 to 10, with the last attempt in sight, or all."""
    names = [name for name in ("base", "pair_sft", "multi_turn", "score") if name in group]
    figure, axes = panels(plt, 2, sharey=True)
    for axis, kind, title in (
        (axes[0, 0], "last", "problem and last attempt in sight"),
        (axes[0, 1], "whole", "all attempts in sight"),
    ):
        for name in names:
            rows = [run["attempts"][kind] for run in group[name]]
            band(axis, range(1, 11), rows, COLOURS[name], TITLES[name], marker="o")
        axis.set(title=title, xlabel="attempt", xticks=range(1, 11))
    axes[0, 0].set(ylabel="right, % (greedy)", ylim=(0, 100))
    axes[0, 0].legend(loc="lower right")
    return figure


def plot_difficulty(plt, group):
    """Accuracy by the longest carry chain, and with longer or shorter operands than trained."""
    names = [name for name in ("base", "multi_turn", "score") if name in group]
    figure, axes = panels(plt, 2, width=4.2, sharey=True)
    for name in names:
        chains = sorted({int(k) for run in group[name] for k in run["by_carry"]})
        lengths = [int(k) for k in group[name][0]["by_length"]]
        for turn, style in ((2, "-"), (1, "--")):
            rows = np.array([[run["by_carry"].get(str(k), [0, 0, 0]) for k in chains]
                             for run in group[name]])  # fmt: skip
            share = rows[..., turn].sum(axis=0) / rows[..., 0].sum(axis=0)
            label = f"{TITLES[name]}, attempt {turn}"
            axes[0, 0].plot(chains, 100 * share, style, color=COLOURS[name], label=label)
            rows = [[run["by_length"][str(k)][turn - 1] for k in lengths] for run in group[name]]
            band(axes[0, 1], lengths, rows, COLOURS[name], label, "", "os"[turn == 1])
    axes[0, 0].set(xlabel="longest carry chain, columns", ylabel="right, % (greedy)", ylim=(0, 100))
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].set(xlabel="digits of each operand", xticks=lengths)
    axes[0, 1].axvline(group["score"][0]["config"]["digits"], color="black", linewidth=1, ls=":")
    return figure


PLOTS = {
    "curves": plot_curves, "edits": plot_edits, "shift": plot_shift, "votes": plot_votes,
    "attempts": plot_attempts, "difficulty": plot_difficulty,
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Write tables (Markdown) and figures (PNG, SVG) beside the JSON. Return the exit status."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: python figures.py STUDY.json", file=sys.stderr)
        return 2
    path = Path(argv[0])
    try:
        runs = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        print(f"figures.py: error: {path} is not a study's JSON: {error}", file=sys.stderr)
        return 2
    tune = len({run["config"]["lr"] for run in runs}) > 1
    found = {"Learning rates": tuning(runs)} if tune else sections(runs)
    text = about(runs) + "".join(f"\n\n## {title}\n\n{table}" for title, table in found.items())
    path.with_suffix(".md").write_text(text + "\n")
    print(f"\n{text}\n")
    if tune:
        return 0
    try:
        plt = matplotlib()
    except ValueError as error:
        print(f"figures.py: {error}", file=sys.stderr)
        return 2
    group = grouped(runs)
    for name, plot in PLOTS.items():
        if name == "difficulty" and "by_carry" not in group["score"][0]:
            continue  # of additions only
        figure = plot(plt, group)
        for kind, about_file in (("png", {"Software": None}), ("svg", {"Date": None})):
            figure.savefig(path.with_name(f"{name}.{kind}"), dpi=120, metadata=about_file)
        plt.close(figure)
    print(f"tables and figures are in {path.parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
