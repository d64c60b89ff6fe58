"""A small model written in fewer operations, its rows parted among threads, is the same model."""

import itertools
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import score
from model import GPT, Cache, GPTConfig
from scale import small
from tests.test_run import CONFIG, flatten

SIZES = [dict(tied_head=True, n_layer=3), dict(n_kv_head=2, qkv_bias=True), dict(head_dim=6)]
CLOSE = dict(rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(small, "ROWS", 2)
    yield
    torch.set_num_threads(1)


def models(n, **sizes):
    """Return two models of the same weights, the second one's rows shared by n threads."""
    alone, shared = (GPT(GPTConfig(11, **dict(n_layer=2) | sizes), seed=1).double() for _ in "12")
    for model in (alone, shared):  # norms and biases count, too
        for i, weight in enumerate(model.parameters()):
            weight.data += torch.linspace(-0.3, 0.4, weight.numel()).view_as(weight).sin() * (i + 1)
    torch.set_num_threads(n)
    small.share(SimpleNamespace(config=score.Config(), policy=shared, base=shared))
    return alone, shared


def rows(B, T):
    """Return ids [B, T], and a mask of some of them: in the first rows none, in the last all."""
    ids = (torch.arange(B * T) * 7 % 11).view(B, T)
    mask = ids % 3 == 0
    mask[: B // 3], mask[-1] = False, True
    return ids, mask


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("B", [2, 9])
def test_logits_and_gradient_are_those_of_the_model(sizes, B):
    """Of rows in one part or four; backwards twice, as who looks at parts of a loss goes. Of five
    tokens all are looked up in the vocabulary of 11, or none."""
    alone, shared = models(4, **sizes)
    ids, mask = rows(B, 5)
    found, expected = shared(ids, wanted_BT=mask), alone(ids)[mask]
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(alone(ids, wanted_BT=mask), expected, **CLOSE)
    torch.testing.assert_close(shared(ids), alone(ids), **CLOSE)
    weight = torch.linspace(-1, 1, 11).double()
    for _ in range(2):
        for logits in (expected, found):
            (logits.softmax(-1) @ weight).sum().backward(retain_graph=True)
    for ours, theirs in zip(shared.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)
    assert torch.get_num_threads() == 1


def test_a_part_that_is_frozen_has_no_gradient_and_the_rest_its_own():
    alone, shared = models(2)
    ids, mask = rows(8, 5)
    for model in (alone, shared):
        model.embed.requires_grad_(False)
        model(ids, wanted_BT=mask).square().sum().backward()
    assert shared.embed.weight.grad is None
    torch.testing.assert_close(shared.head.weight.grad, alone.head.weight.grad)
    logits = shared.requires_grad_(False)(ids, wanted_BT=mask)
    assert not logits.requires_grad


def in_pieces(model, ids, last_n, wanted):
    """Return the states of pieces of rows, and the cache: a prompt, in the last row shorter; two
    tokens, of which a row in the middle then has one less; two at once; and one."""
    n_B, on_B = torch.tensor([[3], [1]]).expand(2, len(ids)).clone()
    cache = Cache(model, len(ids), 9)
    n_B[-1], on_B[len(ids) // 2 - 1], states = last_n, last_n - 2, []
    for start, T, new_B in (0, 3, n_B), (3, 1, None), (4, 1, on_B), (5, 2, None), (7, 1, None):
        last_BT = torch.arange(1, T + 1) == (n_B[:, None] if T == 3 else T)
        mask_BT = last_BT.expand(len(ids), T) if wanted else ...
        states.append(model.hidden(ids[:, start : start + T], cache, new_B, mask_BT))
    return states, cache


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("B", "last_n", "usual"), [(1, 3, 1), (1, 2, 1), (9, 3, 2), (9, 2, 6)])
def test_in_a_cache_it_is_the_same(sizes, B, last_n, usual, monkeypatch):
    """`usual`: how many of five pieces of one or two parts are read by model.py's own code: the two
    tokens at once, and what comes after a part's rows have come to be of several lengths."""
    (alone, shared), (ids, _), seen, real = models(2, **sizes), rows(B, 9), [], GPT.hidden
    with torch.no_grad():
        for wanted in (True, False):
            expected, theirs = in_pieces(alone, ids, last_n, wanted)
            monkeypatch.setattr(GPT, "hidden", lambda *x: seen.append(0) or real(*x))
            found, ours = in_pieces(shared, ids, last_n, wanted)
            monkeypatch.undo()
            for x, y in zip(found + ours.k + ours.v, expected + theirs.k + theirs.v, strict=True):
                torch.testing.assert_close(x, y, **CLOSE)
            assert torch.equal(ours.length_B, theirs.length_B) and ours.reach == theirs.reach
            monkeypatch.setattr(small, "ROWS", 2)
            assert len(seen) == usual
            seen.clear()
        shared.hidden(ids[:, :1], ours)
        for T in (1, 2):
            with pytest.raises(ValueError, match="tokens do not fit 9 positions"):
                shared.hidden(ids[:, :T], ours)
        with pytest.raises(ValueError, match="6 tokens do not fit 5 positions"):
            shared.hidden(ids[:, :6], Cache(shared, B, 5))


def test_parts_are_not_small_and_keep_nothing_for_a_gradient_that_nobody_asks_for(monkeypatch):
    """Of two rows or more each, here; how often the model is asked, and whether for a gradient."""
    (_, shared), seen, real = models(4), [], small.SmallGPT.logits

    def logits(*given):
        here = threading.current_thread() is threading.main_thread()
        seen.append((len(given[1]), torch.is_grad_enabled(), here))
        return real(*given)

    monkeypatch.setattr(small.SmallGPT, "logits", logits)
    for n, parts in ((3, [3]), (5, [2, 3]), (9, [2, 2, 2, 3])):
        ids, mask = rows(n, 5)
        with torch.no_grad():
            shared(ids, wanted_BT=mask)
        assert sorted(seen) == [(x, False, len(parts) == 1) for x in parts]
        seen.clear()
    with pytest.raises(ValueError, match="65 tokens do not fit 64 positions"):
        shared(*[torch.zeros(4, 65, dtype=torch.long)], wanted_BT=torch.ones(4, 65) > 0)


def test_every_thread_computes_alone_and_other_models_are_left_as_they_are(monkeypatch):
    _, shared = models(2)
    torch.set_num_threads(2)
    small.pool.cache_clear()
    seen = small.pool(2).map(lambda _: torch.get_num_threads(), range(8))
    assert {*seen} == {1} and shared.threads == 2
    large, normed = GPT(GPTConfig(11)), GPT(GPTConfig(11, qk_norm=True))
    monkeypatch.setattr(small, "SMALL", sum(x.numel() for x in normed.parameters()) + 1)
    cut = replace(score.Config(), n_layer=1)
    for model, c in (
        (normed, cut),
        (large, SimpleNamespace(device="cpu", micro_batch=0)),
        (large, SimpleNamespace(device="cuda")),
    ):
        small.share(SimpleNamespace(config=c, policy=model, base=model))
        assert type(model) is GPT and torch.get_num_threads() == 2
    monkeypatch.setattr(small, "SMALL", 1000)
    small.share(SimpleNamespace(config=cut, policy=large, base=large))
    assert type(large) is GPT and torch.get_num_threads() == 2


def test_a_run_is_the_same_to_the_bit_by_any_number_of_threads_and_resumed(tmp_path):
    """Its second half is trained by a run that was read from the first one's checkpoint."""
    runs = {}
    for name, n in (("one", 1), ("two", 2), ("again", 2)):
        torch.set_num_threads(n)
        run = score.open_run(score.create(replace(CONFIG, lr=1e-4), tmp_path / name))
        assert run.policy.threads == run.base.threads == n and torch.get_num_threads() == 1
        rows = list(itertools.islice(score.train(run), 8 if name == "again" else 99))
        if name == "again":
            score.save(score.state_of(run), run.folder / "checkpoint.pt")
            run = score.open_run(run.folder)
            rows += score.train(run)
        runs[name] = rows, flatten(run.policy.state_dict())
    assert runs["one"] == runs["two"] == runs["again"]
