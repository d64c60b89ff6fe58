"""Why does multi-turn RL collapse? What is seen of each step: how often a repair is sampled, what a
second attempt earns by changing or copying the first, how long the attempts' gradients are.

Seeing it changes no bit of a training. study/map.py has the tables and the figure.

    python -c "from study import reason; print(reason.KEYS)"

Dimension key: B rows, G of each problem, side by side; S scored positions; K attempts.
"""

import torch

from rollout import Rollout
from score import Run, loss

KINDS = [f"{what}_{first}" for what in ("changed", "copied") for first in ("wrong", "right")]
KEYS = ("groups", *KINDS, "norm1", "norm2")
EACH = 10  # steps from one look at the gradients to the next


def paid_for(r: Rollout, reward_KB, advantage_B, G: int) -> dict:
    """Return the share of groups with a repair, a row that went from wrong to right; and attempt
    2's mean advantage in rows that changed or copied a wrong or right attempt 1, nan if there are
    none."""
    device = advantage_B.device
    changed_B = torch.tensor([a != b for a, b in zip(*r.attempts, strict=True)], device=device)
    repaired_B = (reward_KB[0] == 0) & (reward_KB[1] == 1)
    found = dict(groups=repaired_B.view(-1, G).any(dim=1).float().mean().item())
    for kind in KINDS:
        what, first = kind.split("_")
        rows_B = (changed_B == (what == "changed")) & (reward_KB[0] == (first == "right"))
        found[kind] = advantage_B[rows_B].mean().item()
    return found


def norms(run: Run, r: Rollout, terms, paid_and_held) -> dict:
    """Return the norm of the gradient of each attempt's terms, as if the other's were none."""
    found = {}
    for k in (1, 2):
        loss_B = loss(*terms, r.turn_BS * (r.turn_BS == k), *paid_and_held)
        gradient = torch.autograd.grad(loss_B.mean(), [*run.policy.parameters()], retain_graph=True)
        found[f"norm{k}"] = torch.stack([x.norm() for x in gradient]).norm().item()
    return found


def seen(run: Run, r: Rollout, reward_KB, terms, paid_and_held) -> dict:
    """Return what is seen of a step on sampled rows, every tenth time of the gradients, too."""
    found = paid_for(r, reward_KB, paid_and_held[0][1], run.config.group)
    return found | ({} if run.step % EACH else norms(run, r, terms, paid_and_held))
