"""How does a model learn to correct itself? SCoRe: two stages of two-turn REINFORCE.

Kumar et al., Training Language Models to Self-Correct via Reinforcement Learning,
arXiv 2409.12917v2, ICLR 2025. One policy answers a problem twice; a verifier says 0 or 1 to each.

  Stage I   max E[ r2 - beta1 KL2 - (beta2 + beta1) KL1 ]                      eq. 3
  Stage II  max E[ r1 + r2 + alpha (r2 - r1) - beta1 (KL1 + KL2) ]             eqs. 4 and 5

where every turn is credited with its own terms alone (gamma = 0): attempt 2's reward and bonus
never reach attempt 1's tokens. KLi is the divergence of the policy's attempt i from that of the
frozen *base* model, in both stages. README.md lists what the paper leaves open and what is done.

    python score.py                          # base, Stage I, Stage II, table: minutes on a laptop
    python score.py --method multi_turn      # the control: no Stage I, no bonus
    python score.py --resume runs/score-seed0

Symbols: alpha weight of the progress bonus, beta1 of the KL everywhere, beta2 of Stage I's anchor.
Dimension key: B rows (rollouts), G rows of each problem, side by side; S scored positions;
V vocabulary. The digit after a name is the turn: logp_BS, reward2_B, mask1_BS. Log-probabilities
and KLs are in nats. Functions return one value a row; the training loop takes the mean over rows.
"""

import argparse
import copy
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

import verify
from model import GPT, GPTConfig
from rollout import (
    END,
    REVISE,
    Rollout,
    Turn,
    assemble,
    attempts,
    encode,
    pad,
    rollout,
    token_law,
    toy_encoding,
)

# --- the equations: pure functions of plain tensors -----------------------------------------------


def shaped_reward(reward1_B, reward2_B, alpha: float):
    """Return attempt 2's reward with the progress bonus, r2 + alpha (r2 - r1).

    Source: arXiv 2409.12917v2, eq. 5. Rewards in {0, 1}, so the result is in [-alpha, 1 + alpha].

    With gamma = 0 attempt 1 is given when attempt 2 is drawn, so -alpha r1 is a control variate: it
    has no expected gradient, and in expectation the bonus is a weight of 1 + alpha on r2. Dividing
    by a group's standard deviation would cancel that weight, and is not done.

    >>> shaped_reward(torch.tensor([0., 0., 1., 1.]), torch.tensor([0., 1., 0., 1.]), 10.0)
    tensor([  0.,  11., -10.,   1.])
    """
    return reward2_B + alpha * (reward2_B - reward1_B)


def leave_one_out(reward_B, G: int):
    """Return each row's baseline: the mean reward of the other G - 1 rows of its problem.

    Source: RLOO, Ahmadian et al., arXiv 2402.14740, eq. 6. Rows of a problem stand side by side.

    Raises:
      ValueError: G is below 2 or does not divide the number of rows.

    >>> leave_one_out(torch.tensor([1., 0., 0., 1., 1., 1.]), 3)
    tensor([0.0000, 0.5000, 0.5000, 1.0000, 1.0000, 1.0000])
    """
    if G < 2 or len(reward_B) % G:
        raise ValueError(f"leave-one-out needs groups of at least 2 rows that fill the batch: "
                         f"got G = {G} and {len(reward_B)} rows")  # fmt: skip
    group_PG = reward_B.view(-1, G)
    return ((group_PG.sum(dim=1, keepdim=True) - group_PG) / (G - 1)).view(-1)


def score_function(logp_BS):
    """Return zeros whose gradient is that of logp_BS: what REINFORCE multiplies by a return."""
    return logp_BS - logp_BS.detach()


def reinforce(logp_BS, mask_BS, advantage_B):
    """Return [B] zeros whose gradient is advantage times that of the attempt's log-probability.

    Source: REINFORCE (Williams 1992); the sum over an attempt's tokens, divided by no length.
    """
    return (score_function(logp_BS) * mask_BS).sum(dim=1) * advantage_B.detach()


def after(x_BS):
    """Return the sum of what comes later in each row, exclusive.

    >>> after(torch.tensor([[1., 2., 3.]]))
    tensor([[5., 3., 0.]])
    """
    return x_BS.flip(1).cumsum(1).flip(1) - x_BS


def kl_k1(logp_BS, ref_logp_BS, mask_BS):
    """Return [B] estimates of KL(policy || reference) of a whole attempt, from the sampled tokens.

    Value: the sum over the attempt of log(policy / reference). Gradient: the score function times
    the detached sum from that token to the attempt's end, unbiased for the gradient of the
    *sequence* KL on the policy's own samples. (The value's own gradient would be 0 on average.)

    Source: arXiv 2409.12917v2, D_KL in eqs. 2 to 4; estimator: Schulman, joschu.net/blog/kl-approx.
    """
    k1_BS = ((logp_BS - ref_logp_BS) * mask_BS).detach()
    return (k1_BS + score_function(logp_BS) * mask_BS * (k1_BS + after(k1_BS))).sum(dim=1)


def kl_exact(law_BSV, ref_law_BSV, logp_BS, mask_BS):
    """Return [B] estimates of KL(policy || reference) of a whole attempt, exact at every token.

    Value: the sum over the attempt of the full-vocabulary KL at each sampled prefix. Gradient: that
    of each token's KL, plus the score function times the detached KL of the later tokens, since a
    token also decides where the attempt goes. Same expectation as `kl_k1`, lower variance.

    Args:
      law_BSV, ref_law_BSV: log-probabilities of every token.
    """
    kl_BS = (law_BSV.exp() * (law_BSV - ref_law_BSV)).sum(dim=-1) * mask_BS
    return (kl_BS + score_function(logp_BS) * mask_BS * after(kl_BS.detach())).sum(dim=1)


def loss_stage1(logp_BS, mask2_BS, kl1_B, kl2_B, reward2_B, G: int, beta1: float, beta2: float):
    """Return Stage I's loss of each row: attempt 2 is rewarded, attempt 1 only held to the base.

    Source: arXiv 2409.12917v2, eq. 3, with the beta1 KL that it "omits for clarity" on both turns.
    """
    advantage2_B = reward2_B - leave_one_out(reward2_B, G)
    gain_B = reinforce(logp_BS, mask2_BS, advantage2_B)
    return (beta1 + beta2) * kl1_B + beta1 * kl2_B - gain_B


def loss_stage2(
    logp_BS, mask1_BS, mask2_BS, kl1_B, kl2_B, reward1_B, reward2_B, G: int, alpha, beta1
):
    """Return Stage II's loss of each row: both attempts are rewarded, the second with the bonus.

    Source: arXiv 2409.12917v2, eq. 4 with r2 replaced by eq. 5; gamma = 0 (appendix A.2).
    """
    return2_B = shaped_reward(reward1_B, reward2_B, alpha)
    advantage1_B = reward1_B - leave_one_out(reward1_B, G)
    advantage2_B = return2_B - leave_one_out(return2_B, G)
    gain1_B = reinforce(logp_BS, mask1_BS, advantage1_B)
    gain2_B = reinforce(logp_BS, mask2_BS, advantage2_B)
    return beta1 * (kl1_B + kl2_B) - gain1_B - gain2_B


def loss_sft(logp_BS, mask_BS):
    """Return the negative log-likelihood of each row's target tokens, summed, in nats."""
    return -(logp_BS * mask_BS).sum(dim=1)


# --- one step -------------------------------------------------------------------------------------


def score_terms(policy: GPT, base: GPT, r: Rollout, temperature: float, kl: str):
    """Return what the losses need of a rollout: logp_BS with gradient, kl1_B and kl2_B.

    All are of the law that was sampled: logits / temperature, for policy and base alike. The KL of
    an attempt that another model wrote is 0, as is its policy gradient (`own_mask1`).
    """
    ids_BS, target_BS1 = r.ids_BT[:, :-1], r.ids_BT[:, 1:, None]
    law_BSV = token_law(policy(ids_BS), temperature)
    with torch.no_grad():
        ref_law_BSV = token_law(base(ids_BS), temperature)
    logp_BS = law_BSV.gather(-1, target_BS1)[..., 0]
    if kl == "exact":
        kls = [kl_exact(law_BSV, ref_law_BSV, logp_BS, m) for m in (own_mask1(r), r.mask2_BS)]
    else:
        ref_logp_BS = ref_law_BSV.gather(-1, target_BS1)[..., 0]
        kls = [kl_k1(logp_BS, ref_logp_BS, m) for m in (own_mask1(r), r.mask2_BS)]
    return logp_BS, *kls


def own_mask1(r: Rollout):
    """Return attempt 1's mask, empty in rows where the policy did not write attempt 1."""
    return r.mask1_BS & ~r.offline1_B[:, None]


def grade(r: Rollout, problems: list[verify.Problem], encoding) -> tuple[torch.Tensor, ...]:
    """Return the rewards of both attempts, float32 [B] each, 0 or 1.

    Raises:
      RuntimeError: a verifier failed, or a gold answer is unreadable: never scored as 0.
    """
    rewards = []
    for mask_BS, cut_B in ((r.mask1_BS, r.truncated1_B), (r.mask2_BS, r.truncated2_B)):
        answers = attempts(r.ids_BT, mask_BS, cut_B, encoding)
        verdicts = [
            verify.arithmetic(answer, problem.gold, cut)
            for answer, problem, cut in zip(answers, problems, cut_B.tolist(), strict=True)
        ]
        for verdict, problem in zip(verdicts, problems, strict=True):
            if verdict.reward is None:
                raise RuntimeError(f"no verdict on {problem.prompt!r}: {verdict.detail}")
        rewards.append(torch.tensor([float(v.reward) for v in verdicts], device=cut_B.device))
    return tuple(rewards)


# --- settings: one line a knob --------------------------------------------------------------------


def knob(default, text: str, low=None, high=None, choices=None):
    """Return a dataclass field that is also a command-line option, with what it accepts."""
    return field(default=default, metadata=dict(help=text, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """All settings of a run; every field is an option of the command line.

    Raises:
      ValueError: a value is impossible; the message names the option and what is accepted.
    """

    method: str = knob("score", "what follows the base model", choices=("score", "multi_turn"))
    seed: int = knob(0, "of weights, problems and samples", 0, 2**31)
    device: str = knob("cpu", "cpu, cuda or cuda:N")
    # task
    digits: int = knob(5, "digits of each operand", 1, verify.MAX_OPERAND_DIGITS)
    split_seed: int = knob(0, "of the split into train, dev and test problems", 0, 2**31)
    # model
    n_layer: int = knob(1, "blocks", 1, 1000)
    n_head: int = knob(4, "query heads", 1, 1000)
    n_kv_head: int = knob(4, "key-value heads", 1, 1000)
    d_model: int = knob(64, "width", 1, 2**20)
    d_ff: int = knob(128, "hidden width of the MLP", 1, 2**20)
    rope_theta: float = knob(100.0, "base of the rotary wavelengths", 1, 1e9)
    qkv_bias: bool = knob(False, "bias on query, key and value")
    # base model
    sft_steps: int = knob(1200, "steps of supervised training of the base", 1, 10**9)
    sft_batch: int = knob(256, "documents a step", 1, 2**20)
    sft_lr: float = knob(6e-3, "peak learning rate, then linear to 0", 0, 1)
    forget: float = knob(0.5, "probability that a draft slips a carry at a column of 9", 0, 1)
    right_draft: float = knob(0.2, "probability of a right draft", 0, 1)
    right_revision: float = knob(0.25, "probability of a right revision", 0, 1)
    copy: float = knob(0.45, "probability that the revision copies the draft", 0, 1)
    # reinforcement learning
    stage1_steps: int = knob(200, "steps of Stage I", 1, 10**9)
    stage2_steps: int = knob(300, "steps of Stage II", 1, 10**9)
    rounds: int = knob(1, "how often the two stages alternate, sharing their steps", 1, 1000)
    stage1_gain: float = knob(0, "end Stage I when delta has risen by this; 0: by steps", 0, 1)
    batch: int = knob(512, "rollouts a step", 2, 2**20)
    group: int = knob(4, "rollouts of each problem (leave-one-out baseline)", 2, 2**20)
    micro_batch: int = knob(0, "rollouts in one backward pass, whole groups; 0: all", 0, 2**20)
    lr: float = knob(1e-3, "learning rate", 0, 1)
    warmup: int = knob(20, "steps of linear warm-up in each phase", 0, 10**9)
    clip: float = knob(1.0, "limit of the gradient's norm", 1e-9, 1e9)
    temperature: float = knob(1.0, "of the samples and of all log-probabilities", 0.01, 100)
    max_new: int = knob(0, "limit of an attempt, in tokens; 0: just enough", 0, 2**20)
    alpha: float = knob(10.0, "weight of the progress bonus in Stage II", 0, 1e6)
    beta1: float = knob(0.01, "weight of the KL to the base, both turns and stages", 0, 1e6)
    beta2: float = knob(0.1, "weight of the KL that holds attempt 1 in Stage I", 0, 1e6)
    adaptive_beta2: bool = knob(False, "balance beta2's KL with attempt 2's reward")
    kl: str = knob("exact", "estimator of the KL", choices=("exact", "k1"))
    offline: float = knob(0, "share of Stage II's problems with the base's attempt 1", 0, 0.99)
    select: str = knob("best", "which weights the last phase keeps", choices=("best", "last"))
    # reports
    eval_n: int = knob(2000, "held-out problems in the final table", 1, 10**6)
    save_every: int = knob(100, "steps between checkpoints", 1, 10**9)

    def __post_init__(self):
        for f in fields(self):
            value, option = getattr(self, f.name), "--" + f.name.replace("_", "-")
            low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
            if choices and value not in choices:
                raise ValueError(f"{option} must be one of {', '.join(choices)}, got {value!r}")
            if low is not None and not low <= value <= high:
                raise ValueError(f"{option} must be between {low:g} and {high:g}, got {value}")
        for option, rows in (("--batch", self.batch), ("--micro-batch", self.micro_batch)):
            if rows % self.group:
                raise ValueError(f"{option} must be a multiple of --group {self.group}, got {rows}")
        if self.right_revision + self.copy > 1:
            raise ValueError(f"--right-revision {self.right_revision} and --copy {self.copy} "
                             "must add up to at most 1")  # fmt: skip
        if self.rounds > min(self.stage1_steps, self.stage2_steps):
            raise ValueError(f"--rounds must be at most the steps of a stage, got {self.rounds}")
        self.model()

    def attempt_limit(self) -> int:
        """Return the most tokens of an attempt: by default a sum's digits and its end of turn."""
        return self.max_new or self.digits + 2

    def model(self) -> GPTConfig:
        """Return the sizes of the model, which must hold a prompt, two attempts, an instruction."""
        encoding = toy_encoding()
        return GPTConfig(
            encoding.n_vocab,
            self.n_layer,
            self.n_head,
            self.n_kv_head,
            self.d_model,
            self.d_ff,
            rope_theta=self.rope_theta,
            qkv_bias=self.qkv_bias,
            max_positions=2 * self.digits + 2 + 2 * self.attempt_limit() + 1,
        )


class Phase(NamedTuple):
    """One phase of a run: what is optimised ("sft", "stage1" or "stage2") and for how long."""

    name: str
    objective: str
    steps: int
    alpha: float = 0.0


def schedule(c: Config) -> list[Phase]:
    """Return the phases of a run. The last is named after the method, and its weights selected.

    >>> [(p.name, p.steps) for p in schedule(Config(rounds=2, stage1_steps=3, stage2_steps=4))]
    [('base', 1200), ('stage1-1', 1), ('stage2-1', 2), ('stage1-2', 2), ('score', 2)]
    """
    base = Phase("base", "sft", c.sft_steps)
    if c.method == "multi_turn":  # eq. 4 without the bonus, as many steps as both stages have
        return [base, Phase("multi_turn", "stage2", c.stage1_steps + c.stage2_steps)]
    phases = [base]
    for i in range(c.rounds):
        end = "" if c.rounds == 1 else f"-{i + 1}"
        share1, share2 = (
            steps * (i + 1) // c.rounds - steps * i // c.rounds
            for steps in (c.stage1_steps, c.stage2_steps)
        )
        phases += [
            Phase("stage1" + end, "stage1", share1),
            Phase("stage2" + end, "stage2", share2, c.alpha),
        ]
    return [*phases[:-1], phases[-1]._replace(name=c.method)]


# --- the run: what it carries from step to step ---------------------------------------------------

BLOCK = 20  # steps: training reward and delta are judged on means over a block


@dataclass
class Progress:
    """Where a run stands. JSON values only."""

    phase: int = 0
    step: int = 0  # finished steps of this phase
    beta2: float = 0.0
    block: list = field(default_factory=list)  # (training reward, delta) since the last full block
    first_delta: float | None = None  # means over this phase's first and last block
    last_delta: float | None = None
    best_reward: float | None = None  # of this phase's blocks
    best_step: int = 0
    seconds: float = 0.0  # spent in this phase
    log_bytes: int = 0


@dataclass
class Run:
    """A run in memory: settings, folder, models, optimiser, the two sources of randomness."""

    config: Config
    folder: Path
    policy: GPT
    base: GPT | None  # frozen; None until the base is trained
    optimizer: torch.optim.Optimizer
    best: dict | None  # weights of the best block
    problem_rng: np.random.Generator
    sampler: torch.Generator
    progress: Progress
    encoding: tiktoken.Encoding


def stream(seed: int, number: int) -> int:
    """Return the seed of a run's independent stream of randomness, by number."""
    return int(np.random.default_rng([seed, number]).integers(2**62))


def new_run(config: Config, folder: Path) -> Run:
    """Return a run at its first step; nothing is written."""
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {config.device}: torch sees no CUDA device on this machine")
    policy = GPT(config.model(), seed=stream(config.seed, 0)).to(config.device)
    return Run(
        config,
        folder,
        policy,
        base=None,
        optimizer=new_optimizer(policy),
        best=None,
        problem_rng=np.random.default_rng([config.seed, 1]),
        sampler=torch.Generator(config.device).manual_seed(stream(config.seed, 2)),
        progress=Progress(beta2=config.beta2),
        encoding=toy_encoding(),
    )


def new_optimizer(policy: GPT) -> torch.optim.Optimizer:
    """Every phase starts with a fresh AdamW; its rate is set at each step."""
    return torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0)


# --- one step -------------------------------------------------------------------------------------


def sft_step(run: Run) -> dict:
    """Take one supervised step on fresh documents; return what is logged."""
    c = run.config
    documents = verify.corpus(
        c.sft_batch, run.problem_rng, c.digits, forget=c.forget, right_draft=c.right_draft,
        right_revision=c.right_revision, copy=c.copy, split_seed=c.split_seed,
    )  # fmt: skip
    r = read_documents(documents, run.encoding, c.device)
    mask_BS = r.mask1_BS | r.mask2_BS
    logp_BS = token_law(run.policy(r.ids_BT[:, :-1]), 1.0).gather(-1, r.ids_BT[:, 1:, None])[..., 0]
    loss = loss_sft(logp_BS, mask_BS).sum() / mask_BS.sum()
    run.optimizer.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), c.clip)
    run.optimizer.step()
    return {"loss": loss.item(), "grad_norm": grad_norm.item()}


def read_documents(documents, encoding, device) -> Rollout:
    """Lay out documents (prompt, draft, revision) exactly as a rollout lays out its samples."""
    prompts, drafts, revisions = zip(*documents, strict=True)
    turns = []
    for texts in (drafts, revisions):
        ids_BN, n_B = pad([encode(encoding, text + END) for text in texts], device)
        zeros_BN = torch.zeros(ids_BN.shape, device=device)
        turns.append(Turn(ids_BN, n_B, zeros_BN, torch.zeros_like(n_B, dtype=torch.bool)))
    prompt = pad([encode(encoding, text) for text in prompts], device)
    instruction = pad([encode(encoding, REVISE)] * len(documents), device)
    return assemble(prompt, turns[0], instruction, turns[1])


def rl_step(run: Run, phase: Phase) -> dict:
    """Sample two attempts at fresh problems, take one step of Stage I or II; return what is logged.

    Raises:
      RuntimeError: at a first step, the sampler and the trainer disagree about a log-probability.
    """
    c, p = run.config, run.progress
    n_problems = c.batch // c.group
    drawn = verify.problems(n_problems, "train", run.problem_rng, c.digits, c.split_seed)
    problems = [problem for problem in drawn for _ in range(c.group)]
    n_offline = int(c.offline * n_problems) if phase.objective == "stage2" else 0
    r = rollout(
        run.policy,
        [encode(run.encoding, problem.prompt) for problem in problems],
        encode(run.encoding, REVISE),
        max_new=c.attempt_limit(),
        end_id=encode(run.encoding, END)[0],
        generator=run.sampler,
        temperature=c.temperature,
        author1=run.base if n_offline else None,
        offline1_B=torch.arange(c.batch, device=c.device) < n_offline * c.group,
    )
    reward1_B, reward2_B = grade(r, problems, run.encoding)

    run.optimizer.zero_grad()
    rows = c.micro_batch or c.batch
    kl1 = kl2 = gap = 0.0
    for start in range(0, c.batch, rows):
        part, at = r.rows(start, start + rows), slice(start, start + rows)
        logp_BS, kl1_B, kl2_B = score_terms(run.policy, run.base, part, c.temperature, c.kl)
        if phase.objective == "stage1":
            loss_B = loss_stage1(
                logp_BS, part.mask2_BS, kl1_B, kl2_B, reward2_B[at], c.group, c.beta1, p.beta2
            )
        else:
            loss_B = loss_stage2(
                logp_BS, own_mask1(part), part.mask2_BS, kl1_B, kl2_B,
                reward1_B[at], reward2_B[at], c.group, phase.alpha, c.beta1,
            )  # fmt: skip
        (loss_B.sum() / c.batch).backward()
        own_BS = own_mask1(part) | part.mask2_BS
        gap = max(gap, ((logp_BS - part.logp_BS) * own_BS).abs().max().item())
        kl1, kl2 = kl1 + kl1_B.sum().item(), kl2 + kl2_B.sum().item()
    if p.step == 0 and gap > 1e-5:
        raise RuntimeError(f"sampler and trainer disagree by {gap:.1e} nats about a token")
    grad_norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), c.clip)
    run.optimizer.step()

    own_B = ~r.offline1_B
    acc_t1, acc_t2 = reward1_B[own_B].mean().item(), reward2_B[own_B].mean().item()
    kl1, kl2 = kl1 / int(own_B.sum()), kl2 / c.batch
    log = {
        "acc_t1": acc_t1, "acc_t2": acc_t2, "delta": acc_t2 - acc_t1, "kl1": kl1, "kl2": kl2,
        "grad_norm": grad_norm.item(), "beta2": p.beta2, "gap": gap,
        "truncated1": r.truncated1_B.float().mean().item(),
        "truncated2": r.truncated2_B.float().mean().item(),
    }  # fmt: skip
    if c.adaptive_beta2:
        p.beta2 = balanced_beta2(p.beta2, acc_t2, kl1, c.beta2)
    return log


def balanced_beta2(beta2: float, reward2: float, kl1: float, start: float) -> float:
    """Return the next step's beta2, drawn towards the value at which beta2 KL1 = r2.

    Source: arXiv 2409.12917v2 only says that beta2 may be adapted to balance "the magnitudes of the
    first-attempt KL regularization and the second-attempt policy objective". The geometric
    smoothing (a tenth of the way a step) and the bounds (a tenth to ten times the start) are ours.

    >>> balanced_beta2(0.1, 0.5, 5.0, 0.1), round(balanced_beta2(0.1, 0.5, 0.0, 0.1), 3)
    (0.1, 0.126)
    """
    target = min(max(reward2 / max(kl1, 1e-9), start / 10), start * 10)
    return beta2**0.9 * target**0.1


# --- the training loop ----------------------------------------------------------------------------


def train(run: Run, stop: threading.Event) -> bool:
    """Train phase after phase from wherever the run stands; return False if stopped on the way.

    Each phase ends with its weights in `<phase>.pt`. The frozen base is the same for every phase
    after the first: it is never replaced by what Stage I made of it.
    """
    phases = schedule(run.config)
    log = open(run.folder / "log.jsonl", "r+b")
    log.truncate(run.progress.log_bytes)  # drop what was logged after the last checkpoint
    log.seek(run.progress.log_bytes)
    while run.progress.phase < len(phases):
        p, phase = run.progress, phases[run.progress.phase]
        clock = time.monotonic() - p.seconds
        while p.step < phase.steps and not enough(run, phase):
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(run.config, phase, p.step)
            row = sft_step(run) if phase.objective == "sft" else rl_step(run, phase)
            p.step += 1
            if phase.objective != "sft":
                judge_block(run, phase, row)
            line = json.dumps({"phase": phase.name, "step": p.step, **row}) + "\n"
            log.write(line.encode())
            log.flush()
            p.log_bytes += len(line)
            p.seconds = time.monotonic() - clock
            if p.step % BLOCK == 0 or p.step == phase.steps:
                show_progress(run, phase, row)
            if stop.is_set() or p.step % run.config.save_every == 0:
                save_checkpoint(run)
            if stop.is_set():
                return False
        finish_phase(run, phase)
        save_checkpoint(run)
    return True


def learning_rate(c: Config, phase: Phase, step: int) -> float:
    """Return the rate of a step (counted from 0): warm-up, then falling to 0 in the base's phase,
    constant in the others."""
    warm = min(1.0, (step + 1) / (c.warmup + 1))
    if phase.objective == "sft":
        return c.sft_lr * warm * (1 - step / phase.steps)
    return c.lr * warm


def judge_block(run: Run, phase: Phase, row: dict) -> None:
    """After each block of steps, remember its delta if first, its weights if best by reward.

    The reward is the stage's own, on training samples: r2 in Stage I, r1 + r2 in Stage II.
    Source: arXiv 2409.12917v2, section 6: checkpoints "with the highest training reward".
    """
    p = run.progress
    reward = row["acc_t2"] + (row["acc_t1"] if phase.objective == "stage2" else 0.0)
    p.block.append((reward, row["delta"]))
    if len(p.block) < BLOCK:
        return
    reward, delta = (sum(values) / BLOCK for values in zip(*p.block, strict=True))
    p.block = []
    if p.first_delta is None:
        p.first_delta = delta
    p.last_delta = delta
    if p.best_reward is None or reward > p.best_reward:
        p.best_reward, p.best_step = reward, p.step
        run.best = copy.deepcopy(run.policy.state_dict())


def enough(run: Run, phase: Phase) -> bool:
    """Return whether Stage I may end early: a block's delta has risen by --stage1-gain."""
    p, gain = run.progress, run.config.stage1_gain
    if phase.objective != "stage1" or not gain or p.first_delta is None:
        return False
    return p.last_delta - p.first_delta >= gain


def finish_phase(run: Run, phase: Phase) -> None:
    """Write the phase's weights, and prepare the next phase."""
    p, c = run.progress, run.config
    last = p.phase == len(schedule(c)) - 1
    step = p.step
    if last and c.select == "best" and run.best is not None:
        run.policy.load_state_dict(run.best)
        step = p.best_step
    save(
        {"model": run.policy.state_dict(), "step": step, "steps": p.step, "seconds": p.seconds},
        run.folder / f"{phase.name}.pt",
    )
    if phase.objective == "sft":
        run.base = frozen(run.policy)
    run.optimizer, run.best = new_optimizer(run.policy), None
    run.progress = Progress(phase=p.phase + 1, beta2=p.beta2, log_bytes=p.log_bytes)


def frozen(model: GPT) -> GPT:
    """Return a copy that shares no weight with the model and takes no gradient."""
    return copy.deepcopy(model).requires_grad_(False)


def show_progress(run: Run, phase: Phase, row: dict) -> None:
    """Print one line: where the run is, how well its samples do, and the time left."""
    p, phases = run.progress, schedule(run.config)
    cost = {"sft": 1.0, "stage1": RL_COST, "stage2": RL_COST}
    left = (phase.steps - p.step) * cost[phase.objective]
    left += sum(later.steps * cost[later.objective] for later in phases[p.phase + 1 :])
    left *= p.seconds / (p.step * cost[phase.objective])
    line = f"{phase.name:>10} {p.step:>5}/{phase.steps}  "
    if phase.objective == "sft":
        line += f"loss {row['loss']:.4f}" + 42 * " "
    else:
        line += (
            f"t1 {100 * row['acc_t1']:5.1f} %  t2 {100 * row['acc_t2']:5.1f} %  "
            f"delta {100 * row['delta']:+6.1f}  KL1 {row['kl1']:.3f}  KL2 {row['kl2']:.3f}"
        )
    print(f"{line}  {left // 60:3.0f}m{left % 60:02.0f}s left", flush=True)


RL_COST = 2.5  # seconds of a reinforcement step for one of a supervised step, before it is measured


# --- files: checkpoints that are whole or absent --------------------------------------------------


def save(content: dict, path: Path) -> None:
    """Write a file of tensors under a temporary name, then rename it: never half a checkpoint."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load(path: Path) -> dict:
    """Read what `save` wrote, on the CPU.

    Raises:
      ValueError: the file is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds, depending on which bytes are damaged
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__})") from None


def save_checkpoint(run: Run) -> None:
    """Write all that the next step depends on."""
    content = {
        "policy": run.policy.state_dict(),
        "base": run.base and run.base.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "best": run.best,
        "problem_rng": json.dumps(run.problem_rng.bit_generator.state),
        "sampler": run.sampler.get_state(),
        "progress": asdict(run.progress),
    }
    save(content, run.folder / "checkpoint.pt")


def create(config: Config, folder: Path) -> Run:
    """Start a run in a folder that must not exist yet."""
    run = new_run(config, folder)
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(
            f"{folder} exists and is left alone: continue it with --resume {folder}, "
            "or choose another with --run"
        ) from None
    about = {"config": asdict(config), "machine": machine(), "torch": torch.__version__}
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    (folder / "log.jsonl").touch()
    save_checkpoint(run)
    return run


def read_config(folder: Path) -> Config:
    """Return the settings of a run.

    Raises:
      ValueError: there is no such run, or its config.json is damaged or of another version.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run: it has no config.json")
    try:
        return Config(**json.loads(path.read_text())["config"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable configuration: {error}") from None


def restore(folder: Path) -> Run:
    """Return a run as its last checkpoint left it."""
    run = new_run(read_config(folder), folder)
    path = folder / "checkpoint.pt"
    content = load(path)
    try:
        run.policy.load_state_dict(content["policy"])
        if content["base"] is not None:
            run.base = frozen(run.policy)
            run.base.load_state_dict(content["base"])
        run.optimizer.load_state_dict(content["optimizer"])
        run.best = content["best"]
        run.problem_rng.bit_generator.state = json.loads(content["problem_rng"])
        run.sampler.set_state(content["sampler"])
        run.progress = Progress(**content["progress"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit {folder / 'config.json'}: {error}") from None
    return run


def machine() -> str:
    """Return a line about the machine, for the record."""
    return f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"


# --- command line ---------------------------------------------------------------------------------


def parse(argv: list[str]) -> tuple[Config | None, Path]:
    """Return the settings and folder of a new run, or None and the folder of one to resume."""
    parser = argparse.ArgumentParser(
        prog="score.py", usage=argparse.SUPPRESS, description="Train SCoRe on toy arithmetic.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--run", type=Path, help="folder to create (default: runs/METHOD-seedSEED)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue this run, and no more")
    for f in fields(Config):
        option, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type is bool or f.type == "bool":
            parser.add_argument(option, action="store_true", help=text)
        else:
            parser.add_argument(
                option, type=f.type, default=f.default, choices=f.metadata["choices"], help=text
            )
    args = vars(parser.parse_args(argv))
    folder, resume = args.pop("run"), args.pop("resume")
    if resume is not None:
        if len(argv) > 2:
            raise ValueError("--resume takes all settings from the run: give no other option")
        return None, resume
    config = Config(**args)
    return config, folder or Path("runs") / f"{config.method}-seed{config.seed}"


def main(argv: list[str]) -> int:
    """Train, evaluate, report. Return the exit status."""
    stop = threading.Event()

    def interrupt(number, _):
        stop.set()  # finish the step, save, leave; a second Ctrl-C leaves at once
        signal.signal(number, signal.SIG_DFL)

    try:
        config, folder = parse(argv)
        run = restore(folder) if config is None else create(config, folder)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        parameters = sum(weight.numel() for weight in run.policy.parameters())
        print(f"{folder}: {parameters:,} parameters, {run.config.device}, {machine()}", flush=True)
        if not train(run, stop):
            print(f"stopped and saved; continue with: python score.py --resume {folder}")
            return 130
        evaluator = Path(__file__).with_name("eval.py")
        return subprocess.run([sys.executable, evaluator, folder]).returncode
    except (ValueError, OSError) as error:
        print(f"score.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
