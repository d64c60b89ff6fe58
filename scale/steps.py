"""How is a step of study/methods.py, or of score.py, taken in parts? Its gradient is the same.

Rows are sampled some at a time, and programs are judged side by side. The gradient is summed over
micro-batches and processes. The distributions over the vocabulary are made for a chunk of positions
at a time, and once more in the backward pass, so that no [B, S, V] is kept. The equations and the
sampler are those of the core. Dimension key: as in score.py.

Differs from the core: in bfloat16 sampler and trainer round differently: a gap is only logged.

    python -c "from scale import steps; print(steps.slices(range(4, 9), 3))"
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from model import GPT
from rollout import Rollout, grade, log_probs, summary, token_terms
from scale.memory import prepare
from scale.processes import all_gather, gathered, my_rows, world_size
from score import Phase, Run, loss
from study import methods

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GAP = {"float32": 1e-3, "bfloat16": torch.inf}  # nats by which sampler and trainer may disagree


def slices(rows: range, size: int) -> list[slice]:
    """Return slices of rows, of a size but for the last; 0: all in one."""
    starts = range(rows.start, rows.stop, size or len(rows))
    return [slice(at, min(at + starts.step, rows.stop)) for at in starts]


def take(r: Rollout, at: slice) -> Rollout:
    """Return some rows, up to the last token that any of them wrote."""
    S = int(r.turn_BS[at].any(dim=0).nonzero().max()) + 1
    ids_BT, turn_BS, logp_BS = r.ids_BT[at, : S + 1], r.turn_BS[at, :S], r.logp_BS[at, :S]
    return Rollout(ids_BT, turn_BS, logp_BS, [column[at] for column in r.attempts])


def frozen(model: GPT, weights: dict, c) -> GPT:
    """Return a model of the same sizes with these weights, which are not trained. In float32 it
    shares their memory; in bfloat16 its matrices are rounded here, and not at each use."""
    with torch.device("meta"):
        made = GPT(model.config)
    made.load_state_dict(weights, assign=True)
    if model.config.tied_head:
        made.head.weight = made.embed.weight
    made.cos, made.sin = model.cos, model.sin
    return prepare(made.requires_grad_(False), DTYPES[c.dtype])


def judge(r: Rollout, problems: list, task) -> torch.Tensor:
    """Return what `grade` does; programs run side by side, in processes of their own."""
    rows = [slice(b, b + 1) for b in range(len(problems))]
    with ThreadPoolExecutor(max(1, os.cpu_count() // world_size())) as pool:
        found = pool.map(lambda b: grade(take(r, b), problems[b], task), rows)
        return torch.cat(list(found), dim=1)


def collect(run: Run, author: GPT, offline: float = 0.0):
    """Return what `methods.collect` does, each process having written and judged its own rows."""
    c, task = run.config, run.task
    drawn = task.draw(c.batch // c.group, "train", run.rng)
    noise_2BN = torch.from_numpy(run.rng.random((2, c.batch, task.max_new)))
    problems = [problem for problem in drawn for _ in range(c.group)]
    if author is run.policy and (world_size() > 1 or c.dtype == "bfloat16"):
        author = frozen(author, gathered(author.state_dict()), c)
    parts = []
    for at in slices(my_rows(c.batch), c.sample_batch):
        prompts, noise = [task.encode(x.prompt) for x in problems[at][:: c.group]], noise_2BN[:, at]
        n = min(max(round(offline * len(drawn)) - at.start // c.group, 0), len(prompts))
        rows = task, prompts, noise.to(c.device), c.temperature, n
        r = methods.offline_rollout(author, run.base, *rows)
        parts.append((methods.join([r], "cpu"), judge(r, problems[at], task).cpu()))
    rows, rewards = zip(*all_gather(parts), strict=True)
    if c.eval_every:  # it is shown then
        run.sample = problems[0], take(rows[0], slice(0, 1)), rewards[0][:, 0].tolist()
    return methods.join(rows, c.device), problems, torch.cat(rewards, dim=1).to(c.device)


def in_chunks(terms, models: list[GPT], r: Rollout, temperature: float, chunk: int):
    """Return `terms(*models, r, temperature)`, tensors [B, S], computed `chunk` positions at a time
    and once more in the backward pass; 0: all at once. Each model reads the rows once, whole."""
    ids_BS, states = r.ids_BT[:, :-1], []
    for model in models:
        with torch.set_grad_enabled(model.embed.weight.requires_grad):
            states.append(model.hidden(ids_BS))

    def of_chunk(ids_BC1, turn_BC, *states):
        heads = [lambda _, wanted_BT, m=m, x=x: m.head(x[wanted_BT])
                 for m, x in zip(models, states, strict=True)]  # fmt: skip
        return terms(*heads, replace(r, ids_BT=ids_BC1, turn_BS=turn_BC), temperature)

    again = partial(checkpoint, of_chunk, use_reentrant=False) if chunk else of_chunk
    at = slices(range(ids_BS.shape[1]), chunk)
    found = [again(r.ids_BT[:, x.start : x.stop + 1], *(s[:, x] for s in (r.turn_BS, *states)))
             for x in at]  # fmt: skip
    return [torch.cat(parts, dim=1) for parts in zip(*found, strict=True)]


def rl_update(run: Run, r: Rollout, reward_KB, paid_and_held) -> dict:
    """Do what `score.rl_update` does, in parts; all processes have all rows."""
    c, (advantage_KB, weight_K) = run.config, paid_and_held
    if reward_KB.isnan().any(dim=0).all():
        raise RuntimeError("no row of the batch has both verdicts: the verifier has failed")
    models, gaps, kls = [run.policy, run.base], [], []
    run.optimizer.zero_grad()
    for at in slices(my_rows(c.batch), c.micro_batch):
        rows = take(r, at)
        logp_BS, kl_BS = in_chunks(token_terms, models, rows, c.temperature, c.chunk)
        loss_B = loss(logp_BS, kl_BS, rows.turn_BS, [x[at] for x in advantage_KB], weight_K)
        (loss_B.sum() / c.batch).backward()
        gap_BS = (logp_BS.detach() - rows.logp_BS) * (rows.turn_BS > 0)
        gaps.append(gap_BS.abs().max().item())
        kls.append([(kl_BS * (rows.turn_BS == k)).sum().item() for k in (1, 2)])
    if not (gap := torch.tensor(all_gather(gaps)).max().item()) < GAP[c.dtype]:  # nan, too
        raise RuntimeError(f"sampler and trainer disagree by {gap:.1e} nats about a token")
    kl1, kl2 = (sum(kl) / c.batch for kl in zip(*all_gather(kls), strict=True))
    log = summary(r, reward_KB, run.task) | dict(kl1=kl1, kl2=kl2, gap=gap, grad_norm=descend(run))
    return log | dict(tokens=int((r.turn_BS > 0).sum()), episodes=c.batch)


def came(model: GPT, r: Rollout, temperature: float) -> list[torch.Tensor]:
    """Return the log-probability [B, S] of the tokens that came, alone in a list; 0 of context."""
    mask_BS = r.turn_BS > 0
    logp_WV = log_probs(model(r.ids_BT[:, :-1], wanted_BT=mask_BS), temperature)
    logp_W = logp_WV.gather(-1, r.ids_BT[:, 1:][mask_BS][:, None])[:, 0]
    return [logp_W.new_zeros(mask_BS.shape).masked_scatter(mask_BS, logp_W)]


def sft_update(run: Run, r: Rollout, mask_BS, temperature: float) -> dict:
    """Do what `score.sft_update` does, in parts; all processes have all rows."""
    c, tokens, losses = run.config, int(mask_BS.sum()), []
    run.optimizer.zero_grad()
    for at in slices(my_rows(len(mask_BS)), c.micro_batch):
        rows = take(r, at)
        rows.turn_BS = mask_BS[at, : rows.turn_BS.shape[1]]
        (logp_BS,) = in_chunks(came, [run.policy], rows, temperature, c.chunk)
        part = -logp_BS.sum() / tokens
        part.backward()
        losses.append(part.item())
    return dict(loss=sum(all_gather(losses)), grad_norm=descend(run), tokens=tokens)


def descend(run: Run) -> float:
    """Take the optimizer's step down the gradient, clipped; return the norm that it had."""
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), 1.0, error_if_nonfinite=True)
    run.optimizer.step()
    return gathered(norm).item()


def in_parts(phase: Phase) -> Phase:
    """Return a phase of study/methods.py whose step is taken in parts."""
    pieces = {
        methods.base_step: dict(update=sft_update),
        methods.imitation_step: dict(collect=collect, update=sft_update),
    }.get(partial(phase.step).func, dict(collect=collect, update=rl_update))
    return phase._replace(step=partial(phase.step, **pieces))
