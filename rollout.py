"""What happens in two turns? Prompt, first attempt, an instruction to revise, second attempt.

Token ids in, token ids out: nothing that was sampled is decoded and encoded again, and the second
turn continues on the first turn's cache. A rollout is one contiguous row of ids, `x1 y1 p1 y2`,
with a mask for each attempt, so that one forward pass scores both. An attempt's end-of-turn token
is an action like any other, inside its mask; prompt and instruction are context, outside both.
The law that is sampled is the law that is scored: same temperature, no truncation in training.

    python -c "import rollout as r; print(r.encode(r.toy_encoding(), '12+34=46<|end|>'))"

Dimension key: B rows, T tokens, S = T - 1 scored positions (position s predicts token s + 1),
N tokens of one attempt, C tokens of a chunk that is read, V vocabulary.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import tiktoken
import torch

import verify
from model import GPT, Cache

END, REVISE = "<|end|>", "<|revise|>"


@cache
def toy_encoding() -> tiktoken.Encoding:
    """Return the toy's tokenizer: one token a character of 0-9 + =, and the two special tokens.

    >>> toy_encoding().encode("7+5=12<|end|>", allowed_special="all")
    [7, 10, 5, 11, 1, 2, 12]
    """
    ranks = {bytes([byte]): rank for rank, byte in enumerate(b"0123456789+=")}
    return tiktoken.Encoding(
        "toy", pat_str=r".", mergeable_ranks=ranks, special_tokens={END: 12, REVISE: 13}
    )


@cache
def countdown_encoding() -> tiktoken.Encoding:
    """Return countdown's tokenizer: one token a character of its expressions and prompts.

    >>> countdown_encoding().encode("8-(3+2)")
    [8, 11, 14, 3, 10, 2, 15]
    """
    ranks = {bytes([byte]): rank for rank, byte in enumerate(b"0123456789+-*/()=: ")}
    special = {END: len(ranks), REVISE: len(ranks) + 1}
    return tiktoken.Encoding(
        "countdown", pat_str=r".", mergeable_ranks=ranks, special_tokens=special
    )


def encoding_of(task: str) -> tiktoken.Encoding:
    """Return the tokenizer of a task, or of a kind of problem."""
    return countdown_encoding() if task == "countdown" else toy_encoding()


def encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Return the ids of our own text, special tokens included (never of a model's text)."""
    return encoding.encode(text, allowed_special="all")


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
def sample_turn(
    model: GPT,
    cache: Cache,
    chunk_BC: torch.Tensor,
    n_chunk_B: torch.Tensor,
    *,
    max_new: int,
    end_id: int,
    generator: torch.Generator | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Turn:
    """Read a chunk, then sample one attempt a row until its end-of-turn token or max_new tokens.

    The last token of every attempt is left unread: the next turn reads it before its instruction.

    Args:
      chunk_BC, n_chunk_B: int64, right-padded ids and how many of them are real (at least 1).
      temperature: 0 takes the likeliest token, whose log-probability is then 0 (it is certain).
      top_k, top_p: of `token_law`; for evaluation only.
    """
    B, _ = chunk_BC.shape
    row_B = torch.arange(B, device=chunk_BC.device)
    state_BD = model.hidden(chunk_BC, cache, n_chunk_B)[row_B, n_chunk_B - 1]
    going_B = torch.ones(B, dtype=torch.bool, device=chunk_BC.device)
    n_B = torch.zeros_like(n_chunk_B)
    ids, logps = [], []
    for i in range(max_new):
        logits_BV = model.head(state_BD)
        if temperature == 0:
            token_B = logits_BV.argmax(dim=-1)
            logp_B = torch.zeros(B, device=token_B.device)
        else:
            logp_BV = token_law(logits_BV, temperature, top_k, top_p)
            token_B = torch.multinomial(logp_BV.exp(), 1, generator=generator)[:, 0]
            logp_B = logp_BV[row_B, token_B]
        ids.append(token_B)
        logps.append(logp_B * going_B)
        n_B = n_B + going_B
        going_B = going_B & (token_B != end_id)
        if i == max_new - 1 or not going_B.any():
            break
        state_BD = model.hidden(token_B[:, None], cache, going_B.long())[:, 0]
    return Turn(torch.stack(ids, 1), n_B, torch.stack(logps, 1), going_B)


# --- two turns ------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """Two attempts at each problem, as rows `x1 y1 p1 y2`, contiguous from 0, padded on the right.

    ids_BT: int64. length_B: real tokens of each row. mask1_BS, mask2_BS: bool, position s is True
    where token s + 1 belongs to attempt 1 or 2, end-of-turn token included. logp_BS: the sampler's
    log-probability of token s + 1 (nats), 0 outside the masks. truncated1_B, truncated2_B: bool,
    the attempt did not end within the limit. offline1_B: bool, attempt 1 was written by another
    model, and so is context, not an action of the policy.
    """

    ids_BT: torch.Tensor
    length_B: torch.Tensor
    mask1_BS: torch.Tensor
    mask2_BS: torch.Tensor
    logp_BS: torch.Tensor
    truncated1_B: torch.Tensor
    truncated2_B: torch.Tensor
    offline1_B: torch.Tensor

    def rows(self, at: slice | torch.Tensor) -> "Rollout":
        """Return some rows (a slice, or booleans [B]), with the padding that they alone need."""
        T = int(self.length_B[at].max())
        return Rollout(
            self.ids_BT[at, :T],
            self.length_B[at],
            *(getattr(self, name)[at, : T - 1] for name in ("mask1_BS", "mask2_BS", "logp_BS")),
            *(getattr(self, name)[at] for name in ("truncated1_B", "truncated2_B", "offline1_B")),
        )


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


def assemble(prompt, turn1: Turn, instruction, turn2: Turn, offline1_B=None) -> Rollout:
    """Lay out prompts, attempts and instructions (prompt and instruction: ids [B, C], n [B])."""
    attempt1, attempt2 = (turn1.ids_BN, turn1.n_B), (turn2.ids_BN, turn2.n_B)
    pieces = [prompt, attempt1, instruction, attempt2]
    zeros = [(torch.zeros_like(ids_BC), n_B) for ids_BC, n_B in pieces]
    logp1, logp2 = (turn1.logp_BN, turn1.n_B), (turn2.logp_BN, turn2.n_B)
    ids_BT = join(pieces, torch.long)
    T = ids_BT.shape[1]
    before2_B = prompt[1] + turn1.n_B + instruction[1]
    return Rollout(
        ids_BT,
        before2_B + turn2.n_B,
        attempt_mask(T, prompt[1], turn1.n_B),
        attempt_mask(T, before2_B, turn2.n_B),
        join([zeros[0], logp1, zeros[2], logp2], turn1.logp_BN.dtype)[:, 1:],
        turn1.truncated_B,
        turn2.truncated_B,
        torch.zeros_like(turn1.truncated_B) if offline1_B is None else offline1_B,
    )


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
    author1: GPT | None = None,
    offline1_B: torch.Tensor | None = None,
) -> Rollout:
    """Sample two attempts at each problem.

    Args:
      prompts: the ids of each x1, of any lengths. instruction: the ids of p1.
      max_new: limit of one attempt, its end-of-turn token counted.
      generator: the only source of randomness. temperature, top_k, top_p: of `sample_turn`.
      author1, offline1_B: rows marked True continue from a first attempt that `author1` samples.
        (arXiv 2409.12917v2, section 5: "offline" first attempts from the base model.)
    """
    device = model.embed.weight.device
    prompt = pad(prompts, device)
    B, C = prompt[0].shape
    law = dict(
        max_new=max_new, end_id=end_id, generator=generator,
        temperature=temperature, top_k=top_k, top_p=top_p,
    )  # fmt: skip
    slots = C + max_new + len(instruction) + max_new
    cache = Cache(model, B, slots)
    turn1 = sample_turn(model, cache, *prompt, **law)
    if author1 is not None:
        other = sample_turn(author1, Cache(author1, B, slots), *prompt, **law)
        turn1 = choose(offline1_B, other, turn1)
        cache = Cache(model, B, slots)
        read_B = prompt[1] + turn1.n_B - 1
        model.hidden(join([prompt, (turn1.ids_BN, turn1.n_B)], torch.long), cache, read_B)
    # an attempt's last token was sampled but never fed to the model: turn 2 reads it first
    unread_B1 = turn1.ids_BN.gather(1, turn1.n_B[:, None] - 1)
    order_BC = torch.tensor(instruction, device=device).expand(B, -1)
    n_order_B = torch.full_like(turn1.n_B, len(instruction))
    turn2 = sample_turn(model, cache, torch.cat([unread_B1, order_BC], dim=1), n_order_B + 1, **law)
    return assemble(prompt, turn1, (order_BC, n_order_B), turn2, offline1_B)


def choose(pick_B: torch.Tensor, a: Turn, b: Turn) -> Turn:
    """Return a's attempt where pick_B is True, else b's."""
    N = max(a.ids_BN.shape[1], b.ids_BN.shape[1])

    def merge(name):
        x, y = getattr(a, name), getattr(b, name)
        if x.dim() == 1:
            return torch.where(pick_B, x, y)
        x, y = (torch.nn.functional.pad(z, (0, N - z.shape[1])) for z in (x, y))
        return torch.where(pick_B[:, None], x, y)

    return Turn(*(merge(name) for name in ("ids_BN", "n_B", "logp_BN", "truncated_B")))


# --- reading a rollout back -----------------------------------------------------------------------


def attempts(ids_BT, mask_BS, truncated_B, encoding: tiktoken.Encoding) -> list[str]:
    """Return each row's attempt as text, without its end-of-turn token."""
    rows = zip(ids_BT[:, 1:].tolist(), mask_BS.tolist(), truncated_B.tolist(), strict=True)
    texts = []
    for ids, mask, truncated in rows:
        own = [token for token, inside in zip(ids, mask, strict=True) if inside]
        texts.append(encoding.decode(own if truncated else own[:-1]))
    return texts


def grade(r: Rollout, problems: list[verify.Problem]) -> tuple[torch.Tensor, ...]:
    """Return the rewards of both attempts, float32 [B] each: 0, 1, or nan without a verdict.

    There is no verdict where the verifier failed or the gold answer is unreadable. That is never
    scored as 0: whoever trains or measures leaves the problem out, and counts it.
    """
    encoding, rewards = encoding_of(problems[0].kind), []
    for mask_BS, cut_B in ((r.mask1_BS, r.truncated1_B), (r.mask2_BS, r.truncated2_B)):
        answers = attempts(r.ids_BT, mask_BS, cut_B, encoding)
        verdicts = [
            verify.judge(problem, answer, cut)
            for answer, problem, cut in zip(answers, problems, cut_B.tolist(), strict=True)
        ]
        values = [float("nan") if v.reward is None else float(v.reward) for v in verdicts]
        rewards.append(torch.tensor(values, device=cut_B.device))
    return tuple(rewards)


def read_documents(documents, device, task: str = "addition") -> Rollout:
    """Lay out documents (prompt, draft, revision) exactly as a rollout lays out its samples."""
    encoding, turns = encoding_of(task), []
    prompts, drafts, revisions = zip(*documents, strict=True)
    for texts in (drafts, revisions):
        ids_BN, n_B = pad([encode(encoding, text + END) for text in texts], device)
        zeros_BN = torch.zeros(ids_BN.shape, device=device)
        turns.append(Turn(ids_BN, n_B, zeros_BN, torch.zeros_like(n_B, dtype=torch.bool)))
    prompt = pad([encode(encoding, text) for text in prompts], device)
    instruction = pad([encode(encoding, REVISE)] * len(documents), device)
    return assemble(prompt, turns[0], instruction, turns[1])
