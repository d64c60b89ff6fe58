"""SCoRe in JAX 0.10.2: advantages, KL weights and their loss, and a loop that is a whole run.

    python ports/jax_port.py results.json   # what it makes of the golden cases, in float64
    python ports/check_port.py results.json
    python ports/jax_port.py                # tables of logits learn to correct themselves

`score_loss` asks a model for nothing but its logits and the base's at each scored position.

Dimension key: B rows (rollouts), G rows of each problem, side by side; S scored positions;
V vocabulary; X problems.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

GOLDEN = Path(__file__).parent / "golden"

# --- the port -------------------------------------------------------------------------------------


def score_tensors(turn_BS, reward1_B, reward2_B, G, stage, alpha, beta1, beta2):
    """Return the advantage and the KL weight [B, S] of each token, both 0 in the context."""
    nothing_B, shaped_B = 0 * reward1_B, reward2_B + alpha * (reward2_B - reward1_B)
    paid = jnp.where(stage == 1, nothing_B, reward1_B), jnp.where(stage == 1, reward2_B, shaped_B)
    group_PG3 = jnp.stack([nothing_B, *paid], axis=1).reshape(-1, G, 3)
    others_PG3 = (group_PG3.sum(axis=1, keepdims=True) - group_PG3) / (G - 1)
    advantage_B3 = (group_PG3 - others_PG3).reshape(-1, 3)
    weight_3 = jnp.array([0.0, beta1 + jnp.where(stage == 1, beta2, 0.0), beta1])
    return jnp.take_along_axis(advantage_B3, turn_BS, axis=1), weight_3[turn_BS]


def of_tokens(x_BSV, token_BS):
    """Return [B, S], what stands at the tokens that came."""
    return jnp.take_along_axis(x_BSV, token_BS[..., None], axis=2)[..., 0]


def later(x_BS, turn_BS):
    """Return [B, S], the sum over the later tokens of the same turn; of the context, 0."""
    own = [x_BS * (turn_BS == k) for k in (1, 2)]
    after = [jnp.cumsum(x[:, ::-1], axis=1)[:, ::-1] - x for x in own]
    return sum(x * (turn_BS == k) for k, x in enumerate(after, 1))


def score_loss(
    logits_BSV, ref_logits_BSV, token_BS, turn_BS, advantage_BS, weight_BS, temperature, kl
):  # fmt: skip
    """Return [B], the loss of each row. kl: "exact" or "k1"."""
    logp_BSV = jax.nn.log_softmax(logits_BSV / temperature)
    ratio_BSV = logp_BSV - jax.nn.log_softmax(stop_gradient(ref_logits_BSV) / temperature)
    zero_BS = of_tokens(logp_BSV - stop_gradient(logp_BSV), token_BS)  # its gradient is log p's
    if kl == "exact":
        kl_BS = (jnp.exp(logp_BSV) * ratio_BSV).sum(axis=2)
    else:
        kl_BS = stop_gradient(of_tokens(ratio_BSV, token_BS)) * (1 + zero_BS)
    cost_BS = weight_BS * kl_BS
    later_BS = later(stop_gradient(cost_BS), turn_BS)
    return (cost_BS + zero_BS * (later_BS - advantage_BS)).sum(axis=1)


# --- the golden cases -----------------------------------------------------------------------------


@partial(jax.jit, static_argnames="G")
def quantities(logits_BSV, ref_BSV, ids_BT, turn_BS, rewards, G, stage, settings, temperature):
    """Return the quantities of a stage that follow from rows, rewards and logits."""
    tensors = score_tensors(turn_BS, *rewards, G, stage, *settings)
    found = dict(zip(("token_advantage", "token_kl_weight"), tensors, strict=True))
    for kl in ("exact", "k1"):

        def mean(logits_BSV, kl=kl):
            rows = ref_BSV, ids_BT[:, 1:], turn_BS
            loss_B = score_loss(logits_BSV, *rows, *tensors, temperature, kl)
            return loss_B.mean(), loss_B

        found[f"{kl}_gradient"], found[f"{kl}_loss"] = jax.grad(mean, has_aux=True)(logits_BSV)
    return found


def stages(case):
    """Return the quantities of both stages, as plain numbers."""
    names = ("logits", "ref_logits", "ids", "token_turn", "reward1", "reward2")
    *rows, reward1_B, reward2_B = (jnp.array(case[x]) for x in names)
    settings, found = [case[x] for x in ("alpha", "beta1", "beta2")], {}
    for stage in (1, 2):
        given = (reward1_B, reward2_B), case["G"], stage, settings, case["temperature"]
        for name, x in quantities(*rows, *given).items():
            found[f"stage{stage}_{name}"] = x.tolist()
    return found


def results():
    """Return what this port makes of the golden cases that have logits."""
    files = [json.loads(path.read_text()) for path in GOLDEN.glob("*.json")]
    cases = {name: case for file in files for name, case in file.get("cases", {}).items()}
    with jax.enable_x64(True):
        both = {name: case["inputs"] | case["outputs"] for name, case in cases.items()}
        return {name: stages(case) for name, case in both.items() if "logits" in case}


# --- a whole run: attempts of one token, from tables of logits ------------------------------------

X, V, G, TURN_S = 4, 5, 16, jnp.array([1, 0, 2])


def apply(policy, ids_BT):
    """Return logits [B, 3, V] of y1, p1 and y2 in rows of ids `x y1 p1 y2`."""
    first_BV = policy["first"][ids_BT[:, 0]]
    second_BV = policy["second"][ids_BT[:, 0], ids_BT[:, 1]]
    return jnp.stack([first_BV, jnp.zeros_like(first_BV), second_BV], axis=1)


@jax.jit
def step(policy, base, key, stage):
    """Return the policy after one step, and both accuracies of the rows it was taken on."""
    key1, key2 = jax.random.split(key)
    x_B = jnp.repeat(jnp.arange(X), G)
    y1_B = jax.random.categorical(key1, policy["first"][x_B])
    y2_B = jax.random.categorical(key2, policy["second"][x_B, y1_B])
    ids_BT = jnp.stack([x_B, y1_B, 0 * x_B, y2_B], axis=1)
    rewards = [(y_B == x_B).astype(float) for y_B in (y1_B, y2_B)]
    turn_BS = jnp.tile(TURN_S, (X * G, 1))
    tensors = score_tensors(turn_BS, *rewards, G, stage, alpha=10.0, beta1=0.01, beta2=1.0)

    def loss(policy):
        logits = apply(policy, ids_BT), apply(base, ids_BT)
        rows = ids_BT[:, 1:], turn_BS, *tensors
        return score_loss(*logits, *rows, temperature=1.0, kl="exact").mean()

    update = jax.grad(loss)(policy)
    policy = jax.tree.map(lambda weight, change: weight - 2.0 * change, policy, update)
    return policy, [reward_B.mean() for reward_B in rewards]


def train(steps, key):
    """Return accuracies [2 stages, 2 attempts] of the last step of each stage, from a flat base."""
    base = {"first": jnp.zeros((X, V)), "second": jnp.zeros((X, V, V))}
    policy, found = base, []
    for stage in (1, 2):
        for _ in range(steps):
            key, now = jax.random.split(key)
            policy, accuracies = step(policy, base, now, stage)
        found.append([float(x) for x in accuracies])
    return found


def main(argv):
    if argv:
        Path(argv[0]).write_text(json.dumps(results()))
        return
    for stage, (first, second) in enumerate(train(200, jax.random.key(0)), 1):
        print(f"after Stage {stage}: attempt 1 right {first:.0%}, attempt 2 {second:.0%}")


if __name__ == "__main__":
    main(sys.argv[1:])
