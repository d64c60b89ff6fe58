"""The model is a function of each row alone; the cache computes what the whole row would."""

import copy
import math
import shutil
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import model as program
from model import GPT, Cache, GPTConfig

SIZES = dict(vocab_size=11, n_layer=2, n_head=6, n_kv_head=3, d_model=24, d_ff=10, max_positions=17)


def model(dtype=torch.float64, **changes):
    """Return a model with weights large enough for attention to be far from uniform."""
    gpt = GPT(GPTConfig(**SIZES | changes), seed=3)
    with torch.no_grad():
        for weight in gpt.parameters():
            if weight.dim() == 2:
                weight.mul_(20 if weight is gpt.embed.weight else 2)
            else:
                weight.add_(torch.linspace(-0.3, 0.4, len(weight)))
    return gpt.to(dtype)


def ids(rows, length, seed=0):
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(seed))


def by_hand(gpt, tokens):
    """Return the last token's logits of one row, in plain Python floats from the definitions."""
    c, weights = gpt.config, {n: w.tolist() for n, w in gpt.named_parameters()}
    size, share = c.d_model // c.n_head, c.n_head // c.n_kv_head

    def norm(x, name):
        rms = math.sqrt(sum(v * v for v in x) / len(x) + c.norm_eps)
        return [v / rms * g for v, g in zip(x, weights[name], strict=True)]

    def linear(x, name):
        bias = weights.get(name + ".bias", [0.0] * len(weights[name + ".weight"]))
        rows = zip(weights[name + ".weight"], bias, strict=True)
        return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]

    def turn(x, position):
        out = list(x)
        for k in range(size // 2):
            angle = position * c.rope_theta ** (-2 * k / size)
            a, b = x[k], x[k + size // 2]
            out[k] = a * math.cos(angle) - b * math.sin(angle)
            out[k + size // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    stream = [weights["embed.weight"][t] for t in tokens]
    for layer in range(c.n_layer):
        block = f"blocks.{layer}."
        qkv = [linear(norm(x, block + "norm1.weight"), block + "attention.qkv") for x in stream]
        heads = [[x[i : i + size] for i in range(0, len(x), size)] for x in qkv]
        mixed = []
        for t in range(len(tokens)):
            joined = []
            for h in range(c.n_head):
                q = turn(heads[t][h], t)
                keys = [turn(heads[s][c.n_head + h // share], s) for s in range(t + 1)]
                values = [heads[s][c.n_head + c.n_kv_head + h // share] for s in range(t + 1)]
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


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "tied_head": True, "n_kv_head": 6}])
def test_logits_equal_the_definitions_worked_by_hand(options):
    gpt, row = model(**options), ids(1, 5)
    expected = torch.tensor(by_hand(gpt, row[0].tolist()), dtype=torch.float64)
    # the rotary tables are float32, so float64 agrees to about 1e-7 of values of a few units
    torch.testing.assert_close(gpt(row)[0, -1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_cached_logits_equal_uncached_ones(dtype, tolerance):
    gpt, row = model(dtype), ids(3, 13)
    cache = Cache(gpt, 3, 13)
    pieces = [gpt(row[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 7), (7, 13))]
    torch.testing.assert_close(torch.cat(pieces, 1), gpt(row), rtol=tolerance, atol=tolerance)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)),
                min_size=1, max_size=4), st.integers(0, 99))  # fmt: skip
def test_a_ragged_cache_computes_each_row_as_if_alone(lengths, seed):
    """Rows take chunks of their own lengths; what pads a chunk is nonsense and never seen."""
    gpt, rows = model(), ids(len(lengths), 12, seed)
    cache = Cache(gpt, len(lengths), 12)
    done = [0] * len(lengths)
    for step in range(3):
        n = [row[step] for row in lengths]
        chunk = ids(len(lengths), max(n), seed + 1)
        for b, k in enumerate(n):
            chunk[b, :k] = rows[b, done[b] : done[b] + k]
        logits = gpt(chunk, cache, torch.tensor(n))
        for b, k in enumerate(n):
            alone = gpt(rows[b : b + 1, : done[b] + k])[0, done[b] :]
            torch.testing.assert_close(logits[b, :k], alone, rtol=1e-12, atol=1e-12)
            done[b] += k
        assert cache.length_B.tolist() == done


def test_what_follows_changes_nothing_before_and_rows_do_not_mix():
    gpt, rows = model(), ids(4, 9)
    changed = rows.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 11
    torch.testing.assert_close(gpt(changed)[:, :6], gpt(rows)[:, :6], rtol=1e-12, atol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(gpt(rows[order]), gpt(rows)[order], rtol=1e-12, atol=1e-12)


def test_weights_depend_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    a = GPT(GPTConfig(**SIZES), seed=5).state_dict()
    torch.manual_seed(2)
    b, c = (GPT(GPTConfig(**SIZES), seed=seed).state_dict() for seed in (5, 6))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embed.weight"], c["embed.weight"])


def test_a_tied_head_is_one_weight():
    tied = GPT(GPTConfig(**SIZES | {"tied_head": True}))
    names = [name for name, _ in tied.named_parameters()]
    assert "head.weight" not in names
    assert tied.head.weight is tied.embed.weight


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_layer": 0}, "n_layer"), ({"vocab_size": -1}, "vocab_size"),
        ({"d_model": 10}, "d_model"), ({"d_model": 18}, "d_model"),
        ({"n_kv_head": 4}, "n_head"), ({"d_ff": 0}, "d_ff"),
        ({"head_dim": 5}, "head_dim"), ({"head_dim": -2}, "head_dim"),
        ({"rope_scaling": (8.0, 4.0, 1.0, 32)}, "rope_scaling"),
        ({"rope_scaling": (0.5, 1.0, 4.0, 32)}, "rope_scaling"),
    ],
)  # fmt: skip
def test_impossible_sizes_are_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig(**SIZES | change)


def test_too_many_tokens_are_refused():
    gpt = model()
    with pytest.raises(ValueError, match="max_positions = 17"):
        gpt(ids(1, 18))
    with pytest.raises(ValueError, match="max_positions = 17"):
        Cache(gpt, 1, 18)
    cache = Cache(gpt, 1, 4)
    gpt(ids(1, 3), cache)
    with pytest.raises(ValueError, match="4 slots"):
        gpt(ids(1, 2), cache)


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabularys_gradient_added_in_place_is_the_same(tied):
    """Over two backward passes, as micro-batches make them; and no copy of the matrix is made."""
    gpt, found = model(tied_head=tied), []
    for gpt.lean in (False, True):
        gpt.zero_grad()
        for seed in (1, 2):
            read = ids(3, 7, seed)
            logp = torch.log_softmax(gpt(read), -1)
            (logp[..., 2] * torch.linspace(-1, 2, 21).view(3, 7)).sum().backward()
        found.append([weight.grad.clone() for weight in gpt.parameters()])
    for plain, lean in zip(*found, strict=True):
        assert not lean.is_sparse and plain.abs().max() > 0
        torch.testing.assert_close(lean, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabularys_gradient_is_added_in_place_under_autocast(tied):
    gpt, found = model(torch.float32, tied_head=tied), []
    for gpt.lean in (False, True):
        gpt.zero_grad()
        for seed in (1, 2):
            with torch.autocast("cpu", torch.bfloat16):
                logits = gpt(ids(3, 7, seed))
            assert logits.dtype == torch.bfloat16
            torch.log_softmax(logits.float(), -1)[..., 2].sum().backward()
        found.append([weight.grad.clone() for weight in gpt.parameters()])
    for plain, lean in zip(*found, strict=True):
        assert (lean - plain).norm() < 0.03 * plain.norm()


def two_turns(gpt):
    """Return the logits of a prompt, of each token of a ragged turn, and of another chunk."""
    cache, found = Cache(gpt, 3, 17), []
    with torch.no_grad():
        found.append(gpt(ids(3, 5), cache, torch.tensor([5, 3, 4])))
        for i in range(3):
            found.append(gpt(ids(3, 1, i), cache, torch.tensor([1, i % 2, 1])))
        found.append(gpt(ids(3, 4, 9), cache))
    return torch.cat(found, dim=1)


def calls(profiler):
    return {event.key: event.count for event in profiler.key_averages()}


@pytest.mark.skipif(not program.ONEDNN, reason="torch was built without oneDNN")
def test_large_products_without_a_gradient_are_the_same_by_onednn(monkeypatch):
    gpt = model(torch.float32, qkv_bias=True, tied_head=True)
    usual = two_turns(gpt)
    monkeypatch.setattr(program, "LARGE", 1)
    with torch.profiler.profile() as profiler:
        found = two_turns(gpt)
        gpt(ids(3, 5)).sum().backward()
    assert calls(profiler)["mkldnn::_linear_pointwise"] == 5 * (4 * 2 + 1)  # and no gradient's
    torch.testing.assert_close(found, usual, rtol=1e-5, atol=1e-5 * usual.abs().max().item())
    with torch.profiler.profile() as profiler, torch.no_grad():
        model(torch.float64)(ids(3, 5))
        with torch.autocast("cpu", torch.bfloat16):
            gpt(ids(3, 5))
    assert all("mkldnn::" not in key for key in calls(profiler))


@pytest.mark.skipif(not program.ONEDNN, reason="torch was built without oneDNN")
def test_only_large_matrices_are_onednns():
    """Of 2**17 elements or more: here of the head alone, whose matrix has one more row or not."""
    for rows, n in ((2**13, 1), (2**13 - 1, 0)):
        gpt = GPT(GPTConfig(rows, d_model=16, d_ff=16, n_head=2, n_kv_head=2))
        with torch.profiler.profile() as profiler, torch.no_grad():
            gpt(ids(1, 3))
        assert calls(profiler).get("mkldnn::_linear_pointwise", 0) == n


def compiling(test):
    """Mark a test that needs a compiler, which warns of itself."""
    test = pytest.mark.filterwarnings("ignore")(test)
    return pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")(test)


@compiling
def test_a_compiled_model_computes_the_same_and_so_does_its_copy(monkeypatch):
    gpt = model(torch.float32, qkv_bias=True)
    weights, usual, tokens = list(gpt.parameters()), two_turns(gpt), ids(4, 9)
    expected = torch.autograd.grad(gpt(tokens).logsumexp(-1).sum(), weights)
    gpt.compiled = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(two_turns(gpt), usual, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(gpt(tokens).logsumexp(-1).sum(), weights)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    changed = copy.deepcopy(gpt)  # computes with its own weights
    with torch.no_grad():
        changed.norm.weight.mul_(2)
    torch.testing.assert_close(two_turns(changed), 2 * usual, rtol=1e-4, atol=2e-4)
    monkeypatch.setattr(program, "LARGE", 1)  # oneDNN's own call is left to the compiler
    torch._dynamo.reset()
    torch.testing.assert_close(two_turns(gpt), usual, rtol=1e-4, atol=1e-4)
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] >= 4 and not counted["graph_break"]


@compiling
def test_one_row_is_read_without_a_product_of_matrices(monkeypatch):
    """Where it is compiled, and the matrices are large: the same states, head and biases."""
    gpt = model(torch.float32, qkv_bias=True)

    @torch.no_grad()
    def one_by_one(rows):
        cache, tokens = Cache(gpt, rows, 7), ids(rows, 7)
        return [gpt(part, cache) for part in tokens.split([3, 1, 1, 1, 1], dim=1)]

    usual = {rows: torch.cat(one_by_one(rows), dim=1) for rows in (1, 2)}
    graphs = []
    for fused, large in ((False, 1), (True, 2**17), (True, 1)):
        monkeypatch.setattr(program, "LARGE", large)
        gpt.compiled = fused
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        one_by_one(1)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == 0 and graphs[2] == graphs[1] + 1  # the head's, if it is large
    for rows in (1, 2):
        one_by_one(rows)
        with torch.profiler.profile() as profiler:
            found = torch.cat(one_by_one(rows), dim=1)
        torch.testing.assert_close(found, usual[rows], rtol=1e-4, atol=1e-4)
        count = Counter(calls(profiler))
        steps = 1 if rows == 1 else 5  # only the problem is read with several tokens at once
        assert count["aten::mm"] + count["aten::addmm"] == 4 * 2 * steps
        assert count["mkldnn::_linear_pointwise"] == steps * program.ONEDNN  # the head


@compiling
def test_a_compiled_gradient_is_the_same_to_the_bit_on_two_threads():
    gpt, tokens, found = model(torch.float32), ids(256, 17), []
    gpt.compiled = True
    torch._dynamo.reset()
    torch.set_num_threads(2)
    try:
        for _ in range(10):
            loss = gpt(tokens).log_softmax(-1)[..., 3].square().sum()
            found.append(torch.autograd.grad(loss, list(gpt.parameters())))
    finally:
        torch.set_num_threads(1)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))
