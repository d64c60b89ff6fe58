"""What does the policy compute? A compact decoder-only transformer of the Llama and Qwen families.

RMSNorm before attention and MLP, rotary positions, SwiGLU, grouped-query attention, optional bias
on query, key and value or norm of query and key, optional tying of the head to the embedding. No
loss and no sampling here.

Where it differs from the usual: the key-value cache keeps a length for *each row*. Rows are
contiguous from slot 0 and slot = position, so ragged prompts need no left padding, and "a query at
position p sees the slots up to p" is the whole mask. Whatever was written beyond a row's length is
never seen and is overwritten by the tokens that come to stand there.

    python -c "import model; print(model.GPT(model.GPTConfig(vocab_size=14)))"

Dimension key: B rows, T tokens in this call, S slots of the cache, V vocabulary, D width,
H query heads, J key-value heads, K head size, F hidden width of the MLP; W wanted tokens.
"""

import copy
import fcntl
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a model.

    head_dim: size K of a head; 0 means d_model / n_head. qk_norm: an RMSNorm over K of each query
    and key, before they turn.

    Raises:
      ValueError: sizes that do not fit each other.
    """

    vocab_size: int
    n_layer: int = 1
    n_head: int = 4
    n_kv_head: int = 4
    d_model: int = 64
    d_ff: int = 128
    max_positions: int = 64
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    tied_head: bool = False
    head_dim: int = 0
    qk_norm: bool = False

    @property
    def head_size(self) -> int:
        """K: head_dim, or what d_model gives each query head."""
        return self.head_dim or self.d_model // self.n_head

    def frequencies(self) -> torch.Tensor:
        """Return the angle that each pair of a head turns by from token to token, float64 [K/2]."""
        half = self.head_size // 2
        return self.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)

    def __post_init__(self):
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")
        if self.head_dim % 2 or (not self.head_dim and self.d_model % (2 * self.n_head)):
            raise ValueError(f"d_model must be a multiple of {2 * self.n_head}, twice n_head, or "
                             f"head_dim even: {self.d_model}, {self.head_dim}")  # fmt: skip


class Cache:
    """Keys and values of the tokens that a model has read, preallocated, with a length per row.

    k, v: one [B, J, S, K] tensor a layer. length_B: tokens held by each row, int64. reach: no row
    holds more tokens; it is a plain int, as a GPU would have to be waited for to read length_B.
    """

    def __init__(self, model: "GPT", rows: int, slots: int):
        c, weight = model.config, model.embed.weight
        if slots > c.max_positions:
            raise ValueError(f"{slots} tokens do not fit max_positions = {c.max_positions}")
        shape = (rows, c.n_kv_head, slots, c.head_size)
        self.k = [weight.new_zeros(shape) for _ in range(c.n_layer)]
        self.v = [weight.new_zeros(shape) for _ in range(c.n_layer)]
        self.length_B = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.reach = 0

    def take(self, row_R: torch.Tensor) -> "Cache":
        """Return a copy of some rows (int64 [R]), in that order; a row may be taken many times."""
        part = copy.copy(self)
        part.k, part.v = ([x[row_R] for x in layers] for layers in (self.k, self.v))
        part.length_B = self.length_B[row_R]
        return part

    def put(self, row_R: torch.Tensor, part: "Cache") -> None:
        """Write back rows that `take` returned and that have gone on since."""
        for ours, theirs in zip(self.k + self.v, part.k + part.v, strict=True):
            ours[row_R] = theirs
        self.length_B[row_R] = part.length_B
        self.reach = max(self.reach, part.reach)


def rotary_table(config: GPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and signed sin of position times frequency, each [max_positions, K], float32.

    Source: Su et al., RoFormer, arXiv 2104.09864, eq. 15, with element k paired with k + K/2.
    """
    angle = torch.arange(config.max_positions, dtype=torch.float64)[:, None] * config.frequencies()
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x_BTHK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[k], x[k + K/2]) by its angle; cos and sin broadcast to [B, T, 1, K]."""
    swapped = x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1)
    return (x_BTHK * cos + swapped * sin).to(x_BTHK.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; n_kv_head < n_head shares keys and values."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        K, self.n_head, self.n_kv_head = config.head_size, config.n_head, config.n_kv_head
        width = (config.n_head + 2 * config.n_kv_head) * K
        self.qkv = nn.Linear(config.d_model, width, bias=config.qkv_bias)
        self.out = nn.Linear(config.n_head * K, config.d_model, bias=False)
        self.q_norm = nn.RMSNorm(K, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(K, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BTD, cos, sin, kept=None):
        """`kept`: this layer's cached k and v [B, J, S, K]; the index of the slots to write to; and
        the mask [B, 1, T, slots in use], added to the scores: -inf where a token must not look;
        None where all rows begin."""
        B, T, _ = x_BTD.shape
        H, J = self.n_head, self.n_kv_head
        q, k, v = self.qkv(x_BTD).view(B, T, H + 2 * J, -1).split([H, J, J], dim=2)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        q, k, v, bias = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None
        if kept is not None:
            k_BJSK, v_BJSK, place, bias = kept
            # padding lands beyond the row's length, unseen
            k_BJSK[place], v_BJSK[place] = k.to(k_BJSK.dtype), v.to(v_BJSK.dtype)
        if bias is not None:
            reach, bias = bias.shape[-1], bias.to(q.dtype)
            k, v = k_BJSK[:, :, :reach].to(q.dtype), v_BJSK[:, :, :reach].to(q.dtype)
        y_BHTK = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=H != J
        )
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU. Source: Shazeer, arXiv 2002.05202, eq. 6."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x_BTD):
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD, cos, sin, kept=None):
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD), cos, sin, kept)
        return x_BTD + self.mlp(self.norm2(x_BTD))


class GPT(nn.Module):
    """The language model: `logits_BTV = model(ids_BT)`, or in chunks with a `Cache`. Its initial
    weights depend on the seed alone."""

    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embed.weight
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Embedding with standard deviation 0.02, matrices with variance 1 / fan-in, of those into
        the residual stream divided by their number (GPT-2); norms 1, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif "norm" not in name:
                std = 0.02 if name == "embed.weight" else weight.shape[1] ** -0.5
                if name.endswith(("out.weight", "down.weight")):
                    std *= (2 * self.config.n_layer) ** -0.5
                weight.normal_(0.0, std, generator=generator)

    def forward(self, ids_BT, cache: Cache | None = None, n_new_B=None, wanted_BT=...):
        """Return logits [B, T, V] of the token after each token of ids_BT (int64, right-padded), or
        [W, V] after the tokens that the mask wanted_BT chooses, row by row (`...`: all).

        Without a cache the rows start at position 0, and padding on the right changes nothing to
        its left. With one, the rows go on where they stand; n_new_B (int64, default T each) says
        how many of the T tokens are real, and the cache is advanced by as many.
        """
        return self.head(self.hidden(ids_BT, cache, n_new_B, wanted_BT))

    def hidden(self, ids_BT, cache: Cache | None = None, n_new_B=None, wanted_BT=...):
        """Return the final normalised states [B, T, D], or [W, D], of which `head` makes logits."""
        (B, T), device = ids_BT.shape, ids_BT.device
        reach = 0 if cache is None else cache.reach
        slots = self.config.max_positions if cache is None else cache.k[0].shape[2]
        if reach + T > slots:
            raise ValueError(f"{reach + T} tokens do not fit {slots} positions")
        if reach == 0:  # all rows begin here
            place, bias = (slice(None), slice(None), slice(T)), None
            cos, sin = self.cos[:T, None], self.sin[:T, None]
        else:
            position_BT = cache.length_B[:, None] + torch.arange(T, device=device)
            row_B11 = torch.arange(B, device=device)[:, None, None]
            head_J1 = torch.arange(self.config.n_kv_head, device=device)[:, None]
            place = (row_B11, head_J1, position_BT[:, None])
            unseen_BTS = torch.arange(reach + T, device=device) > position_BT[..., None]
            bias = torch.where(unseen_BTS, -torch.inf, 0.0)[:, None]
            cos, sin = self.cos[position_BT][:, :, None], self.sin[position_BT][:, :, None]
        x_BTD = self.embed(ids_BT)
        for i, block in enumerate(self.blocks):
            kept = None if cache is None else (cache.k[i], cache.v[i], place, bias)
            x_BTD = block(x_BTD, cos, sin, kept)
        if cache is not None:
            cache.reach += T
            cache.length_B += T if n_new_B is None else n_new_B
        return self.norm(x_BTD[wanted_BT])


# --- files of tensors: whole, or not at all -------------------------------------------------------


def save(content: dict, path: Path) -> None:
    """Write a dict of tensors, numbers and texts under a temporary name, then rename the file."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def hold(path: Path):
    """Return a file that is locked until it is closed; ValueError if another process has it."""
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{path.parent} is in use: process {path.read_text()} trains it") from None
    file.truncate(0)
    print(os.getpid(), end="", file=file, flush=True)
    return file


def load(path: Path) -> dict:
    """Return what `save` wrote, on the CPU; ValueError if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            damaged = archive.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a dozen kinds, depending on which bytes are damaged
        damaged = type(error).__name__
    if damaged:
        raise ValueError(f"{path} is not a readable checkpoint ({damaged})")
    return content
