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
from scale import steps, train
from study import methods
from tests.scale import wide
from verify import Verdict

KINDS = {
    "score": dict(offline=0.4),
    "multi_turn": {},
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
    score.drive(whole)
    train.drive(parts)
    rows = wide.assert_same(whole.folder, parts.folder)
    assert any(0 < row.get("acc_t2", 0) < 1 for row in rows)
    assert any(row.get("unjudged") and row["grad_norm"] > 1e-3 for row in rows)


@pytest.fixture
def run(tmp_path):
    run = wide.new_run(wide.Config(**wide.SMALL | dict(chunk=3)), tmp_path)
    return replace(run, rng=np.random.default_rng(0))


@pytest.mark.parametrize("chunk", [0, 3])
def test_of_the_vocabulary_no_more_than_a_chunk_is_made_and_none_kept(run, chunk):
    r, _, _ = steps.collect(run, run.policy)
    made, kept, N = [], [], int((r.turn_BS > 0).sum())

    def keep(x):
        kept.append(x.shape[-1] == run.task.vocab_size)
        return x

    for gpt in (run.policy, run.base):
        gpt.head.register_forward_hook(lambda head, given, logits: made.append(len(logits)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        terms = steps.in_chunks(token_terms, [run.policy, run.base], r, 1.0, chunk)
    assert any(kept) == (chunk == 0) and sum(made) == 2 * N
    sum(x.sum() for x in terms).backward()
    assert max(made) <= (len(r.turn_BS) * chunk or N) and sum(made) == (4 if chunk else 2) * N


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
    """About one token, of the first micro-batch's attempts 1 or the last one's attempts 2. In
    bfloat16 the gap is only logged, unless it is no number."""
    r, _, reward_KB = steps.collect(run, run.policy)
    stage, run.optimizer.param_groups[0]["lr"] = score.stage2(reward_KB, run.config), 0.0
    run.config = replace(run.config, micro_batch=len(reward_KB[0]) // 2)
    places = (r.turn_BS == 1).nonzero()[0], (r.turn_BS == 2).nonzero()[-1]

    def gap(dtype, off, place):
        run.config = replace(run.config, dtype=dtype)
        rows = replace(r, logp_BS=r.logp_BS.clone())
        rows.logp_BS[*place] += off
        return steps.rl_update(run, rows, reward_KB, stage)["gap"]

    for place in places:
        assert gap("float32", 0.0, place) < 1e-12 and 0.04 < gap("bfloat16", 0.1, place) < 0.2
        for dtype, off in (("float32", 2e-3), ("bfloat16", torch.nan)):
            with pytest.raises(RuntimeError, match="disagree"):
                gap(dtype, off, place)


def test_no_verdict_at_all_stops_the_run(run):
    draw = run.task.draw
    failing = [
        x._replace(verifier=lambda *_: Verdict(None, "error")) for x in draw(6, "train", run.rng)
    ]
    run.task = run.task._replace(draw=lambda *_: failing)
    with pytest.raises(RuntimeError, match="the verifier has failed"):
        methods.rl_step(run, score.stage1, collect=steps.collect, update=steps.rl_update)
