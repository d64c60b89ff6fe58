"""What does the policy compute? A compact decoder-only transformer of the Llama and Qwen families.

RMSNorm before each block, rotary positions, SwiGLU, grouped-query attention, optional bias on
query, key and value or norm of query and key, optional tying of the head to the embedding. No loss
and no sampling here. Last in the file: folders of open weights, read and written.

Where it differs from the usual: the key-value cache keeps a length for *each row*. Rows are
contiguous from slot 0 and slot = position, so ragged prompts need no left padding, and "a query at
position p sees the slots up to p" is the whole mask. Whatever was written beyond a row's length is
never seen and is overwritten by the tokens that come to stand there.

    python -c "import model; print(model.GPT(model.GPTConfig(vocab_size=14)))"

Dimension key: B rows, T tokens in this call, S slots of the cache, V vocabulary, D width,
H query heads, J key-value heads, K head size, F hidden width of the MLP.
"""

import copy
import functools
import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
LARGE = 2**17  # elements of a matrix from which on its reading, not the call, takes the time


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a model.

    head_dim: size K of a head; 0 means d_model / n_head. qk_norm: an RMSNorm over K of each query
    and key, before they turn. rope_scaling: Llama 3's factor, low_freq_factor, high_freq_factor and
    original_max_position_embeddings; None leaves the frequencies as they are.

    Raises:
      ValueError: a size is impossible; the message names the field and the value.
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
    rope_scaling: tuple[float, float, float, int] | None = None

    @property
    def head_size(self) -> int:
        """K: head_dim, or what d_model gives each query head."""
        return self.head_dim or self.d_model // self.n_head

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "d_model", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim < 0 or self.head_dim % 2:
            raise ValueError(
                f"head_dim must be 0 or even (rotary positions turn pairs), got {self.head_dim}"
            )
        if not self.head_dim and self.d_model % (2 * self.n_head):
            raise ValueError(
                f"d_model must be a multiple of 2 * n_head = {2 * self.n_head} (rotary positions "
                f"turn pairs), got {self.d_model}"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head must be a multiple of n_kv_head = {self.n_kv_head}, got {self.n_head}"
            )
        if self.rope_scaling is not None:
            factor, low, high, original = self.rope_scaling
            if not (factor >= 1 and 0 < low < high and original >= 1):
                raise ValueError(
                    "rope_scaling must have factor >= 1, 0 < low_freq_factor < high_freq_factor "
                    f"and original_max_position_embeddings >= 1, got {self.rope_scaling}"
                )


class Cache:
    """Keys and values of the tokens that a model has read, preallocated, with a length per row.

    k, v: one [B, J, S, K] tensor a layer, of `dtype`: by default that of the computation, which is
    autocast's where autocast is on and else the weights'. (Of a narrower one, the first chunk still
    sees what it has just computed, unrounded.) length_B: tokens held by each row, int64.
    reach: an upper bound of every length; a plain int, so that reading it waits for no device.
    """

    def __init__(self, model: "GPT", rows: int, slots: int, dtype: torch.dtype | None = None):
        c, weight = model.config, model.embed.weight
        if slots > c.max_positions:
            raise ValueError(f"{slots} tokens do not fit max_positions = {c.max_positions}")
        if dtype is None:
            kind = weight.device.type
            autocast = torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
        shape = (rows, c.n_kv_head, slots, c.head_size)
        self.k = [weight.new_zeros(shape, dtype=dtype) for _ in range(c.n_layer)]
        self.v = [weight.new_zeros(shape, dtype=dtype) for _ in range(c.n_layer)]
        self.length_B = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.reach = 0

    def take(self, row_R: torch.Tensor) -> "Cache":
        """Return a copy of some rows (int64 [R])."""
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

    def spread(self, n: int, slots: int) -> "Cache":
        """Return a copy with n of each row, side by side, and so many slots."""
        part = copy.copy(self)
        more = (0, 0, 0, slots - self.k[0].shape[2])
        part.k, part.v = (
            [F.pad(x, more).repeat_interleave(n, dim=0) for x in layers]
            for layers in (self.k, self.v)
        )
        part.length_B = self.length_B.repeat_interleave(n)
        return part


def rotary_table(config: GPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and signed sin of position times frequency, each [max_positions, K], float32.

    Source: Su et al., RoFormer, arXiv 2104.09864, eq. 15, with element k paired with k + K/2;
    rope_scaling as in the code that Llama 3.1 was released with: pairs that turn less than
    low_freq_factor times within the original length turn `factor` times slower, those that turn
    more than high_freq_factor times stay, and those between are interpolated.
    """
    half = config.head_size // 2
    frequency_K = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    if config.rope_scaling is not None:
        factor, low, high, original = config.rope_scaling
        turns_K = original * frequency_K / (2 * math.pi)
        stays_K = ((turns_K - low) / (high - low)).clamp(0, 1)
        frequency_K = frequency_K * (stays_K + (1 - stays_K) / factor)
    angle = torch.arange(config.max_positions, dtype=torch.float64)[:, None] * frequency_K
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x_BTHK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[k], x[k + K/2]) by its angle; cos and sin broadcast to [B, T, 1, K].

    Computed in the wider dtype of the two, float32 where the tables are; returned in x's.
    """
    swapped = x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1)
    return (x_BTHK * cos + swapped * sin).to(x_BTHK.dtype)


class Linear(nn.Linear):
    """x @ weight.T + bias. In decoding on a CPU, reading a large matrix is what takes the time: of
    few rows oneDNN takes half as long as MKL, which torch would choose; of one row, what
    torch.compile makes of a plain sum is faster still."""

    def reads(self, x):
        """Is this a product of a large float32 matrix on a CPU, without a gradient?"""
        weight = self.weight
        return (
            weight.numel() >= LARGE and weight.device.type == "cpu"
            and x.dtype == weight.dtype == torch.float32
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        )  # fmt: skip

    def reads_alone(self, x):
        """Is it such a product, and of one row?"""
        return x.numel() == x.shape[-1] and self.reads(x)

    def forward(self, x):
        if torch.compiler.is_compiling():
            if self.reads_alone(x):
                y = (x[..., None, :] * self.weight).sum(-1)
                return y if self.bias is None else y + self.bias
        elif ONEDNN and self.reads(x):
            pointwise = torch.ops.mkldnn._linear_pointwise
            return pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last axis, in float32 or wider; returned in x's dtype.

    Source: Zhang and Sennrich, arXiv 1910.07467, eq. 4.
    """

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; n_kv_head < n_head shares keys and values."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        K, self.n_head, self.n_kv_head = config.head_size, config.n_head, config.n_kv_head
        width = (config.n_head + 2 * config.n_kv_head) * K
        self.qkv = Linear(config.d_model, width, bias=config.qkv_bias)
        self.out = Linear(config.n_head * K, config.d_model, bias=False)
        self.q_norm = RMSNorm(K, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(K, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x_BTD, cos, sin, kept=None):
        """`kept`: this layer's cached k and v [B, J, S, K], where to write, and what to see."""
        B, T, _ = x_BTD.shape
        H, J = self.n_head, self.n_kv_head
        qk, v_BTJK = self.qkv(x_BTD).view(B, T, H + 2 * J, -1).split([H + J, J], dim=2)
        if self.q_norm is not None:
            q, k = qk.split([H, J], dim=2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        q_BTHK, k_BTJK = rotate(qk, cos, sin).split([H, J], dim=2)
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTJK, v_BTJK))
        bias = None
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
        self.gate_up = Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x_BTD):
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD, cos, sin, kept=None):
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD), cos, sin, kept)
        return x_BTD + self.mlp(self.norm2(x_BTD))


class AddedInPlace(torch.autograd.Function):
    """x @ weight.T, whose backward pass adds to weight.grad in place and returns none for it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        g_NV, x_ND = grad.flatten(0, -2), x.flatten(0, -2).to(grad.dtype)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        if grad.dtype == weight.dtype:
            weight.grad.addmm_(g_NV.T, x_ND)
        else:  # under autocast
            weight.grad += g_NV.T @ x_ND
        return (grad @ weight.to(grad.dtype)).to(x.dtype), None


@functools.cache
def compiled(f):
    """Return f, compiled for each kind of call (with and without gradient, cache, one row, ..)."""
    return torch.compile(f, dynamic=True, recompile_limit=64)


class GPT(nn.Module):
    """The language model: `logits_BTV = model(ids_BT)`, or in chunks with a `Cache`.

    Args:
      seed: of the initial weights, which depend on nothing else.

    recompute: an attribute, False at first. True computes each block's activations again on the way
    back instead of keeping them: the same gradients from less memory, in more time.
    lean: an attribute, False at first. True adds to the gradient of a large vocabulary's matrix in
    place, for callers of `logits` in chunks: the same gradient without copies of its size.
    compiled: an attribute, False at first. True lets torch.compile fuse what is between the matrix
    products, and of one row on a CPU large ones, too: the same but for rounding.
    """

    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.recompute = self.lean = self.compiled = False
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embed.weight
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Embedding Normal(0, 0.02), matrices Normal(0, 1 / fan-in), the variance of those into the
        residual stream divided by their number (GPT-2); norms 1, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif "norm" not in name:
                std = 0.02 if name == "embed.weight" else weight.shape[1] ** -0.5
                if name.endswith(("out.weight", "down.weight")):
                    std *= (2 * self.config.n_layer) ** -0.5
                weight.normal_(0.0, std, generator=generator)

    def forward(self, ids_BT, cache=None, n_new_B=None):
        """Return logits [B, T, V] of the token after each token of ids_BT (int64, right-padded).

        Without a cache the rows start at position 0, and padding on the right changes nothing to
        its left. With one, the rows go on where they stand; n_new_B (int64, default T each) says
        how many of the T tokens are real, and the cache is advanced by as many.
        """
        return self.logits(self.hidden(ids_BT, cache, n_new_B))

    def logits(self, state):
        """Return logits [.., V] of final states [.., D]."""
        if self.lean and torch.is_grad_enabled():
            return AddedInPlace.apply(state, self.head.weight)
        if self.compiled and self.head.reads_alone(state):
            return compiled(Linear.forward)(self.head, state)
        return self.head(state)

    def hidden(self, ids_BT, cache=None, n_new_B=None):
        """Return the final normalised states [B, T, D]; `logits` is for those that one needs."""
        # a sparse gradient, of the rows that were read, goes where `logits` has left a dense one
        sparse = self.lean and self.config.tied_head
        # not compiled: of a token read twice, fused threads would add gradients in any order
        x_BTD = F.embedding(ids_BT, self.embed.weight, sparse=sparse)
        through = compiled(GPT.through) if self.compiled else GPT.through
        return through(self, x_BTD, cache, n_new_B)

    def through(self, x_BTD, cache, n_new_B):
        """Return the final normalised states of embedded tokens."""
        (B, T, _), device = x_BTD.shape, x_BTD.device
        reach = 0 if cache is None else cache.reach
        slots = self.config.max_positions if cache is None else cache.k[0].shape[2]
        if reach + T > slots:
            limit = f"max_positions = {slots}" if cache is None else f"a cache of {slots} slots"
            raise ValueError(f"{reach + T} tokens do not fit {limit}")
        if not reach:  # all rows begin here
            place, bias_B1TS = (slice(None), slice(None), slice(T)), None
            cos, sin = self.cos[:T, None], self.sin[:T, None]
        else:
            position_BT = cache.length_B[:, None] + torch.arange(T, device=device)
            row_B11 = torch.arange(B, device=device)[:, None, None]
            head_J1 = torch.arange(self.config.n_kv_head, device=device)[:, None]
            place = (row_B11, head_J1, position_BT[:, None])
            unseen_BTS = torch.arange(reach + T, device=device) > position_BT[..., None]
            bias_B1TS = cache.k[0].new_zeros(unseen_BTS.shape)
            bias_B1TS = bias_B1TS.masked_fill_(unseen_BTS, -torch.inf)[:, None]
            cos, sin = self.cos[position_BT][:, :, None], self.sin[position_BT][:, :, None]
        kept = [None] * len(self.blocks)
        if cache is not None:
            kept = [(k, v, place, bias_B1TS) for k, v in zip(cache.k, cache.v, strict=True)]
            cache.reach += T
        again = self.recompute and cache is None and torch.is_grad_enabled()
        for block, layer in zip(self.blocks, kept, strict=True):
            if again:
                x_BTD = checkpoint(
                    block, x_BTD, cos, sin, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BTD = block(x_BTD, cos, sin, layer)
        if cache is not None:
            cache.length_B += T if n_new_B is None else n_new_B
        return self.norm(x_BTD)

    @staticmethod
    def from_pretrained(folder: str | Path, dtype: torch.dtype = torch.float32) -> "GPT":
        """Return the model in a local Hugging Face folder, on the CPU, with weights of `dtype`.

        The rotary tables are float32 whatever the dtype; a later `.to(dtype)` would round them too.

        Raises:
          ValueError: one line that names what is missing, damaged, or of another shape or kind.
        """
        return read_open(Path(folder), dtype)

    def save_pretrained(self, folder: str | Path, source: str | Path | None = None) -> None:
        """Write a new folder that transformers and vLLM load: whole, or not at all.

        Args:
          source: a folder to copy the tokenizer and the generation settings from, and the fields of
            config.json that do not follow from this model's.

        Raises:
          ValueError: the folder exists, the source is none, or no open family has such a model.
        """
        write_open(self, Path(folder), None if source is None else Path(source))


# --- open checkpoints -----------------------------------------------------------------------------

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SIZES_THERE = {
    "vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "d_model": "hidden_size", "d_ff": "intermediate_size",
    "max_positions": "max_position_embeddings",
}  # fmt: skip
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
MODULES_THERE = {  # several: their rows follow one another in the one matrix here
    "embed": ["model.embed_tokens"], "norm": ["model.norm"], "head": ["lm_head"],
    "norm1": ["input_layernorm"], "norm2": ["post_attention_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.q_norm": ["self_attn.q_norm"], "attention.k_norm": ["self_attn.k_norm"],
    "attention.out": ["self_attn.o_proj"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"], "mlp.down": ["mlp.down_proj"],
}  # fmt: skip
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip


def read_json(path: Path) -> dict:
    """Return the object in a JSON file; ValueError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {path}: it holds no JSON object")
    return content


def number(table: dict, name: str, kind: type, default=None):
    """Return a field that must be a number of a kind, int or float; null is as good as absent."""
    value = default if table.get(name) is None else table[name]
    if type(value) not in (int, kind):
        raise ValueError(f"config.json: {name} must be of type {kind.__name__}, got {value!r}")
    return kind(value)


def config_from(folder: str | Path) -> GPTConfig:
    """Return the sizes in a Hugging Face folder's config.json, of transformers 4's layout or 5's.

    Raises:
      ValueError: it cannot be read, or asks for what this model does not compute.
    """
    raw = read_json(Path(folder) / "config.json")
    family = raw.get("model_type")
    classes = raw.get("architectures") or [FAMILIES.get(family)]
    if family not in FAMILIES or classes != [FAMILIES[family]]:
        raise ValueError(
            f"config.json: model_type {family!r} with architectures {classes} is not supported; "
            f"accepted: {', '.join(FAMILIES.values())}"
        )
    defaults = {"n_kv_head": raw.get("num_attention_heads")}
    sizes = {ours: number(raw, name, int, defaults.get(ours)) for ours, name in SIZES_THERE.items()}
    windows = number(raw, "max_window_layers", int, 28) < sizes["n_layer"]
    slides = bool(raw.get("use_sliding_window")) and windows
    slides = slides or bool(set(raw.get("layer_types") or []) - {"full_attention"})
    rope = raw | (raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for name, value, *accepted in (
        ("hidden_act", raw.get("hidden_act", "silu"), "silu"),
        ("attention_bias", family != "qwen2" and raw.get("attention_bias", False), False),
        ("mlp_bias", raw.get("mlp_bias", False), False),
        ("use_sliding_window", slides, False),
        ("rope_type", rope_type, "default", "llama3"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1), 1),
    ):
        if value not in accepted:
            accepted = " or ".join(map(repr, accepted))
            raise ValueError(
                f"config.json: {name} {value!r} is not supported; accepted: {accepted}"
            )
    head_dim = number(raw, "head_dim", int, 128 if family == "qwen3" else 0)
    scaling = None
    if rope_type == "llama3":
        scaling = tuple(number(rope, x, int if x == LLAMA3[-1] else float) for x in LLAMA3)
    return GPTConfig(
        **sizes,
        rope_theta=number(rope, "rope_theta", float, 10_000),
        norm_eps=number(raw, "rms_norm_eps", float, 1e-6),
        qkv_bias=family == "qwen2",
        tied_head=bool(raw.get("tie_word_embeddings", False)),
        head_dim=0 if head_dim * sizes["n_head"] == sizes["d_model"] else head_dim,
        qk_norm=family == "qwen3",
        rope_scaling=scaling,
    )


def config_there(config: GPTConfig, dtype: torch.dtype) -> dict:
    """Return the fields of config.json that say what the model is, in both layouts at once."""
    if config.qk_norm and config.qkv_bias:
        raise ValueError("no open family has both qk_norm and qkv_bias")
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    rope = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_type": "llama3", **dict(zip(LLAMA3, config.rope_scaling, strict=True))}
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        **{there: getattr(config, ours) for ours, there in SIZES_THERE.items()},
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "dtype": name,
        "torch_dtype": name,
    }


def parts(model: GPT) -> dict[str, torch.Tensor]:
    """Return an open checkpoint's tensors, by their names there, as views of our weights."""
    c = model.config
    rows = {
        "attention.qkv": [n * c.head_size for n in (c.n_head, c.n_kv_head, c.n_kv_head)],
        "mlp.gate_up": [c.d_ff, c.d_ff],
    }
    views = {}
    for name, weight in model.named_parameters():
        module, kind = name.rsplit(".", 1)
        before = ""
        if module.startswith("blocks."):
            _, layer, module = module.split(".", 2)
            before = f"model.layers.{layer}."
        pieces = weight.detach().split(rows.get(module, len(weight)))
        for there, piece in zip(MODULES_THERE[module], pieces, strict=True):
            views[f"{before}{there}.{kind}"] = piece
    return views


def safetensors_library():
    """Return the package that reads and writes files of weights; nothing else here needs it."""
    try:
        import safetensors.torch
    except ImportError:
        needed = "safetensors: pip install safetensors==0.8.0"
        raise ValueError(f"open checkpoints need {needed}") from None
    return safetensors


def open_tensors(folder: Path) -> dict:
    """Return the open file of each tensor's name; nothing is read yet but the files' headers."""
    library = safetensors_library()
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file():
        if not index.is_file():
            raise ValueError(f"{folder} has neither {names[0]} nor {index.name}")
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"cannot read {index}: it has no weight_map")
        names = sorted(set(map(str, places.values())))
    where = {}
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, which is missing")
        try:
            file = library.safe_open(folder / name, framework="pt")
        except (OSError, library.SafetensorError) as error:
            raise ValueError(f"cannot read {folder / name}: {error}") from None
        where |= dict.fromkeys(file.keys(), file)
    return where


def read_open(folder: Path, dtype: torch.dtype) -> GPT:
    """Return a folder's model, one tensor read at a time (`GPT.from_pretrained`)."""
    config, where = config_from(folder), open_tensors(folder)
    with torch.device("meta"):  # no initial weights: they would be drawn only to be overwritten
        model = GPT(config).to(dtype)
    model.to_empty(device="cpu")
    if config.tied_head:
        model.head.weight = model.embed.weight
        where.pop("lm_head.weight", None)
    model.cos, model.sin = rotary_table(config)  # float32, whatever the weights' dtype
    views = parts(model)
    buffers = {name for name in where if name.endswith("rotary_emb.inv_freq")}
    for fault, names in (
        ("lacks", views.keys() - where.keys()),
        ("has, unexpectedly,", where.keys() - views.keys() - buffers),
    ):
        if names:
            raise ValueError(f"{folder} {fault} {len(names)} tensors, first {min(names)}")
    for name, view in views.items():
        shape = tuple(where[name].get_slice(name).get_shape())
        if shape != view.shape:
            raise ValueError(f"{folder}: {name} must be {tuple(view.shape)}, got {shape}")
        view.copy_(where[name].get_tensor(name))
    return model


def write_open(model: GPT, folder: Path, source: Path | None) -> None:
    """Write a model under a temporary name, then rename it (`GPT.save_pretrained`)."""
    library = safetensors_library()
    if folder.exists():
        raise ValueError(f"{folder} exists; name a new folder")
    kept = {} if source is None else read_json(source / "config.json")
    settings = kept | config_there(model.config, model.embed.weight.dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=folder.name + ".", dir=folder.parent) as place:
        draft = Path(place) / "whole"
        draft.mkdir()
        for name in COMPANIONS if source is not None else ():
            if (source / name).is_file():
                shutil.copyfile(source / name, draft / name)
        (draft / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        library.torch.save_file(parts(model), draft / "model.safetensors", {"format": "pt"})
        draft.rename(folder)
