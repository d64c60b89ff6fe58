"""The model is a function of each row alone; the cache computes what the whole row would."""

import math

import pytest
import torch

import model as program
from model import GPT, Cache, GPTConfig
from scale.pretrained import OpenConfig

SIZES = dict(vocab_size=11, n_layer=2, n_head=6, n_kv_head=3, d_model=24, d_ff=10, max_positions=17)


def model(dtype=torch.float64, **changes):
    """Return a model with weights large enough for attention to be far from uniform."""
    gpt = GPT(OpenConfig(**SIZES | changes), seed=3)
    with torch.no_grad():
        for weight in gpt.parameters():
            if weight.dim() == 2:
                weight.mul_(20 if weight is gpt.embed.weight else 2)
            else:
                weight.add_(torch.linspace(-0.3, 0.4, len(weight)))
    return gpt.to(dtype)


def ids(rows, length, seed=0):
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(seed))


def frequency(c, k, size):
    """Return by how much pair k turns from one position to the next, as Llama 3.1's authors do."""
    usual = c.rope_theta ** (-2 * k / size)
    if c.rope_scaling is None:
        return usual
    factor, low, high, original = c.rope_scaling
    wavelength = 2 * math.pi / usual
    if wavelength < original / high:
        return usual
    if wavelength > original / low:
        return usual / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * usual / factor + smooth * usual


def by_hand(gpt, tokens):
    """Return the last token's logits of one row, in plain Python floats from the definitions."""
    c, weights = gpt.config, {n: w.tolist() for n, w in gpt.named_parameters()}
    size, share = c.head_dim or c.d_model // c.n_head, c.n_head // c.n_kv_head

    def norm(x, name):
        rms = math.sqrt(sum(v * v for v in x) / len(x) + c.norm_eps)
        return [v / rms * g for v, g in zip(x, weights[name], strict=True)]

    def linear(x, name):
        bias = weights.get(name + ".bias", [0.0] * len(weights[name + ".weight"]))
        rows = zip(weights[name + ".weight"], bias, strict=True)
        return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]

    def turn(x, position, name):
        out = norm(x, name) if c.qk_norm else list(x)
        for k in range(size // 2):
            angle = position * frequency(c, k, size)
            a, b = out[k], out[k + size // 2]
            out[k] = a * math.cos(angle) - b * math.sin(angle)
            out[k + size // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    stream = [weights["embed.weight"][t] for t in tokens]
    for layer in range(c.n_layer):
        block = f"blocks.{layer}."
        qkv = [linear(norm(x, block + "norm1.weight"), block + "attention.qkv") for x in stream]
        heads = [[x[i : i + size] for i in range(0, len(x), size)] for x in qkv]
        q_norm, k_norm = (f"{block}attention.{x}_norm.weight" for x in "qk")
        mixed = []
        for t in range(len(tokens)):
            joined = []
            for h in range(c.n_head):
                q, j = turn(heads[t][h], t, q_norm), c.n_head + h // share
                keys = [turn(heads[s][j], s, k_norm) for s in range(t + 1)]
                values = [heads[s][j + c.n_kv_head] for s in range(t + 1)]
                scores = [sum(a * b for a, b in zip(q, k, strict=True)) for k in keys]
                e = [math.exp(s / math.sqrt(size)) for s in scores]
                joined += [
                    sum(w * v[i] for w, v in zip(e, values, strict=True)) / sum(e)
                    for i in range(size)
                ]
            mixed.append(joined)
        stream = [
            [a + b for a, b in zip(x, linear(m, block + "attention.out"), strict=True)]
            for x, m in zip(stream, mixed, strict=True)
        ]
        for t, x in enumerate(stream):
            hidden = linear(norm(x, block + "norm2.weight"), block + "mlp.gate_up")
            gate, up = hidden[: c.d_ff], hidden[c.d_ff :]
            swish = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
            out = linear(swish, block + "mlp.down")
            stream[t] = [a + b for a, b in zip(x, out, strict=True)]
    head = "embed" if c.tied_head else "head"
    return linear(norm(stream[-1], "norm.weight"), head)


OPTIONS = [
    {},
    dict(qkv_bias=True, tied_head=True, n_kv_head=6, norm_eps=0.1),
    dict(head_dim=10, qk_norm=True, rope_theta=30.0, rope_scaling=(8.0, 1.0, 4.0, 40)),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_logits_equal_the_definitions_worked_by_hand(options):
    """Of the third, pair 0 turns as it does, pair 4 slower, and those between are interpolated."""
    gpt, row = model(**options), ids(1, 5)
    expected = torch.tensor(by_hand(gpt, row[0].tolist()), dtype=torch.float64)
    # the rotary tables are float32, so float64 agrees to about 1e-7 of values of a few units
    torch.testing.assert_close(gpt(row)[0, -1], expected, rtol=1e-5, atol=1e-5)


def test_far_positions_turn_by_their_angle():
    """Frequencies in float32 would turn token 100,000 by some thousandths too much."""
    cos, sin = program.rotary_table(GPTConfig(**SIZES | dict(max_positions=100_001)))
    angle = torch.tensor([100_000 * 10_000.0 ** (-k / 2) for k in (0, 1)], dtype=torch.float64)
    torch.testing.assert_close(cos[-1], angle.cos().repeat(2).float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[-1, 2:], angle.sin().float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_cached_logits_equal_uncached_ones(dtype, tolerance):
    gpt, row = model(dtype), ids(3, 13)
    cache = Cache(gpt, 3, 13)
    pieces = [gpt(row[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 7), (7, 13))]
    torch.testing.assert_close(torch.cat(pieces, 1), gpt(row), rtol=tolerance, atol=tolerance)


def test_a_ragged_cache_computes_each_row_as_if_alone():
    """Rows take chunks of their own lengths, some of none; what pads a chunk is nonsense and never
    seen. In between, a copy of three rows goes on alone and is put back."""
    gpt, rows, done = model(), ids(4, 12), [0] * 4
    cache = Cache(gpt, 4, 17)

    def read(cache, which, lengths, seed):
        chunk = ids(len(which), max(lengths), seed)  # nonsense where it is not a row's own
        for i, (b, n) in enumerate(zip(which, lengths, strict=True)):
            chunk[i, :n] = rows[b, done[b] : done[b] + n]
        logits = gpt(chunk, cache, torch.tensor(lengths))
        for i, (b, n) in enumerate(zip(which, lengths, strict=True)):
            alone = gpt(rows[b : b + 1, : done[b] + n])[0, done[b] :]
            torch.testing.assert_close(logits[i, :n], alone, rtol=1e-12, atol=1e-12)
            done[b] += n

    read(cache, range(4), [4, 1, 3, 2], seed=1)
    read(cache, range(4), [0, 1, 3, 1], seed=2)
    part = cache.take(torch.tensor([3, 1, 2]))
    read(part, [3, 1, 2], [2, 0, 1], seed=3)
    read(part, [3, 1, 2], [1, 4, 3], seed=4)
    cache.put(torch.tensor([3, 1, 2]), part)
    assert cache.length_B.tolist() == done == [4, 6, 10, 6]
    read(cache, range(4), [4, 1, 2, 3], seed=5)
    assert max(done) <= cache.reach <= 17


def test_a_row_taken_many_times_goes_on_each_time_alone():
    """The cache it was taken from is not written to."""
    gpt, row = model(), ids(1, 9)
    cache = Cache(gpt, 1, 9)
    gpt(row[:, :4], cache)
    copies, ends = cache.take(torch.tensor([0, 0, 0])), ids(3, 5, seed=7)
    found = gpt(ends, copies)
    for b in range(3):
        alone = gpt(torch.cat([row[0, :4], ends[b]])[None])[0, 4:]
        torch.testing.assert_close(found[b], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gpt(row[:, 4:], cache), gpt(row)[:, 4:], rtol=1e-12, atol=1e-12)


def test_what_follows_changes_nothing_before_and_rows_do_not_mix():
    gpt, rows = model(), ids(4, 9)
    changed = rows.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 11
    torch.testing.assert_close(gpt(changed)[:, :6], gpt(rows)[:, :6], rtol=1e-12, atol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(gpt(rows[order]), gpt(rows)[order], rtol=1e-12, atol=1e-12)


def test_first_weights_depend_on_the_seed_alone_and_have_the_stated_spread():
    assert GPT(GPTConfig(**SIZES)).norm.eps == 1e-6
    sizes = dict(SIZES, vocab_size=301, d_model=48, d_ff=130, qkv_bias=True, qk_norm=True)
    torch.manual_seed(1)
    a = GPT(GPTConfig(**sizes), seed=5).state_dict()
    torch.manual_seed(2)
    b, c = (GPT(GPTConfig(**sizes), seed=seed).state_dict() for seed in (5, 6))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embed.weight"], c["embed.weight"])
    for name, weight in a.items():
        if weight.dim() == 1:
            assert set(weight.tolist()) == {0.0 if "bias" in name else 1.0}, name
            continue
        variance = 1 / weight.shape[1]
        if "attention.out" in name or "mlp.down" in name:
            variance /= 4  # two blocks write twice each
        if name == "embed.weight":
            variance = 0.02**2
        error = (2 / weight.numel()) ** 0.5  # one standard deviation of a sample's variance
        assert abs(weight.square().mean() / variance - 1) < 5 * error, name


def test_a_tied_head_is_one_weight():
    tied = GPT(GPTConfig(**SIZES | {"tied_head": True}))
    assert tied.head.weight is tied.embed.weight
    assert "head.weight" not in [name for name, _ in tied.named_parameters()]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"d_model": 18}, "d_model .* 12, .* 18, 0$"), ({"d_model": 26}, "d_model .* 26, 0$"),
        ({"n_kv_head": 4}, "n_kv_head 4"), ({"head_dim": 5}, "head_dim even: 24, 5$"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig(**SIZES | change)


def test_too_many_tokens_are_refused():
    gpt = model()
    with pytest.raises(ValueError, match="18 tokens do not fit 17"):
        gpt(ids(1, 18))
    with pytest.raises(ValueError, match="max_positions = 17"):
        Cache(gpt, 1, 18)
    cache = Cache(gpt, 1, 4)
    gpt(ids(1, 3), cache)
    with pytest.raises(ValueError, match="5 tokens do not fit 4"):
        gpt(ids(1, 2), cache)


# --- files ----------------------------------------------------------------------------------------


def test_a_file_is_whole_or_the_one_before(tmp_path, monkeypatch):
    """The machine fails while a file is written: the previous one is still there."""
    path = tmp_path / "x.pt"
    program.save({"step": 1}, path)
    assert list(tmp_path.iterdir()) == [path]

    def fail(content, file):
        file.write(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        program.save({"step": 2}, path)
    assert program.load(path) == {"step": 1}


@pytest.mark.parametrize("damage", ["absent", "cut", "flipped", "empty", "text", "pickled code"])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    path, weight = tmp_path / "x.pt", torch.arange(100.0)
    program.save({"weight": weight}, path)
    content = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":  # one byte of a weight: the zip's checksum tells
        where = content.index(weight.numpy().tobytes()) + 5
        path.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a checkpoint")
    else:
        torch.save({"weight": pytest.raises}, path)
    with pytest.raises(ValueError, match="no checkpoint at" if damage == "absent" else "x.pt is"):
        program.load(path)
