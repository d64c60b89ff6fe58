"""How does the study look? Its training curves.

Lines are means over seeds, in per cent; bands are one standard error.

    python -m study --table study/results/study.json    # draws beside it; needs matplotlib
"""

from pathlib import Path

import numpy as np

from study.tables import TITLES, grouped, mean_error

COLOURS = {  # Okabe and Ito's, told apart by the colour-blind
    "score": "#0072B2",
    "multi_turn": "#D55E00",
}
ATTEMPTS, SAMPLES = {", attempt 2": "acc_t2", ", attempt 1": "acc_t1"}, "% of training samples"
CURVES = [  # panels: title, y, methods, and keys of a curve by label
    ("SCoRe", f"right, {SAMPLES}", ["score"], ATTEMPTS),
    ("multi-turn RL", f"right, {SAMPLES}", ["multi_turn"], ATTEMPTS),
    ("second answers that differ", SAMPLES, ["score", "multi_turn"], {"": "changed"}),
]


def draw(runs: list[dict], folder: Path) -> None:
    """Write the training curves of SCoRe and multi-turn RL, if there are both of one learning rate.
    ValueError if matplotlib is missing."""
    group = grouped(runs)
    if "multi_turn" not in group or len({run["config"]["lr"] for run in runs}) > 1:
        return
    try:
        from matplotlib import figure, rcParams
    except ImportError:
        raise ValueError("the figures need: pip install matplotlib==3.11.2") from None
    rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "grid.alpha": 0.25})  # fmt: skip
    made = figure.Figure((11.4, 3.5), layout="constrained")
    for axis, (title, ylabel, names, keys) in zip(made.subplots(1, 3), CURVES, strict=True):
        for name in names:
            for (label, key), style in zip(keys.items(), ("-", "--"), strict=False):
                found = [{x["step"]: 100 * x[key] for x in run["curve"]} for run in group[name]]
                x = sorted(set().union(*found))
                columns = [[row[k] for row in found if k in row] for k in x]
                mean, error = np.reshape([mean_error(y) for y in columns], (-1, 2)).T
                axis.plot(x, mean, style, color=COLOURS[name], label=TITLES[name] + label)
                axis.fill_between(x, mean - error, mean + error, color=COLOURS[name], alpha=0.2)
        axis.legend(fontsize=7)
        axis.set(title=title, xlabel="step", ylabel=ylabel, ylim=(0, 100))
    made.savefig(folder / "curves.png", dpi=120, metadata={"Software": None})
