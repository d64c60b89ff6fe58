"""SCoRe for a stack that takes numbers for each token, and for one that takes advantages alone.

score.py's stages say who is paid and who is held: the advantage of each attempt, the weight of its
KL. `spread` gives them to the tokens; `fold` leaves one number a token, the KL in it, estimated
from the tokens that came; `k1_terms` is that KL for score.py's loss.

    python -m doctest -v ports/tensors.py

Dimension key: B rows (rollouts), S scored positions, K attempts.
"""

import torch


def spread(turn_BS, advantage_KB, weight_K):
    """Return the advantage and the KL weight [B, S] of each token, both 0 in the context.

    Args:
      turn_BS: int64, 1, 2, .. in the attempts, their end of turn included; 0 elsewhere.
      advantage_KB, weight_K: of a stage.

    >>> paid, held = [torch.tensor([0.5]), torch.tensor([-1.0])], (0.4, 0.1)
    >>> advantage_BS, weight_BS = spread(torch.tensor([[0, 1, 1, 0, 2]]), paid, held)
    >>> advantage_BS[0].tolist(), weight_BS[0]
    ([0.0, 0.5, 0.5, 0.0, -1.0], tensor([0.0000, 0.4000, 0.4000, 0.0000, 0.1000]))
    """
    nothing_B = torch.zeros_like(advantage_KB[0])
    advantage_BS = torch.stack([nothing_B, *advantage_KB], dim=1).gather(1, turn_BS)
    return advantage_BS, nothing_B.new_tensor([0.0, *weight_K])[turn_BS]


def fold(advantage_BS, weight_BS, logp_BS, ref_logp_BS, turn_BS):
    """Return [B, S] advantages with the KL in them, estimated from the tokens that came.

    A policy gradient -(folded * log p).sum() then has the gradient of advantage and KL: a token
    pays for its own log-ratio and for the later ones of its attempt.
    """
    cost_BS = weight_BS * (logp_BS - ref_logp_BS).detach()
    for k in range(1, int(turn_BS.max()) + 1):
        mask_BS = turn_BS == k
        to_go_BS = (cost_BS * mask_BS).flip(1).cumsum(1).flip(1)
        advantage_BS = advantage_BS - to_go_BS * mask_BS
    return advantage_BS


def k1_terms(policy, base, r, temperature: float):
    """Return what `rollout.token_terms` does, but each KL is estimated by the token that came.

    Its value is log(policy / base). Its gradient is that value times the gradient of log p: the
    value's own gradient would be 0 on average. Source: k1 of Schulman, joschu.net/blog/kl-approx.
    """
    from rollout import log_probs

    mask_BS = r.turn_BS > 0

    def of_tokens(model):
        logp_WV = log_probs(model(r.ids_BT[:, :-1], wanted_BT=mask_BS), temperature)
        logp_W = logp_WV.gather(-1, r.ids_BT[:, 1:][mask_BS][:, None])[:, 0]
        return logp_W.new_zeros(mask_BS.shape).masked_scatter(mask_BS, logp_W)

    logp_BS = of_tokens(policy)
    with torch.no_grad():
        k1_BS = logp_BS - of_tokens(base)
    return logp_BS, k1_BS * (1 + logp_BS - logp_BS.detach())
