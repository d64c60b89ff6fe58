"""What happens in two turns? Prompt, first attempt, an instruction to revise, second attempt.

Token ids in, token ids out: nothing that was sampled is decoded and encoded again, and the second
turn goes on in the first turn's cache. A rollout is one contiguous row of ids, `x1 y1 p1 y2`, with
the turn of each token, so that one forward pass scores both attempts. An attempt's end-of-turn
token is an action like any other, of its turn; prompt and instruction are context, of turn 0.

Tokens are drawn from the very distribution that is scored: same temperature, nothing cut off. All
randomness is an array of uniform numbers that the caller draws, one for each row and token: a row's
samples depend on its own numbers alone (up to rounding), whichever rows stand beside it.

    python -c "import torch, rollout as r; print(r.log_probs(torch.tensor([2.0, 1.0]), 0.7).exp())"

Dimension key: P prompts; B rows, B / P of each prompt, side by side; K attempts, N tokens of one
attempt at most; T tokens of a row, S = T - 1 scored positions (position s predicts token s + 1);
R rows that are still being written; W tokens of all attempts; D width of the model, V vocabulary.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

import verify
from model import GPT, Cache

# --- a task: problems, and how they are written in tokens -----------------------------------------


class Task(NamedTuple):
    """What a policy is trained on. Another task is another such tuple.

    draw: (n, split, rng) -> n problems of split "train", "dev" or "test".
    documents: (n, rng) -> n documents that the base model reads, in ids: (prompts, [first attempts,
      second ones]), three lists of n rows. Attempts end with end_id; a second one may be empty.
    encode: a problem's text -> the ids of x1. decode: an attempt's ids -> its text.
    instruction: the ids of p1. end_id: ends an attempt.
    vocab_size; max_new: most tokens of an attempt, its end included; max_positions: of a row, at
      least a prompt and two attempts.
    """

    draw: Callable[[int, str, np.random.Generator], list[verify.Problem]]
    documents: Callable[[int, np.random.Generator], tuple[list, list]]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    instruction: list[int]
    end_id: int
    vocab_size: int
    max_new: int
    max_positions: int


@cache
def toy_encoding() -> tiktoken.Encoding:
    """Return the toy's tokenizer, with a token for each number, signed number and target.

    >>> toy_encoding().decode_tokens_bytes(toy_encoding().encode_ordinary("4 2 =2+4-2"))
    [b'4 ', b'2 ', b'=2', b'+4', b'-2']
    """
    words = [f"{sign}{x}{end}" for sign, end in (("+", ""), ("-", ""), ("", " "))
             for x in range(1, verify.LARGEST + 1)]  # fmt: skip
    words += [f"={target}" for target in range(9 * verify.LARGEST + 1)]
    ranks = {word.encode(): rank for rank, word in enumerate(words)}
    special = {f"<|{x}|>": len(words) + i for i, x in enumerate(("end", "revise", "check"))}
    pattern = r"[+-]\d|\d |=\d+"
    return tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def to_read(c, corpus: Callable, encode: Callable, end_id: int, check_id: int) -> Callable:
    """Return `Task.documents` of a toy. corpus: (n, rng, size, slip, slip_hard, rights, careless)
    -> n texts (problem, draft, revision).

    A share of them ask to *check* a draft, which stands in the prompt, and teach a right revision.
    The others teach a draft and, asked to *revise* it, as the policy will be, mostly to copy it. So
    the base is able to correct a draft, but does not when it is only told to revise.
    """

    def documents(n, rng):
        k, about = round(c.checks * n), (rng, c.size, c.slip, c.slip_hard)
        rows = [([*encode(x), *encode(y), end_id, check_id], [*encode(z), end_id], [])
                for x, y, z in corpus(k, *about, 1.0, 0.0)]  # fmt: skip
        rows += [(encode(x), [*encode(y), end_id], [*encode(z), end_id])
                 for x, y, z in corpus(n - k, *about, c.right_revisions, c.careless)]  # fmt: skip
        prompts, *attempts = map(list, zip(*rows, strict=True))
        return prompts, attempts

    return documents


def signs(c) -> Task:
    """Return the toy: signs, and a base that has read `verify.corpus`. c: score.py's settings."""
    if not 4 <= c.size <= 9:
        raise ValueError(f"--size must be 4 to 9 numbers of a problem, got {c.size}")
    encoding, encode = toy_encoding(), toy_encoding().encode_ordinary
    end_id, revise_id, check_id = range(encoding.n_vocab)[-3:]
    return Task(
        draw=lambda n, split, rng: verify.problems(n, split, rng, c.size),
        documents=to_read(c, verify.corpus, encode, end_id, check_id),
        encode=encode,
        decode=encoding.decode,
        instruction=[revise_id],
        end_id=end_id,
        vocab_size=encoding.n_vocab,
        max_new=c.size + 1,
        max_positions=c.size + 1 + 2 * (c.size + 2),
    )


def find_task(name: str) -> tuple[Callable, dict]:
    """Return a task's function from settings to its Task, and its own defaults: of signs, or `task`
    and `SETTINGS` of a module in the folder tasks/."""
    if name == "signs":
        return signs, {}
    if name.isidentifier() and (Path(__file__).parent / "tasks" / f"{name}.py").is_file():
        module = importlib.import_module(f"tasks.{name}")
        if hasattr(module, "task"):
            return module.task, getattr(module, "SETTINGS", {})
    raise ValueError(f"--task must be signs or a task in tasks/, as addition, got {name!r}")


# --- one turn -------------------------------------------------------------------------------------


def log_probs(logits_BV, temperature: float) -> torch.Tensor:
    """Return log-probabilities [.., V] (nats, float32 or wider) that tokens are drawn with.

    temperature 0: the likeliest token is certain, and its log-probability 0.

    >>> log_probs(torch.tensor([2.0, 1.0]), 0.0).exp()
    tensor([1., 0.])
    """
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    if temperature == 0:
        best_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits_BV, -torch.inf).scatter(-1, best_B1, 0.0)
    return torch.log_softmax(logits_BV / temperature, dim=-1)


def pad(rows: list[list], device, dtype=np.int64) -> torch.Tensor:
    """Return ragged rows as [B, T], padded on the right with 0."""
    T = max(map(len, rows))
    return torch.tensor(np.array([([*row] + [0] * T)[:T] for row in rows], dtype), device=device)


def read(model: GPT, cache: Cache, rows: list[list[int]]) -> torch.Tensor:
    """Read some ids in each row into the cache; return the model's states [B, D] after the last."""
    n_B = torch.tensor([len(ids) for ids in rows], device=cache.length_B.device)
    last_BT = torch.arange(1, max(map(len, rows)) + 1, device=n_B.device) == n_B[:, None]
    return model.hidden(pad(rows, n_B.device), cache, n_B, last_BT)


@torch.no_grad()
def sample_turn(model: GPT, cache: Cache, state_BD, noise_BN, end_id: int, temperature: float):
    """Sample one attempt a row, until its end-of-turn token or for N tokens.

    Return the attempts, a list of ids for each row, and the log-probabilities of these ids (nats).
    A token is where the cumulative probability passes a number of noise_BN, float64 in [0, 1). The
    last token of an attempt is not read into the cache here, but by the next turn, ahead of the
    instruction. Whenever half of the rows have ended, the others go on alone.
    """
    (B, N), device = noise_BN.shape, noise_BN.device
    ids_BN = torch.full((B, N), end_id, device=device)
    logp_BN = noise_BN.new_zeros(B, N)
    row_R, going, state_RD = torch.arange(B, device=device), cache, state_BD
    for i in range(N):
        logp_RV = log_probs(model.head(state_RD), temperature)
        passed_RV = logp_RV.double().exp().cumsum(dim=1)
        wanted_R1 = noise_BN[row_R, i, None] * passed_RV[:, -1:]
        token_R1 = torch.searchsorted(passed_RV, wanted_R1, right=True)
        ids_BN[row_R, i] = token_R1[:, 0]
        logp_BN[row_R, i] = logp_RV.gather(1, token_R1)[:, 0].to(logp_BN.dtype)
        goes_on_R = (ids_BN[row_R, : i + 1] != end_id).all(dim=1)
        if i == N - 1 or not goes_on_R.any():
            break
        if 2 * goes_on_R.sum() <= len(row_R):
            if going is not cache:
                cache.put(row_R, going)
            row_R, token_R1, goes_on_R = row_R[goes_on_R], token_R1[goes_on_R], goes_on_R[goes_on_R]
            going = cache.take(row_R)
        state_RD = model.hidden(token_R1, going, goes_on_R.long())[:, 0]
    if going is not cache:
        cache.put(row_R, going)
    attempts, logps = ids_BN[:, : i + 1].tolist(), logp_BN[:, : i + 1].tolist()
    lengths = [([*ids, end_id]).index(end_id) + 1 for ids in attempts]
    return [[row[:n] for row, n in zip(rows, lengths, strict=True)] for rows in (attempts, logps)]


# --- two turns ------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """Attempts at each problem, as rows `x1 y1 p1 y2`, contiguous from 0, padded on the right.

    ids_BT: int64. turn_BS: the attempt (1, 2, ..) that token s + 1 belongs to, its end-of-turn
    token included, 0 for context. logp_BS: float64, the sampler's log-probability of token s + 1
    (nats), 0 for context. attempts: by turn and row, the ids that were written.
    """

    ids_BT: torch.Tensor
    turn_BS: torch.Tensor
    logp_BS: torch.Tensor
    attempts: list[list[list[int]]]


def make_rows(prompts, attempts, instruction: list[int], device, logps=None) -> Rollout:
    """Return rows of given ids: prompts by row; attempts, and logps if known, by turn and row. An
    empty second attempt has no instruction before it."""
    logps = logps or [[[0.0] * len(ids) for ids in column] for column in attempts]
    ids_B, turn_B, logp_B = [], [], []
    for b, prompt in enumerate(prompts):
        ids, turn, logp = list(prompt), [0] * len(prompt), [0.0] * len(prompt)
        for k, column in enumerate(attempts, start=1):
            context = instruction if k > 1 and column[b] else []
            ids += context + column[b]
            turn += [0] * len(context) + [k] * len(column[b])
            logp += [0.0] * len(context) + logps[k - 1][b]
        ids_B.append(ids)
        turn_B.append(turn[1:])
        logp_B.append(logp[1:])
    padded = pad(ids_B, device), pad(turn_B, device), pad(logp_B, device, np.float64)
    return Rollout(*padded, attempts)


@torch.no_grad()
def rollout(model: GPT, task: Task, prompts: list[list[int]], noise_KBN, temperature) -> Rollout:
    """Sample K attempts in each of B rows, the same number G of rows for each prompt.

    Args:
      prompts: the ids of each x1, of any lengths; each is read once for its G rows, side by side.
      noise_KBN: numbers in [0, 1), the only randomness; N is the limit of one attempt, in tokens.
    """
    (K, B, N), P = noise_KBN.shape, len(prompts)
    slots = max(map(len, prompts)) + K * N + (K - 1) * len(task.instruction)
    cache = Cache(model, P, slots)
    state_BD = read(model, cache, prompts)
    if B > P:
        row_B = torch.arange(P, device=noise_KBN.device).repeat_interleave(B // P)
        cache, state_BD = cache.take(row_B), state_BD[row_B]
    attempts, logps = [], []
    for noise_BN in noise_KBN:
        if attempts:  # the last token was sampled but never fed to the model: it is read now
            state_BD = read(model, cache, [ids[-1:] + task.instruction for ids in attempts[-1]])
        ids, logp = sample_turn(model, cache, state_BD, noise_BN, task.end_id, temperature)
        attempts.append(ids)
        logps.append(logp)
    rows = [prompt for prompt in prompts for _ in range(B // P)]
    return make_rows(rows, attempts, task.instruction, noise_KBN.device, logps)


def token_terms(policy: GPT, base: GPT, r: Rollout, temperature: float):
    """Return two [B, S]: the log-probability of each token that came, and KL(policy || base) of the
    distribution that it was drawn from, over the whole vocabulary. Gradient to the policy; 0 of
    context. Both models have the temperature of the samples."""
    ids_BS, mask_BS = r.ids_BT[:, :-1], r.turn_BS > 0
    logp_WV = log_probs(policy(ids_BS, wanted_BT=mask_BS), temperature)
    with torch.no_grad():
        base_WV = log_probs(base(ids_BS, wanted_BT=mask_BS), temperature)
    kl_W = (logp_WV.exp() * (logp_WV - base_WV)).sum(dim=-1)
    logp_W = logp_WV.gather(-1, r.ids_BT[:, 1:][mask_BS][:, None])[:, 0]
    return [x_W.new_zeros(mask_BS.shape).masked_scatter(mask_BS, x_W) for x_W in (logp_W, kl_W)]


# --- texts and rewards ----------------------------------------------------------------------------


def texts(r: Rollout, turn: int, task: Task) -> list[str]:
    """Return each row's attempt as text, without its end-of-turn token."""
    return [task.decode([x for x in ids if x != task.end_id]) for ids in r.attempts[turn - 1]]


def truncated(r: Rollout, turn: int, task: Task) -> list[bool]:
    """Return which rows' attempt ran into the limit before it ended."""
    return [ids[-1] != task.end_id for ids in r.attempts[turn - 1]]


def grade(r: Rollout, problems: list[verify.Problem], task: Task) -> torch.Tensor:
    """Return the reward of each attempt, float32 [K, B]: 0, 1, or nan where there is no verdict
    (the verifier failed, or the gold answer is unreadable): that is never scored as 0."""
    judge, reward_KB = cache(verify.judge), []  # the same attempt at a problem is judged once
    for k in range(1, len(r.attempts) + 1):
        verdicts = map(judge, problems, texts(r, k, task), truncated(r, k, task))
        reward_KB.append([torch.nan if v.reward is None else v.reward for v in verdicts])
    return torch.tensor(reward_KB, dtype=torch.float32, device=r.ids_BT.device)


def summary(r: Rollout, reward_KB, task: Task) -> dict:
    """Return what is logged of sampled attempts: shares, and entropies in nats a token."""
    acc_t1, acc_t2 = reward_KB[:2].nanmean(dim=1).tolist()
    changed = [a != b for a, b in zip(*r.attempts[:2], strict=True)]
    log = dict(acc_t1=acc_t1, acc_t2=acc_t2, delta=acc_t2 - acc_t1, changed=np.mean(changed).item())
    for k in (1, 2):
        log[f"truncated{k}"] = np.mean(truncated(r, k, task)).item()
        log[f"entropy{k}"] = -r.logp_BS[r.turn_BS == k].mean().item()
    return log | dict(unjudged=reward_KB.isnan().any(dim=0).float().mean().item())
