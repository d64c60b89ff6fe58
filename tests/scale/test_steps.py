"""A step in parts is the step that score.py and study/methods.py take, to the rounding of sums.

Whole runs in float64 are compared, of each kind of step, rewards and missing verdicts included.
"""

import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import score
from rollout import token_terms
from scale import steps
from study import methods
from tests.scale import wide
from verify import Verdict

KINDS = {
    "score": dict(offline=0.4, adaptive_beta2=1),
    "three_turn": dict(pool=9),
    "multi_turn": dict(kl="k1"),
    "single_turn": dict(temperature=0.7),
    "star_stage2": {},
    "pair_sft": {},
}


@pytest.mark.parametrize("method", KINDS)
def test_a_run_in_parts_is_the_run_of_the_study(tmp_path, method):
    settings = wide.SMALL | KINDS[method] | dict(method=method)
    whole = wide.widened(methods.new_run(methods.Config(**settings), tmp_path / "whole"))
    parts = wide.new_run(wide.Config(**settings | wide.PARTS), tmp_path / "parts")
    whole.phases[0] = whole.phases[0]._replace(warmup=0)
    for run in (whole, parts):
        run.folder.mkdir()
    ways = list(score.train(whole)), list(score.train(parts))
    wide.assert_same(*ways)
    for name, weight in whole.policy.state_dict().items():
        torch.testing.assert_close(parts.policy.state_dict()[name], weight, rtol=1e-9, atol=1e-9)
    assert any(0 < row.get("acc_t2", 0) < 1 for row in ways[0])
    assert any(row.get("unjudged") and row["grad_norm"] > 1e-3 for row in ways[0])


@pytest.fixture
def run(tmp_path):
    run = wide.new_run(wide.Config(**wide.SMALL, chunk=3), tmp_path)
    return replace(run, rng=np.random.default_rng(0))


@pytest.mark.parametrize("chunk", [0, 3])
def test_of_the_vocabulary_no_more_than_a_chunk_is_kept(run, chunk):
    """A row of logits is told by its size, that of the vocabulary."""
    r, _, _ = steps.collect(run, run.policy)
    kept = []

    def keep(x):
        kept.append(x.numel() if x.shape[-1] == run.task.vocab_size else 0)
        return x

    models = [run.policy, run.base]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        terms = steps.in_chunks(token_terms, models, r, 1.0, chunk)
    assert (max(kept) >= r.turn_BS.numel() * run.task.vocab_size) == (chunk == 0)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        sum(x.sum() for x in terms).backward()
    assert sum(kept) == 0  # what is computed again is kept by nobody


def test_programs_are_judged_side_by_side_and_in_order(run, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    r, problems, _ = steps.collect(run, run.policy)
    both = threading.Barrier(2)

    def slow(answer, gold):
        both.wait(timeout=10)
        return wide.lottery(answer, gold)

    problems = [problem._replace(verifier=slow) for problem in problems]
    found = steps.judge(r, problems, run.task)
    expected = score.grade(r, [x._replace(verifier=wide.lottery) for x in problems], run.task)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_sampler_that_disagrees_stops_the_run(run):
    """In bfloat16 the gap is only logged, unless it is no number."""
    r, _, reward_KB = steps.collect(run, run.policy)
    stage, (b, s) = score.stage2(reward_KB, run.config), r.turn_BS.nonzero()[3]

    run.optimizer.param_groups[0]["lr"] = 0.0

    def gap(dtype, off):
        run.config = replace(run.config, dtype=dtype)
        rows = replace(r, logp_BS=r.logp_BS.clone())
        rows.logp_BS[b, s] += off
        return steps.rl_update(run, rows, reward_KB, stage, run.base)["gap"]

    assert gap("float32", 0.0) < 1e-12 and 0.04 < gap("bfloat16", 0.1) < 0.2
    for dtype, off in (("float32", 2e-3), ("bfloat16", torch.nan)):
        with pytest.raises(RuntimeError, match="disagree"):
            gap(dtype, off)


def test_no_verdict_at_all_stops_the_run(run):
    draw = run.task.draw
    failing = [
        x._replace(verifier=lambda *_: Verdict(None, "error")) for x in draw(6, "train", run.rng)
    ]
    run.task = run.task._replace(draw=lambda *_: failing)
    with pytest.raises(RuntimeError, match="the verifier has failed"):
        steps.rl_step(run, score.stage1)
