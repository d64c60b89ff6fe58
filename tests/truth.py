"""The truth that the losses are held against: a two-turn policy small enough to enumerate.

Vocabulary of three tokens, attempts of at most two: 7 attempts a turn, 49 trajectories. The policy
is the shipped transformer in float64 with 2 blocks and about 300 weights. `Oracle` sums the
objectives exactly, prefix by prefix, without rows, masks, padding, log-prob tensors or autograd,
and differentiates them numerically. `expected_gradient` lets the shipped sampler write all
trajectories, each from numbers that make it do so, sends all pairs of them (groups of G = 2)
through the shipped code and weights each pair by its probability. Nothing is left to chance, so
nothing is tolerated but rounding.

The objective is the paper's with gamma = 0: attempt 2's terms draw attempt 1 from a *frozen* copy
of the policy (arXiv 2409.12917v2, appendix A.2). Where attempt 1 is made to earn the bonus
("leak"), its terms draw attempt 2 from a frozen copy, likewise.
"""

import itertools
import math
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

ROOT = Path(__file__).parent.parent
PROMPT, INSTRUCTION, END, LIMIT, V = (0, 2), (2, 0), 1, 2, 3
RIGHT = {(0, 1), (1,)}  # the attempts that earn 1
ALPHA, BETA1, BETA2, TEMPERATURE = 3.0, 0.3, 0.7, 0.8
SETTINGS = SimpleNamespace(group=2, alpha=ALPHA, beta1=BETA1, beta2=BETA2)
ATTEMPTS = [(1,), *((a, b) for a in (0, 2) for b in range(V))]
PAIRS = list(itertools.product(ATTEMPTS, ATTEMPTS))


def load_program(*edits: tuple[str, str, str]) -> SimpleNamespace:
    """Return fresh copies of the modules, after edits (file, old, new) of their source text.

    Raises:
      AssertionError: an edit's old text is not in the file exactly once.
    """
    names = ("verify", "model", "rollout", "score")
    before = {name: sys.modules.pop(name, None) for name in names}
    try:
        for name in names:
            source = (ROOT / f"{name}.py").read_text()
            for file, old, new in edits:
                if file == f"{name}.py":
                    assert source.count(old) == 1, f"{file} has {source.count(old)} of {old!r}"
                    source = source.replace(old, new)
            module = ModuleType(name)
            module.__file__ = str(ROOT / f"{name}.py")
            sys.modules[name] = module
            exec(compile(source, f"{name}.py", "exec"), module.__dict__)
        return SimpleNamespace(**{name: sys.modules[name] for name in names})
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


def tiny_task(program):
    """Return the task whose every problem is PROMPT, and whose right attempts are RIGHT's."""

    def verifier(answer, gold):
        return program.verify.Verdict(int(answer in {str(y[:-1]) for y in RIGHT}), "")

    return program.rollout.Task(
        draw=lambda n, split, rng: [program.verify.Problem("", "", verifier)] * n,
        documents=None,
        encode=lambda text: list(PROMPT),
        decode=lambda ids: str(tuple(ids)),
        instruction=list(INSTRUCTION),
        end_id=END,
        vocab_size=V,
        max_new=LIMIT,
        max_positions=8,
    )


class Oracle:
    """Exact objectives of both stages and of other methods, and their numerical gradients."""

    def __init__(self):
        program = load_program()
        self.policy, self.base = tiny_model(program, 1), tiny_model(program, 2)
        self.contexts = [PROMPT] + [PROMPT + y1 + INSTRUCTION for y1 in ATTEMPTS]
        self.next0 = self.next_tokens(self.policy)
        self.p0 = self.laws(self.policy)
        self.ref = self.laws(self.base)

    @torch.no_grad()
    def next_tokens(self, model) -> dict:
        """Return {prefix: probabilities of the next token}, prefixes of one length at a time."""
        prefixes = self.contexts + [(*context, a) for context in self.contexts for a in (0, 2)]
        found = {}
        for _, same in itertools.groupby(sorted(prefixes, key=len), key=len):
            same = list(same)
            for prefix, row in zip(same, model(torch.tensor(same))[:, -1].tolist(), strict=True):
                weights = [math.exp(x / TEMPERATURE) for x in row]
                found[prefix] = [w / sum(weights) for w in weights]
        return found

    def laws(self, model) -> dict:
        """Return {context: {attempt: probability}}."""
        p = self.next_tokens(model)
        return {
            context: {
                y: p[context][y[0]] * (p[(*context, y[0])][y[1]] if len(y) == 2 else 1.0)
                for y in ATTEMPTS
            }
            for context in self.contexts
        }

    def probability(self, y1, y2) -> float:
        """Return the probability of a trajectory under the policy's first weights."""
        return self.p0[PROMPT][y1] * self.p0[PROMPT + y1 + INSTRUCTION][y2]

    def objectives(self) -> dict[str, float]:
        """Return J of each objective at the policy's present weights."""
        p = self.laws(self.policy)

        def kl(context):
            law, ref = p[context], self.ref[context]
            return sum(law[y] * math.log(law[y] / ref[y]) for y in ATTEMPTS)

        kl1 = kl(PROMPT)
        stage1, stage2 = -(BETA1 + BETA2) * kl1, -BETA1 * kl1
        single_turn = sum(p[PROMPT][y] for y in RIGHT) - BETA1 * kl1
        leak = 0.0  # what attempt 1 earns besides its own reward
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
                leak += weight * ALPHA * (right2 - right1)
        return {"stage1": stage1, "stage2": stage2, "single_turn": single_turn,
                "leak": stage2 + leak}  # fmt: skip

    @cached_property
    @torch.no_grad()
    def gradients(self) -> dict:
        """The objectives' gradients, by five-point differences with an error of order h^4."""
        rows, h = {}, 2e-5
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

    def numbers(self, context, attempt, where: float) -> list[float]:
        """Return numbers that make a sampler write an attempt: of each token the one that lies at
        `where`, from 0 to 1, in the token's share of [0, 1); and any for what comes no more."""
        found = []
        for i, token in enumerate(attempt):
            p = self.next0[context + attempt[:i]]
            found.append(sum(p[:token]) + where * p[token])
        return found + [0.5] * (LIMIT - len(attempt))


def all_rows(program, oracle: Oracle, policy, where: float = 0.5):
    """Return PAIRS as one shipped Rollout, written by the shipped sampler."""
    noise_BKN = [
        [oracle.numbers(PROMPT, y1, where), oracle.numbers(PROMPT + y1 + INSTRUCTION, y2, where)]
        for y1, y2 in PAIRS
    ]
    noise_KBN = torch.tensor(noise_BKN, dtype=torch.float64).transpose(0, 1)
    task, prompts = tiny_task(program), [list(PROMPT)]
    return program.rollout.rollout(policy, task, prompts, noise_KBN, TEMPERATURE)


def expected_gradient(
    program, oracle: Oracle, stage: Callable, token_terms: Callable | None = None
) -> torch.Tensor:
    """Return minus the expected gradient of the shipped loss over all pairs of trajectories.

    stage: such as `score.stage1`, called with rewards and SETTINGS. token_terms: None is the
    shipped one, with the exact KL.
    """
    policy, base = tiny_model(program, 1), tiny_model(program, 2)
    r = all_rows(program, oracle, policy)
    rewards = [[float(y in RIGHT) for y in attempts] for attempts in zip(*PAIRS, strict=True)]
    reward_KB = torch.tensor(rewards, dtype=torch.float64)
    terms = token_terms or program.rollout.token_terms
    logp_BS, kl_BS = terms(policy, base, r, TEMPERATURE)
    p = torch.tensor([oracle.probability(*pair) for pair in PAIRS], dtype=torch.float64)
    pairs = torch.cartesian_prod(torch.arange(len(PAIRS)), torch.arange(len(PAIRS)))
    i = pairs.reshape(-1)  # two rows side by side are a group
    paid_and_held = stage(reward_KB[:, i], SETTINGS)
    loss = program.score.loss(logp_BS[i], kl_BS[i], r.turn_BS[i], *paid_and_held)
    weight = p[pairs[:, 0]] * p[pairs[:, 1]]
    (loss.view(-1, 2).mean(dim=1) * weight).sum().backward()
    return -torch.cat([w.grad.reshape(-1) for w in policy.parameters()])


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return |found - truth| / |truth|."""
    return ((found - truth).norm() / truth.norm()).item()
