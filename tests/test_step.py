"""What the step, the schedule and the evaluation do with the pieces that other tests prove."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_score import TINY

import chat
import eval as evaluation
import rollout
import run as runs
import score
import verify

CONFIG = runs.Config(
    **TINY | dict(batch=12, group=3, temperature=0.7, alpha=4.0, beta1=0.3, beta2=0.8, clip=1e9)
)
REWARD1 = [1.0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 1]
REWARD2 = [1.0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0]
REWARD3 = [0.0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 1]
REWARDS = [torch.tensor(x).double() for x in (REWARD1, REWARD2, REWARD3)]


def prepared(monkeypatch, tmp_path, config=CONFIG):
    """Return a float64 run whose base differs from its policy, and what its step will have seen."""
    run, seen = runs.new_run(config, tmp_path), {}
    run.policy.double()
    for name, size in (("base", 0.1), ("previous", 0.2)):
        other = copy.deepcopy(run.policy).requires_grad_(False)
        with torch.no_grad():
            for i, weight in enumerate(other.parameters()):
                weight.add_(size * torch.cos(torch.arange(weight.numel()).view(weight.shape) + i))
        setattr(run, name, other)
    real = rollout.rollout

    def watched(model, prompts, *args, **law):
        r = real(model, prompts, *args, **law)
        of_rows = [x for x in prompts for _ in range(law["group"])]
        assert [row[: len(x)].tolist() for row, x in zip(r.ids_BT, of_rows, strict=True)] == of_rows
        seen.update(model=model, prompts=of_rows, **law, r=r)
        return r

    def graded(r, problems, *_):
        seen.update(problems=problems)
        return [x.clone() for x in REWARDS[: r.truncated_BK.shape[1]]]

    monkeypatch.setattr(score, "rollout", watched)
    monkeypatch.setattr(score, "grade", graded)
    run.progress.beta2 = 0.9
    return run, seen


def others(values, b, G=3):
    group = [values[i] for i in range(b // G * G, b // G * G + G) if i != b]
    return sum(group) / len(group)


def by_rows(run, seen, stage, alpha, rows=range(12)):
    """Return the gradient of one step, row by row and token by token, from the definitions."""
    c, r, loss = run.config, seen["r"], 0.0
    attempts = r.truncated_BK.shape[1]
    kls = [[] for _ in range(attempts)]
    policy = copy.deepcopy(run.policy)
    policy.zero_grad()
    earned = [REWARD1] + [
        [new + alpha * (new - old) for old, new in zip(before, after, strict=True)]
        for before, after in ((REWARD1, REWARD2), (REWARD2, REWARD3))
    ]
    for b in rows:
        ids = r.ids_BT[b : b + 1, : int(r.length_B[b])]
        reference = run.previous if stage == "stage1b" else run.base
        p = torch.log_softmax(policy(ids)[0] / c.temperature, -1)
        q = torch.log_softmax(reference(ids)[0] / c.temperature, -1)
        for turn in range(attempts):
            last, held = turn == attempts - 1, c.beta1 + 0.9
            if stage.startswith("stage1"):
                reward = (REWARD2, REWARD3)[attempts - 2]
                pay = reward[b] - others(reward, b) if last else 0.0
                weight = c.beta1 if last else held
            else:
                pay, weight = earned[turn][b] - others(earned[turn], b), c.beta1
            if stage == "single_turn" and turn == 1:
                pay = weight = 0.0
            steps = (r.turn_BS[b] == turn + 1).nonzero()[:, 0].tolist()
            if turn == 0 and r.offline1_B[b]:
                continue
            kl = [sum(math.e ** p[s, v] * (p[s, v] - q[s, v]) for v in range(14)) for s in steps]
            kls[turn].append(sum(x.item() for x in kl))
            for i, s in enumerate(steps):
                future = sum(x.item() for x in kl[i + 1 :])
                loss = loss + weight * (kl[i] + p[s, ids[0, s + 1]] * future) / len(rows)
                loss = loss - pay * p[s, ids[0, s + 1]] / len(rows)
    loss.backward()
    return [w.grad for w in policy.parameters()], kls


STEPS = [  # stage, share of offline first attempts, attempts
    ("stage1", 0.5, 2), ("stage2", 0.0, 2), ("stage2", 0.5, 2), ("stage2", 1.0, 2),
    ("single_turn", 0.0, 2), ("stage1b", 0.0, 3), ("stage2", 0.0, 3),
]  # fmt: skip


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize(("stage", "offline", "attempts"), STEPS)
def test_a_whole_step_takes_the_gradient_of_its_definition(
    monkeypatch, tmp_path, stage, offline, attempts, micro_batch
):
    config = replace(CONFIG, offline=offline, micro_batch=micro_batch)
    run, seen = prepared(monkeypatch, tmp_path, config)
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    alpha = 4.0 if stage == "stage2" else 0.0
    phase = runs.Phase("x", stage, 5, alpha, attempts)
    log = score.rl_step(run, phase)
    expected, kls = by_rows(run, seen, stage, phase.alpha)
    for weight, gradient in zip(run.policy.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-6, atol=1e-9)

    off = seen["r"].offline1_B
    assert off.tolist() == [stage == "stage2" and b < 12 * offline for b in range(12)]
    assert seen.get("author1") is (run.base if off.any() else None)
    own = [b for b in range(12) if not off[b]] or range(12)  # all are the base's: of all
    assert log["acc_t1"] == pytest.approx(np.mean([REWARD1[b] for b in own]))
    assert log["acc_t2"] == pytest.approx(np.mean([REWARD2[b] for b in own]))
    assert log["kl1"] == pytest.approx(np.mean(kls[0]) if kls[0] else 0.0)
    assert log["kl2"] == pytest.approx(np.mean(kls[1]))
    assert log.get("kl3") == (pytest.approx(np.mean(kls[2])) if attempts == 3 else None)
    assert log.get("acc_t3") == (pytest.approx(np.mean(REWARD3)) if attempts == 3 else None)
    seconds = zip(rollout.written(seen["r"], 1), rollout.written(seen["r"], 2), strict=True)
    assert log["changed"] == pytest.approx(sum(a != b for a, b in seconds) / 12)
    assert log["gap"] < 1e-12
    assert seen["model"] is run.policy and seen["temperature"] == 0.7
    assert seen["generator"] is run.sampler


def numbered(n):
    """Return rows whose attempts are two digits that name row and turn: 01, 02, 11, 12, .."""
    documents = [("1+1=", f"{b}1", f"{b}2") for b in range(n)]
    return rollout.read_documents(documents, "cpu")


def said(ids):
    return "".join(str(token) for token in ids if token != END_ID)


TOY = chat.format_of("addition")
END_ID = chat.encode(chat.toy_encoding(), chat.END)[0]


def test_star_imitates_rows_that_went_from_wrong_to_right():
    reward1, reward2 = torch.tensor([0.0, 0, 1, 1]), torch.tensor([1.0, 0, 1, 0])
    for plus, expected in ((False, [(0, "02")]), (True, [(0, "02"), (2, "22")])):
        found = score.traces(numbered(4), reward1, reward2, plus)
        assert [(b, said(ids)) for b, ids in found] == expected
        assert all(ids[-1] == END_ID for _, ids in found)


def test_pair_sft_draws_among_all_right_answers_to_the_same_problem():
    """Rows 0-2 are one problem with right answers 11 and 22, rows 3-5 one with 41, rows 6-8 one
    without any."""
    reward1 = torch.tensor([0.0, 1, 0, 0, 1, 0, 0, 0, 0])
    reward2 = torch.tensor([0.0, 0, 1, 0, 0, 0, 0, 0, 0])
    rng, seen = np.random.default_rng(0), {}
    for _ in range(200):
        for b, ids in score.pairs(numbered(9), reward1, reward2, 3, False, rng):
            seen.setdefault(b, []).append(said(ids))
    assert {b: set(found) for b, found in seen.items()} == {
        0: {"11", "22"}, 2: {"11", "22"}, 3: {"41"}, 5: {"41"}
    }  # fmt: skip
    assert all(len(found) == 200 for found in seen.values())
    assert 70 < seen[0].count("11") < 130
    plus = score.pairs(numbered(9), reward1, reward2, 3, True, rng)
    assert [b for b, _ in plus] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("objective", ["star", "pair_sft"])
def test_imitation_learns_the_second_attempts_of_the_phase_before(monkeypatch, tmp_path, objective):
    """The samples are those of `run.previous`; the gradient is that of the mean negative
    log-likelihood of the imitated second attempts' tokens, given problem and first attempt."""
    run, seen = prepared(monkeypatch, tmp_path)
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    state = run.problem_rng.bit_generator.state
    log = score.imitate_step(run, runs.Phase("x", objective, 5))
    assert seen["model"] is run.previous and seen["temperature"] == 0.7
    assert log["acc_t1"] == pytest.approx(np.mean(REWARD1))
    assert log["acc_t2"] == pytest.approx(np.mean(REWARD2))

    r, examples = seen["r"], [(b, rollout.written(seen["r"], 2)[b]) for b in (1, 6, 10)]
    if objective == "pair_sft":  # the same draws, after the same problems
        run.problem_rng.bit_generator.state = state
        verify.problems(4, "train", run.problem_rng, run.config.digits)
        examples = score.pairs(r, *REWARDS[:2], 3, False, run.problem_rng)
        assert {1, 6, 10} < {b for b, _ in examples}
    policy, total, tokens = copy.deepcopy(run.policy), 0.0, 0
    policy.zero_grad()
    for b, second in examples:
        context = [*seen["prompts"][b], *rollout.written(r, 1)[b], END_ID + 1]
        logp = torch.log_softmax(policy(torch.tensor([context + second]))[0] / 0.7, -1)
        total = total - sum(logp[len(context) - 1 + i, x] for i, x in enumerate(second))
        tokens += len(second)
    (total / tokens).backward()
    assert log["loss"] == pytest.approx(total.item() / tokens)
    assert log["examples"] == len(examples) / 12
    for weight, mine in zip(run.policy.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, mine.grad, rtol=1e-6, atol=1e-9)


def test_nothing_to_imitate_changes_nothing(monkeypatch, tmp_path):
    run, _ = prepared(monkeypatch, tmp_path)
    monkeypatch.setattr(score, "grade", lambda r, problems, *_: [torch.zeros(12), torch.zeros(12)])
    before = copy.deepcopy(run.policy.state_dict())
    for objective in ("star", "pair_sft"):
        log = score.imitate_step(run, runs.Phase("x", objective, 5, plus=True))
        assert log["examples"] == 0 and log["loss"] is None
    assert all(torch.equal(x, before[name]) for name, x in run.policy.state_dict().items())


def test_rows_of_a_group_are_one_training_problem_side_by_side(monkeypatch, tmp_path):
    run, seen = prepared(monkeypatch, tmp_path)
    score.rl_step(run, runs.Phase("x", "stage1", 5))
    encoding = chat.toy_encoding()
    for b, problem in enumerate(seen["problems"]):
        assert problem == seen["problems"][b // 3 * 3]
        assert encoding.decode(seen["prompts"][b]) == problem.prompt
        a, c = problem.prompt.removesuffix("=").split("+")
        assert verify.split_of(np.array([int(a)]), np.array([int(c)]))[0] == "train"
    assert len(set(seen["problems"])) == 4


def test_the_gradient_is_clipped_and_adaptive_beta2_moves_in_stage_1_only(monkeypatch, tmp_path):
    for stage in ("stage1", "stage2"):
        config = replace(CONFIG, clip=1e-3, adaptive_beta2=True)
        run, _ = prepared(monkeypatch, tmp_path, config)
        norms = []

        def step(weights=run.policy.parameters, norms=norms):
            norms.append(torch.stack([w.grad.norm() for w in weights()]).norm())

        monkeypatch.setattr(run.optimizer, "step", step)
        log = score.rl_step(run, runs.Phase("x", stage, 5, 4.0))
        assert norms == [pytest.approx(1e-3, rel=1e-3)] and log["grad_norm"] > 1e-3
        moved = score.balanced_beta2(0.9, log["acc_t2"], log["kl1"], 0.8)
        assert run.progress.beta2 == (pytest.approx(moved) if stage == "stage1" else 0.9)


def test_the_phases_of_score():
    phases = runs.schedule(runs.Config())
    assert [(p.name, p.objective, p.alpha) for p in phases] == [
        ("base", "sft", 0.0), ("stage1", "stage1", 0.0), ("score", "stage2", 10.0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "expected"), [("stage2", 0.75), ("single_turn", 0.25), ("stage1b", 0.875)]
)
def test_blocks_are_judged_by_the_rewards_of_their_training(tmp_path, objective, expected):
    run = runs.new_run(replace(CONFIG, method="single_turn"), tmp_path)
    row = dict(acc_t1=0.25, acc_t2=0.5, delta=0.25)
    if objective == "stage1b":
        row["acc_t3"] = 0.125
    for run.progress.step in range(1, runs.BLOCK + 1):
        score.judge_block(run, runs.Phase("single_turn", objective, 5), row)
    assert run.progress.best_reward == pytest.approx(expected) and run.best is not None


def test_rates_warm_up_and_the_bases_falls_to_zero():
    c = runs.Config(lr=0.1, warmup=4, sft_lr=0.2, sft_warmup=4, sft_steps=10)
    base, stage = runs.Phase("base", "sft", 10), runs.Phase("stage1", "stage1", 10)
    rates = [score.learning_rate(c, stage, i) for i in range(7)]
    assert rates == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1])
    rates = [score.learning_rate(c, base, i) for i in (0, 4, 9)]
    assert rates == pytest.approx([0.04, 0.12, 0.02])


def test_seeds_give_other_weights_problems_and_samples(tmp_path):
    a, b = (runs.new_run(runs.Config(**TINY, seed=s), tmp_path) for s in (0, 1))
    assert not torch.equal(a.policy.head.weight, b.policy.head.weight)
    assert a.problem_rng.integers(10**9) != b.problem_rng.integers(10**9)
    assert a.sampler.initial_seed() != b.sampler.initial_seed()


def test_the_base_reads_right_revisions_first_and_learns_both_attempts(monkeypatch, tmp_path):
    asked, masks, corpus = [], [], verify.corpus

    def read(*words, **shares):
        asked.append((shares["copy"], shares["right_revision"]))
        return corpus(*words, **shares)

    def loss(logp_BS, mask_BS):
        masks.append(mask_BS)
        return -(logp_BS * mask_BS).sum(dim=1)

    monkeypatch.setattr(verify, "corpus", read)
    monkeypatch.setattr(score, "loss_sft", loss)
    c = runs.Config(**TINY | dict(sft_steps=8, clean=0.5, copy=0.6, right_revision=0.3))
    run = runs.new_run(c, tmp_path)
    for run.progress.step in range(8):
        score.sft_step(run)
    assert asked == [(0.0, 1.0)] * 4 + [(0.6, 0.3)] * 4
    two_digits_and_an_end_twice = [6] * TINY["sft_batch"]
    assert all(mask.sum(dim=1).tolist() == two_digits_and_an_end_twice for mask in masks)


def test_a_base_reads_later_revisions_behind_copies_that_it_does_not_learn(monkeypatch, tmp_path):
    run, seen = runs.new_run(replace(CONFIG, base_attempts=4, sft_batch=9), tmp_path), []
    documents = [(f"{b}+0=", f"{b}1", f"{b}2") for b in range(9)]
    monkeypatch.setattr(score, "documents", lambda *_: documents)
    monkeypatch.setattr(score, "imitate", lambda run, parts, temperature: seen.extend(parts) or {})
    score.sft_step(run)
    found = []
    for r, mask_BS in seen:
        for row, mask, n in zip(r.ids_BT, mask_BS, r.length_B, strict=True):
            text = chat.decode(TOY, row[:n].tolist())
            found.append((text, chat.decode(TOY, row[1:][mask].tolist())))
    end, more = chat.END, chat.REVISE
    assert sorted(found) == sorted(
        (f"{x}{draft}{end}{more}" + f"{draft}{end}{more}" * copies + f"{revision}{end}",
         f"{draft}{end}{revision}{end}")
        for b, (x, draft, revision) in enumerate(documents) for copies in [b % 3]
    )  # fmt: skip


def test_a_pool_is_the_same_problems_at_every_step(tmp_path):
    c = replace(CONFIG, pool=6)
    rng = np.random.default_rng(1)
    drawn = [runs.draw_training(c, 4, rng) for _ in range(30)]
    pool = runs.draw(c, 6, "train", np.random.default_rng(c.seed))
    assert {x for step in drawn for x in step} == set(pool)
    assert len({tuple(step) for step in drawn}) > 5  # in another order, and others are left out
    other = runs.draw_training(replace(c, seed=c.seed + 1), 4, np.random.default_rng(1))
    assert other != drawn[0]
    fresh = [runs.draw_training(replace(c, pool=0), 4, rng) for _ in range(30)]
    assert len({x for step in fresh for x in step}) > 20


def test_rows_sampled_in_slices_keep_their_offline_flags(tmp_path):
    c = replace(CONFIG, sample_batch=6)
    run = runs.new_run(c, tmp_path)
    problems = runs.draw(c, 4, "train", np.random.default_rng(0))
    flags_B = torch.arange(12) % 5 < 2
    r = score.sample(run.policy, c, problems, run.sampler, 1.0, 3, flags_B, author1=run.policy)
    assert torch.equal(r.offline1_B, flags_B) and len(r.ids_BT) == 12


def fake_rollout(firsts, seconds, cut1):
    documents = list(zip(["1+1="] * len(firsts), firsts, seconds, strict=True))
    r = rollout.read_documents(documents, "cpu")
    r.truncated_BK[:, 0] = torch.tensor(cut1)
    return r


def test_truncated_attempts_are_not_paid():
    """Each row's first or second attempt is cut after digits that are right: "02", no end."""
    problems = [verify.Problem("1+1=", "2")] * 3
    r = fake_rollout(["02", "0", "2"], ["3", "2", "0"], [False, False, False])
    assert [x.tolist() for x in rollout.grade(r, problems, TOY)] == [[1, 0, 1], [0, 1, 0]]
    r.truncated_BK[1, 0] = r.truncated_BK[2, 1] = True
    r.ids_BT[r.ids_BT == chat.encode(chat.toy_encoding(), chat.END)[0]] = 2
    assert rollout.texts(r, 1, TOY)[1] == "02" and rollout.texts(r, 2, TOY)[2] == "02"
    assert [x.tolist() for x in rollout.grade(r, problems, TOY)] == [[1, 0, 1], [0, 1, 0]]


def test_a_verifier_that_fails_gives_no_reward():
    r, problems = fake_rollout(["2"], ["2"], [False]), [verify.Problem("1+1=", "two")]
    assert all(math.isnan(x.item()) for x in rollout.grade(r, problems, TOY))


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize(
    ("stage", "alpha", "offline"), [("stage1", 0, 0), ("stage2", 4.0, 0), ("stage2", 4.0, 0.5)]
)
@pytest.mark.parametrize("turn", [1, 2])
def test_problems_without_a_verdict_are_left_out_whole(
    monkeypatch, tmp_path, stage, alpha, offline, micro_batch, turn
):
    config = replace(CONFIG, offline=offline, micro_batch=micro_batch)
    run, seen = prepared(monkeypatch, tmp_path, config)
    real = score.grade

    def failing(r, problems, *more):
        rewards = real(r, problems, *more)
        rewards[turn - 1][4] = float("nan")
        return rewards

    monkeypatch.setattr(score, "grade", failing)
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    log = score.rl_step(run, runs.Phase("x", stage, 5, alpha=alpha))
    kept = [b for b in range(12) if b // 3 != 1]
    own = [b for b in kept if b >= 12 * offline]
    expected, kls = by_rows(run, seen, stage, alpha, kept)
    for weight, gradient in zip(run.policy.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-6, atol=1e-9)
    assert log["dropped"] == pytest.approx(0.25)
    assert log["acc_t1"] == pytest.approx(np.mean([REWARD1[b] for b in own]))
    assert log["acc_t2"] == pytest.approx(np.mean([REWARD2[b] for b in own]))
    assert log["kl1"] == pytest.approx(np.mean(kls[0]))
    assert log["kl2"] == pytest.approx(np.mean(kls[1]))


def test_a_batch_whose_own_attempts_got_no_verdict_stops_the_run(monkeypatch, tmp_path):
    run, _ = prepared(monkeypatch, tmp_path, replace(CONFIG, offline=0.5))
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0] + [float("nan")] * 6)
    monkeypatch.setattr(score, "grade", lambda r, problems, *_: [rewards, rewards])
    with pytest.raises(RuntimeError, match="no verdict"):
        score.rl_step(run, runs.Phase("x", "stage2", 5, alpha=1.0))


def test_a_batch_without_any_verdict_stops_the_run(monkeypatch, tmp_path):
    run, _ = prepared(monkeypatch, tmp_path)
    nothing = torch.full((12,), float("nan"))
    monkeypatch.setattr(score, "grade", lambda r, problems, *_: [nothing, nothing])
    with pytest.raises(RuntimeError, match="no verdict"):
        score.rl_step(run, runs.Phase("x", "stage1", 5))


def test_behaviour_is_measured_on_what_was_sampled(monkeypatch, tmp_path):
    """Five problems by hand: kept, repaired, spoiled, changed in vain, copied wrong."""
    firsts, seconds = ["2", "3", "02", "4", "5"], ["2", "2", "9", "77", "5"]
    asked = []

    def sample(model, c, problems, generator, temperature):
        asked.append((generator.initial_seed(), temperature))
        return fake_rollout(firsts, seconds, [False] * 5)

    monkeypatch.setattr(evaluation, "sample", sample)
    problem = verify.Problem("1+1=", "2")
    m = evaluation.evaluate(None, runs.Config(), [problem] * 5, 0.3)
    assert asked == [(0, 0.3)]
    assert (m["acc_t1"], m["acc_t2"], m["delta_i_to_c"], m["delta_c_to_i"]) == (0.4, 0.4, 0.2, 0.2)
    assert m["changed"] == pytest.approx(3 / 5)
    assert m["changed_if_wrong"] == pytest.approx(2 / 3)
    assert m["edit_ratio"] == pytest.approx((0 + 1 / 2 + 2 / 3 + 2 / 3 + 0) / 5)
    assert m["repair_rate"] == pytest.approx(1 / 3)
    assert m["repair_rate_interval"] == pytest.approx(evaluation.wilson(1, 3))
    assert m["spoil_rate_interval"] == pytest.approx(evaluation.wilson(1, 2))
    assert m["rows"][2] == (problem, "02", "9", True, False) and m["unjudged"] == 0


def test_problems_without_a_verdict_are_counted_and_not_measured(monkeypatch):
    r = fake_rollout(["2", "3", "3", "2"], ["2", "2", "3", "2"], [False] * 4)
    monkeypatch.setattr(evaluation, "sample", lambda *_: r)
    for turn in (0, 1):

        def one_fails(r, problems, format, turn=turn):
            rewards = rollout.grade(r, problems, format)
            rewards[turn][2] = float("nan")
            return rewards

        monkeypatch.setattr(evaluation, "grade", one_fails)
        m = evaluation.evaluate(None, runs.Config(), [verify.Problem("1+1=", "2")] * 4, 0.3)
        assert (m["n"], m["unjudged"]) == (3, 1)
    assert (m["n"], m["unjudged"], m["acc_t1"], m["acc_t2"]) == (3, 1, pytest.approx(2 / 3), 1.0)
    assert [row[1:] for row in m["rows"]] == [
        ("2", "2", True, True), ("3", "2", False, True), ("2", "2", True, True)
    ]  # fmt: skip
    assert m["changed"] == pytest.approx(1 / 3)


def test_edit_ratio_is_over_the_length_of_both():
    assert evaluation.edit_ratio("ab", "cd") == 0.5
    assert evaluation.edit_ratio("", "abc") == 1.0


def test_the_report_is_greedy_on_the_named_split_and_sampled_beside_it(monkeypatch, tmp_path):
    run = runs.create(runs.Config(**TINY), tmp_path / "run")
    score.finish_phase(run, runs.schedule(run.config)[0])
    asked = []

    def evaluate(model, c, problems, temperature):
        for problem in problems:
            a, b = problem.prompt.removesuffix("=").split("+")
            split = str(verify.split_of(np.array([int(a)]), np.array([int(b)]))[0])
            asked.append((split, temperature))
        return evaluation.metrics(np.array([True]), np.array([True])) | {
            "rows": [(p, "1", "1", True, True) for p in problems], "changed_if_wrong": None,
            "truncated_t1": 0.0, "unjudged": 0,
        }  # fmt: skip

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    for split in ("dev", "test"):
        asked.clear()
        evaluation.report(tmp_path / "run", split, 6)
        assert asked == [(split, 0)] * 6 + [(split, 1.0)] * 6
