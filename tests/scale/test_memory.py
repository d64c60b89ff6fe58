"""What is done to a model for memory and speed changes no logits and no gradients but by rounding.

The same model is run as it is, and prepared: all its rows at once with a gradient, and in pieces on
a cache, whose rows are taken as the sampler takes them.
"""

import copy
import shutil
from functools import partial

import pytest
import torch

from model import GPT, Cache, GPTConfig
from scale import memory

SIZES = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=40, max_positions=40)
IDS = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(0))
BFLOAT16 = dict(dtype=torch.bfloat16)


def make():
    """Return a model with biases, a tied head and weights that make much of the tokens."""
    gpt = GPT(GPTConfig(61, **SIZES, qkv_bias=True, tied_head=True), seed=1)
    with torch.no_grad():
        for weight in gpt.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) / 8)
    return gpt


@torch.no_grad()
def in_pieces(gpt):
    """Return logits [2, 17, V] of two rows, read in pieces: alone, beside others, one by one."""
    cache = Cache(gpt, 2, 20)
    found = [gpt(IDS[:2, :7], cache)]
    cache = cache.take(torch.tensor([1, 0, 1]))
    found += [gpt(IDS[[1, 0, 1], i : i + 1], cache)[[1, 0]] for i in range(7, 11)]
    cache = cache.take(torch.tensor([1, 0]))
    return torch.cat([*found, gpt(IDS[:2, 11:], cache)], dim=1), cache


def gradients(gpt):
    """Return the gradient of each weight; positions 0 to 15, as in training."""
    loss = gpt(IDS[:, :-1]).float().log_softmax(-1).gather(-1, IDS[:, 1:, None]).square().mean()
    return torch.autograd.grad(loss, [x for x in gpt.parameters() if x.requires_grad])


def assert_close(found, expected, share):
    """The largest difference is a small share of the largest value."""
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= share * b.abs().max()


def products(gpt):
    """Return how many of oneDNN's products are in a forward pass without a gradient."""
    with torch.no_grad(), torch.profiler.profile() as profiler:
        gpt(IDS[:, :3])
    return sum(x.count for x in profiler.key_averages() if "_linear_pointwise" in x.key)


@pytest.mark.skipif(not memory.ONEDNN, reason="torch was built without oneDNN")
def test_large_products_without_a_gradient_are_onednns(monkeypatch):
    usual = make()
    monkeypatch.setattr(memory, "LARGE", 61 * 32)  # the head, qkv and the MLP's two, not `out`
    gpt = memory.prepare(copy.deepcopy(usual))
    assert (products(usual), products(gpt)) == (0, 1 + 2 * 2)
    assert_close(in_pieces(gpt)[:1], in_pieces(usual)[:1], 1e-5)
    assert all(map(torch.equal, gradients(gpt), gradients(usual)))


@pytest.mark.parametrize("more", [{}, BFLOAT16])
def test_what_is_computed_again_gives_the_same_gradients(monkeypatch, more):
    usual, calls = memory.prepare(make(), **more), []
    gpt = memory.prepare(copy.deepcopy(usual), **more, recompute=True)
    gpt.blocks[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    assert all(map(torch.equal, gradients(gpt), gradients(usual)))
    assert len(calls) == 2
    monkeypatch.delattr(memory, "checkpoint")  # which would slow down sampling
    assert torch.equal(in_pieces(gpt)[0], in_pieces(usual)[0])


def test_bfloat16_is_computed_in_and_not_kept_but_in_the_cache():
    usual, gpt = make(), memory.prepare(make(), **BFLOAT16)
    assert {x.dtype for x in gpt.parameters()} == {torch.float32}
    logits, (pieces, cache) = gpt(IDS), in_pieces(gpt)
    assert (logits.dtype, pieces.dtype) == (torch.bfloat16, torch.bfloat16)
    assert not torch.is_autocast_enabled("cpu")
    assert {x.dtype for x in cache.k + cache.v} == {torch.bfloat16}
    expected = usual(IDS).detach()
    assert 1e-4 < (logits - expected).abs().max() / expected.abs().max() < 0.03
    assert_close([pieces], [logits[:2]], 0.03)
    assert_close(gradients(gpt), gradients(usual), 0.1)


def test_a_frozen_model_keeps_matrices_in_bfloat16_and_computes_the_same_to_the_bit():
    gpt = memory.prepare(make(), **BFLOAT16)
    frozen = memory.prepare(copy.deepcopy(gpt).requires_grad_(False), **BFLOAT16)
    narrow = {name for name, x in frozen.named_parameters() if x.dtype == torch.bfloat16}
    assert narrow == {"head.weight"} | {
        f"blocks.{i}.{name}.weight" for i in (0, 1)
        for name in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    }  # fmt: skip
    for _ in range(2):
        assert torch.equal(frozen(IDS), gpt(IDS))
        assert torch.equal(in_pieces(frozen)[0], in_pieces(gpt)[0])
        other = make().state_dict() | {"norm.weight": torch.ones(32)}
        frozen.load_state_dict(other)  # as the base, once it is trained
        gpt.load_state_dict(other)


def test_a_copy_computes_with_its_own_weights():
    gpt = memory.prepare(make(), **BFLOAT16, recompute=True)
    changed, before = copy.deepcopy(gpt), gpt(IDS)
    with torch.no_grad():
        for weight in changed.parameters():
            weight.zero_()
    assert torch.equal(gpt(IDS), before) and not changed(IDS).any()


# --- torch.compile --------------------------------------------------------------------------------

compiling = pytest.mark.filterwarnings("ignore")  # the compiler warns of itself


@compiling
def test_blocks_are_traced_whole_and_once_for_all(monkeypatch):
    """Two blocks, rows, lengths: few graphs and no break, whatever a compiler makes of them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    usual = memory.prepare(make(), **BFLOAT16, recompute=True)
    gpt = memory.prepare(copy.deepcopy(usual), **BFLOAT16, recompute=True, compile=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(in_pieces(gpt)[0], in_pieces(usual)[0])
    assert all(map(torch.equal, gradients(gpt), gradients(usual)))
    counted = torch._dynamo.utils.counters
    assert 0 < counted["stats"]["unique_graphs"] <= 5 and not counted["graph_break"]


@compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_compiled_model_computes_the_same():
    gpt = make()
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close([memory.prepare(gpt, compile=True)(IDS)], [make()(IDS)], 1e-5)


def test_norms_are_computed_in_their_weights_precision():
    """Half-precision states, float32 norms, as a large model is kept: a sum of squares of 1,000s
    that would be infinite in float16 is not."""
    norm = memory.Float32Norm(4, eps=1e-6)
    found = norm(torch.tensor([1000.0, -1000.0, 1000.0, 1000.0], dtype=torch.float16))
    assert found.dtype == torch.float16 and found.tolist() == [1, -1, 1, 1]
    gpt = memory.prepare(GPT(GPTConfig(61, **SIZES, qk_norm=True)), **BFLOAT16)
    norms = [type(x) for x in gpt.modules() if isinstance(x, torch.nn.RMSNorm)]
    assert norms == [memory.Float32Norm] * (2 * 4 + 1)
