"""The truth that the losses are held against: a two-turn policy small enough to enumerate.

Vocabulary of three tokens, attempts of at most two: 7 attempts a turn, 49 trajectories. The policy
is the shipped transformer in float64 with 2 blocks and about 300 weights. `Oracle` sums both
objectives exactly, prefix by prefix, without rows, masks, padding, log-prob tensors or autograd,
and differentiates them numerically. `expected_gradient` sends all trajectories (all pairs of them,
for leave-one-out with G = 2) through the shipped code and weights each by its probability. There is
no sampling anywhere, so nothing is tolerated but rounding.

The objective is the paper's with gamma = 0: attempt 2's terms draw attempt 1 from a *frozen* copy
of the policy (arXiv 2409.12917v2, appendix A.2). Where attempt 1 is made to earn part of attempt
2's return ("gamma") or the bonus ("leak"), its terms draw attempt 2 from a frozen copy, likewise.
"""

import itertools
import math
import sys
import types
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PROMPT, INSTRUCTION, END, LIMIT, V = (0, 2), (2, 0), 1, 2, 3
RIGHT = {(0, 1), (2, 0), (1,)}  # the attempts that earn 1
ALPHA, BETA1, BETA2, GAMMA, TEMPERATURE = 3.0, 0.3, 0.7, 0.6, 0.8
ATTEMPTS = [(1,), *((a, b) for a in (0, 2) for b in range(V))]
PAIRS = list(itertools.product(ATTEMPTS, ATTEMPTS))


def load_program(*edits: tuple[str, str, str]) -> types.SimpleNamespace:
    """Return fresh copies of the modules, after edits (file, old, new) of their source text.

    Raises:
      AssertionError: an edit's old text is not in the file exactly once.
    """
    names = ("verify", "model", "rollout", "run", "score")
    before = {name: sys.modules.pop(name, None) for name in names}
    try:
        for name in names:
            source = (ROOT / f"{name}.py").read_text()
            for file, old, new in edits:
                if file == f"{name}.py":
                    assert source.count(old) == 1, f"{file} has {source.count(old)} of {old!r}"
                    source = source.replace(old, new)
            module = types.ModuleType(name)
            module.__file__ = str(ROOT / f"{name}.py")
            sys.modules[name] = module
            exec(compile(source, f"{name}.py", "exec"), module.__dict__)
        return types.SimpleNamespace(**{name: sys.modules[name] for name in names})
    finally:
        for name in names:
            sys.modules.pop(name, None)
            if before[name] is not None:
                sys.modules[name] = before[name]


def tiny_model(program, seed: int):
    """Return a float64 model whose weights are large enough to make every token matter."""
    config = program.model.GPTConfig(
        V, n_layer=2, n_head=2, n_kv_head=1, d_model=4, d_ff=3, max_positions=8, qkv_bias=True
    )
    model = program.model.GPT(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(weight + 0.7 * noise if weight.dim() == 1 else 0.7 * noise)
    return model


class Oracle:
    """Exact objectives of both stages and their variants, and their numerical gradients."""

    def __init__(self):
        program = load_program()
        self.policy, self.base = tiny_model(program, 1), tiny_model(program, 2)
        self.contexts = [PROMPT] + [PROMPT + y1 + INSTRUCTION for y1 in ATTEMPTS]
        self.p0 = self.laws(self.policy)
        self.ref = self.laws(self.base)
        self.gradients = self.differentiate()

    @torch.no_grad()
    def laws(self, model) -> dict:
        """Return {context: {attempt: probability}}, from prefixes of one length at a time."""
        prefixes = self.contexts + [(*context, a) for context in self.contexts for a in (0, 2)]
        next_token = {}
        for _, same in itertools.groupby(sorted(prefixes, key=len), key=len):
            same = list(same)
            for prefix, row in zip(same, model(torch.tensor(same))[:, -1].tolist(), strict=True):
                weights = [math.exp(x / TEMPERATURE) for x in row]
                next_token[prefix] = [w / sum(weights) for w in weights]
        return {
            context: {
                y: next_token[context][y[0]]
                * (next_token[(*context, y[0])][y[1]] if len(y) == 2 else 1.0)
                for y in ATTEMPTS
            }
            for context in self.contexts
        }

    def objectives(self) -> dict[str, float]:
        """Return J of each objective at the policy's present weights."""
        p = self.laws(self.policy)

        def kl(context):
            law, ref = p[context], self.ref[context]
            return sum(law[y] * math.log(law[y] / ref[y]) for y in ATTEMPTS)

        kl1 = kl(PROMPT)
        stage1, stage2 = -(BETA1 + BETA2) * kl1, -BETA1 * kl1
        single_turn = sum(p[PROMPT][y] for y in RIGHT) - BETA1 * kl1
        gamma = leak = 0.0  # what attempt 1 earns besides its own reward
        for y1 in ATTEMPTS:
            right1, context2 = float(y1 in RIGHT), PROMPT + y1 + INSTRUCTION
            stage2 += p[PROMPT][y1] * right1
            frozen = self.p0[PROMPT][y1]
            stage1 -= frozen * BETA1 * kl(context2)
            stage2 -= frozen * BETA1 * kl(context2)
            for y2 in ATTEMPTS:
                right2, weight = float(y2 in RIGHT), frozen * p[context2][y2]
                stage1 += weight * right2
                stage2 += weight * (right2 + ALPHA * (right2 - right1))
                weight = p[PROMPT][y1] * self.p0[context2][y2]
                gamma += weight * GAMMA * (right2 + ALPHA * (right2 - right1))
                leak += weight * ALPHA * (right2 - right1)
        return {"stage1": stage1, "stage2": stage2, "single_turn": single_turn,
                "gamma": stage2 + gamma, "leak": stage2 + leak}  # fmt: skip

    @torch.no_grad()
    def differentiate(self, h: float = 2e-5) -> dict:
        """Return the objectives' gradients by five-point differences, error of order h^4."""
        rows = {}
        for weight in self.policy.parameters():
            flat = weight.view(-1)
            for i in range(len(flat)):
                value, j = flat[i].item(), {}
                for k in (-2, -1, 1, 2):
                    flat[i] = value + k * h
                    j[k] = self.objectives()
                flat[i] = value
                for s in j[1]:
                    slope = (j[-2][s] - 8 * j[-1][s] + 8 * j[1][s] - j[2][s]) / (12 * h)
                    rows.setdefault(s, []).append(slope)
        return {s: torch.tensor(slopes, dtype=torch.float64) for s, slopes in rows.items()}


def as_turn(program, attempts):
    """Return attempts as the sampler would, with *nonsense* behind their ends."""
    ids = torch.tensor([[*y, 0, 2][: LIMIT + 1] for y in attempts])
    n = torch.tensor([len(y) for y in attempts])
    cut = torch.tensor([y[-1] != END for y in attempts])
    return program.rollout.Turn(ids, n, torch.zeros(ids.shape, dtype=torch.float64), cut)


def all_rows(program, trajectories):
    """Return trajectories (y1, y2) as one shipped Rollout, and their rewards."""
    first, second = zip(*trajectories, strict=True)

    def constant(ids):
        return torch.tensor([ids] * len(first)), torch.full((len(first),), len(ids))

    turns = [as_turn(program, first), as_turn(program, second)]
    r = program.rollout.assemble(constant(PROMPT), turns, constant(INSTRUCTION))
    rewards = [torch.tensor([float(y in RIGHT) for y in ys]).double() for ys in (first, second)]
    return r, *rewards


def expected_gradient(program, oracle: Oracle, stage: str, kl: str) -> torch.Tensor:
    """Return minus the expected gradient of the shipped loss over all pairs of trajectories."""
    policy, base = tiny_model(program, 1), tiny_model(program, 2)
    p = [oracle.p0[PROMPT][y1] * oracle.p0[PROMPT + y1 + INSTRUCTION][y2] for y1, y2 in PAIRS]
    p = torch.tensor(p, dtype=torch.float64)
    r, reward1, reward2 = all_rows(program, PAIRS)
    logp, kl1, kl2 = program.score.score_terms(policy, base, r, TEMPERATURE, kl)
    pairs = torch.cartesian_prod(torch.arange(len(PAIRS)), torch.arange(len(PAIRS)))
    i = pairs.reshape(-1)  # two rows side by side are a group
    terms = (logp[i], r.mask2_BS[i], kl1[i], kl2[i])
    if stage == "stage1":
        loss = program.score.loss_stage1(*terms, reward2[i], 2, BETA1, BETA2)
    elif stage == "single_turn":
        loss = program.score.loss_attempt(logp[i], r.mask1_BS[i], kl1[i], reward1[i], 2, BETA1)
    else:
        mask1 = program.score.own_mask1(r)[i]
        loss = program.score.loss_stage2(
            logp[i], mask1, *terms[1:], reward1[i], reward2[i], 2, ALPHA, BETA1,
            gamma=GAMMA if stage == "gamma" else 0.0, leak=stage == "leak",
        )  # fmt: skip
    weight = p[pairs[:, 0]] * p[pairs[:, 1]]
    (loss.view(-1, 2).mean(dim=1) * weight).sum().backward()
    return -torch.cat([w.grad.reshape(-1) for w in policy.parameters()])


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return |found - truth| / |truth|."""
    return ((found - truth).norm() / truth.norm()).item()
