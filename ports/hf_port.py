"""SCoRe in a loop of your own: any causal language model of transformers, and plain torch.

The plainest port: rows, log-probabilities, credit, loss and a step, with nothing of score.py. Only
what checks it, and the toy that it trains on, come from this repository.

    python ports/hf_port.py results.json       # the golden case `triples`, in float32
    python ports/check_port.py results.json --dtype float32
    python ports/hf_port.py                    # five steps of Stage II on the toy

Dimension key: B rows (rollouts), G of each problem side by side; T tokens, S = T - 1; V vocabulary.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

# --- the port -------------------------------------------------------------------------------------


def pad(rows):
    """Return lists of numbers as a tensor [B, longest], with zeros behind."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def write(model, contexts, end, max_new, temperature):
    """Return an attempt after each context: a context at a time, without padding."""
    settings = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    settings |= dict(max_new_tokens=max_new, eos_token_id=end, pad_token_id=end)
    made = [model.generate(torch.tensor([ids]), **settings)[0] for ids in contexts]
    return [row[len(ids) :].tolist() for row, ids in zip(made, contexts, strict=True)]


def make_rows(prompts, attempts1, instruction, attempts2):
    """Return ids [B, T] of `x1 y1 p1 y2` and the turn [B, S] of each token but the first."""
    ids, turns = [], []
    for x1, y1, y2 in zip(prompts, attempts1, attempts2, strict=True):
        ids.append(x1 + y1 + instruction + y2)
        turns.append([0] * len(x1) + [1] * len(y1) + [0] * len(instruction) + [2] * len(y2))
    return pad(ids), pad([turn[1:] for turn in turns])


def others(reward_B, G):
    """Return the mean reward of the other rows of each row's problem."""
    reward_PG = reward_B.view(-1, G)
    return ((reward_PG.sum(dim=1, keepdim=True) - reward_PG) / (G - 1)).view(-1)


def credit(stage, turn_BS, r1_B, r2_B, c):
    """Return each token's advantage and KL weight. c: G, alpha, beta1, beta2."""
    if stage == "stage1":
        returns, weights = (0 * r1_B, r2_B), (c["beta1"] + c["beta2"], c["beta1"])
    else:
        returns, weights = (r1_B, r2_B + c["alpha"] * (r2_B - r1_B)), (c["beta1"], c["beta1"])
    advantage_BS, weight_BS = (torch.zeros(turn_BS.shape) for _ in range(2))
    for k, return_B, weight in zip((1, 2), returns, weights, strict=True):
        mine_BS, paid_B = (turn_BS == k).float(), return_B - others(return_B, c["G"])
        advantage_BS += mine_BS * paid_B[:, None]
        weight_BS += mine_BS * weight
    return advantage_BS, weight_BS


def losses(logits_BSV, ref_BSV, ids_BT, turn_BS, advantage_BS, weight_BS, temperature):
    """Return each row's loss. Padding stands behind, where a causal model does not see it."""
    logp_BSV, ref_logp_BSV = (x.div(temperature).log_softmax(-1) for x in (logits_BSV, ref_BSV))
    logp_BS = logp_BSV.gather(-1, ids_BT[:, 1:, None])[..., 0]
    cost_BS = weight_BS * (logp_BSV.exp() * (logp_BSV - ref_logp_BSV)).sum(-1)
    later_BS = torch.zeros(cost_BS.shape)
    for k in (1, 2):
        mine_BS = cost_BS.detach() * (turn_BS == k)
        later_BS += (turn_BS == k) * (mine_BS.sum(1, keepdim=True) - mine_BS.cumsum(1))
    return (cost_BS - logp_BS * (advantage_BS - later_BS) * (turn_BS > 0)).sum(dim=1)


def step(policy, base, optimizer, rows, rewards, stage, c):
    """Take one step on sampled rows, graded; return the mean loss's gradient's norm."""
    ids_BT, turn_BS = rows
    with torch.no_grad():
        ref_BSV = base(ids_BT[:, :-1]).logits
    given = ids_BT, turn_BS, *credit(stage, turn_BS, *rewards, c), c["temperature"]
    optimizer.zero_grad()
    losses(policy(ids_BT[:, :-1]).logits, ref_BSV, *given).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return norm.item()


# --- the golden case, and the toy -----------------------------------------------------------------


def results():
    """Return what the port makes of the inputs of the golden case `triples`."""
    from ports import make_golden
    from ports.check_port import contract
    from scale import pretrained

    case, pair = contract()["triples"]["inputs"], []
    with tempfile.TemporaryDirectory() as place:
        for name, model in zip(("policy", "base"), make_golden.models(torch.float32), strict=True):
            pretrained.save(model, f"{place}/{name}")
            pair.append(AutoModelForCausalLM.from_pretrained(f"{place}/{name}"))
    prompts = [prompt for prompt in case["prompts"] for _ in range(case["G"])]
    attempts = case["attempts1"], case["instruction"], case["attempts2"]
    ids_BT, turn_BS = make_rows(prompts, *attempts)
    rewards = [torch.tensor(case[f"reward{k}"]).float() for k in (1, 2)]
    logits_BSV, ref_BSV = (model(ids_BT[:, :-1]).logits for model in pair)
    found, weights = dict(ids=ids_BT.tolist(), turn=turn_BS.tolist()), [*pair[0].parameters()]
    for stage in ("stage1", "stage2"):
        paid_and_held = credit(stage, turn_BS, *rewards, case)
        for name, x in zip(("advantage", "kl_weight"), paid_and_held, strict=True):
            found[f"{stage}_token_{name}"] = x.tolist()
        given = ids_BT, turn_BS, *paid_and_held, case["temperature"]
        mean = losses(logits_BSV, ref_BSV.detach(), *given).mean()
        by_logits, *rest = torch.autograd.grad(mean, [logits_BSV, *weights], retain_graph=True)
        found[f"{stage}_exact_gradient"] = by_logits.tolist()
        found[f"{stage}_exact_grad_norm"] = torch.stack([x.norm() for x in rest]).norm().item()
    return {"triples": found}


def toy(steps):
    """Yield the gradient's norm and both mean rewards of steps of Stage II, from random weights."""
    import numpy as np

    import score
    import verify
    from rollout import signs
    from scale import pretrained

    c, rng = score.Config(batch=16), np.random.default_rng(0)
    task, names = signs(c), ("temperature", "alpha", "beta1", "beta2")
    with tempfile.TemporaryDirectory() as place:
        pretrained.save(score.new_run(c, Path(place)).policy, f"{place}/model")
        policy, base = (AutoModelForCausalLM.from_pretrained(f"{place}/model") for _ in range(2))
    optimizer = torch.optim.Adam(policy.parameters(), c.lr)
    for _ in range(steps):
        drawn = [x for x in task.draw(c.batch // c.group, "train", rng) for _ in range(c.group)]
        prompts, rewards = [task.encode(x.prompt) for x in drawn], []
        ends = task.end_id, task.max_new, c.temperature
        y1s = write(policy, prompts, *ends)
        contexts = [x1 + y1 + task.instruction for x1, y1 in zip(prompts, y1s, strict=True)]
        y2s = write(policy, contexts, *ends)
        for attempts in (y1s, y2s):
            texts = [task.decode([x for x in ids if x != task.end_id]) for ids in attempts]
            cut = [ids[-1] != task.end_id for ids in attempts]
            verdicts = map(verify.judge, drawn, texts, cut)
            rewards.append(torch.tensor([float(x.reward) for x in verdicts]))
        rows = make_rows(prompts, y1s, task.instruction, y2s)
        settings = {x: getattr(c, x) for x in names} | dict(G=c.group)
        norm = step(policy, base, optimizer, rows, rewards, "stage2", settings)
        yield norm, *(x.mean().item() for x in rewards)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(results()))
    else:
        for n, (norm, r1, r2) in enumerate(toy(5), start=1):
            print(
                f"step {n}  gradient {norm:.3f}  attempt 1 right {r1:.2f}  attempt 2 right {r2:.2f}"
            )
