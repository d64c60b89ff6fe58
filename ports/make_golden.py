"""Which outputs belong to the inputs of the golden vectors? Computed by the program as it stands.

    python ports/make_golden.py

It writes the outputs into ports/golden/pairs.json, triples.json and metrics.json, whose inputs are
short decimals that stand there: a case is changed or added by its inputs. The models' weights are
in weights.json. The outputs in hand.json are those of the derivations beside them, not of any code.
All is computed in float64, and rounded to 12 significant digits. check_port.py says what each
quantity is, and compares a port's.

Dimension key: B rows, G rows of each problem, side by side; T tokens, S = T - 1 scored positions;
V vocabulary; K attempts, N tokens of one at most.
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the command runs from any folder

import eval as evaluation
import score
from model import GPT, GPTConfig
from ports.check_port import GOLDEN, ORDER, read
from ports.tensors import k1_terms, spread
from rollout import Rollout, Task, make_rows, rollout, token_terms, truncated
from study.methods import offline_rollout

STAGES = {"stage1": score.stage1, "stage2": score.stage2}
FORMS = {"exact": token_terms, "k1": k1_terms}

# --- a case as the program takes it ---------------------------------------------------------------


def models(dtype: torch.dtype) -> list[GPT]:
    """Return policy and base of weights.json."""
    content, found = read(GOLDEN / "weights.json"), []
    for name in ("policy", "base"):
        model = GPT(GPTConfig(**content["config"])).to(dtype)
        weights = {key: torch.tensor(x, dtype=dtype) for key, x in content[name].items()}
        model.load_state_dict(weights)
        found.append(model)
    return found


def credited(case: dict, dtype: torch.dtype) -> dict:
    """Return what each stage says of the rewards: the attempts' advantages, the KLs' weights."""
    names = ("alpha", "beta1", "beta2")
    c = SimpleNamespace(group=case["G"], **{name: case[name] for name in names})
    reward_KB = torch.tensor([case["reward1"], case["reward2"]], dtype=dtype)
    return {name: stage(reward_KB, c) for name, stage in STAGES.items()}


# --- outputs --------------------------------------------------------------------------------------


def rows(case: dict) -> tuple[Rollout, dict]:
    """Return a case's rows, and what is told of them."""
    prompts = [prompt for prompt in case["prompts"] for _ in range(case["G"])]
    attempts = [case["attempts1"], case["attempts2"]]
    r = make_rows(prompts, attempts, case["instruction"], "cpu")
    columns = zip(prompts, *attempts, strict=True)
    length = [sum(map(len, parts)) + len(case["instruction"]) for parts in columns]
    # an attempt that another model wrote is context: none of its tokens was the policy's choice
    offline_B1 = torch.tensor(case["offline1"])[:, None]
    own_BS = r.turn_BS.masked_fill(offline_B1 & (r.turn_BS == 1), 0)
    return r, dict(ids=r.ids_BT, length=torch.tensor(length), turn=r.turn_BS, token_turn=own_BS)


def credit(case: dict, turn_BS, dtype: torch.dtype) -> dict:
    """Return returns, baselines and advantages of both stages, and what they say to each token."""
    reward1_B, reward2_B = (torch.tensor(case[x], dtype=dtype) for x in ("reward1", "reward2"))
    shaped_B, found = score.shaped_reward(reward1_B, reward2_B, case["alpha"]), {}
    returns = {"stage1": {2: reward2_B}, "stage2": {1: reward1_B, 2: shaped_B}}
    for name, (advantage_KB, weight_K) in credited(case, dtype).items():
        for k, advantage_B in enumerate(advantage_KB, start=1):
            found[f"{name}_advantage{k}"] = advantage_B
        for k, return_B in returns[name].items():
            found[f"{name}_return{k}"] = return_B
            found[f"{name}_baseline{k}"] = return_B - advantage_KB[k - 1]
        tensors = spread(turn_BS, advantage_KB, weight_K)
        found[f"{name}_token_advantage"], found[f"{name}_token_kl_weight"] = tensors
    return found


def of_weights(name: str, by_weight: dict) -> dict:
    """Return what is told of a gradient by a model's weights."""
    norms = {key: x.norm() for key, x in by_weight.items()}
    entries = {key: x.reshape(-1)[[0, -1]] for key, x in by_weight.items()}
    norm = torch.stack(list(norms.values())).norm()
    return {f"{name}_grad_norm": norm, f"{name}_grad_norms": norms, f"{name}_grad_entries": entries}


def learned(case: dict, policy, base, dtype: torch.dtype) -> dict:
    """Return what follows from a case's attempts: rows, credit, log-probabilities, KLs, losses.

    policy, base: models, or functions that return logits whatever they are asked.
    """
    r, found = rows(case)
    in_turn_BS, own_BS, temperature = r.turn_BS > 0, found["token_turn"], case["temperature"]
    found |= credit(case, own_BS, dtype)
    logits_BSV, ref_BSV = policy(r.ids_BT[:, :-1]), base(r.ids_BT[:, :-1])
    real_BS = torch.arange(1, r.ids_BT.shape[1]) < found["length"][:, None]
    found |= dict(logits=logits_BSV * real_BS[..., None], ref_logits=ref_BSV * real_BS[..., None])
    pair = [lambda _, wanted_BT, x=x: x[wanted_BT] for x in (logits_BSV, ref_BSV)]
    for name, model in zip(("logp", "ref_logp"), pair, strict=True):
        found[name] = token_terms(model, model, r, temperature)[0] * in_turn_BS
    weights = dict(policy.named_parameters()) if isinstance(policy, GPT) else {}
    for form, terms in FORMS.items():
        logp_BS, kl_BS = terms(*pair, r, temperature)
        found[f"kl_token_{form}"] = kl_BS * in_turn_BS
        found |= {f"kl{k}_{form}": (kl_BS * (own_BS == k)).sum(dim=1) for k in (1, 2)}
        for stage, paid_and_held in credited(case, dtype).items():
            loss_B, name = score.loss(logp_BS, kl_BS, own_BS, *paid_and_held), f"{stage}_{form}"
            at = [logits_BSV, *weights.values()]
            by_logits, *rest = torch.autograd.grad(loss_B.mean(), at, retain_graph=True)
            found |= {f"{name}_loss": loss_B, f"{name}_gradient": by_logits}
            if weights:
                found |= of_weights(name, dict(zip(weights, rest, strict=True)))
    return found


def sampled(case: dict, policy: GPT, base: GPT) -> dict:
    """Return the attempts that the case's numbers draw in each row, and each problem's likeliest
    ones. The base writes attempt 1 where it is to, from the same numbers."""
    names = dict.fromkeys(Task._fields) | {x: case[x] for x in ("instruction", "end_id", "max_new")}
    task, noise_KBN = Task(**names), torch.tensor(case["noise"], dtype=torch.float64)
    given = task, case["prompts"], noise_KBN, case["temperature"]
    n = sum(case["offline1"]) // case["G"]  # the first problems
    r = offline_rollout(policy, base, *given, n) if n else rollout(policy, *given)
    greedy = rollout(policy, *given[:2], noise_KBN[:, :: case["G"]], 0.0)
    found = {f"sampled{k}": r.attempts[k - 1] for k in (1, 2)}
    found |= {f"greedy{k}": greedy.attempts[k - 1] for k in (1, 2)}
    cut_KB = torch.tensor([truncated(r, k, task) for k in (1, 2)])
    return found | dict(truncated=cut_KB.T, sampled_logp=r.logp_BS)


def from_probs(case: dict) -> dict:
    """Return the KL of each token of one attempt, whose probabilities are given."""
    logits = (torch.tensor([case[x]]).double().log() for x in ("probs", "ref_probs"))
    given = [lambda _, wanted_BT, x=x: x[wanted_BT] for x in logits]
    r = make_rows([[0]], [[case["tokens"]]], [], "cpu")
    return {f"kl_token_{form}": terms(*given, r, 1.0)[1][0] for form, terms in FORMS.items()}


def results(case: dict, dtype: str = "float64") -> dict:
    """Return what the program makes of a case's inputs, as plain numbers, in order of dependency.

    dtype: "bfloat16" means autocast: products of matrices, the rest float32.
    """
    wide = torch.float64 if dtype == "float64" else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        if "noise" in case:
            pair = models(wide)
            found = learned(case, *pair, wide) | sampled(case, *pair)
        elif "logits" in case:
            logits = [torch.tensor(case[x], dtype=wide) for x in ("logits", "ref_logits")]
            logits[0].requires_grad_()
            found = learned(case, lambda _: logits[0], lambda _: logits[1], wide)
        elif "probs" in case:
            found = from_probs(case)
        elif "right1" in case:
            right = (np.array(case[x], dtype=bool) for x in ("right1", "right2"))
            found = evaluation.metrics(*right)
        elif "alpha" in case:
            reward_KB = torch.tensor([case["reward1"], case["reward2"]])
            found = dict(stage2_return2=score.shaped_reward(*reward_KB, case["alpha"]))
        else:
            return_B = torch.tensor(case["reward2"])
            advantage_B = score.advantage(return_B, case["G"])
            found = dict(stage1_advantage2=advantage_B, stage1_baseline2=return_B - advantage_B)
    return {name: plain(found[name]) for name in ORDER if name in found}


def plain(x):
    """Return tensors, and what holds them, as nested lists of numbers."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    return x.detach().tolist() if isinstance(x, torch.Tensor) else x


# --- files ----------------------------------------------------------------------------------------


def rounded(x):
    """Return nested numbers with 12 significant digits, and 0 for what is but rounding."""
    if isinstance(x, dict):
        return {key: rounded(y) for key, y in x.items()}
    if isinstance(x, list):
        return [rounded(y) for y in x]
    return (float(f"{x:.12g}") if abs(x) > 1e-14 else 0.0) if isinstance(x, float) else x


def written(content: dict) -> str:
    """Return JSON with the innermost lists of numbers on one line each."""
    text = json.dumps(content, indent=1)
    return re.sub(r'\[\s+([^][{}"]*?)\s+\]', lambda x: f"[{' '.join(x[1].split())}]", text) + "\n"


def make() -> dict[Path, str]:
    """Return the text of each file whose outputs are computed."""
    found = {}
    for name in ("pairs", "triples", "metrics"):
        content = read(GOLDEN / f"{name}.json")
        for case in content["cases"].values():
            case["outputs"] = rounded(results(case["inputs"]))
        found[GOLDEN / f"{name}.json"] = written(content)
    return found


if __name__ == "__main__":
    for path, text in make().items():
        print(f"{len(text):>7} bytes  {path}")
        path.write_text(text)
