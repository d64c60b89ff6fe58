"""Writes tests/golden/*.json, the golden vectors: what a port to another stack is held against.

    python tests/make_golden.py

weights.json holds two tiny transformers, policy and base; pairs.json and triples.json a step of
SCoRe each, from prompts and noise to the gradients of both stages; metrics.json the metrics of two
tables; hand.json cases that a person can follow with a pencil, whose outputs are written out below
and not computed by the shipped code; tolerances.json how close a port must come.
`tests/check_port.py` says what each quantity is and compares a port's; `tests/test_golden.py` holds
the files against a second derivation. Inputs are short decimals from Python's own generator, the
same on every machine; outputs are computed in float64 and rounded to 12 significant digits.

Dimension key: B rows, G rows of each problem, side by side; T tokens, S = T - 1 scored positions;
V vocabulary; N steps of sampling; K attempts.
"""

import json
import math
import random
import sys
import textwrap
from pathlib import Path
from unittest.mock import patch

import check_port
import numpy as np
import torch
import torch.nn.functional as F
import truth

sys.path.insert(0, str(truth.ROOT))  # so that the command runs from any folder
import eval as evaluation  # noqa: E402

FOLDER = Path(__file__).parent / "golden"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}
CONFIG = dict(
    vocab_size=7, n_layer=2, n_head=2, n_kv_head=1, head_dim=4, d_model=5, d_ff=3,
    max_positions=20, rope_theta=100.0, norm_eps=1e-6, qkv_bias=True,
)  # fmt: skip


def lines(text: str) -> list[str]:
    """Return the lines of an indented text."""
    return textwrap.dedent(text).strip().splitlines()


ABOUT = {
    "weights": lines("""
        Two transformers of the Llama family (model.py), policy and base. x starts as the rows of
        embed; each block: x += attention(norm1(x)), x += mlp(norm2(x)); logits = head(norm(x)).
        Matrices are [out, in], y = W x. norm: x / sqrt(mean(x^2) + norm_eps) * weight. Rows of
        qkv: n_head queries, n_kv_head keys, n_kv_head values, of head_dim each, with a bias.
        Rotary positions from 0, pairs (k, k + head_dim / 2); cos and sin, below, are rounded to
        float32, in a float64 model, too. Scores are divided by sqrt(head_dim), and causal. Rows of
        gate_up: d_ff gates, then d_ff ups; mlp: down(silu(gate) * up).
    """),
    "steps": lines("""
        One step of SCoRe in each stage. Inputs: prompts, one of each problem, which has G rows,
        side by side; instruction; end_id, the end-of-turn token, a part of its attempt; max_new,
        the limit of an attempt, that token counted; temperature, of sampling, policy and base;
        alpha, beta1, beta2; offline1, rows whose first attempt the base wrote; rewards; attempts,
        those that were sampled, for ports that do not sample.
        Sampling: step n of an attempt takes the token with the largest p / noise[n][row], p the
        law at the temperature; noise1 and noise2 are the policy's, noise1_base the base's, whose
        attempt stands in the rows of offline1. The best token leads by 7 per cent or more.
        Outputs: `python tests/check_port.py --help`. token_turn, token_advantage, token_kl_weight
        are all that a loss needs of SCoRe. Of each row it is the sum over tokens of
            weight (KL + c log p) - advantage log p,
        KL the exact KL of the token's law, c the detached sum of the KLs of the attempt's *later*
        tokens; or with k1, weight c log p - advantage log p, c the detached sum of log(p / base)
        over this token and the attempt's later ones. Gradients are of its mean over rows; what is
        called loss is, in value, the sum of weight KL alone (of weight log(p / base), with k1).
    """),
    "metrics": lines("""
        Right or not at attempts 1 and 2, of each problem, and the metrics. delta_interval is a
        bootstrap's, of 10,000 draws, on multiples of 1 / n; the tables are such that other draws
        have the same percentiles.
    """),
    "hand": lines("""
        Cases to follow with a pencil. The outputs are those of the derivations, not of any code.
        ln 2 = 0.693147. Names are those of the large cases (`python tests/check_port.py --help`).
    """),
    "tolerances": lines("""
        A quantity agrees if no entry is off by more than the tolerance of its kind, as a share of
        the quantity's largest entry (of 1, if all are 0). measured: the largest such error of the
        shipped code where this file was written, against the rounded outputs; in bfloat16 as a run
        computes it: matrices in autocast, those of the base's blocks rounded, the rest float32.
        float64: 100 times the rounding to 12 digits. float32: 10 times the measured or more, out
        of reach of other orders of summing. bfloat16: 3 times or more; rewards are float32 there,
        too; what is decoded is not compared (null), as another token may come to be the
        likeliest. Mistakes are off by more: `tests/test_port.py`.
    """),
}

# --- inputs ---------------------------------------------------------------------------------------

SEEDS = {"policy": 55, "base": 155, "pairs": 1635, "triples": 607}
STEPS = {
    "pairs": dict(
        prompts=[[3, 1], [6, 0, 5], [2, 4, 0, 1, 3], [5, 5]],  # 0 and end_id are tokens there, too
        instruction=[6, 2], end_id=1, max_new=4, temperature=0.7, G=2,
        alpha=10.0, beta1=0.01, beta2=0.25,
        offline1=[True, True, False, False, False, False, False, False],
        reward1=[0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0],  # the third group's are all equal
        reward2=[0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0],
    ),
    "triples": dict(
        prompts=[[4, 0, 2, 6], [1, 3]],
        instruction=[5, 0, 6], end_id=1, max_new=5, temperature=1.3, G=3,
        alpha=3.0, beta1=0.3, beta2=0.7, offline1=[False] * 6,
        reward1=[0.0, 1.0, 0.0, 0.0, 1.0, 1.0],
        reward2=[1.0, 0.0, 0.0, 1.0, 0.0, 1.0],
    ),
}  # fmt: skip
TABLES = {  # right at attempt 1, right at attempt 2
    "metrics": (
        [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0],
    ),
    "metrics_all_right_first": ([1, 1, 1], [1, 0, 1]),
}


def array(shape, draw) -> list:
    """Return nested lists of a shape, of what draw() returns."""
    return [array(shape[1:], draw) for _ in range(shape[0])] if shape else draw()


def draw_weights(program, name: str) -> dict[str, list]:
    """Return a model's weights: uniform, of a size that makes every token matter."""
    rng, found = random.Random(SEEDS[name]), {}

    def around(middle, half):
        return lambda: round(middle + half * (2 * rng.random() - 1), 3)

    for weight, x in program.model.GPT(program.model.GPTConfig(**CONFIG)).named_parameters():
        half = 1.2 if weight in ("embed.weight", "head.weight") else 0.6
        found[weight] = array(x.shape, around(1.0, 0.4) if "norm" in weight else around(0.0, half))
    return found


def draw_noise(name: str) -> dict[str, list]:
    """Return the Exp(1) noise of each turn's sampling, [N, B, V]."""
    rng, case = random.Random(SEEDS[name]), STEPS[name]
    shape = (case["max_new"], len(case["offline1"]), CONFIG["vocab_size"])
    turns = ["noise1", *(["noise1_base"] if any(case["offline1"]) else []), "noise2"]
    return {
        t: array(shape, lambda: max(0.001, round(-math.log(1 - rng.random()), 3))) for t in turns
    }


def rotary(program) -> dict[str, list]:
    """Return cos and sin of position times frequency, [max_positions, K / 2], of float32."""
    cos, sin = program.model.rotary_table(program.model.GPTConfig(**CONFIG))
    half = CONFIG["head_dim"] // 2
    return {"cos": cos[:, :half].tolist(), "sin": sin[:, half:].tolist()}


# --- outputs of the shipped code ------------------------------------------------------------------


def settings(program, dtype: str):
    """Return the settings of a run that computes in a dtype (of float64 there is none)."""
    return program.run.Config(dtype="bfloat16" if dtype == "bfloat16" else "float32")


def models(program, weights: dict, dtype: str):
    """Return policy and frozen base as a run has them."""
    found = []
    for name in ("policy", "base"):
        model = program.model.GPT(program.model.GPTConfig(**CONFIG)).to(DTYPES[dtype])
        state = {key: torch.tensor(x, dtype=torch.float64) for key, x in weights[name].items()}
        model.load_state_dict(state)
        found.append(model)
    return found[0], program.run.frozen(found[1], settings(program, dtype))


def sampled(program, models, case: dict, temperature: float):
    """Return the shipped rollout: greedy at temperature 0, else with the case's noise."""
    policy, base = models
    law = dict(max_new=case["max_new"], end_id=case["end_id"], generator=None)
    if temperature == 0:
        return program.rollout.rollout(policy, case["prompts"], case["instruction"], **law,
                                       temperature=0.0)  # fmt: skip
    if any(case["offline1"]):
        law |= dict(author1=base, offline1_B=torch.tensor(case["offline1"]))
    tables = iter([case[x] for x in ("noise1", "noise1_base", "noise2") if x in case])
    sample_turn = program.rollout.sample_turn

    def with_noise(*args, **more):
        steps = iter(next(tables))

        def exponential(noise, generator=None):
            return noise.copy_(torch.tensor(next(steps)))

        with patch.object(torch.Tensor, "exponential_", exponential):
            return sample_turn(*args, **more)

    with patch.object(program.rollout, "sample_turn", with_noise):
        return program.rollout.rollout(policy, case["prompts"], case["instruction"], **law,
                                       temperature=temperature, group=case["G"])  # fmt: skip


def laid_out(program, case: dict):
    """Return the case's rows as the shipped code lays them out, with nonsense behind each end."""

    def piece(rows):
        n = max(map(len, rows)) + 1
        ids = torch.tensor([(row + [2, 0, 3, 1, 2])[:n] for row in rows])
        return ids, torch.tensor([len(row) for row in rows])

    prompts = [x for x in case["prompts"] for _ in range(case["G"])]
    turns = []
    for k in (1, 2):
        ids_BN, n_B = piece(case[f"attempts{k}"])
        cut_B = torch.tensor([row[-1] != case["end_id"] for row in case[f"attempts{k}"]])
        turns.append(program.rollout.Turn(ids_BN, n_B, torch.zeros(ids_BN.shape), cut_B))
    order, offline1_B = piece([case["instruction"]] * len(prompts)), torch.tensor(case["offline1"])
    return program.rollout.assemble(piece(prompts), turns, order, offline1_B)


def scored(program, models, r, case: dict, kl: str) -> dict:
    """Return the shipped score_terms, with what it hands to the KL's estimator and the logits."""
    policy, base = models
    seen, estimator = {}, getattr(program.score, f"kl_{kl}")

    def logits(state):
        seen["logits"] = type(policy).logits(policy, state)
        seen["logits"].retain_grad()
        return seen["logits"]

    def watched(x_BS, y_BS, mask_BS):
        seen["handed"] = x_BS.detach(), y_BS.detach()
        return estimator(x_BS, y_BS, mask_BS)

    with patch.object(program.score, f"kl_{kl}", watched), patch.object(policy, "logits", logits):
        terms = program.score.score_terms(policy, base, r, case["temperature"], kl)
    return seen | dict(zip(("logp", "kl1", "kl2"), terms, strict=True))


def rewards(case: dict, dtype):
    """Return the rewards of both attempts."""
    return (torch.tensor(case[x], dtype=dtype) for x in ("reward1", "reward2"))


def loss(program, stage: str, case: dict, masks, logp_BS, kl1_B, kl2_B):
    """Return the shipped loss of each row."""
    reward1_B, reward2_B = rewards(case, logp_BS.dtype)
    if stage == "stage1":
        return program.score.loss_stage1(
            logp_BS, masks[1], kl1_B, kl2_B, reward2_B, case["G"], case["beta1"], case["beta2"]
        )
    return program.score.loss_stage2(
        logp_BS, *masks, kl1_B, kl2_B, reward1_B, reward2_B, case["G"], case["alpha"], case["beta1"]
    )


def slopes(program, stage: str, case: dict, masks, dtype):
    """Return minus the shipped loss's slope in each token's log-probability, and its slope in each
    attempt's KL: the advantages and the weights that it works with, whatever it calls them."""
    logp_BS = torch.zeros(masks[0].shape, dtype=dtype, requires_grad=True)
    kls = [torch.zeros(len(logp_BS), dtype=dtype, requires_grad=True) for _ in masks]
    loss(program, stage, case, masks, logp_BS, *kls).sum().backward()
    return -logp_BS.grad, [torch.zeros_like(x) if x.grad is None else x.grad for x in kls]


def credit(program, stage: str, case: dict, masks, dtype) -> dict:
    """Return returns, baselines and advantages of a stage, and what it says to each token."""
    reward1_B, reward2_B = rewards(case, dtype)
    returns, found = {2: reward2_B}, {}
    if stage == "stage2":
        shaped_B = program.score.shaped_reward(reward1_B, reward2_B, case["alpha"])
        returns = {1: reward1_B, 2: shaped_B}
    for k, return_B in returns.items():
        found[f"{stage}_return{k}"] = return_B
        found[f"{stage}_baseline{k}"] = program.score.leave_one_out(return_B, case["G"])
    single = torch.eye(2, dtype=torch.bool)[:, None].expand(-1, len(reward1_B), -1)
    advantage_BK, _ = slopes(program, stage, case, single, dtype)  # attempts of one token each
    found[f"{stage}_advantage1"], found[f"{stage}_advantage2"] = advantage_BK.unbind(dim=1)
    found[f"{stage}_token_advantage"], weights = slopes(program, stage, case, masks, dtype)
    found[f"{stage}_token_kl_weight"] = sum(
        weight_B[:, None] * mask_BS for weight_B, mask_BS in zip(weights, masks, strict=True)
    )
    return found


def gradients(program, policy, stage: str, kl: str, case: dict, r, terms: dict) -> dict:
    """Return a stage's loss of each row, and the gradients of their mean."""
    masks, name = (program.score.own_mask1(r), r.mask2_BS), f"{stage}_{kl}"
    policy.zero_grad()
    loss_B = loss(program, stage, case, masks, terms["logp"], terms["kl1"], terms["kl2"])
    loss_B.mean().backward()
    grads = {key: weight.grad for key, weight in policy.named_parameters()}
    norms = {key: grad.norm() for key, grad in grads.items()}
    return {
        f"{name}_loss": loss_B,
        f"{name}_gradient": terms["logits"].grad,
        f"{name}_grad_norm": torch.stack(list(norms.values())).norm(),
        f"{name}_grad_norms": norms,
        f"{name}_grad_entries": {key: x.view(-1)[[0, -1]] for key, x in grads.items()},
    }


def token_kls(program, kl: str, x_BS, y_BS):
    """Return each token's KL, from what the estimator was handed; k1's as attempts of one token."""
    if kl == "exact":
        return x_BS
    ones_N1 = torch.ones(x_BS.numel(), 1)
    return program.score.kl_k1(x_BS.view(-1, 1), y_BS.view(-1, 1), ones_N1).view(x_BS.shape)


def learned(program, models, r, case: dict, dtype) -> dict:
    """Return what follows from a case's rows and logits, up to the gradients of both stages."""
    masks, in_turn_BS = (program.score.own_mask1(r), r.mask2_BS), r.turn_BS > 0
    found = dict(ids=r.ids_BT, length=r.length_B, turn=r.turn_BS)
    found["token_turn"] = masks[0] + 2 * masks[1]
    for stage in ("stage1", "stage2"):
        found |= credit(program, stage, case, masks, dtype)
    for kl in ("exact", "k1"):
        for stage in ("stage1", "stage2"):
            terms = scored(program, models, r, case, kl)
            found |= gradients(program, models[0], stage, kl, case, r, terms)
        found |= {f"kl{k}_{kl}": terms[f"kl{k}"] for k in (1, 2)}
        found[f"kl_token_{kl}"] = token_kls(program, kl, *terms["handed"]) * in_turn_BS
    found["logp"], found["ref_logp"] = (x_BS * in_turn_BS for x_BS in terms["handed"])
    return found


def step(program, weights: dict, case: dict, dtype: str) -> dict:
    """Return all outputs of a case that has a model, as plain numbers."""
    pair, r = models(program, weights, dtype), laid_out(program, case)
    with program.run.computing(settings(program, dtype)):
        found = learned(program, pair, r, case, DTYPES[dtype])
        for name, temperature in (("greedy", 0.0), ("sampled", case["temperature"])):
            sample = sampled(program, pair, case, temperature)
            found |= {f"{name}{k}": program.rollout.written(sample, k) for k in (1, 2)}
        found |= dict(truncated=sample.truncated_BK, sampled_logp=sample.logp_BS)
        real_BS = torch.arange(1, r.ids_BT.shape[1]) < r.length_B[:, None]
        for name, model in zip(("logits", "ref_logits"), pair, strict=True):
            found[name] = model(r.ids_BT[:, :-1]) * real_BS[..., None]
    return plain(found)


def plain(x):
    """Return tensors, and what holds them, as nested lists of numbers."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    return x.detach().tolist() if isinstance(x, torch.Tensor) else x


class Table(torch.nn.Module):
    """A model whose logits [B, S, V] are given, and 0 at further positions."""

    def __init__(self, logits_BSV):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(logits_BSV, dtype=torch.float64))

    def hidden(self, ids_BS):
        return F.pad(self.weight, (0, 0, 0, ids_BS.shape[1] - self.weight.shape[1]))

    def logits(self, state_BSV):
        return state_BSV * 1.0


def from_logits(program, case: dict) -> dict:
    """Return what follows from given logits."""
    pair = [Table(case[x]) for x in ("logits", "ref_logits")]
    return plain(learned(program, pair, laid_out(program, case), case, torch.float64))


def from_laws(program, case: dict) -> dict:
    """Return the KL at each token of a row."""
    pair = [Table([[[math.log(p) for p in law] for law in case[x]]]) for x in ("law", "ref_law")]
    r = program.rollout.lay_out([[0]], [[[token]] for token in case["tokens"]], [], "cpu")
    found = {}
    for kl in ("exact", "k1"):
        handed = scored(program, pair, r, {"temperature": 1.0}, kl)["handed"]
        found[f"kl_token_{kl}"] = token_kls(program, kl, *handed)[0]
    return plain(found)


def from_rewards(program, case: dict) -> dict:
    """Return what the pure functions of rewards, or of a row, make of a case."""
    given = {name: torch.tensor(x) for name, x in case.items()}
    if "alpha" in case:
        rewards = given["reward1"], given["reward2"]
        return plain({"stage2_return2": program.score.shaped_reward(*rewards, case["alpha"])})
    if "x" in case:
        return plain({"after": program.score.after(given["x"])})
    baseline_B = program.score.leave_one_out(given["reward2"], case["G"])
    advantage_B = given["reward2"] - baseline_B
    return plain({"stage1_baseline2": baseline_B, "stage1_advantage2": advantage_B})


def from_table(case: dict) -> dict:
    """Return the shipped metrics."""
    return evaluation.metrics(*(np.array(case[x], dtype=bool) for x in ("right1", "right2")))


def results(program, weights: dict, cases: dict, dtype: str = "float64") -> dict:
    """Return what the shipped code makes of all cases: every quantity that a case has."""
    found = {}
    for name, case in cases.items():
        given = case["inputs"]
        if "noise1" in given:
            computed = step(program, weights, given, dtype)
        elif "logits" in given:
            computed = from_logits(program, given)
        elif "law" in given:
            computed = from_laws(program, given)
        elif "right1" in given:
            computed = from_table(given)
        else:
            computed = from_rewards(program, given)
        found[name] = {x: y for x, y in computed.items() if x in case["outputs"]}
    return found


# --- cases by hand --------------------------------------------------------------------------------

LN2 = math.log(2)
FLAT = [1 / 3, 1 / 3, 1 / 3]
LAWS = [  # [B, S, V]; prompt, instruction and padding do not count
    [[0.8, 0.1, 0.1], [1 / 6, 2 / 3, 1 / 6], FLAT, [0.2, 0.4, 0.4]],
    [[0.5, 0.25, 0.25], FLAT, [0.25, 0.5, 0.25], FLAT],
]
REF_LAWS = [[[0.4, 0.2, 0.4], [2 / 3, 1 / 6, 1 / 6], FLAT, [0.4, 0.2, 0.4]], LAWS[1]]
# of each attempt's token, in temperature-scaled logits: the gradient of its log-probability, and
# those of the KL in both forms, these in units of ln 2
SCORE = {
    (0, 0): [0.2, -0.1, -0.1], (0, 1): [-1 / 6, 1 / 3, -1 / 6], (0, 3): [-0.2, 0.6, -0.4],
    (1, 0): [-0.5, 0.75, -0.25], (1, 2): [-0.25, 0.5, -0.25],
}  # fmt: skip
KL_SLOPE = {
    "exact": {(0, 0): [0.6, -0.25, -0.35], (0, 1): [-1 / 2, 2 / 3, -1 / 6],
              (0, 3): [-0.24, 0.32, -0.08]},
    "k1": {(0, 0): [0.6, -0.3, -0.3], (0, 1): [-1 / 3, 2 / 3, -1 / 3],
           (0, 3): [-0.2, 0.6, -0.4]},
}  # fmt: skip
ATTEMPT = {(0, 0): 1, (0, 1): 1, (0, 3): 2, (1, 0): 1, (1, 2): 2}
ADVANTAGE = {"stage1": {1: [0.0, 0.0], 2: [1.0, -1.0]}, "stage2": {1: [-1.0, 1.0], 2: [5.0, -5.0]}}
KL_WEIGHT = {"stage1": {1: 0.4, 2: 0.1}, "stage2": {1: 0.1, 2: 0.1}}


def by_hand(stage: str, kl: str) -> list:
    """Return the gradient [B, S, V] of two_rows: (weight * KL's - advantage * score) / 4."""
    gradient = array((2, 4, 3), float)
    for (b, s), attempt in ATTEMPT.items():
        slope = KL_SLOPE[kl].get((b, s), [0.0] * 3)
        for v in range(3):
            held = KL_WEIGHT[stage][attempt] * LN2 * slope[v]
            gradient[b][s][v] = (held - ADVANTAGE[stage][attempt][b] * SCORE[b, s][v]) / 4
    return gradient


def logits_of(laws: list) -> list:
    """Return logits that have these laws at temperature 2."""
    return [[[2 * math.log(p) for p in law] for law in row] for row in laws]


HAND = {
    "shaped_reward": dict(
        derivation=lines("""
        Eq. 5, r2 + alpha (r2 - r1), with alpha = 10, for all four (r1, r2):
        (0, 0): 0 + 0 = 0; (0, 1): 1 + 10 = 11; (1, 0): 0 - 10 = -10; (1, 1): 1 + 0 = 1.
        """),
        inputs=dict(alpha=10.0, reward1=[0.0, 0.0, 1.0, 1.0], reward2=[0.0, 1.0, 0.0, 1.0]),
        outputs=dict(stage2_return2=[0.0, 11.0, -10.0, 1.0]),
    ),
    "leave_one_out": dict(
        derivation=lines("""
        Two problems of three rows each. The first has rewards 1 0 0. The means of the others:
        (0 + 0) / 2 = 0, (1 + 0) / 2 = 0.5, (1 + 0) / 2 = 0.5. What is left: 1, -0.5, -0.5.
        The second has rewards 1 1 1: each mean is 1, and 0 is left.
        """),
        inputs=dict(G=3, reward2=[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
        outputs=dict(
            stage1_baseline2=[0.0, 0.5, 0.5, 1.0, 1.0, 1.0],
            stage1_advantage2=[1.0, -0.5, -0.5, 0.0, 0.0, 0.0],
        ),
    ),
    "after": dict(
        derivation=lines("""
        What comes later, the entry itself not counted: 2 + 4 = 6; 4; 0.
        """),
        inputs=dict(x=[[1.0, 2.0, 4.0]]),
        outputs=dict(after=[[6.0, 4.0, 0.0]]),
    ),
    "three_token_kl": dict(
        derivation=lines("""
        Policy p = (0.8, 0.1, 0.1), base q = (0.4, 0.2, 0.4), so that
        ln(p / q) = (1, -1, -2) ln 2. KL(p || q) = (0.8 - 0.1 - 0.2) ln 2 = 0.5 ln 2 = 0.34657.
        (The other way round: (-0.4 + 0.2 + 0.8) ln 2 = 0.6 ln 2, which is wrong.)
        k1 of token 0 is ln 2 = 0.69315, of token 2 it is -2 ln 2 = -1.3863.
        """),
        inputs=dict(law=[[0.8, 0.1, 0.1]] * 2, ref_law=[[0.4, 0.2, 0.4]] * 2, tokens=[0, 2]),
        outputs=dict(kl_token_exact=[0.5 * LN2] * 2, kl_token_k1=[LN2, -2 * LN2]),
    ),
    "two_rows": dict(
        derivation=lines("""
        One problem, G = 2, prompt (2), instruction (0), end of turn 1, temperature 2. Row 0
        answers (0, 1), then (1): wrong, then right. Row 1 answers (1), then (1): right, then
        wrong. Row 1's laws are the base's: no KL. With u = logits / 2, the law is softmax(u).

        Row 0, law p, base q, token y, score e_y - p, slope p (ln(p / q) - KL):
        s = 0: p = (.8, .1, .1), q = (.4, .2, .4), y = 0, ln(p / q) = (1, -1, -2) ln 2,
          KL 0.5 ln 2, score (.2, -.1, -.1), slope (.4, -.15, -.25) ln 2
        s = 1: p = (1, 4, 1) / 6, q = (4, 1, 1) / 6, y = 1, ln(p / q) = (-2, 2, 0) ln 2,
          KL ln 2, score (-1, 2, -1) / 6, slope (-1/2, 2/3, -1/6) ln 2
        s = 3: p = (.2, .4, .4), q = (.4, .2, .4), y = 1, ln(p / q) = (-1, 1, 0) ln 2,
          KL 0.2 ln 2, score (-.2, .6, -.4), slope (-.24, .32, -.08) ln 2
        exact: the slope, plus the score times the KL of the attempt's later tokens:
          s = 0: (.4, -.15, -.25) + 1 (.2, -.1, -.1) = (.6, -.25, -.35); s = 1, 3: the slope.
          KL1 = 1.5 ln 2 = 1.0397, KL2 = 0.2 ln 2 = 0.13863.
        k1: the score times ln(p / q) of this token and the attempt's later ones, 1 + 2 = 3:
          s = 0: (.6, -.3, -.3); s = 1, with 2: (-1/3, 2/3, -1/3); s = 3, with 1: the score.
          KL1 = 3 ln 2 = 2.0794, KL2 = ln 2 = 0.69315.
        Row 1, no KL: score at s = 0 (-.5, .75, -.25), at s = 2 (-.25, .5, -.25).

        Stage I: weights beta1 + beta2 = 0.4 and beta1 = 0.1; advantages of attempt 2: 1, -1.
          Loss of row 0: (0.4 * 1.5 + 0.1 * 0.2) ln 2 = 0.62 ln 2 = 0.42975,
          with k1 (0.4 * 3 + 0.1 * 1) ln 2 = 1.3 ln 2 = 0.90109.
        Stage II: weights 0.1 and 0.1; alpha = 2, returns 0, 1 of attempt 1 and 1 + 2 = 3,
          0 - 2 = -2 of attempt 2; advantages -1, 1 and 5, -5.
          Loss of row 0: 0.1 * (1.5 + 0.2) ln 2 = 0.17 ln 2 = 0.11784,
          with k1 0.1 * (3 + 1) ln 2 = 0.4 ln 2 = 0.27726.
        Gradient by the logits, of the mean over two rows, at temperature 2:
          (weight * KL's - advantage * score) / 2 / 2. Stage I, exact, row 0, s = 3, v = 1:
          (0.1 * 0.32 ln 2 - 1 * 0.6) / 4 = -0.14445. Stage II there:
          (0.1 * 0.32 ln 2 - 5 * 0.6) / 4 = -0.74445. Stage II, exact, row 0, s = 0, v = 0:
          (0.1 * 0.6 ln 2 + 1 * 0.2) / 4 = 0.060397.
        """),
        inputs=dict(
            prompts=[[2]], instruction=[0], end_id=1, temperature=2.0, G=2,
            alpha=2.0, beta1=0.1, beta2=0.3, offline1=[False, False],
            attempts1=[[0, 1], [1]], attempts2=[[1], [1]], reward1=[0.0, 1.0], reward2=[1.0, 0.0],
            logits=logits_of(LAWS), ref_logits=logits_of(REF_LAWS),
        ),
        outputs=dict(
            ids=[[2, 0, 1, 0, 1], [2, 1, 0, 1, 0]],
            length=[5, 4],
            turn=[[1, 1, 0, 2], [1, 0, 2, 0]],
            token_turn=[[1, 1, 0, 2], [1, 0, 2, 0]],
            stage1_token_advantage=[[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, -1.0, 0.0]],
            stage2_token_advantage=[[-1.0, -1.0, 0.0, 5.0], [1.0, 0.0, -5.0, 0.0]],
            stage1_token_kl_weight=[[0.4, 0.4, 0.0, 0.1], [0.4, 0.0, 0.1, 0.0]],
            stage2_token_kl_weight=[[0.1, 0.1, 0.0, 0.1], [0.1, 0.0, 0.1, 0.0]],
            kl1_exact=[1.5 * LN2, 0.0], kl2_exact=[0.2 * LN2, 0.0],
            kl1_k1=[3 * LN2, 0.0], kl2_k1=[LN2, 0.0],
            **{f"{stage}_advantage{k}": ADVANTAGE[stage][k] for stage in ADVANTAGE for k in (1, 2)},
            stage1_exact_loss=[0.62 * LN2, 0.0], stage2_exact_loss=[0.17 * LN2, 0.0],
            stage1_k1_loss=[1.3 * LN2, 0.0], stage2_k1_loss=[0.4 * LN2, 0.0],
            **{f"{s}_{kl}_gradient": by_hand(s, kl) for s in ADVANTAGE for kl in KL_SLOPE},
        ),
    ),
    "metrics_by_hand": dict(
        derivation=lines("""
        Five problems (r1, r2): (1, 1) (1, 0) (0, 1) (0, 0) (0, 1). Right first: 2 of 5 = 0.4;
        right second: 3 of 5 = 0.6; delta 0.2. Wrong to right: 2 of 5 = 0.4; right to wrong:
        1 of 5 = 0.2; 0.4 - 0.2 = 0.2. Repaired: 2 of 3 wrong; spoilt: 1 of 2 right.
        """),
        inputs=dict(right1=[1, 1, 0, 0, 0], right2=[1, 0, 1, 0, 1]),
        outputs=dict(n=5, acc_t1=0.4, acc_t2=0.6, delta=0.2, delta_i_to_c=0.4, delta_c_to_i=0.2,
                     repair_rate=2 / 3, spoil_rate=0.5),
    ),
}  # fmt: skip

# --- tolerances -----------------------------------------------------------------------------------

TOLERANCE = {
    "float64": dict(exact=0, logits=1e-9, logp=1e-9, decoded=0, drawn=1e-9, reward=1e-9, kl=1e-9,
                    loss=1e-9, gradient=1e-9, weights=1e-9, metrics=1e-9),
    "float32": dict(exact=0, logits=2e-5, logp=2e-5, decoded=0, drawn=2e-5, reward=1e-6, kl=2e-5,
                    loss=2e-5, gradient=2e-5, weights=5e-5, metrics=1e-6),
    "bfloat16": dict(exact=0, logits=0.05, logp=0.05, decoded=None, drawn=None, reward=1e-6,
                     kl=0.05, loss=0.05, gradient=0.05, weights=0.2, metrics=1e-6),
}  # fmt: skip


def measured(program, weights: dict, cases: dict, dtype: str) -> dict[str, float]:
    """Return the largest error of the shipped code in a dtype, for each kind of quantity."""
    found = check_port.check(results(program, weights, cases, dtype), cases)
    worst = {}
    for (name, _), verdict in found.items():
        kind = check_port.ORDER[check_port.PLACE[name]].kind
        if verdict:
            worst[kind] = max(worst.get(kind, 0.0), verdict.error)
    return {kind: float(f"{error:.2g}") for kind, error in worst.items()}


# --- files ----------------------------------------------------------------------------------------


def rounded(x):
    """Return nested numbers with 12 significant digits, and 0 for what is but rounding."""
    if isinstance(x, dict):
        return {key: rounded(y) for key, y in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(y) for y in x]
    return (float(f"{x:.12g}") if abs(x) > 1e-14 else 0.0) if isinstance(x, float) else x


def ordered(outputs: dict) -> dict:
    """Return rounded outputs in order of dependency."""
    return {q.name: rounded(outputs[q.name]) for q in check_port.ORDER if q.name in outputs}


def written(x, indent: int = 0, before: int = 0) -> str:
    """Return JSON of at most 100 columns: on one line what fits there, lists of numbers filled.

    Args:
      indent: of the lines that follow the first. before: columns that the first has already.
    """
    line = json.dumps(x)
    if len(line) + before < 100 or not isinstance(x, (dict, list)):
        return line
    end, margin = "\n" + " " * indent, " " * (indent + 1)
    if isinstance(x, list) and not any(isinstance(y, (dict, list, str)) for y in x):
        return "[" + textwrap.fill(line[1:-1], 99, initial_indent=" " * (before + 1),
                                   subsequent_indent=margin).lstrip() + "]"  # fmt: skip
    if isinstance(x, list):
        items, (left, right) = [written(y, indent + 1, indent + 1) for y in x], "[]"
    else:
        names, (left, right) = [f"{json.dumps(key)}: " for key in x], "{}"
        items = [name + written(x[key], indent + 1, indent + 1 + len(name))
                 for key, name in zip(x, names, strict=True)]  # fmt: skip
    return f"{left}\n{margin}" + f",\n{margin}".join(items) + f"{end}{right}"


def make(program) -> dict[str, dict]:
    """Return the content of each golden file, by its name."""
    weights = {name: draw_weights(program, name) for name in ("policy", "base")}
    cases = {}
    for name, case in STEPS.items():
        inputs = case | draw_noise(name)
        sample = sampled(program, models(program, weights, "float64"), inputs, case["temperature"])
        inputs |= {f"attempts{k}": program.rollout.written(sample, k) for k in (1, 2)}
        outputs = step(program, weights, inputs, "float64")
        cases[name] = {"inputs": inputs, "outputs": ordered(outputs)}
    for name, (right1, right2) in TABLES.items():
        inputs = {"right1": right1, "right2": right2}
        cases[name] = {"inputs": inputs, "outputs": ordered(from_table(inputs))}
    cases |= rounded(HAND)
    return {
        "weights": {
            "about": ABOUT["weights"],
            "config": CONFIG,
            "rotary": rounded(rotary(program)),
            **weights,
        },
        "pairs": {"about": ABOUT["steps"], "cases": {"pairs": cases["pairs"]}},
        "triples": {"about": ABOUT["steps"], "cases": {"triples": cases["triples"]}},
        "metrics": {"about": ABOUT["metrics"], "cases": {name: cases[name] for name in TABLES}},
        "hand": {"about": ABOUT["hand"], "cases": {name: cases[name] for name in HAND}},
        "tolerances": {
            "about": ABOUT["tolerances"],
            "tolerance": TOLERANCE,
            "measured": {d: measured(program, weights, cases, d) for d in check_port.DTYPES},
        },
    }


def main():
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, content in make(truth.load_program()).items():
        path = FOLDER / f"{name}.json"
        path.write_text(written(content) + "\n")
        print(f"{path.stat().st_size:>7} bytes  {path}")


if __name__ == "__main__":
    main()
