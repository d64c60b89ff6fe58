"""SCoRe in verl 0.9.1: an advantage estimator, and settings for the rest.

A row is one multi-turn response, `y1 p1 y2`, whose `response_mask` is 1 in the attempts and 0 in
the instruction, as verl's agent loops write it; `token_level_scores` has each attempt's reward, 0
or 1, at one of its tokens. verl hands the whole batch to no estimator but the one that is named
"gdpo", so that this one takes its name. The settings, besides a rollout of two turns:

    algorithm.adv_estimator=gdpo  algorithm.use_kl_in_reward=False
    +algorithm.score={stage: 2, alpha: 10, beta1: 0.01, beta2: 0.1}
    actor_rollout_ref.actor.policy_loss.loss_mode=gpg         # -log p times advantage, no ratio
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum  # sums over tokens, mean over rows
    actor_rollout_ref.actor.use_kl_loss=True                  # so that the base is scored,
    actor_rollout_ref.actor.kl_loss_coef=0                    # and counts in the advantage alone
    actor_rollout_ref.actor.ppo_epochs=1                      # and one mini-batch: one update

Tried, by tests/test_ports.py: that the settings compose; verl's `compute_advantage`, "gpg" and
`agg_loss`, on batches made there. Not tried: its trainer, an agent loop with the second turn, a
reward loop that writes two rewards, several GPUs.

verl needs an environment of its own (transformers before 5.11). There:

    python -m pytest tests/test_ports.py -k verl

Dimension key: B rows (rollouts), G rows of each problem, in any order; S tokens of a response.
"""

import numpy as np
import torch
from port_tensors import fold, score_tensors
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY


def score_advantage(batch, index, config, **_):
    """Return each token's advantage [B, S] with the KL in it, twice: verl wants returns, too."""
    mask_BS = batch["response_mask"].long()
    starts_BS = mask_BS.diff(dim=1, prepend=0 * mask_BS[:, :1]) > 0
    turn_BS = starts_BS.cumsum(dim=1) * mask_BS
    rewards = [(batch["token_level_scores"] * (turn_BS == k)).sum(dim=1) for k in (1, 2)]

    _, group, sizes = np.unique(index, return_inverse=True, return_counts=True)
    if sizes.min() < sizes.max():
        raise ValueError(f"problems have from {sizes.min()} to {sizes.max()} rows, not the same")

    order_B = torch.from_numpy(group.argsort())  # rows of a problem side by side, and back again
    sorted_rows = (x[order_B] for x in (turn_BS, *rewards))
    tensors = score_tensors(*sorted_rows, G=sizes[0], **config["score"])
    advantage_BS, weight_BS = (x[order_B.argsort()] for x in tensors)
    terms = batch["old_log_probs"], batch["ref_log_prob"], turn_BS
    folded_BS = fold(advantage_BS, weight_BS, *terms)
    return folded_BS, folded_BS


ADV_ESTIMATOR_REGISTRY["gdpo"] = score_advantage
