"""SCoRe in verl 0.9.1: an advantage estimator, and settings for the rest.

A row is one multi-turn response, `y1 p1 y2`, whose `response_mask` is 1 in the attempts and 0 in
the instruction, as verl's agent loops write it; `token_level_scores` has each attempt's reward, 0
or 1, at one of its tokens. verl hands the whole batch to no estimator but the one that is named
"gdpo", so that this one takes its name. `SETTINGS` has the rest, besides a rollout of two turns.
The KL is folded into the advantages, which has the gradient of `tensors.k1_terms`.

    pip install verl==0.9.1 cachetools fastapi uvicorn tiktoken
    python ports/verl_port.py results.json     # its gradient in two golden cases
    python ports/check_port.py results.json

That tries the settings, verl's `compute_advantage`, "gpg" and `agg_loss`. verl_score.py has the
second turn, both rewards, and the commands. verl needs transformers before 5.11, and so an
environment of its own.

Dimension key: B rows (rollouts), G rows of each problem, in any order; S tokens of a response.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import verl
from hydra import compose, initialize_config_dir
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import compute_advantage

sys.path.insert(0, str(Path(__file__).parent.parent))

import score
from ports.check_port import contract
from ports.tensors import fold, spread
from rollout import log_probs

# --- the port -------------------------------------------------------------------------------------

SETTINGS = [
    "algorithm.adv_estimator=gdpo",
    "algorithm.use_kl_in_reward=False",
    "+algorithm.score={stage: 2, alpha: 10, beta1: 0.01, beta2: 0.1}",
    "actor_rollout_ref.actor.policy_loss.loss_mode=gpg",  # -log p times advantage, no ratio
    "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum",  # over tokens; mean over rows
    "actor_rollout_ref.actor.use_kl_loss=True",  # so that the base is scored,
    "actor_rollout_ref.actor.kl_loss_coef=0",  # and counts in the advantage alone
    "actor_rollout_ref.actor.ppo_epochs=1",  # and one mini-batch: one update
]


def score_advantage(batch, index, config, **_):
    """Return each token's advantage [B, S] with the KL in it, twice: verl wants returns, too."""
    mask_BS = batch["response_mask"].long()
    starts_BS = mask_BS.diff(dim=1, prepend=0 * mask_BS[:, :1]) > 0
    turn_BS = starts_BS.cumsum(dim=1) * mask_BS
    scores_BS = batch["token_level_scores"]
    rewards = [scores_BS.where(turn_BS == k, 0).sum(dim=1) for k in (1, 2)]

    _, group, sizes = np.unique(index, return_inverse=True, return_counts=True)
    if sizes.min() < sizes.max():
        raise ValueError(f"problems have from {sizes.min()} to {sizes.max()} rows, not the same")

    c = SimpleNamespace(group=int(sizes[0]), **config["score"])
    stage = {1: score.stage1, 2: score.stage2}[c.stage]
    order_B = torch.from_numpy(group.argsort())  # rows of a problem side by side, and back again
    tensors = spread(turn_BS[order_B], *stage(torch.stack(rewards)[:, order_B], c))
    advantage_BS, weight_BS = (x_BS[order_B.argsort()] for x_BS in tensors)
    terms = batch["old_log_probs"], batch["ref_log_prob"], turn_BS
    folded_BS = fold(advantage_BS, weight_BS, *terms)
    return folded_BS, folded_BS


ADV_ESTIMATOR_REGISTRY["gdpo"] = score_advantage

# --- the golden cases -----------------------------------------------------------------------------


def gradient(case: dict, config) -> torch.Tensor:
    """Return the gradient by the logits, through verl, of rows that stand in another order."""
    names = ("ids", "turn", "logits", "ref_logits", "reward1", "reward2")
    given = (torch.from_numpy(np.array(case[x])) for x in names)
    ids_BT, turn_BS, logits_BSV, ref_BSV, *rewards = given
    logits_BSV.requires_grad_()
    logp_BS, ref_logp_BS = (
        log_probs(x_BSV, case["temperature"]).gather(-1, ids_BT[:, 1:, None])[..., 0]
        for x_BSV in (logits_BSV, ref_BSV)
    )
    scores_BS, B = torch.zeros_like(ref_logp_BS), len(ids_BT)
    for k, reward_B in enumerate(rewards, start=1):
        last_B = (turn_BS == k).long().cumsum(dim=1).argmax(dim=1)
        scores_BS[torch.arange(B), last_B] = reward_B
    order_B = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    columns = dict(
        response_mask=(turn_BS > 0).long(), token_level_scores=scores_BS,
        token_level_rewards=scores_BS, old_log_probs=logp_BS.detach(), ref_log_prob=ref_logp_BS,
    )  # fmt: skip
    problem_B = np.array([f"problem {b // case['G']}" for b in order_B], dtype=object)
    rows = TensorDict({name: x[order_B] for name, x in columns.items()}, B)
    data = verl.DataProto(rows, {"uid": problem_B})
    data = compute_advantage(data, config.algorithm.adv_estimator, config=config.algorithm)
    actor = config.actor_rollout_ref.actor
    loss, _ = get_policy_loss_fn(actor.policy_loss.loss_mode)(
        rows["old_log_probs"], logp_BS[order_B], data.batch["advantages"], rows["response_mask"],
        actor.loss_agg_mode, SimpleNamespace(global_batch_info={}),
    )  # fmt: skip
    return torch.autograd.grad(loss, logits_BSV)[0]


def results() -> dict:
    """Return the gradients of both stages in the cases whose attempts are all the policy's."""
    with initialize_config_dir(f"{Path(verl.__file__).parent}/trainer/config", version_base=None):
        config, found = compose("ppo_trainer", SETTINGS), {}
    for name in ("triples", "two_rows"):
        case = contract()[name]
        case, found[name] = case["outputs"] | case["inputs"], {}
        for stage in (1, 2):
            settings = {x: case[x] for x in ("alpha", "beta1", "beta2")}
            config.algorithm.score.update(settings | {"stage": stage})
            found[name][f"stage{stage}_k1_gradient"] = gradient(case, config).tolist()
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(results()))
