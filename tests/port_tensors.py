"""SCoRe as three tensors, which any stack can carry (README, "Porting").

Each token has the number of its turn, an advantage and a KL weight. Nothing else of a loss depends
on the stage. Both stages of score.py follow from them, values and gradients (tests/test_ports.py).
The other ports, to libraries, are tests/port_jax.py, port_trl.py and port_verl.py.

Dimension key: B rows (rollouts), G rows of each problem, side by side; S scored positions.
"""

import torch


def score_tensors(turn_BS, reward1_B, reward2_B, G, stage, alpha, beta1, beta2):
    """Return the advantage and the KL weight [B, S] of each token, both 0 in the context.

    Args:
      turn_BS: int64, 1 and 2 in the attempts, their end of turn included; 0 elsewhere.
      stage: 1 or 2. alpha is of Stage II alone, beta2 of Stage I alone.
    """
    shaped_B = reward2_B + alpha * (reward2_B - reward1_B)
    nothing_B = torch.zeros_like(reward1_B)
    earned_B3 = torch.stack(
        [nothing_B, nothing_B, reward2_B] if stage == 1 else [nothing_B, reward1_B, shaped_B], dim=1
    )
    group_PG3 = earned_B3.view(-1, G, 3)
    others_PG3 = (group_PG3.sum(dim=1, keepdim=True) - group_PG3) / (G - 1)
    advantage_BS = (group_PG3 - others_PG3).view(-1, 3).gather(1, turn_BS)
    weight_3 = reward1_B.new_tensor([0.0, beta1 + beta2 if stage == 1 else beta1, beta1])
    return advantage_BS, weight_3[turn_BS]


def to_go(x_BS, turn_BS):
    """Return [B, S], sums from each token to the end of its own turn; of the context, 0."""
    own_BS = [x_BS * (turn_BS == k) for k in (1, 2)]
    return sum(x.flip(1).cumsum(1).flip(1) * (turn_BS == k) for k, x in enumerate(own_BS, 1))


def fold(advantage_BS, weight_BS, logp_BS, ref_logp_BS, turn_BS):
    """Return [B, S] advantages with the KL in them, for a stack that knows policy gradients only.

    -(folded * logp).sum() then has the gradient of both, from samples: the score function takes a
    token's own log-ratio and the later ones of its turn as a cost.
    """
    return advantage_BS - to_go(weight_BS * (logp_BS - ref_logp_BS).detach(), turn_BS)


def token_loss(logp_BS, kl_BS, turn_BS, advantage_BS, weight_BS):
    """Return [B], the loss of each row: sums over tokens, divided by nothing.

    Args:
      logp_BS: with gradient. kl_BS: each token's KL from the base, with the gradient of its own
        law: over the vocabulary; or, from samples, k1 * (1 + logp - logp.detach()) of a detached
        k1 = logp - ref_logp.
    """
    zero_BS = logp_BS - logp_BS.detach()  # its gradient is that of logp
    cost_BS = weight_BS * kl_BS
    later_BS = to_go(cost_BS.detach(), turn_BS) - cost_BS.detach()
    return (cost_BS + zero_BS * (later_BS - advantage_BS)).sum(dim=1)
