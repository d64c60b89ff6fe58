"""What does the loss do with one row? Row 0 of the golden case `triples`, token by token.

    python ports/one_row.py stage2 --picture ports/one_row.png      # or stage1

A Markdown table, explained in ports/README.md; drawn, too, if asked, which needs matplotlib.
"""

import argparse
import sys
from itertools import groupby
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from ports.check_port import contract
from study.tables import markdown

TITLES = "| id | turn | log p | log q | KL | A | w | w KL | later | A − later |"
PARTS = {"problem": "none", "attempt 1": "C0", "instruction": "none", "attempt 2": "C1"}
# from the top, of each thing that is drawn: its name, its column of numbers, its colour
PANELS = [[("log p", 0, "black"), ("log q", 1, "#999999")], [("w KL", 5, "#CC79A7")],
          [("A", 3, "#E69F00"), ("A − later", 7, "#009E73")]]  # fmt: skip


def row(stage: str) -> tuple[str, list[tuple]]:
    """Return a line about the row, and of each token its id, its turn, and what a stage's loss
    makes of it. The golden loss is the sum of w KL; log p is multiplied by − (A − later)."""
    case, tokens, later = contract()["triples"], [], {1: 0.0, 2: 0.0}
    lists = [(key, x) for part in case.values() for key, x in part.items() if isinstance(x, list)]
    of = {key.removeprefix(f"{stage}_"): x[0] for key, x in lists}  # of row 0
    names = "logp", "ref_logp", "kl_token_exact", "token_advantage", "token_kl_weight"
    for s in reversed(range(of["length"] - 1)):  # the later tokens first
        turn, numbers = of["turn"][s], [np.nan] * 8
        if turn:
            logp, ref, kl, paid, held = (of[name][s] for name in names)
            numbers = [logp, ref, kl, paid, held, held * kl, later[turn], paid - later[turn]]
            later[turn] += held * kl
        tokens.append((of["ids"][s + 1], turn, numbers))
    tokens.append((of["ids"][0], "", [np.nan] * 8))  # which is not scored
    r1, r2, loss = (of[name] for name in ("reward1", "reward2", "exact_loss"))
    return f"r1 = {r1:g}, r2 = {r2:g}; loss {loss:.3f}", tokens[::-1]


def table(stage: str) -> str:
    """Return the row as a table."""
    about, tokens = row(stage)
    cells = [[*map(str, of), *(f"{x:.3f}" if x == x else "" for x in xs)] for *of, xs in tokens]
    return f"{about}\n\n{markdown(TITLES, cells)}"


def draw(stage: str, path: Path) -> None:
    """Write the row as a picture: log-probabilities as lines, and what the loss has as bars."""
    from matplotlib.figure import Figure

    ids, turns, numbers = zip(*row(stage)[1], strict=True)
    figure, above = Figure((9, 3.3), layout="constrained"), ("data", "axes fraction")
    axes = figure.subplots(3, sharex=True, height_ratios=(3, 2, 3), subplot_kw=dict(ymargin=0.15))
    x, start = np.arange(len(ids)), -0.5
    for axis, shown in zip(axes, PANELS, strict=True):
        for i, (name, column, colour) in enumerate(shown):
            y, how = [xs[column] for xs in numbers], dict(color=colour, label=name)
            if axis is axes[0]:
                axis.plot(x, y, "o-", **how)
            else:
                axis.bar(x, y, 0.8 - 0.4 * i, **how)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    for (name, colour), (_, part) in zip(PARTS.items(), groupby(turns, bool), strict=True):
        stop = start + len(list(part))
        for axis in axes:
            axis.axvspan(start, stop, color=colour, alpha=0.12, lw=0, zorder=0)
        axes[0].annotate(name, ((start + stop) / 2, 1.06), xycoords=above, ha="center")
        start = stop
    axes[2].axhline(0, color="black", lw=0.8)
    axes[2].set(xlim=(-0.5, start), xlabel="id of the token", xticks=x, xticklabels=ids)
    figure.savefig(path, dpi=144, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("stage1", "stage2"))
    parser.add_argument("--picture", metavar="PNG", type=Path, help="draw the row into this file")
    asked = parser.parse_args()
    print(table(asked.stage))
    if asked.picture:
        draw(asked.stage, asked.picture)
