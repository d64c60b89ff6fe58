"""How does the study look? Its figures: training curves, repairs along training, attempts.

Lines are means over seeds, in per cent; bands are one standard error.

    python -m study --table study/results/study.json    # draws them beside it; needs matplotlib
"""

from pathlib import Path

import numpy as np

from study.tables import TITLES, grouped, mean_error

COLOURS = {  # Okabe and Ito's, told apart by the colour-blind
    "base": "#555555", "score": "#0072B2", "multi_turn": "#D55E00", "pair_sft": "#CC79A7",
}  # fmt: skip


def along(what: str, key: str):
    """Return what finds a run's shares by step."""
    return lambda run: {row["step"]: row[key] for row in run[what]}


SAMPLES, GREEDY = "% of training samples", "right, % (greedy)"
FIGURES = {  # panels: title, x, y, methods, and what finds a run's shares of y by x, by label
    "curves": [
        *((TITLES[x], "step", f"right, {SAMPLES}", (x,),
           {f"attempt {k}": along("curve", f"acc_t{k}") for k in (2, 1)})
          for x in ("score", "multi_turn")),
        ("second answers that differ", "step", SAMPLES, ("score", "multi_turn"),
         {"": along("curve", "changed")}),
    ],
    "shift": [
        (TITLES[x], "step", "repaired, % of wrong first attempts", (x,),
         {"the base's first attempts": along("watched", "fixed_sampled"),
          "its own first attempts": along("watched", "own_sampled")})
        for x in ("pair_sft", "score")
    ],
    "attempts": [
        (f"{title} in sight", "attempt", GREEDY, ("base", "multi_turn", "score", "pair_sft"),
         {"": lambda run, kind=kind: dict(enumerate(run["attempts"][kind], start=1))})
        for title, kind in (("last attempt", "last"), ("all attempts", "whole"))
    ],
}  # fmt: skip


def draw(runs: list[dict], folder: Path) -> None:
    """Write the figures, if there are data for them, as PNG."""
    group = grouped(runs)
    if "attempts" not in group["score"][0]:
        return
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("the figures need: pip install matplotlib==3.11.2") from None
    plt.switch_backend("Agg")
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.25, "figure.constrained_layout.use": True})  # fmt: skip
    for path, panels in FIGURES.items():
        figure, axes = plt.subplots(1, len(panels), figsize=(3.8 * len(panels), 3), squeeze=False)
        for axis, (title, xlabel, ylabel, names, lines) in zip(axes[0], panels, strict=True):
            for name in [name for name in names if name in group]:
                for (label, shares), style in zip(lines.items(), ("-", "--"), strict=False):
                    found = [shares(run) for run in group[name]]
                    x = sorted(set().union(*found))
                    columns = [[100 * row[k] for row in found if k in row] for k in x]
                    mean, error = np.reshape([mean_error(y) for y in columns], (-1, 2)).T
                    label = label if len(names) == 1 else f"{TITLES[name]} {label}"
                    axis.plot(x, mean, style, color=COLOURS[name], label=label)
                    axis.fill_between(x, mean - error, mean + error, color=COLOURS[name], alpha=0.2)
                axis.legend(fontsize=8)
            axis.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(0, 100))
        figure.savefig(folder / f"{path}.png", dpi=120, metadata={"Software": None})
        plt.close(figure)
    print(f"figures are in {folder}")
