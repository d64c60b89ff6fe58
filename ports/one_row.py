"""What does the loss do with one row? Row 0 of the golden case `triples`, token by token.

    python ports/one_row.py stage2      # or stage1; as a Markdown table

Its columns are those of the porting guide, ports/README.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from ports.check_port import contract
from study.tables import markdown

TITLES = "| id | turn | log p | log q | KL | A | w | w KL | later | A − later |"


def table(stage: str) -> str:
    """Return what each token of the row is, and what a stage's loss makes of it. The golden loss is
    the sum of the column w KL; log p is multiplied by − (A − later)."""
    case = contract()["triples"]
    reward1, reward2 = (case["inputs"][f"reward{k}"][0] for k in (1, 2))
    names = "turn", "logp", "ref_logp", "kl_token_exact"
    names += f"{stage}_token_advantage", f"{stage}_token_kl_weight"
    n, ids, loss, *columns = (
        case["outputs"][name][0] for name in ("length", "ids", f"{stage}_exact_loss", *names)
    )
    rows, later = [], {1: 0.0, 2: 0.0}  # from the last token to the first
    for token, turn, logp, ref, kl, paid, held in zip(
        *(column[n - 2 :: -1] for column in (ids[1:], *columns)), strict=True
    ):
        numbers = ()
        if turn:
            numbers = (logp, ref, kl, paid, held, held * kl, later[turn], paid - later[turn])
            later[turn] += held * kl
        rows.append([str(token), str(turn), *(f"{x:.3f}" for x in numbers)])
    rows.append([str(ids[0]), ""])  # which is not scored
    cells = [(row + [""] * 8)[:10] for row in reversed(rows)]
    about = f"r1 = {reward1:g}, r2 = {reward2:g}; loss {loss:.3f}"
    return f"{about}\n\n{markdown(TITLES, cells)}"


if __name__ == "__main__":
    if sys.argv[1:] not in (["stage1"], ["stage2"]):
        sys.exit("usage: python ports/one_row.py stage1 (or stage2)")
    print(table(sys.argv[1]))
