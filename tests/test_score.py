"""A whole step is what its definition says, row by row; and the loop around it keeps its word."""

import copy
import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import score
import verify
from rollout import rollout
from tests import truth
from tests.test_rollout import CHECK, REVISE

TINY = score.Config(
    size=4, n_layer=1, d_model=8, d_ff=8, sft_steps=4, sft_batch=8, stage1_steps=3, stage2_steps=3,
    batch=12, group=3, warmup=1, temperature=0.7, alpha=4.0, beta1=0.3, beta2=0.8, eval_n=10,
)  # fmt: skip
REWARDS = [[1.0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 1], [1.0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0]]


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("G", [2, 5])
def test_the_baseline_is_the_mean_of_the_others_and_a_group_without_a_verdict_has_none(G):
    reward = torch.rand(4 * G, generator=torch.Generator().manual_seed(G), dtype=torch.float64)
    reward[2 * G - 1] = torch.nan
    given = reward.tolist()
    expected = []
    for i in range(4 * G):
        others = [given[j] for j in range(i // G * G, i // G * G + G) if j != i]
        expected.append(0.0 if i // G == 1 else given[i] - sum(others) / len(others))
    assert score.advantage(reward, G).tolist() == pytest.approx(expected)
    assert all(map(math.isnan, reward.tolist()[2 * G - 1 : 2 * G]))  # nothing was written into it


# --- one step -------------------------------------------------------------------------------------


def prepared(monkeypatch, tmp_path, rewards, config=TINY):
    """Return a float64 run whose base differs from its policy, and what its step will have seen: it
    is given rewards, and its gradient is kept as it is."""
    run, seen = score.new_run(config, tmp_path), {}
    run.rng = np.random.default_rng(1)
    run.policy.double()
    run.base.double()
    for i, weight in enumerate(run.base.parameters()):
        weight.add_(0.1 * torch.cos(torch.arange(weight.numel()).view(weight.shape) + i))

    def watched(model, task, prompts, noise, temperature):
        r = rollout(model, task, prompts, noise, temperature)
        seen.update(model=model, prompts=prompts, noise=noise, temperature=temperature, r=r)
        return r

    def graded(r, problems, task):
        seen.update(problems=problems)
        return torch.tensor(rewards, dtype=torch.float64)

    def optimizer_step(run, mean):
        run.policy.zero_grad()
        mean.backward()
        return 0.125

    monkeypatch.setattr(score, "rollout", watched)
    monkeypatch.setattr(score, "grade", graded)
    monkeypatch.setattr(score, "optimizer_step", optimizer_step)
    return run, seen


def others(values, b):
    """Return the mean of the other two of a group, by hand."""
    group = [values[i] for i in range(b // 3 * 3, b // 3 * 3 + 3) if i != b]
    return sum(group) / 2


def by_rows(run, seen, stage, rewards):
    """Return the gradient of one step, row by row and token by token, from the definitions; and the
    KL of each row's attempts."""
    c, r, loss, kls = run.config, seen["r"], 0.0, [[], []]
    policy = copy.deepcopy(run.policy)
    policy.zero_grad()
    alpha = 0.0 if stage == "multi_turn" else 4.0
    bonus = [y + alpha * (y - x) for x, y in zip(*rewards, strict=True)]
    held = [0.3 + 0.8, 0.3] if stage == "stage1" else [0.3, 0.3]
    for b in range(12):
        first, second = (r.attempts[k][b] for k in (0, 1))
        row = [*seen["prompts"][b // 3], *first, REVISE, *second]
        p, q = (torch.log_softmax(m(torch.tensor([row]))[0] / c.temperature, -1)
                for m in (policy, run.base))  # fmt: skip
        for k, attempt in enumerate((first, second)):
            values = [[0.0] * 12, rewards[1]] if stage == "stage1" else [rewards[0], bonus]
            pay = values[k][b] - others(values[k], b)
            pay = 0.0 if math.isnan(pay) else pay
            start = len(row) - len(second) if k else len(row) - len(second) - 1 - len(first)
            kl = [sum(math.e ** p[s, v] * (p[s, v] - q[s, v]) for v in range(CHECK + 1))
                  for s in range(start - 1, start - 1 + len(attempt))]  # fmt: skip
            kls[k].append(sum(x.item() for x in kl))
            for i, token in enumerate(attempt):
                logp, future = p[start - 1 + i, token], sum(x.item() for x in kl[i + 1 :])
                loss = loss + (held[k] * (kl[i] + logp * future) - pay * logp) / 12
    loss.backward()
    return [w.grad for w in policy.parameters()], kls


@pytest.mark.parametrize("unjudged", [None, 0, 1])
@pytest.mark.parametrize("stage", ["stage1", "stage2", "multi_turn"])
def test_a_whole_step_takes_the_gradient_of_its_definition(monkeypatch, tmp_path, stage, unjudged):
    """Also where an attempt has no verdict: its problem's rows are not paid for what would need it,
    and are held to the base as all others."""
    rewards = copy.deepcopy(REWARDS)
    if unjudged is not None:
        rewards[unjudged][4] = torch.nan
    run, seen = prepared(monkeypatch, tmp_path, rewards)
    log = score.rl_step(run, stage=getattr(score, stage))
    expected, kls = by_rows(run, seen, stage, rewards)
    for weight, gradient in zip(run.policy.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-6, atol=1e-9)
    assert all(weight.grad is None for weight in run.base.parameters())
    assert log["kl1"] == pytest.approx(np.mean(kls[0]))
    assert log["kl2"] == pytest.approx(np.mean(kls[1]))
    for key, rights in zip(("acc_t1", "acc_t2"), rewards, strict=True):
        assert log[key] == pytest.approx(np.nanmean(rights))
    assert log["gap"] < 1e-12 and log["grad_norm"] == 0.125 and log["changed"] > 0
    assert seen["model"] is run.policy and seen["temperature"] == 0.7


def test_rows_of_a_group_are_one_training_problem_side_by_side(monkeypatch, tmp_path):
    monkeypatch.setattr(verify, "LARGEST", 4)
    run, seen = prepared(monkeypatch, tmp_path, REWARDS)
    score.rl_step(run, stage=score.stage1)
    assert [x.prompt for x in seen["problems"][::3]] == list(map(run.task.decode, seen["prompts"]))
    every = verify.problems(890, "train", np.random.default_rng(0), M=4)
    for b, problem in enumerate(seen["problems"]):
        assert problem == seen["problems"][b // 3 * 3]
        assert problem in every
    assert len(set(seen["problems"])) == 4


def test_collected_trajectories_have_the_enumerated_probabilities():
    """Chi-squared of 20,000, the rarest of the 49 counted together, so that there are at most 48
    degrees of freedom. A right sampler exceeds 107 with probability 2e-6; the seed is fixed."""
    oracle, shipped = truth.Oracle(), truth.load_program()
    c = SimpleNamespace(batch=20_000, group=2, device="cpu", temperature=truth.TEMPERATURE)
    rng = np.random.default_rng(0)
    run = SimpleNamespace(config=c, task=truth.tiny_task(shipped), rng=rng)
    r, _, reward_KB = score.collect(run, truth.tiny_model(shipped, 1), K=2)
    found = [(tuple(y1), tuple(y2)) for y1, y2 in zip(*r.attempts, strict=True)]
    rights = [[float(y in truth.RIGHT) for y in turn] for turn in zip(*found, strict=True)]
    assert reward_KB.tolist() == rights
    expected, count = Counter(), Counter()
    for pair in truth.PAIRS:
        p = oracle.probability(*pair)
        expected[pair if p > 5e-4 else "rare"] += 20_000 * p
        count[pair if p > 5e-4 else "rare"] += found.count(pair)
    assert min(expected.values()) > 10 and sum(count.values()) == 20_000
    assert sum((count[x] - n) ** 2 / n for x, n in expected.items()) < 107


def test_a_batch_without_any_verdict_stops_the_run(monkeypatch, tmp_path):
    """Each row lacks one of its two."""
    rewards = [[torch.nan, 1.0] * 6, [1.0, torch.nan] * 6]
    run, _ = prepared(monkeypatch, tmp_path, rewards)
    with pytest.raises(RuntimeError, match="no row of the batch"):
        score.rl_step(run, stage=score.stage2)


@pytest.mark.parametrize("gap", [2e-3, torch.nan])
def test_a_sampler_that_disagrees_with_the_trainer_stops_the_run(monkeypatch, tmp_path, gap):
    run, _ = prepared(monkeypatch, tmp_path, REWARDS)
    r, _, reward_KB = score.collect(run, run.policy, K=2)
    paid_and_held = score.stage1(reward_KB, run.config)
    terms = score.token_terms(run.policy, run.base, r, run.config.temperature)
    r.logp_BS = r.logp_BS - 2e-4 * (r.turn_BS > 0) - 9.0 * (r.turn_BS == 0)
    assert score.rl_update(run, r, reward_KB, *terms, paid_and_held)["gap"] < 3e-4
    b, s = (r.turn_BS == 2).nonzero()[-1]
    r.logp_BS[b, s] -= gap
    with pytest.raises(RuntimeError, match="disagree by"):
        score.rl_update(run, r, reward_KB, *terms, paid_and_held)


def test_a_supervised_step_is_the_mean_over_all_tokens_of_both_attempts(monkeypatch, tmp_path):
    """Of documents of several lengths, token by token, each with its own prefix."""
    run, _ = prepared(monkeypatch, tmp_path, REWARDS)
    prompts = [[1, 10, 2, 11], [3, 11], [0, 10, 11]]
    attempts = [[[3, 12], [0, 0, 4, 12], [12]], [[5, 6, 12], [7, 12], [8, 1, 2, 12]]]
    p1, asked = run.task.instruction, []

    def documents(*given):
        asked.append(given)
        return prompts, attempts

    run.task = run.task._replace(documents=documents)
    log, losses = score.sft_step(run), []
    policy = copy.deepcopy(run.policy)
    policy.zero_grad()
    for prompt, first, second in zip(prompts, *attempts, strict=True):
        for context, attempt in ((prompt, first), ([*prompt, *first, *p1], second)):
            for i, token in enumerate(attempt):
                logits = policy(torch.tensor([context + attempt[:i]]))[0, -1]
                losses.append(torch.logsumexp(logits, 0) - logits[token])
    mean = sum(losses) / len(losses)
    mean.backward()
    assert log == dict(loss=pytest.approx(mean.item()), grad_norm=0.125) and len(losses) == 16
    for weight, mine in zip(run.policy.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, mine.grad, rtol=1e-6, atol=1e-9)
    assert asked == [(8, run.rng)]


def test_the_optimizer_is_adam_with_a_clipped_gradient_and_no_decay(tmp_path):
    """Three steps of one weight by hand. The gradient has a norm of 5, then 0.5, then 0."""
    run = score.new_run(TINY, tmp_path)
    weight, other = run.policy.norm.weight, run.policy.embed.weight
    start, first, second = weight[0].item(), 0.0, 0.0
    run.optimizer.param_groups[0]["lr"] = 0.01
    for t, (size, clipped) in enumerate(((5.0, 0.6), (0.5, 0.3), (0.0, 0.0)), start=1):
        mean = size * (0.6 * weight[0] + 0.8 * other[1, 1])
        assert score.optimizer_step(run, mean) == pytest.approx(size)
        first, second = 0.9 * first + 0.1 * clipped, 0.95 * second + 0.05 * clipped**2
        start -= 0.01 * (first / (1 - 0.9**t)) / (math.sqrt(second / (1 - 0.95**t)) + 1e-8)
        assert weight[0].item() == pytest.approx(start, rel=1e-5)
    before = copy.deepcopy(run.policy.state_dict())
    with pytest.raises(RuntimeError, match="non-finite"):
        score.optimizer_step(run, weight.sum() * torch.inf)
    assert all(torch.equal(x, before[name]) for name, x in run.policy.state_dict().items())


def test_both_stages_learn_at_bandit_size():
    """40 steps as they are shipped, in the truth's world of 49 trajectories, judged by enumeration.

    Over seeds 0 to 19 Stage I raised its objective by 1.67 to 1.85 and Stage II by 1.08 to 1.20;
    the bounds are half of the least, so that no seed tried is near.
    """
    oracle = truth.Oracle()
    start, first = oracle.objectives(), copy.deepcopy(oracle.policy.state_dict())
    settings = dict(batch=64, group=4, device="cpu", temperature=truth.TEMPERATURE)
    c = SimpleNamespace(**vars(truth.SETTINGS) | settings)
    task = truth.tiny_task(truth.load_program())
    run = SimpleNamespace(config=c, task=task, policy=oracle.policy, base=oracle.base)
    for stage, bound in (("stage1", 0.83), ("stage2", 0.54)):
        oracle.policy.load_state_dict(first)
        run.optimizer = torch.optim.Adam(oracle.policy.parameters(), lr=0.04)
        run.rng = np.random.default_rng(5)
        for _ in range(40):
            score.rl_step(run, getattr(score, stage))
        assert oracle.objectives()[stage] - start[stage] > bound


# --- phases ---------------------------------------------------------------------------------------


def scripted(tmp_path, phases, config=TINY):
    """Return a run of phases (name, steps, step, rate, final rate and warm-up), which may write any
    weight, and has taken no step."""
    run = score.new_run(config, tmp_path)
    run.phases = [score.Phase(*about) for about in phases]
    return run


def weights(run, name):
    return score.load(run.folder / f"{name}.pt")["model"]["norm.weight"].tolist()[0]


def rates(run):
    """Return the rate of each step of a run, none of which does anything."""
    found = []

    def step(run):
        found.append(run.optimizer.param_groups[0]["lr"])
        return {}

    run.phases = [x._replace(step=step) for x in run.phases]
    list(score.train(run))
    return found


def test_rates_fall_from_the_first_to_the_final_while_they_warm_up(tmp_path):
    """A warm-up of 4 steps rises by fifths, of a rate that falls by tenths or by sixths."""
    run = scripted(tmp_path, [("a", 10, None, 0.2, 0.0, 4), ("b", 6, None, 0.1, 0.04, 4)])
    falling = [0.04, 0.072, 0.096, 0.112, 0.12, 0.1, 0.08, 0.06, 0.04, 0.02]
    assert rates(run) == pytest.approx(falling + [0.02, 0.036, 0.048, 0.056, 0.06, 0.05])


def test_both_stages_together_have_the_rates_of_the_control(tmp_path):
    c = replace(TINY, sft_steps=1, stage1_steps=4, stage2_steps=6, lr=0.5, warmup=0)
    falling = [0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05]
    assert rates(score.new_run(c, tmp_path))[1:] == pytest.approx(falling * 2)


def test_the_phases_of_control_and_score_and_of_what_is_left_of_it():
    """Each holds the stage, the steps, the rates and the warm-up that the settings name. The last
    of a method falls to just 0."""
    c = score.Config(sft_lr=0.3, lr=0.2, warmup=7, stage1_steps=60, stage2_steps=40)
    control, first = ("multi_turn", 100, "multi_turn", 0.2, 0), ("stage1", 60, "stage1", 0.2, 0.08)
    for changes, expected in (
        ({}, [control, first, ("score", 40, "stage2", 0.08, 0)]),
        (dict(control=0), [first, ("score", 40, "stage2", 0.08, 0)]),
        (dict(alpha=0.0), [control, first, ("no_bonus", 40, "stage2", 0.08, 0)]),
        (dict(stage1_steps=0), [("multi_turn", 40, *control[2:]),
                                ("no_stage1", 40, "stage2", 0.2, 0)]),
        (dict(stage1_steps=0, control=0, alpha=0.0),
         [("no_stage1_no_bonus", 40, "stage2", 0.2, 0)]),
        (dict(stage2_steps=0, control=0), [("stage1", 60, "stage1", 0.2, 0)]),
        (dict(stage1_steps=0, stage2_steps=0), []),
    ):  # fmt: skip
        base, *rest = score.schedule(replace(c, **changes))
        assert base == ("base", c.sft_steps, score.sft_step, 0.3, 0, 100)
        assert [x[:2] for x in rest] == [x[:2] for x in expected]
        for found, (*_, stage, lr, final) in zip(rest, expected, strict=True):
            assert (found.step.func, found.warmup) == (score.rl_step, 7)
            assert found.step.keywords == dict(stage=getattr(score, stage))
            assert found.lr == pytest.approx(lr)
            assert found.final == pytest.approx(final, rel=1e-9, abs=0)


def test_score_is_bit_for_bit_the_same_with_and_without_the_control(tmp_path):
    """Logs, but for the control's, and weights: so Stage I begins from the base again."""
    logs, folders = [], [tmp_path / "without", tmp_path / "with"]
    for control, folder in enumerate(folders):
        settings = replace(TINY, control=control, lr=0.1)
        score.drive(score.open_run(score.create(settings, folder)))
        lines = (folder / "log.jsonl").read_text().splitlines()
        logs.append([line for line in lines if json.loads(line)["phase"] != "multi_turn"])
        assert len(lines) - len(logs[-1]) == control * 6
    assert logs[0] == logs[1] and len(logs[0]) == 10
    for name in ("base", "stage1", "score"):
        one, other = (score.load(x / f"{name}.pt")["model"] for x in folders)
        assert all(torch.equal(x, other[key]) for key, x in one.items())


def test_what_a_step_draws_depends_on_seed_phase_and_step_alone(tmp_path):
    drawn = {}

    def step(run, torch_seed=0):
        torch.manual_seed(torch_seed)
        key = (run.config.seed, run.phase, run.step)
        drawn.setdefault(key, set()).add(run.rng.random())
        return {}

    phases = [("a", 3, step, 0.1, 0.0, 1), ("b", 4, step, 0.1, 0.0, 1)]
    for seed in (0, 1):
        list(score.train(scripted(tmp_path, phases, replace(TINY, seed=seed))))
    late = scripted(tmp_path, [phases[0], ("b", 4, partial(step, torch_seed=1), 0.1, 0.0, 1)])
    late.phase, late.step = 1, 2
    list(score.train(late))
    assert len(drawn) == 14 and all(len(numbers) == 1 for numbers in drawn.values())
    assert len(set.union(*drawn.values())) == 14
    a, b = (score.new_run(replace(TINY, seed=seed), tmp_path) for seed in (0, 1))
    assert not torch.equal(a.policy.head.weight, b.policy.head.weight)


def test_the_reference_is_the_base_each_method_begins_there_and_each_phase_has_a_fresh_optimizer(
    tmp_path,
):
    """The base; a method of one phase; a method of two. Weights are named after their phase."""
    seen = []

    def step(run):
        of = [(m.norm.weight, m.blocks[0].norm1.weight) for m in (run.base, run.policy)]
        seen.append((*({w[0].item() for w in pair} for pair in of), len(run.optimizer.state)))
        score.optimizer_step(run, run.policy.norm.weight.sum())
        with torch.no_grad():
            for weight in of[1]:
                weight.fill_(run.phase + 2.0)
        return {}

    about = [("a", 0.0), ("b", 0.0), ("c", 0.05), ("d", 0.0)]
    run = scripted(tmp_path, [(name, 2, step, 0.1, final, 1) for name, final in about])
    score.drive(run)
    log = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    rows = [(row["phase"], row["step"]) for row in log]
    n, starts = seen[1][2], [1.0, 2.0, 2.0, 4.0]
    assert n and seen[::2] == [({min(x, 2.0)}, {x}, 0) for x in starts]
    assert seen[1::2] == [({min(x, 2.0)}, {i + 2.0}, n) for i, x in enumerate(starts)]
    assert rows == [(name, i) for name in "abcd" for i in (1, 2)]
    assert [weights(run, name) for name in "abcd"] == [2.0, 3.0, 4.0, 5.0]
    assert not any(weight.requires_grad for weight in run.base.parameters())
