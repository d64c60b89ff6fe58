"""What does the loss do with one row? Row 0 of the golden case `triples`, token by token.

    python ports/one_row.py stage2      # or stage1; as a Markdown table

Dimension key: b is the row, s a scored position.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from ports.check_port import contract

COLUMNS = ("id", "turn", "log p", "log q", "KL", "A", "w", "w KL", "later", "A − later")


def table(stage: str, b: int = 0) -> str:
    """Return what each token of row b is, and what a stage's loss makes of it. The golden loss is
    the sum of the column w KL; log p is multiplied by − (A − later)."""
    case = contract()["triples"]
    found = case["outputs"]
    reward1, reward2 = (case["inputs"][f"reward{k}"][b] for k in (1, 2))
    names = "turn", "logp", "ref_logp", "kl_token_exact"
    names += f"{stage}_token_advantage", f"{stage}_token_kl_weight"
    n = found["length"][b]
    lines, cost = [], [kl * w for kl, w in zip(found[names[3]][b], found[names[5]][b], strict=True)]
    turns = found["turn"][b]
    lines.append(f"| {found['ids'][b][0]} |" + " |" * (len(COLUMNS) - 1))  # the first is not scored
    for s in range(n - 1):
        turn, logp, ref, kl, paid, held = (found[name][b][s] for name in names)
        later = sum(cost[t] for t in range(s + 1, n - 1) if turns[t] == turn)
        numbers = (logp, ref, kl, paid, held, cost[s], later, paid - later) if turn else ()
        cells = [str(found["ids"][b][s + 1]), str(turn), *(f"{x:.3f}" for x in numbers)]
        lines.append("| " + " | ".join(cells + [""] * (len(COLUMNS) - len(cells))) + " |")
    head = f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|\n"
    about = f"r1 = {reward1:g}, r2 = {reward2:g}; loss {found[f'{stage}_exact_loss'][b]:.3f}\n\n"
    return about + head + "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1]))
