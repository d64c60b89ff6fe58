"""What happens in two turns? Prompt, first attempt, an instruction to revise, second attempt.

Token ids in, token ids out: nothing that was sampled is decoded and encoded again, and the second
turn continues on the first turn's cache. A rollout is one contiguous row of ids, `x1 y1 p1 y2`,
with the turn of each token, so that one forward pass scores both. An attempt's end-of-turn token
is an action like any other, of its turn; prompt and instruction are context, of none. Further
attempts, where somebody wants them, are further turns: `p1 y3` and so on.
The law that is sampled is the law that is scored: same temperature, no truncation in training.

    python -c "import torch, rollout as r; print(r.token_law(torch.tensor([2.0, 1.0]), 0.7).exp())"

Dimension key: B rows, T tokens, S = T - 1 scored positions (position s predicts token s + 1),
N tokens of one attempt, K attempts, C tokens of a chunk that is read, V vocabulary.
"""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

import verify
from chat import Format, decode, encode, encode_text, format_of, prompt
from model import GPT, Cache

# --- one turn -------------------------------------------------------------------------------------


@dataclass
class Turn:
    """One attempt of each row, padded on the right.

    ids_BN: int64. n_B: tokens of each attempt, its end-of-turn token counted, at least 1.
    logp_BN: float32 or wider, log-probability in nats of each token under the sampled law, 0 beyond
    n_B. truncated_B: bool, no end-of-turn token within the limit.
    """

    ids_BN: torch.Tensor
    n_B: torch.Tensor
    logp_BN: torch.Tensor
    truncated_B: torch.Tensor


def token_law(logits_BV, temperature: float, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Return log-probabilities [.., V], float32 or wider, of the law that tokens are drawn from.

    Args:
      temperature: above 0. top_k: keep the k likeliest tokens, 0 keeps all. top_p: keep the
        smallest set of likeliest tokens whose probability reaches top_p, 1 keeps all.

    >>> token_law(torch.tensor([[2.0, 1.0, 0.0]]), 1.0, top_k=2).exp()
    tensor([[0.7311, 0.2689, 0.0000]])
    """
    wide = torch.promote_types(logits_BV.dtype, torch.float32)
    logp_BV = torch.log_softmax(logits_BV.to(wide) / temperature, dim=-1)
    if not top_k and top_p >= 1.0:
        return logp_BV
    sorted_BV, order_BV = logp_BV.sort(dim=-1, descending=True, stable=True)
    p_BV = sorted_BV.exp()
    drop_BV = p_BV.cumsum(-1) - p_BV >= top_p
    if top_k:
        drop_BV[..., top_k:] = True
    drop_BV = torch.zeros_like(drop_BV).scatter(-1, order_BV, drop_BV)
    return torch.log_softmax(logp_BV.masked_fill(drop_BV, -torch.inf), dim=-1)


@torch.no_grad()
def read(model: GPT, cache: Cache, chunk_BC: torch.Tensor, n_chunk_B: torch.Tensor) -> torch.Tensor:
    """Read a chunk into the cache; return the state [B, D] after each row's last real token.

    Args:
      chunk_BC, n_chunk_B: int64, right-padded ids and how many of them are real (at least 1).
    """
    row_B = torch.arange(len(chunk_BC), device=chunk_BC.device)
    return model.hidden(chunk_BC, cache, n_chunk_B)[row_B, n_chunk_B - 1]


@torch.no_grad()
def sample_turn(
    model: GPT,
    cache: Cache,
    state_BD: torch.Tensor,
    *,
    max_new: int,
    end_id: int,
    generator: torch.Generator | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    compact: bool = False,
    share: tuple[int, int] = (0, 1),
    largest: Callable[[int], int] = int,
) -> Turn:
    """Sample one attempt a row until its end-of-turn token or max_new tokens.

    The last token of every attempt is left unread: the next turn reads it before its instruction.
    A token is the one whose p / Exp(1) noise is largest, which has the probability p. The noise is
    that of all rows at all times, so that neither `compact` nor `share` changes what is sampled.

    Args:
      state_BD: what `read` returned.
      temperature: 0 takes the likeliest token, whose log-probability is then 0 (it is certain).
      top_k, top_p: of `token_law`; for evaluation only.
      compact: go on with the unfinished rows alone whenever they are half of those in work.
      share: (i, n): these are the i-th of n equal parts of the rows, which n processes sample.
      largest: returns the largest number that any of the n processes calls it with. Called once, at
        the end: who is done early draws the noise of the others' last tokens.
    """
    B, device = len(state_BD), state_BD.device
    ids_BN = torch.full((B, max_new), end_id, device=device)
    wide = torch.promote_types(state_BD.dtype, torch.float32)
    logp_BN = torch.zeros(B, max_new, dtype=wide, device=device)
    row_R, working = slice(None), cache  # the rows in work, at first all, and their cache
    state_RD, going_R = state_BD, torch.ones(B, dtype=torch.bool, device=device)
    for i in range(max_new):
        logits_RV = model.logits(state_RD)
        if temperature == 0:
            token_R = logits_RV.argmax(dim=-1)
        else:
            law_RV = token_law(logits_RV, temperature, top_k, top_p)
            noise = law_RV.new_empty(share[1], B, law_RV.shape[1])
            noise.exponential_(generator=generator)
            token_R = (law_RV.exp() / noise[share[0], row_R]).argmax(dim=-1)
            logp_BN[row_R, i] = law_RV.gather(1, token_R[:, None])[:, 0]
        ids_BN[row_R, i] = token_R
        going_R = going_R & (token_R != end_id)
        left = int(going_R.sum())
        if i == max_new - 1 or not left:
            break
        if compact and 2 * left <= len(going_R):
            if working is not cache:
                cache.put(row_R, working)
            row_R = torch.arange(B, device=device)[row_R][going_R]
            token_R, working, going_R = token_R[going_R], cache.take(row_R), going_R[going_R]
        state_RD = model.hidden(token_R[:, None], working, going_R.long())[:, 0]
    if working is not cache:
        cache.put(row_R, working)
    for _ in range(largest(i) - i if temperature else 0):
        noise.exponential_(generator=generator)
    ids_BN, logp_BN = ids_BN[:, : i + 1], logp_BN[:, : i + 1]
    ends_BN = (ids_BN == end_id).long()
    real_BN = ends_BN.cumsum(dim=1) == ends_BN  # no end of turn has come before
    return Turn(ids_BN, real_BN.sum(dim=1), logp_BN * real_BN, ~ends_BN.any(dim=1))


# --- two turns ------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """Two attempts at each problem, as rows `x1 y1 p1 y2`, contiguous from 0, padded on the right.

    ids_BT: int64. length_B: real tokens of each row. turn_BS: int64, the attempt (1, 2, ..) that
    token s + 1 belongs to, end-of-turn token included, 0 for context. logp_BS: the sampler's
    log-probability of token s + 1 (nats), 0 for context. truncated_BK: bool, the attempt did not
    end within the limit. offline1_B: bool, attempt 1 was written by another model, and so is
    context, not an action of the policy.
    """

    ids_BT: torch.Tensor
    length_B: torch.Tensor
    turn_BS: torch.Tensor
    logp_BS: torch.Tensor
    truncated_BK: torch.Tensor
    offline1_B: torch.Tensor

    @property
    def mask1_BS(self) -> torch.Tensor:
        """Bool: does token s + 1 belong to attempt 1?"""
        return self.turn_BS == 1

    @property
    def mask2_BS(self) -> torch.Tensor:
        """Bool: does token s + 1 belong to attempt 2?"""
        return self.turn_BS == 2

    def rows(self, at: slice | torch.Tensor) -> "Rollout":
        """Return some rows (a slice, or booleans [B]), with the padding that they alone need."""
        T = max(self.length_B[at].tolist(), default=1)
        return Rollout(
            self.ids_BT[at, :T],
            self.length_B[at],
            *(getattr(self, name)[at, : T - 1] for name in ("turn_BS", "logp_BS")),
            *(getattr(self, name)[at] for name in ("truncated_BK", "offline1_B")),
        )


def concatenate(parts: list[Rollout]) -> Rollout:
    """Return all rows of several rollouts, in order."""
    T = max(r.ids_BT.shape[1] for r in parts)

    def joined(name):
        columns = [getattr(r, name) for r in parts]
        if name in ("ids_BT", "turn_BS", "logp_BS"):
            more = [T - r.ids_BT.shape[1] for r in parts]
            columns = [F.pad(x, (0, n)) for x, n in zip(columns, more, strict=True)]
        return torch.cat(columns)

    return Rollout(*(joined(f.name) for f in fields(Rollout)))


def pad(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ragged rows as ids [B, C] padded on the right with 0, and lengths [B], both int64."""
    n = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), n.max()), dtype=np.int64)
    ids[np.arange(n.max()) < n[:, None]] = np.concatenate(rows)
    return torch.from_numpy(ids).to(device), torch.from_numpy(n).to(device)


def join(parts: list[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> torch.Tensor:
    """Join right-padded pieces (values [B, C], lengths [B]) into contiguous rows [B, T], 0 beyond.

    >>> a = torch.tensor([[1, 9], [2, 3]]), torch.tensor([1, 2])
    >>> b = torch.tensor([[4, 5], [6, 9]]), torch.tensor([2, 1])
    >>> join([a, b], torch.long)
    tensor([[1, 4, 5],
            [2, 3, 6]])
    """
    end_B = sum(n_B for _, n_B in parts)
    row = end_B.new_zeros(len(end_B), int(end_B.max())).to(dtype)
    start_B = torch.zeros_like(end_B)
    for values_BC, n_B in parts:
        slot_C = torch.arange(values_BC.shape[1], device=row.device)
        real_BC = slot_C < n_B[:, None]
        rows, _ = real_BC.nonzero(as_tuple=True)
        row[rows, (start_B[:, None] + slot_C)[real_BC]] = values_BC[real_BC].to(dtype)
        start_B = start_B + n_B
    return row


def attempt_mask(T: int, before_B: torch.Tensor, n_B: torch.Tensor) -> torch.Tensor:
    """Return the mask [B, T - 1] of targets that belong to n_B tokens after the first before_B."""
    target_S = torch.arange(1, T, device=n_B.device)
    return (target_S >= before_B[:, None]) & (target_S < (before_B + n_B)[:, None])


def assemble(prompt, turns: list[Turn], instruction, offline1_B=None) -> Rollout:
    """Lay out prompts, attempts and instructions (prompt and instruction: ids [B, C], n [B])."""
    pieces, logps, before = [prompt], [as_zeros(prompt)], []
    for turn in turns:
        if len(pieces) > 1:
            pieces.append(instruction)
            logps.append(as_zeros(instruction))
        before.append(sum(n_B for _, n_B in pieces))
        pieces.append((turn.ids_BN, turn.n_B))
        logps.append((turn.logp_BN, turn.n_B))
    ids_BT = join(pieces, torch.long)
    T = ids_BT.shape[1]
    masks = [attempt_mask(T, b, turn.n_B) for b, turn in zip(before, turns, strict=True)]
    return Rollout(
        ids_BT,
        sum(n_B for _, n_B in pieces),
        sum(k * mask_BS for k, mask_BS in enumerate(masks, 1)),
        join(logps, turns[0].logp_BN.dtype)[:, 1:],
        torch.stack([turn.truncated_B for turn in turns], dim=1),
        torch.zeros_like(turns[0].truncated_B) if offline1_B is None else offline1_B,
    )


def as_zeros(piece: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a piece of the same lengths, all 0."""
    return torch.zeros_like(piece[0]), piece[1]


@torch.no_grad()
def rollout(
    model: GPT,
    prompts: list[list[int]],
    instruction: list[int],
    *,
    max_new: int,
    end_id: int,
    generator: torch.Generator | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    compact: bool = False,
    share: tuple[int, int] = (0, 1),
    largest: Callable[[int], int] = int,
    attempts: int = 2,
    group: int = 1,
    author1: GPT | None = None,
    offline1_B: torch.Tensor | None = None,
) -> Rollout:
    """Sample two attempts at each problem, or more.

    Args:
      prompts: the ids of each x1, of any lengths. instruction: the ids of p1.
      group: rows of each prompt, side by side; the prompt is read once for all of them.
      max_new: limit of one attempt, its end-of-turn token counted.
      generator: the only source of randomness. temperature, top_k, top_p, compact, share,
        largest: of `sample_turn`.
      author1, offline1_B: rows marked True continue from a first attempt that `author1` samples.
        (arXiv 2409.12917v2, section 5: "offline" first attempts from the base model.)
    """
    device = model.embed.weight.device
    one = pad(prompts, device)  # of each group
    prompt = tuple(x.repeat_interleave(group, dim=0) for x in one)
    B, C = prompt[0].shape
    law = dict(
        max_new=max_new, end_id=end_id, generator=generator, temperature=temperature,
        top_k=top_k, top_p=top_p, compact=compact, share=share, largest=largest,
    )  # fmt: skip
    slots = C + attempts * max_new + (attempts - 1) * len(instruction)

    def first_turn(author):
        cache = Cache(author, len(prompts), slots if group == 1 else C)
        state_BD = read(author, cache, *one)
        if group > 1:
            cache, state_BD = cache.spread(group, slots), state_BD.repeat_interleave(group, dim=0)
        return cache, sample_turn(author, cache, state_BD, **law)

    cache, turn1 = first_turn(model)
    if author1 is not None:
        turn1 = choose(offline1_B, first_turn(author1)[1], turn1)
        cache = Cache(model, B, slots)
        read_B = prompt[1] + turn1.n_B - 1
        model.hidden(join([prompt, (turn1.ids_BN, turn1.n_B)], torch.long), cache, read_B)
    order_BC = torch.tensor(instruction, device=device).expand(B, -1)
    n_order_B = torch.full_like(turn1.n_B, len(instruction))
    turns = [turn1]
    while len(turns) < attempts:
        # an attempt's last token was sampled but never fed to the model: the next turn reads it
        unread_B1 = turns[-1].ids_BN.gather(1, turns[-1].n_B[:, None] - 1)
        chunk_BC = torch.cat([unread_B1, order_BC], dim=1)
        state_BD = read(model, cache, chunk_BC, n_order_B + 1)
        turns.append(sample_turn(model, cache, state_BD, **law))
    return assemble(prompt, turns, (order_BC, n_order_B), offline1_B)


def choose(pick_B: torch.Tensor, a: Turn, b: Turn) -> Turn:
    """Return a's attempt where pick_B is True, else b's."""
    N = max(a.ids_BN.shape[1], b.ids_BN.shape[1])

    def merge(name):
        x, y = getattr(a, name), getattr(b, name)
        if x.dim() == 1:
            return torch.where(pick_B, x, y)
        x, y = (F.pad(z, (0, N - z.shape[1])) for z in (x, y))
        return torch.where(pick_B[:, None], x, y)

    return Turn(*(merge(name) for name in ("ids_BN", "n_B", "logp_BN", "truncated_B")))


# --- reading a rollout back -----------------------------------------------------------------------


def written(r: Rollout, turn: int) -> list[list[int]]:
    """Return each row's attempt as ids, its end-of-turn token included."""
    rows = zip(r.ids_BT[:, 1:].tolist(), (r.turn_BS == turn).tolist(), strict=True)
    return [[token for token, inside in zip(*row, strict=True) if inside] for row in rows]


def texts(r: Rollout, turn: int, format: Format) -> list[str]:
    """Return each row's attempt as text, without its end-of-turn token."""
    rows = zip(written(r, turn), r.truncated_BK[:, turn - 1].tolist(), strict=True)
    return [decode(format, ids if cut else ids[:-1]) for ids, cut in rows]


def grade(
    r: Rollout,
    problems: list[verify.Problem],
    format: Format,
    tally: Counter | None = None,
    processes: int = 1,
) -> list[torch.Tensor]:
    """Return the rewards of each attempt, float32 [B]: 0, 1, or nan without a verdict.

    There is no verdict where the verifier failed or the gold answer is unreadable. That is never
    scored as 0: whoever trains or measures leaves the problem out, and counts it.

    Args:
      tally: counts verdicts by their status. processes: so many grade at once, and share the cores.
    """
    rewards, workers = [], max(1, os.cpu_count() // processes)
    with ThreadPoolExecutor(workers) as pool:  # programs run in processes of their own
        over = pool.map if problems[0].kind == "program" else map
        for turn, cut_B in enumerate(r.truncated_BK.unbind(dim=1), 1):
            answers = texts(r, turn, format)
            verdicts = list(over(verify.judge, problems, answers, cut_B.tolist()))
            if tally is not None:
                tally.update(verdict.status for verdict in verdicts)
            values = [float("nan") if v.reward is None else float(v.reward) for v in verdicts]
            rewards.append(torch.tensor(values, device=cut_B.device))
    return rewards


def lay_out(prompts, attempts, instruction: list[int], device) -> Rollout:
    """Lay out rows of ids as a rollout does its samples: prompts, then all first attempts, .."""
    turns = []
    for column in attempts:
        ids_BN, n_B = pad(column, device)
        zeros_BN = torch.zeros(ids_BN.shape, device=device)
        turns.append(Turn(ids_BN, n_B, zeros_BN, torch.zeros_like(n_B, dtype=torch.bool)))
    return assemble(pad(prompts, device), turns, pad([instruction] * len(prompts), device))


def read_documents(documents, device, task: str = "addition") -> Rollout:
    """Lay out a toy's documents: prompt, draft, revision or several, all but the prompt without
    their end of turn."""
    format = format_of(task)
    columns = [
        [encode(format.tokenizer.encoding, text) + [format.end_id] * (turn > 0) for text in column]
        for turn, column in enumerate(zip(*documents, strict=True))
    ]
    return lay_out(columns[0], columns[1:], format.instruction, device)


def read_solutions(problems: list[verify.Problem], format: Format, device) -> Rollout:
    """Lay out problems and their worked answers, as first attempts that are the last."""
    encoding, nfc = format.tokenizer
    answers = [[*encode_text(encoding, p.solution, nfc), format.end_id] for p in problems]
    return lay_out([prompt(format, p) for p in problems], [answers], format.instruction, device)
