"""The GiB that the porting guide tells are those of the published sizes, and of the benchmark."""

import json

import pytest

from ports import engines
from tests.truth import ROOT

GIB = 2**30
PUBLISHED = {"0.5B": 494_032_768, "7B": 7_615_616_512, "70B": 70_553_706_496}  # weights


@pytest.mark.parametrize("size", PUBLISHED)
def test_what_an_engine_holds_is_bytes_times_published_weights(size):
    c, n = engines.SIZES[size], PUBLISHED[size]
    matrix = c.vocab_size * c.d_model  # the embedding stays float32; a tied head is one more
    norms = (2 * c.n_layer + 1) * c.d_model
    biases = c.qkv_bias * c.n_layer * (c.n_head + 2 * c.n_kv_head) * c.head_size
    frozen = 2 * (n + norms + biases + matrix * (1 + c.tied_head))
    cache = 32 * 2400 * c.n_layer * 2 * c.n_kv_head * c.head_size * 2
    expected = {
        "ours, one process": (16 * n, frozen, frozen, cache),
        "ours, torchrun": (2 * n, frozen, frozen, max(cache, 4 * n)),
        "TRL": (16 * n, 4 * n, 0, 2 * cache),
        "verl": (2 * n, 0, 2 * n, cache),
        "verl, vLLM over 8": (2 * n, 0, n / 4, cache / 8),
    }
    found = {name: [*x.values()] for name, x in engines.held(c).items()}
    for name, parts in expected.items():
        assert found[name] == pytest.approx([x / GIB for x in parts], abs=2e-3), name


def test_the_formulas_are_those_that_a_step_was_measured_against():
    """Weights, gradient, moments and base of Qwen2.5-0.5B's shape in float32, and a chunk."""
    measured = json.loads((ROOT / "tests/results/memory.json").read_text())["runs"]["chunks"]
    parts = engines.held(engines.SIZES["0.5B"])["TRL"]
    assert parts["base"] == pytest.approx(measured["weights"] / GIB, abs=1e-3)
    told = (parts["part"] + parts["base"]) * GIB + measured["chunk"]
    assert 1 < measured["peak"] / told < 1.05
