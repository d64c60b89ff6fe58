"""How does a model learn to correct itself? SCoRe: two stages of two-turn REINFORCE.

Kumar et al., Training Language Models to Self-Correct via Reinforcement Learning,
arXiv 2409.12917v2, ICLR 2025. One policy answers a problem twice; a verifier says 0 or 1 to each.

  Stage I   max E[ r2 - beta1 KL2 - (beta1 + beta2) KL1 ]                      eq. 3
  Stage II  max E[ r1 + r2 + alpha (r2 - r1) - beta1 (KL1 + KL2) ]             eqs. 4 and 5

where every turn is credited with its own terms alone (gamma = 0): for the terms of attempt 2,
attempt 1 is drawn from a frozen copy of the policy, so that neither reward and bonus nor KL of the
second turn reach the first turn's tokens. KLi is the divergence of the policy's attempt i from that
of the frozen *base* model, in both stages. README.md lists what the paper leaves open.

    python score.py                          # base, Stage I, Stage II, table: minutes on a laptop
    python score.py --method multi_turn      # the control: no Stage I, no bonus
    python score.py --resume runs/score-seed0
    torchrun --nproc-per-node 8 -- score.py  # a part of the rows and the weights in each process

Symbols: alpha weight of the progress bonus, beta1 of the KL everywhere, beta2 of Stage I's anchor.
Dimension key: B rows (rollouts), G rows of each problem, side by side; S scored positions;
V vocabulary. The digit after a name is the turn: logp_BS, reward2_B, mask1_BS. Log-probabilities
and KLs are in nats. Functions return one value a row; the training loop takes the mean over rows.
"""

import copy
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from chat import prompt
from model import GPT
from parallel import (
    complain,
    count,
    empty_passes,
    first,
    largest,
    mean,
    processes,
    share,
    together,
    total,
    whole,
    whole_tensor,
)
from rollout import (
    Rollout,
    concatenate,
    grade,
    lay_out,
    read_documents,
    read_solutions,
    rollout,
    token_law,
    written,
)
from run import (
    BLOCK,
    DATA,
    SUPERVISED,
    Config,
    Failure,
    Phase,
    Progress,
    Run,
    computing,
    create,
    documents,
    draw,
    draw_training,
    frozen,
    needs_previous,
    new_optimizer,
    open_board,
    parse,
    restore,
    save_checkpoint,
    save_weights,
    schedule,
    steps_before,
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


def kl_exact(kl_BS, logp_BS, mask_BS):
    """Return [B] estimates of KL(policy || reference) of a whole attempt, exact at every token.

    Value: the sum over the attempt of the full-vocabulary KL at each sampled prefix. Gradient: that
    of each token's KL, plus the score function times the detached KL of the later tokens, since a
    token also decides where the attempt goes. Same expectation as `kl_k1`, lower variance.

    Args:
      kl_BS: KL(policy || reference) of the next token after each prefix, with gradient.
    """
    kl_BS = kl_BS * mask_BS
    return (kl_BS + score_function(logp_BS) * mask_BS * after(kl_BS.detach())).sum(dim=1)


def loss_stage1(logp_BS, mask2_BS, kl1_B, kl2_B, reward2_B, G: int, beta1: float, beta2: float):
    """Return Stage I's loss of each row: attempt 2 is rewarded, attempt 1 only held to the base.

    Its gradient is what counts: in its value the rewards do not appear, only the KLs.

    Source: arXiv 2409.12917v2, eq. 3, with the beta1 KL that it "omits for clarity" on both turns.

    Args:
      logp_BS: log-probability of each token that came, at the sampling temperature, with gradient.
      mask2_BS: bool, attempt 2's tokens, its end of turn included. kl1_B, kl2_B: of `kl_exact` or
        `kl_k1`. reward2_B: float. G: rows of a problem, which stand side by side.
    """
    advantage2_B = reward2_B - leave_one_out(reward2_B, G)
    gain_B = reinforce(logp_BS, mask2_BS, advantage2_B)
    return (beta1 + beta2) * kl1_B + beta1 * kl2_B - gain_B


def loss_stage2(
    logp_BS, mask1_BS, mask2_BS, kl1_B, kl2_B, reward1_B, reward2_B, G: int, alpha, beta1,
    gamma=0.0, leak=False,
):  # fmt: skip
    """Return Stage II's loss of each row: both attempts are rewarded, the second with the bonus.

    Source: arXiv 2409.12917v2, eq. 4 with r2 replaced by eq. 5; gamma = 0 (appendix A.2).

    Args: as of `loss_stage1`; and
      gamma, leak: what the paper does *not* do, to show why: attempt 1 earns gamma times attempt
        2's return, or the bonus, too. Then r1 weighs 1 - alpha gamma or 1 - alpha in attempt 1's
        return, and where that is negative it pays to answer wrongly first.
    """
    return2_B = shaped_reward(reward1_B, reward2_B, alpha)
    return1_B = reward1_B + gamma * return2_B
    if leak:
        return1_B = return1_B + alpha * (reward2_B - reward1_B)
    advantage1_B = return1_B - leave_one_out(return1_B, G)
    advantage2_B = return2_B - leave_one_out(return2_B, G)
    gain1_B = reinforce(logp_BS, mask1_BS, advantage1_B)
    gain2_B = reinforce(logp_BS, mask2_BS, advantage2_B)
    return beta1 * (kl1_B + kl2_B) - gain1_B - gain2_B


def loss_attempt(logp_BS, mask_BS, kl_B, return_B, G: int, beta1):
    """Return the loss of one attempt by itself, of each row.

    Of attempt 1 and its reward it is single-turn RL, a baseline (arXiv 2409.12917v2, eq. 1, and the
    row "w/o multi-turn training" of its ablations): the second attempt is sampled all the same, to
    be logged, and nothing trains it. Of attempt 3 and its shaped reward it is what a third attempt
    adds to Stage II.
    """
    advantage_B = return_B - leave_one_out(return_B, G)
    return beta1 * kl_B - reinforce(logp_BS, mask_BS, advantage_B)


def loss_sft(logp_BS, mask_BS):
    """Return the negative log-likelihood of each row's target tokens, summed, in nats."""
    return -(logp_BS * mask_BS).sum(dim=1)


# --- one step -------------------------------------------------------------------------------------


def score_terms(policy: GPT, base: GPT, r: Rollout, temperature: float, kl: str, chunk: int = 0):
    """Return what the losses need of a rollout: logp_BS with gradient, and the KL_B of each turn.

    All are of the law that was sampled: logits / temperature, for policy and base alike. The KL of
    an attempt that another model wrote is 0, as is its policy gradient (`own_mask1`).
    """

    def of_positions(state_BSD, ref_state_BSD, target_BS):
        law_BSV = token_law(policy.logits(state_BSD), temperature)
        with torch.no_grad():
            ref_law_BSV = token_law(base.logits(ref_state_BSD), temperature)
        kl_BS = (law_BSV.exp() * (law_BSV - ref_law_BSV)).sum(dim=-1)
        return of_tokens(law_BSV, target_BS), of_tokens(ref_law_BSV, target_BS), kl_BS

    ids_BS, target_BS = r.ids_BT[:, :-1], r.ids_BT[:, 1:]
    with torch.no_grad():
        ref_state_BSD = base.hidden(ids_BS)
    states = (policy.hidden(ids_BS), ref_state_BSD)
    logp_BS, ref_logp_BS, kl_BS = in_chunks(of_positions, chunk, *states, target_BS)
    turns = [own_mask1(r), *(r.turn_BS == k for k in range(2, r.truncated_BK.shape[1] + 1))]
    if kl == "exact":
        return logp_BS, *(kl_exact(kl_BS, logp_BS, mask_BS) for mask_BS in turns)
    return logp_BS, *(kl_k1(logp_BS, ref_logp_BS, mask_BS) for mask_BS in turns)


def token_logp(policy: GPT, r: Rollout, temperature: float, chunk: int = 0):
    """Return [B, S] log-probabilities of the tokens that stand in the rows, with gradient."""

    def of_positions(state_BSD, target_BS):
        return (of_tokens(token_law(policy.logits(state_BSD), temperature), target_BS),)

    states_BSD = policy.hidden(r.ids_BT[:, :-1])
    return in_chunks(of_positions, chunk, states_BSD, r.ids_BT[:, 1:])[0]


def of_tokens(law_BSV, target_BS):
    """Return [B, S] log-probabilities of the tokens that came."""
    return law_BSV.gather(-1, target_BS[..., None])[..., 0]


def in_chunks(f, chunk: int, *columns_BS):
    """Return f of columns [B, S, ..], by chunks of positions, so that no [B, S, V] is kept.

    A chunk's laws are computed again in the backward pass, in which each chunk adds to the head's
    gradient by itself (hence reentrant). chunk 0: all positions at once, kept.
    """
    if not chunk:
        return f(*columns_BS)
    parts = zip(*(x_BS.split(chunk, dim=1) for x_BS in columns_BS), strict=True)
    if torch.is_grad_enabled():
        f = functools.partial(checkpoint, f, use_reentrant=True)
    found = [f(*part) for part in parts]
    return tuple(torch.cat(x, dim=1) for x in zip(*found, strict=True))


def own_mask1(r: Rollout):
    """Return attempt 1's mask, empty in rows where the policy did not write attempt 1."""
    return r.mask1_BS & ~r.offline1_B[:, None]


def sft_step(run: Run) -> dict:
    """Take one supervised step on fresh documents, or worked answers; return what is logged."""
    c = run.config
    if c.task in DATA:
        drawn = share(draw(c, c.sft_batch, "train", run.problem_rng))
        r = read_solutions(drawn, c.format(), c.device)
        return imitate(run, [(r, r.mask1_BS)], 1.0)
    clean = run.progress.step < c.clean * c.sft_steps  # it learns to check before it gets careless
    drawn, places = documents(c, c.sft_batch, run.problem_rng, clean), c.base_attempts - 1
    parts = []
    for i in range(places):  # a later revision stands behind i more copies of the draft, as context
        rows = [(x, *[draft] * (i + 1), revision) for x, draft, revision in share(drawn[i::places])]
        r = read_documents(rows, c.device, c.task)
        parts.append((r, r.mask1_BS | (r.turn_BS == i + 2)))
    return imitate(run, parts, 1.0)


def imitate(run: Run, parts: list[tuple[Rollout, torch.Tensor]], temperature: float) -> dict:
    """Take a step that raises the likelihood of the masked tokens, each counting the same."""
    c, summed = run.config, 0.0
    tokens = total(sum(int(mask_BS.sum()) for _, mask_BS in parts))
    run.optimizer.zero_grad()
    passes = [(*part, at) for part in parts for at in slices(len(part[1]), c.micro_batch)]
    most = largest(len(passes))
    for r, mask_BS, at in passes:
        part = r.rows(at)
        with computing(c):
            logp_BS = token_logp(run.policy, part, temperature, c.chunk)
        loss = loss_sft(logp_BS, mask_BS[at, : logp_BS.shape[1]]).sum() / tokens
        loss.backward()
        summed += loss.item()
    empty_passes(most - len(passes), run.policy)
    return {"loss": total(summed), "grad_norm": descend(run)}


def slices(n: int, size: int) -> list[slice]:
    """Return n rows in slices of a size, the last maybe shorter; 0: all in one."""
    return [slice(at, at + (size or n)) for at in range(0, n, size or n or 1)]


def descend(run: Run) -> float:
    """Clip the gradient and take the optimiser's step; return the norm that the gradient had."""
    weights = list(run.policy.parameters())
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norm = whole_tensor(torch.nn.utils.get_total_norm(gradients))
    if not norm.isfinite():
        raise Failure(f"the gradient's norm is {norm.item()}")
    torch.nn.utils.clip_grads_with_norm_(weights, run.config.clip, norm)
    run.optimizer.step()
    return norm.item()


def sample(
    model: GPT, c: Config, problems, generator, temperature, group=1, offline1_B=None,
    share=(0, 1), **more,
) -> Rollout:  # fmt: skip
    """Sample attempts at each problem, `group` rows each (`more`: attempts, author1, largest)."""
    format, parts = c.format(), []
    prompts = [prompt(format, problem) for problem in problems]
    for at in slices(len(prompts), c.sample_batch // group // share[1]):
        rows = slice(at.start * group, at.stop * group)
        with computing(c):
            part = rollout(
                model, prompts[at], format.instruction, max_new=c.attempt_limit(),
                end_id=format.end_id, generator=generator, temperature=temperature,
                compact=True, group=group, share=share,
                offline1_B=None if offline1_B is None else offline1_B[rows], **more,
            )  # fmt: skip
        parts.append(part)
    return concatenate(parts)


def check_sampler(policy: GPT, c: Config) -> None:
    """Hold the sampler's log-probabilities against the trainer's, on a few problems.

    A toy's in float64, where both agree to rounding whatever the weights; a checkpoint's in
    float32, without a copy. (The gap of the training samples, in float32 a few 1e-5 at worst where
    the policy is sharp, is in the log of every step.)

    Raises:
      Failure: they differ by more than 1e-5 nats at some token (float32: 1e-3).
    """
    n, limit = (min(8, c.batch // c.group), 1e-3) if c.checkpoint else (64, 1e-5)
    if not c.checkpoint:
        policy = copy.deepcopy(policy).double()
        policy.compiled = False
    c = replace(c, dtype="float32")
    problems = draw(c, n, "train", np.random.default_rng(0))
    generator = torch.Generator(c.device).manual_seed(0)
    r = sample(policy, c, problems, generator, c.temperature)
    with torch.no_grad():
        gap = sampler_gap(score_terms(policy, policy, r, c.temperature, c.kl, c.chunk)[0], r)
    if not gap <= limit:  # also if it is not a number
        raise Failure(f"sampler and trainer disagree by {gap:.1e} nats about a token")


def sampler_gap(logp_BS, r: Rollout) -> float:
    """Return the largest difference of trainer and sampler over the policy's own tokens (nats)."""
    return ((logp_BS - r.logp_BS) * (own_mask1(r) | (r.turn_BS > 1))).abs().max().item()


def collect(run: Run, author: GPT, **more) -> tuple[Rollout, list, list[torch.Tensor], float]:
    """Let `author` attempt fresh problems, `--group` rows each, side by side.

    Return the rollout, its problems, the reward of each attempt, and the share of rows dropped: a
    problem with a row that got no verdict is left out, whole, so that every group has its baseline.
    """
    c = run.config
    drawn = draw_training(c, c.batch // c.group, run.problem_rng)  # the same in all processes
    drawn = share(drawn, c.sample_batch // c.group)
    problems = [problem for problem in drawn for _ in range(c.group)]
    start = time.monotonic()
    more |= dict(share=processes(), largest=largest)
    r = sample(whole(author), c, drawn, run.sampler, c.temperature, c.group, **more)
    sampled = time.monotonic()
    rewards = grade(r, problems, c.format(), tally := Counter(), processes()[1])
    run.clock |= dict(
        sampling_s=sampled - start, judging_s=time.monotonic() - sampled, episodes=c.batch,
        tokens=count(r.turn_BS > 0), timeouts=total(tally["timeout"]),
    )  # fmt: skip
    keep_B = all_judged(sum(rewards), c.group)
    judged = [problems[i] for i in keep_B.nonzero()[:, 0].tolist()]
    return r.rows(keep_B), judged, [x[keep_B] for x in rewards], 1 - total(len(judged)) / c.batch


def rl_step(run: Run, phase: Phase) -> dict:
    """Sample attempts at fresh problems, take one step of a phase; return what is logged.

    The gradient is that of the mean over all rows, whatever the micro-batch.
    """
    c, p = run.config, run.progress
    more = dict(attempts=phase.attempts)
    if c.offline and phase.objective == "stage2":
        rows_B = torch.tensor(share(range(c.batch), c.sample_batch), device=c.device)
        offline1_B = rows_B < round(c.offline * (c.batch // c.group)) * c.group
        more |= dict(author1=whole(run.base), offline1_B=offline1_B)
    r, _, rewards, dropped = collect(run, run.policy, **more)
    B, own = total(len(r.ids_BT)), count(~r.offline1_B)
    if not own and ("offline1_B" not in more or count(~more["offline1_B"])):
        raise Failure("no verdict on any problem whose first attempt is the policy's own")
    anchor = run.previous if phase.objective == "stage1b" else run.base

    run.optimizer.zero_grad()
    kl, gap = torch.zeros(phase.attempts, dtype=torch.float64), 0.0
    passes = slices(len(r.ids_BT), c.micro_batch)
    most = largest(len(passes))
    for at in passes:
        part = r.rows(at)
        with computing(c):
            logp_BS, *kls = score_terms(run.policy, anchor, part, c.temperature, c.kl, c.chunk)
        loss_B = loss_of(phase, c, p.beta2, part, logp_BS, kls, [x[at] for x in rewards])
        (loss_B.sum() / B).backward()
        gap = max(gap, sampler_gap(logp_BS.detach(), part))
        kl += torch.stack([kl_B.detach().sum() for kl_B in kls]).cpu()
    empty_passes(most - len(passes), run.policy, anchor)
    grad_norm, kl, gap = descend(run), total(kl), largest(gap)

    kl1, kl2, *kl3 = (kl / torch.tensor([max(1, own), *[B] * (len(kl) - 1)])).tolist()
    log = summary(r, rewards) | dict(
        kl1=kl1, kl2=kl2, beta2=p.beta2, grad_norm=grad_norm, gap=gap, dropped=dropped
    )  # fmt: skip
    if kl3:
        log |= dict(acc_t3=mean(rewards[2]), kl3=kl3[0])
    if c.adaptive_beta2 and phase.objective == "stage1":
        p.beta2 = balanced_beta2(p.beta2, log["acc_t2"], kl1, c.beta2)
    return log


def loss_of(phase: Phase, c: Config, beta2: float, r: Rollout, logp_BS, kls, rewards):
    """Return [B], the loss that a phase takes of its rows."""
    mask1_BS, G = own_mask1(r), c.group
    if phase.objective == "single_turn":
        return loss_attempt(logp_BS, mask1_BS, kls[0], rewards[0], G, c.beta1)
    if phase.objective == "stage1":
        return loss_stage1(logp_BS, r.mask2_BS, *kls, rewards[1], G, c.beta1, beta2)
    if phase.objective == "stage1b":  # eq. 3 once more, with attempts 1 and 2 held
        kl12_B = kls[0] + kls[1]
        return loss_stage1(logp_BS, r.turn_BS == 3, kl12_B, kls[2], rewards[2], G, c.beta1, beta2)
    loss_B = loss_stage2(
        logp_BS, mask1_BS, r.mask2_BS, *kls[:2], *rewards[:2], G, phase.alpha, c.beta1,
        c.gamma, c.leak,
    )  # fmt: skip
    if phase.attempts == 3:
        return3_B = shaped_reward(rewards[1], rewards[2], phase.alpha)
        loss_B = loss_B + loss_attempt(logp_BS, r.turn_BS == 3, kls[2], return3_B, G, c.beta1)
    return loss_B


def summary(r: Rollout, rewards: list[torch.Tensor]) -> dict:
    """Return what is logged of sampled attempts; accuracies of the rows whose first attempt is the
    sampled policy's own, if there are any; entropies in nats a token, estimated by the samples."""
    own_B = ~r.offline1_B
    of_B = own_B if count(own_B) else r.offline1_B
    acc_t1, acc_t2 = (mean(x[of_B]) for x in rewards[:2])
    changed = [a != b for a, b in zip(written(r, 1), written(r, 2), strict=True)]
    cut1, cut2 = (mean(cut_B.float()) for cut_B in r.truncated_BK[:, :2].unbind(dim=1))
    entropy1, entropy2 = (-mean(r.logp_BS[mask_BS]) for mask_BS in (r.mask1_BS, r.mask2_BS))
    return dict(
        acc_t1=acc_t1, acc_t2=acc_t2, delta=acc_t2 - acc_t1,
        changed=total(sum(changed)) / total(len(changed)), truncated1=cut1, truncated2=cut2,
        entropy1=entropy1, entropy2=entropy2,
    )  # fmt: skip


def imitate_step(run: Run, phase: Phase) -> dict:
    """Take one supervised step on second attempts worth imitating; return what is logged.

    STaR and Pair-SFT, the baselines of arXiv 2409.12917v2, section 4, on the samples of the policy
    as the phase before left it (the base, or STaR's last iteration): as many samples and updates
    as a step of reinforcement learning has. Only the second attempt's tokens carry the loss: the
    first are mistakes, mostly.
    """
    c = run.config
    r, problems, rewards, dropped = collect(run, run.previous)
    if phase.objective == "star":
        examples = traces(r, *rewards, phase.plus)
    else:
        examples = pairs(r, *rewards, c.group, phase.plus, run.problem_rng)
    found = total(len(examples))
    log = summary(r, rewards) | dict(dropped=dropped, examples=found / c.batch)
    if not found:
        return log | dict(loss=None, grad_norm=0.0)
    format, written1 = c.format(), written(r, 1)
    prompts = [prompt(format, problems[b]) for b, _ in examples]
    firsts, seconds = [written1[b] for b, _ in examples], [second for _, second in examples]
    parts = []
    if examples:  # another process may have some where this one has none
        rows = lay_out(prompts, [firsts, seconds], format.instruction, c.device)
        parts.append((rows, rows.mask2_BS))
    return log | imitate(run, parts, c.temperature)


def traces(r: Rollout, reward1_B, reward2_B, plus: bool) -> list[tuple[int, list[int]]]:
    """Return STaR's examples: rows that went from wrong to right, and their second attempts.

    Source: arXiv 2409.12917v2, section 4, D_STaR; with `plus` D+_STaR, also right to right.
    """
    chosen_B = (reward2_B == 1) & ((reward1_B == 0) | plus)
    seconds = written(r, 2)
    return [(b, seconds[b]) for b in chosen_B.nonzero()[:, 0].tolist()]


def pairs(r: Rollout, reward1_B, reward2_B, G: int, plus: bool, rng: np.random.Generator):
    """Return Pair-SFT's examples: rows whose first attempt is wrong, each with a right answer drawn
    from all first and second attempts at its problem; none where no attempt was right.

    Source: arXiv 2409.12917v1, section 4, D_SFT; with `plus` D+_SFT, also right first attempts.
    """
    firsts, seconds = written(r, 1), written(r, 2)
    right = [[] for _ in range(0, len(firsts), G)]  # by problem
    for attempts, reward_B in ((firsts, reward1_B), (seconds, reward2_B)):
        for b in (reward_B == 1).nonzero()[:, 0].tolist():
            right[b // G].append(attempts[b])
    rows = range(len(firsts)) if plus else (reward1_B == 0).nonzero()[:, 0].tolist()
    answers = [(b, right[b // G]) for b in rows]
    return [(b, found[rng.integers(len(found))]) for b, found in answers if found]


def all_judged(reward_B, G: int):
    """Return [B] booleans: does the row's problem have a verdict (a number) in all its rows?

    Raises:
      Failure: no problem has, so that there is nothing to learn from.

    >>> all_judged(torch.tensor([1., 0., float("nan"), 1.]), 2)
    tensor([ True,  True, False, False])
    """
    keep_B = reward_B.isfinite().view(-1, G).all(dim=1).repeat_interleave(G)
    if not count(keep_B):
        raise Failure("no verdict on any problem of the batch: the verifier has failed")
    return keep_B


def balanced_beta2(beta2: float, reward2: float, kl1: float, start: float) -> float:
    """Return the next step's beta2, a part of the way to r2 / KL1, where beta2 KL1 = r2.

    Source: arXiv 2409.12917v2 mentions, and no more, a beta2 that adapts so as to balance the first
    attempt's KL and the second attempt's objective. The geometric smoothing (a tenth of the way a
    step) and the bounds (a tenth to ten times the start) are ours. The balance need not be stable:
    where KL1 falls faster than 1 / beta2, a larger beta2 asks for a still larger one, to the bound.

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
    path = run.folder / "log.jsonl"
    if path.stat().st_size < run.progress.log_bytes:
        raise ValueError(f"{path} is shorter than the checkpoint says")
    with open(path if processes()[0] == 0 else os.devnull, "r+b") as log:
        first(log.truncate, run.progress.log_bytes)  # what was logged after the last checkpoint
        log.seek(run.progress.log_bytes)
        open_board(run)
        for phase in schedule(run.config)[run.progress.phase :]:
            if not train_phase(run, phase, log, stop):
                break
        if run.board is not None:
            run.board.close()
    return run.progress.phase == len(schedule(run.config))


def train_phase(run: Run, phase: Phase, log: BinaryIO, stop: threading.Event) -> bool:
    """Take the steps of a phase that are left; log, show and save. Return False if stopped."""
    p, c = run.progress, run.config
    clock, shown = time.monotonic() - p.seconds, (p.step, p.seconds)
    if phase.objective != "sft":
        check_sampler(whole(run.policy), c)
    while p.step < phase.steps and not enough(run, phase):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(c, phase, p.step)
        started = time.monotonic()
        row = step(run, phase)
        p.step += 1
        note_speed(run, phase, row, time.monotonic() - started)
        if phase.objective not in SUPERVISED:
            judge_block(run, phase, row)
        line = json.dumps({"phase": phase.name, "step": p.step, **row}) + "\n"
        log.write(line.encode())
        log.flush()
        p.log_bytes += len(line)
        p.seconds = time.monotonic() - clock
        if p.step % BLOCK == 0 or p.step == phase.steps or p.seconds - shown[1] > QUIET:
            pace = (p.seconds - shown[1]) / (p.step - shown[0])
            shown = p.step, p.seconds
            show_progress(run, phase, row, pace)
        stopping = total(int(stop.is_set()))  # asked once: a signal may come at any moment
        if stopping or p.step % c.save_every == 0:
            first(os.fsync, log.fileno())  # the log is never shorter than a checkpoint says
            save_checkpoint(run)
        if stopping:
            return False
    finish_phase(run, phase)
    first(os.fsync, log.fileno())
    save_checkpoint(run)
    return True


def step(run: Run, phase: Phase) -> dict:
    """Take one step of a phase; return what is logged."""
    if phase.objective == "sft":
        return sft_step(run)
    if phase.objective in SUPERVISED:
        return imitate_step(run, phase)
    return rl_step(run, phase)


def learning_rate(c: Config, phase: Phase, step: int) -> float:
    """Return the rate of a step (counted from 0): a linear warm-up in a phase that continues no
    other; then it falls to 0 while the base is trained, and is constant in the stages."""
    if phase.objective == "sft":
        return c.sft_lr * min(1.0, (step + 1) / (c.sft_warmup + 1)) * (1 - step / phase.steps)
    return c.lr if phase.continues else c.lr * min(1.0, (step + 1) / (c.warmup + 1))


def judge_block(run: Run, phase: Phase, row: dict) -> None:
    """After each block of steps, remember its delta and, in the last phase, the best weights.

    Best by reward on training samples, of all attempts; only whole blocks are judged.
    Source: arXiv 2409.12917v2, section 6, selects checkpoints by training reward.
    """
    p = run.progress
    reward = row["acc_t1"] + row.get("acc_t3", 0.0)
    if phase.objective != "single_turn":  # its training reward is attempt 1's
        reward += row["acc_t2"]
    p.block.append((reward, row["delta"]))
    if len(p.block) < BLOCK:
        return
    reward, delta = (sum(values) / BLOCK for values in zip(*p.block, strict=True))
    p.block = []
    if p.first_delta is None:
        p.first_delta = delta
    p.last_delta = delta
    if phase.name == run.config.method and (p.best_reward is None or reward > p.best_reward):
        p.best_reward, p.best_step = reward, p.step
        run.best = {name: x.detach().cpu().clone() for name, x in run.policy.state_dict().items()}


def enough(run: Run, phase: Phase) -> bool:
    """Return whether Stage I may end early: a block's delta has risen by --stage1-gain."""
    p, gain = run.progress, run.config.stage1_gain
    if phase.objective != "stage1" or not gain or p.first_delta is None:
        return False
    return p.last_delta - p.first_delta >= gain


def finish_phase(run: Run, phase: Phase) -> None:
    """Write the phase's weights, and prepare the next phase."""
    p, c = run.progress, run.config
    step = p.step
    if c.select == "best" and run.best is not None:
        run.policy.load_state_dict(run.best)
        step = p.best_step
        print(f"{phase.name:>10} keeps the weights of step {step}: highest reward in training")
    about = dict(steps=p.step, selected_step=step, seconds=p.seconds)
    about["problem_rng"] = json.dumps(run.problem_rng.bit_generator.state)  # for --base
    save_weights(run.policy, about, run.folder / f"{phase.name}.pt")
    if phase.objective == "sft":
        run.base = frozen(run.policy, c)
    later = schedule(c)[p.phase + 1 :]
    run.previous = frozen(run.policy, c) if later and needs_previous(later[0]) else None
    if not (later and later[0].continues):
        run.optimizer = new_optimizer(run.policy)
    run.best = None
    run.progress = Progress(phase=p.phase + 1, beta2=p.beta2, log_bytes=p.log_bytes)


def note_speed(run: Run, phase: Phase, log: dict, seconds: float) -> None:
    """Add a line to speed.jsonl: what a step took. It is kept apart from log.jsonl, which is the
    same whenever the run is, and is not cut back when a run goes on from a checkpoint. TensorBoard,
    if asked for, is shown both."""
    row = dict(phase=phase.name, step=run.progress.step, seconds=seconds) | run.clock
    if "tokens" in row:
        row |= dict(
            sampled_tokens_per_s=row["tokens"] / row["sampling_s"],
            episodes_per_s=row["episodes"] / seconds,
        )
    if run.policy.embed.weight.is_cuda:
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    else:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    run.clock = {}
    with open(run.folder / "speed.jsonl" if processes()[0] == 0 else os.devnull, "a") as file:
        file.write(json.dumps(row) + "\n")
    if run.board is not None:
        for name, x in (log | row).items():
            if isinstance(x, (int, float)):
                run.board.add_scalar(name, x, steps_before(run) + run.progress.step)


QUIET = 60.0  # seconds after which a line is printed, if it is not time for one anyway
RL_COST = 4.0  # seconds of a reinforcement step for one of a supervised step, before it is measured


def show_progress(run: Run, phase: Phase, row: dict, pace: float) -> None:
    """Print one line: where the run is, how well its samples do, the time left at this pace (s)."""
    p, c = run.progress, run.config

    def cost(phase):
        return 1.0 if phase.objective == "sft" else RL_COST

    left = (phase.steps - p.step) * cost(phase)
    left += sum(later.steps * cost(later) for later in schedule(c)[p.phase + 1 :])
    left *= pace / cost(phase)
    line = f"{phase.name:>10} {p.step:>5}/{phase.steps}  "
    if phase.objective == "sft":
        kind = "right revisions" if p.step <= c.clean * c.sft_steps else "mixed revisions"
        kind = "worked answers" if c.task in DATA else kind
        line += f"loss {row['loss']:.4f} on {kind:<44}"
    elif phase.objective in SUPERVISED:
        line += (
            f"author's t1 {100 * row['acc_t1']:5.1f} %  t2 {100 * row['acc_t2']:5.1f} %  "
            f"imitated {100 * row['examples']:5.1f} %" + 20 * " "
        )
    else:
        line += (
            f"samples t1 {100 * row['acc_t1']:5.1f} %  t2 {100 * row['acc_t2']:5.1f} %  "
            f"delta {100 * row['delta']:+6.1f}  KL1 {row['kl1']:.3f}  KL2 {row['kl2']:.3f}"
        )
    hours = f"{left // 3600:.0f}h" if left >= 3600 else ""
    print(f"{line}  {hours}{left % 3600 // 60:3.0f}m{left % 60:02.0f}s left", flush=True)


# --- command line ---------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Train, evaluate, report. Return the exit status."""
    stop = threading.Event()

    def interrupt(number, _):
        stop.set()
        if processes()[1] == 1:  # torchrun sends every process a second signal itself
            signal.signal(number, signal.SIG_DFL)
            os.write(2, b"\nstopping after this step; the next Ctrl-C leaves at once\n")

    with together() as process:
        try:
            config, folder, base = parse(argv)
            run = restore(folder) if config is None else create(config, folder, base)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, interrupt)
            parameters = sum(weight.numel() for weight in run.policy.parameters())
            print(f"{folder}: {parameters:,} parameters, {run.config.device}", flush=True)
            if run.config.compile:
                print("torch.compile makes the first steps of a phase take up to a minute")
            if not train(run, stop):
                print(f"stopped and saved; continue with: python score.py --resume {folder}")
                return 130
        except (ValueError, OSError, Failure) as error:
            complain(f"score.py: error: {error}")
            return 2
    if process > 0:
        os._exit(0)  # at the interpreter's own end, torch's threads abort a process now and then
    del run  # the evaluation needs the memory
    torch.cuda.empty_cache()
    evaluator = Path(__file__).with_name("eval.py")
    return subprocess.run([sys.executable, evaluator, folder.resolve()]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
