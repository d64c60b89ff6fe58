"""Rows that threads share have the logits and the gradient of one thread's."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import score
from model import GPT, Cache, GPTConfig
from scale import threads
from tests.test_run import CONFIG, flatten


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(threads, "ROWS", 2)
    yield
    torch.set_num_threads(1)


def models(n, **sizes):
    """Return two models of the same weights, the second one's rows shared by n threads."""
    alone, shared = (GPT(GPTConfig(11, 2, **sizes), seed=1).double() for _ in range(2))
    torch.set_num_threads(n)
    threads.share(SimpleNamespace(config=score.Config(), policy=shared, base=shared))
    return alone, shared


@pytest.mark.parametrize("tied_head", [False, True])
def test_logits_and_gradient_are_those_of_one_thread(tied_head):
    """Of 9 rows in four parts; backwards twice, as who looks at parts of a loss goes."""
    alone, shared = models(4, tied_head=tied_head)
    ids = torch.arange(9 * 5).view(9, 5) % 11
    found, expected = shared(ids), alone(ids)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1, 1, 11).double()
    for _ in range(2):
        for logits in (expected, found):
            (logits.softmax(-1) @ weight).sum().backward(retain_graph=True)
    for ours, theirs in zip(shared.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    assert torch.get_num_threads() == 1


def test_a_part_that_is_frozen_has_no_gradient_and_the_rest_its_own():
    alone, shared = models(2)
    ids = torch.arange(8 * 5).view(8, 5) % 11
    for model in (alone, shared):
        model.embed.requires_grad_(False)
        model(ids).square().sum().backward()
    assert shared.embed.weight.grad is None
    torch.testing.assert_close(shared.head.weight.grad, alone.head.weight.grad)


def test_without_a_gradient_and_in_a_cache_it_is_the_same():
    alone, shared = models(2)
    ids = torch.arange(8 * 5).view(8, 5) % 11
    with torch.no_grad():
        torch.testing.assert_close(shared(ids), alone(ids), rtol=1e-12, atol=1e-12)
        assert not shared(ids).requires_grad
        cache = Cache(shared, 8, 5)
        shared(ids[:, :3], cache)
        torch.testing.assert_close(shared(ids[:, 3:], cache), alone(ids)[:, 3:])
    assert not shared.requires_grad_(False)(ids).requires_grad


def test_parts_are_not_small_and_keep_nothing_for_a_gradient_that_nobody_asks_for(monkeypatch):
    """Of two rows or more each, here; how often the model is called, and whether for a gradient."""
    (_, shared), seen, real = models(4), [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *x: seen.append(torch.is_grad_enabled()) or real(*x))
    ids = torch.arange(9 * 5).view(9, 5) % 11
    for rows, parts in ((3, 1), (5, 2), (9, 4)):
        with torch.no_grad():
            shared(ids[:rows])
        assert seen == [False] * parts
        seen.clear()


def test_every_thread_computes_alone_and_large_models_are_left_as_they_are(monkeypatch):
    _, shared = models(2)
    torch.set_num_threads(2)
    threads.pool.cache_clear()
    seen = threads.pool(2).map(lambda _: torch.get_num_threads(), range(8))
    assert {*seen} == {1} and shared.threads == 2
    large = GPT(GPTConfig(11))
    monkeypatch.setattr(threads, "SMALL", 1000)
    threads.share(SimpleNamespace(config=score.Config(), policy=large, base=large))
    assert type(large) is GPT and torch.get_num_threads() == 2


def test_a_run_of_two_threads_is_that_of_one_up_to_rounding_and_resumes_bit_for_bit(tmp_path):
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
    assert runs["two"] == runs["again"] and runs["two"][1] != runs["one"][1]
    for ours, theirs in zip(runs["two"][0][:5], runs["one"][0][:5], strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3, abs=1e-5)
