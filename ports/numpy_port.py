"""SCoRe's losses and metrics in NumPy alone: a port that shows how the golden vectors are used.

    python ports/numpy_port.py results.json
    python ports/check_port.py results.json

It takes a golden case's inputs, and the logits of policy and base since it has no model, and
computes from the equations of arXiv 2409.12917v2 all that follows: rows, returns, advantages, KLs,
losses, and their gradients by the logits, by formula and not by differentiation.

  Stage I    r2 - beta1 KL2 - (beta1 + beta2) KL1                      eq. 3
  Stage II   r1 + r2 + alpha (r2 - r1) - beta1 (KL1 + KL2)             eqs. 4 and 5

each attempt credited with its own terms alone, KLi = E[sum over attempt i of log(policy / base)].

Dimension key: B rows, G rows of each problem, T tokens, S = T - 1 scored positions, V vocabulary.
"""

import json
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def rows(case: dict) -> dict:
    """Return ids [B, T] with zeros behind each row, its length, and each target's turn [B, S]."""
    prompts = [prompt for prompt in case["prompts"] for _ in range(case["G"])]
    parts = [
        [(x, 0), (y1, 1), (case["instruction"], 0), (y2, 2)]
        for x, y1, y2 in zip(prompts, case["attempts1"], case["attempts2"], strict=True)
    ]
    length = [sum(len(ids) for ids, _ in row) for row in parts]
    ids, turn = np.zeros((2, len(parts), max(length)), dtype=int)
    for b, row in enumerate(parts):
        ids[b, : length[b]] = [token for part, _ in row for token in part]
        turn[b, : length[b]] = [k for part, k in row for _ in part]
    return {"ids": ids, "length": length, "turn": turn[:, 1:]}


def log_softmax(logits, temperature: float):
    """Return the log-probabilities that tokens are drawn with."""
    x = logits / temperature
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def of_tokens(x_BSV, token_BS):
    """Return [B, S], what stands at the tokens that came."""
    return np.take_along_axis(x_BSV, token_BS[..., None], axis=-1)[..., 0]


def others(reward_B, G: int):
    """Return the mean of the other rows of each row's problem (RLOO, arXiv 2402.14740)."""
    problems = reward_B.reshape(-1, G)
    return np.array([[np.delete(p, i).mean() for i in range(G)] for p in problems]).reshape(-1)


def returns(stage: str, case: dict) -> dict[int, np.ndarray]:
    """Return what each attempt earns, by its number."""
    reward1_B, reward2_B = np.array(case["reward1"]), np.array(case["reward2"])
    if stage == "stage1":
        return {2: reward2_B}
    return {1: reward1_B, 2: reward2_B + case["alpha"] * (reward2_B - reward1_B)}


def later(x_BS):
    """Return the sum of what comes after each entry of a row."""
    return x_BS.sum(axis=1, keepdims=True) - x_BS.cumsum(axis=1)


def kl_terms(logp_BSV, ref_BSV, token_BS) -> dict[str, tuple]:
    """Return for both forms the KL of each token [B, S] and its own gradient [B, S, V] in the
    logits: exact, sum_v p (log p - log q), which is p (log p - log q - KL); and k1, log p - log q
    of the token that came, whose own gradient is 0 on average and left out."""
    p_BSV, ratio_BSV = np.exp(logp_BSV), logp_BSV - ref_BSV
    exact_BS = (p_BSV * ratio_BSV).sum(axis=-1)
    k1_BS = of_tokens(ratio_BSV, token_BS)
    return {
        "exact": (exact_BS, p_BSV * (ratio_BSV - exact_BS[..., None]), 0.0),
        "k1": (k1_BS, np.zeros_like(p_BSV), k1_BS),
    }


def stage_terms(stage: str, case: dict, turn_BS) -> dict:
    """Return returns, baselines, advantages, and the advantage and KL weight of each token."""
    held = {1: case["beta1"], 2: case["beta1"]}
    if stage == "stage1":
        held[1] += case["beta2"]
    found, advantages = {}, {1: np.zeros(len(turn_BS))}
    for k, return_B in returns(stage, case).items():
        baseline_B = others(return_B, case["G"])
        advantages[k] = return_B - baseline_B
        found |= {f"return{k}": return_B, f"baseline{k}": baseline_B}
    found |= {f"advantage{k}": x_B for k, x_B in advantages.items()}
    found["token_advantage"] = sum(x_B[:, None] * (turn_BS == k) for k, x_B in advantages.items())
    found["token_kl_weight"] = sum(weight * (turn_BS == k) for k, weight in held.items())
    return {f"{stage}_{name}": x for name, x in found.items()}


def step(case: dict, logits_BSV, ref_logits_BSV) -> dict:
    """Return every quantity that follows from a case's rows, rewards and logits."""
    found = rows(case)
    token_BS, turn_BS = found["ids"][:, 1:], found["turn"]
    logp_BSV, ref_BSV = (log_softmax(x, case["temperature"]) for x in (logits_BSV, ref_logits_BSV))
    # an attempt that another model wrote is context: none of its tokens was the policy's choice
    own_BS = np.where(np.array(case["offline1"])[:, None] & (turn_BS == 1), 0, turn_BS)
    found["token_turn"] = own_BS
    for name, x_BSV in (("logp", logp_BSV), ("ref_logp", ref_BSV)):
        found[name] = of_tokens(x_BSV, token_BS) * (turn_BS > 0)
    score_BSV = np.eye(logp_BSV.shape[-1])[token_BS] - np.exp(logp_BSV)  # log p's gradient
    for stage in ("stage1", "stage2"):
        found |= stage_terms(stage, case, own_BS)
    for form, (kl_BS, slope_BSV, now_BS) in kl_terms(logp_BSV, ref_BSV, token_BS).items():
        found[f"kl_token_{form}"] = kl_BS * (turn_BS > 0)
        ahead_BS = sum(later(kl_BS * (own_BS == k)) * (own_BS == k) for k in (1, 2)) + now_BS
        for k in (1, 2):
            found[f"kl{k}_{form}"] = (kl_BS * (own_BS == k)).sum(axis=1)
        for stage in ("stage1", "stage2"):
            weight_BS = found[f"{stage}_token_kl_weight"]
            score_weight_BS = weight_BS * ahead_BS - found[f"{stage}_token_advantage"]
            gradient_BSV = weight_BS[..., None] * slope_BSV + score_weight_BS[..., None] * score_BSV
            found[f"{stage}_{form}_loss"] = (weight_BS * kl_BS).sum(axis=1)
            found[f"{stage}_{form}_gradient"] = gradient_BSV / case["temperature"] / len(kl_BS)
    return found


def wilson(k: int, n: int) -> list[float]:
    """Return the shares p for which k of n is 1.96 standard errors away: |k / n - p| =
    z sqrt(p (1 - p) / n), a quadratic equation in p."""
    if n == 0:
        return [0.0, 1.0]
    a, b, c = 1 + (z2 := 1.959963984540054**2) / n, -(2 * k + z2) / n, (k / n) ** 2
    root = max(0.0, b * b - 4 * a * c) ** 0.5
    return [(-b - root) / (2 * a), (-b + root) / (2 * a)]


def bootstrap(changes, seed: int):
    """Return the 2.5th and 97.5th percentiles of the mean change, over problems drawn again."""
    draws = np.random.default_rng(seed).choice(changes, size=(10_000, len(changes)))
    return np.percentile(draws.mean(axis=1), [2.5, 97.5])


def metrics(right1_N, right2_N) -> dict:
    """Return the paper's five metrics, shares of all problems, and two conditional rates."""
    pairs = list(zip(right1_N, right2_N, strict=True))
    n, gained, lost = len(pairs), pairs.count((0, 1)), pairs.count((1, 0))
    right1, right2 = sum(right1_N), sum(right2_N)
    found = {"n": n, "delta": right2 / n - right1 / n}
    for name, k, of in (
        ("acc_t1", right1, n), ("acc_t2", right2, n),
        ("delta_i_to_c", gained, n), ("delta_c_to_i", lost, n),
        ("repair_rate", gained, n - right1), ("spoil_rate", lost, right1),
    ):  # fmt: skip
        found |= {name: k / of if of else None, f"{name}_interval": wilson(k, of)}
    return found | {"delta_interval": bootstrap([b - a for a, b in pairs], seed=1)}


def from_case(given: dict, asked: dict) -> dict:
    """Return what this port makes of a case's inputs, and of its logits among the outputs."""
    if "prompts" in given:
        return step(given, *(np.array((asked | given)[x]) for x in ("logits", "ref_logits")))
    if "right1" in given:
        return metrics(given["right1"], given["right2"])
    if "probs" in given:
        both = (np.log(given[x])[None] for x in ("probs", "ref_probs"))
        terms = kl_terms(*both, np.array(given["tokens"])[None])
        return {f"kl_token_{form}": x[0][0] for form, x in terms.items()}
    if "alpha" in given:
        return {"stage2_return2": returns("stage2", given)[2]}
    reward_B = np.array(given["reward2"])
    baseline_B = others(reward_B, given["G"])
    return {"stage1_baseline2": baseline_B, "stage1_advantage2": reward_B - baseline_B}


def results() -> dict:
    """Return what this port makes of the golden cases: each quantity that a case asks for."""
    files, found = [json.loads(path.read_text()) for path in GOLDEN.glob("*.json")], {}
    for name, case in (item for file in files for item in file.get("cases", {}).items()):
        computed, asked = from_case(case["inputs"], case["outputs"]), case["outputs"]
        found[name] = {x: np.asarray(y).tolist() for x, y in computed.items() if x in asked}
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python ports/numpy_port.py RESULTS.json")
    Path(sys.argv[1]).write_text(json.dumps(results()))
