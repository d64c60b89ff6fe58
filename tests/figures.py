"""How does the study look? Draws its training curves, or the figures of its map, beside a JSON.

Lines are means over seeds, in per cent if nothing else is said; bands are one standard error.

    python tests/figures.py study/results/study.json
    python tests/figures.py study/results/map.json
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from study.map import AT, RATES, by_level
from study.tables import TITLES, grouped, mean_error, values

COLOURS = {  # Okabe and Ito's, told apart by the colour-blind
    "base": "#555555", "score": "#0072B2", "stage1": "#0072B2", "multi_turn": "#D55E00",
    "pair_sft": "#CC79A7", "no_stage1": "#009E73", "no_bonus": "#E69F00",
}  # fmt: skip
ATTEMPTS, SAMPLES = {", attempt 2": "acc_t2", ", attempt 1": "acc_t1"}, "% of training samples"
CURVES = [  # panels: title, y, methods, and keys of a curve by label
    ("SCoRe", f"right, {SAMPLES}", ["score"], ATTEMPTS),
    ("multi-turn RL", f"right, {SAMPLES}", ["multi_turn"], ATTEMPTS),
    ("second answers that differ", SAMPLES, ["score", "multi_turn"], {"": "changed"}),
]
MAP = {  # panels: title and y
    "acc_t2": ("right at the second attempt", "Acc@t2, %"),
    "delta": ("gain of the second attempt", "Δ(t1,t2), points"),
    "changed": ("second answers that differ", "% of all problems"),
}
REASONS = [  # panels: title, y, factor, and keys of a curve by label
    ("groups with a sampled repair", "% of groups", 100, {"": "groups"}),
    ("after a wrong first attempt", "advantage of attempt 2", 1,
     {", changed": "changed_wrong", ", copied": "copied_wrong"}),
    ("gradient of each attempt", "norm", 1, {", attempt 2": "norm2", ", attempt 1": "norm1"}),
]  # fmt: skip
BRANCHES = ("multi_turn", "multi_turn"), ("score", "stage1")  # names and phases of REASONS
STYLES, MARKERS = (("-", 1.5), ("--", 2)), "oDs^vP"  # dashed over plain: both are seen
LEAST = 0.02  # per cent: lower rates are drawn here, as a log axis has no 0
TICKS = [x * 10**n for n in (-2, -1, 0, 1) for x in (1, 3)] + [100]


def grid(rows: int):
    """Return a figure, and its axes in rows of three."""
    rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "grid.alpha": 0.25, "axes.titlesize": 11})  # fmt: skip
    made = Figure((10, 0.5 + 3.2 * rows), layout="constrained")
    return made, made.subplots(rows, 3, squeeze=False)


def save(figure, path: Path) -> None:
    """Write a figure, without naming the version that drew it."""
    figure.savefig(path, dpi=144, metadata={"Software": None})


def lines(axis, methods: dict, keys: dict, factor: float) -> None:
    """Draw values by step, with a legend.

    methods: the curves of all seeds, by name. keys: of what is drawn, by label.
    """
    for name, curves in methods.items():
        for (label, key), (style, width) in zip(keys.items(), STYLES, strict=False):
            found = [{x["step"]: factor * x[key] for x in rows if key in x} for rows in curves]
            if x := sorted(set().union(*found)):
                columns = [[row[k] for row in found if k in row] for k in x]
                y, error = np.reshape([mean_error(y) for y in columns], (-1, 2)).T
                axis.plot(x, y, style, lw=width, color=COLOURS[name], label=TITLES[name] + label)
                axis.fill_between(x, y - error, y + error, color=COLOURS[name], alpha=0.2)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18))


def draw(runs: list[dict], folder: Path) -> None:
    """Write the training curves of SCoRe and multi-turn RL, if there are both, at one rate."""
    group = grouped(runs)
    if "multi_turn" in group and len({run["config"]["lr"] for run in runs}) == 1:
        figure, axes = grid(1)
        for axis, (title, ylabel, names, keys) in zip(axes[0], CURVES, strict=True):
            lines(axis, {x: [run["curve"] for run in group[x]] for x in names}, keys, 100)
            axis.set(title=title, xlabel="step", ylabel=ylabel, ylim=(0, 100))
        end = runs[0]["config"]["stage1_steps"]
        axes[0, 0].axvline(end, color="black", ls=":")
        axes[0, 0].annotate("Stage II", (end + 2, 50))
        save(figure, folder / "curves.png")


def draw_map(tasks: dict, rate: str, path: Path) -> None:
    """Write a map: a row a task, a colour a method, a point a run, a line through level means.

    tasks: {task: {level: {method: runs by seed}}}. rate: of the base's, what x is.
    """
    figure, axes = grid(len(tasks))
    what = "spoils, % of right" if rate == "spoil_rate" else "repairs, % of wrong"
    for row, (task, levels) in zip(axes, tasks.items(), strict=True):
        groups = sorted(levels.values(), key=lambda x: sum(values(x["base"], rate, sampled=True)))
        x_LN = np.maximum([values(x["base"], rate, sampled=True) for x in groups], LEAST)
        for axis, (key, (title, ylabel)) in zip(row, MAP.items(), strict=True):
            for name, marker in zip(groups[0], MARKERS, strict=False):
                y_LN = np.array([values(group[name], key) for group in groups])
                means = x_LN.mean(axis=1), y_LN.mean(axis=1)
                axis.plot(*means, color=COLOURS[name], alpha=0.35)
                axis.plot(x_LN.ravel(), y_LN.ravel(), marker, ms=5, alpha=0.7, color=COLOURS[name],
                          label=TITLES[name])  # fmt: skip
            axis.set(title=f"{task}: {title}", xlabel=f"base {what} first attempts", ylabel=ylabel,
                     xscale="log")  # fmt: skip
            axis.set_xticks([x for x in TICKS if x_LN.min() <= x <= x_LN.max()])
            axis.minorticks_off()
            axis.xaxis.set_major_formatter("{x:g}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    save(figure, path)


def reasons(group: dict) -> dict[str, list[list[dict]]]:
    """Return the curves by seed of each of BRANCHES, of the runs of a level."""
    return {phase: [[row for row in run["curve"] if row["phase"] == phase] for run in group[name]]
            for name, phase in BRANCHES}  # fmt: skip


def draw_reasons(tasks: dict, path: Path) -> None:
    """Write what the two attempts' gradients were made of. tasks: by name, `methods` of `lines`."""
    figure, axes = grid(len(tasks))
    for row, (where, methods) in zip(axes, tasks.items(), strict=True):
        for axis, (title, ylabel, factor, keys) in zip(row, REASONS, strict=True):
            lines(axis, methods, keys, factor)
            axis.set(title=title, xlabel=f"{where}: step", ylabel=ylabel)
        row[2].set(yscale="log", ylim=(1e-3, None))
    save(figure, path)


def draw_maps(data: dict, folder: Path) -> None:
    """Write the figures of a map."""
    for spoils, name in enumerate(("map", "map-spoils")):
        if tasks := by_level(data["runs"], spoils):
            draw_map(tasks, RATES[spoils], folder / f"{name}.png")
    tasks = by_level(data["runs"], False)
    draw_reasons({x: reasons(y[AT]) for x, y in tasks.items()}, folder / "reasons.png")


def main(path: Path) -> None:
    """Draw what a file has."""
    data = json.loads(path.read_text())
    (draw if isinstance(data, list) else draw_maps)(data, path.parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
