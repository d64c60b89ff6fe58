"""Each method against its definition: phases, gradients, examples; and it goes on bit for bit."""

import copy
import json
import math
import runpy
import sys
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pytest
import torch

import model
import rollout
import score
import tasks.addition
import verify
from ports.tensors import k1_terms
from study import methods
from tests import truth
from tests.test_rollout import CHECK

TINY = dict(
    size=4, n_layer=1, d_model=8, d_ff=8, sft_steps=4, sft_batch=8, stage1_steps=3, stage2_steps=3,
    batch=8, group=2, warmup=1, eval_n=10, control=0,
)  # fmt: skip


def made(folder: Path, **changes) -> score.Run:
    return score.open_run(score.create(methods.Config(**TINY | changes), folder))


def trained(folder: Path, **changes) -> list[dict]:
    """Return the log of a tiny run."""
    score.drive(made(folder, **changes))
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict:
    return model.load(path)["model"]


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# --- the truth: gradients of enumerated objectives ------------------------------------------------

STAGES = dict(
    single_turn=methods.single_turn, leak=methods.mistaken, stage1=score.stage1,
    stage2=score.stage2,
)  # fmt: skip


class Oracle(truth.Oracle):
    """Knows slopes along three random directions: as sharp as one for each weight, and sooner."""

    @cached_property
    @torch.no_grad()
    def slopes(self) -> tuple[torch.Tensor, dict]:
        weights, found, h = list(self.policy.parameters()), {}, 2e-4
        start = torch.nn.utils.parameters_to_vector(weights)
        noise = torch.randn(3, len(start), generator=torch.Generator().manual_seed(0)).double()
        directions = noise / noise.norm(dim=1, keepdim=True)
        for direction in directions:
            j = {}
            for k in (-2, -1, 1, 2):
                torch.nn.utils.vector_to_parameters(start + k * h * direction, weights)
                j[k] = self.objectives()
            for s in j[1]:
                slope = (j[-2][s] - 8 * j[-1][s] + 8 * j[1][s] - j[2][s]) / (12 * h)
                found.setdefault(s, []).append(slope)
        torch.nn.utils.vector_to_parameters(start, weights)
        return directions, {s: torch.tensor(x, dtype=torch.float64) for s, x in found.items()}

    def error(self, stage, pay, terms) -> float:
        found = truth.expected_gradient(truth.load_program(), self, pay, terms)
        return truth.relative_error(self.slopes[0] @ found, self.slopes[1][stage])


@pytest.fixture(scope="module")
def oracle():
    return Oracle()


@pytest.mark.parametrize(
    ("stage", "terms"),
    [("single_turn", None), ("leak", None)]
    + [(stage, k1_terms) for stage in ("stage1", "stage2", "single_turn")],
)
def test_expected_gradients_are_those_of_the_enumerated_objectives(oracle, stage, terms):
    assert oracle.error(stage, STAGES[stage], terms) <= 1e-8


def test_the_value_of_a_sampled_kl_has_no_gradient_of_its_own(oracle):
    """Which is why `k1_terms` gives it another: differentiated as it is, it misses the truth."""

    def wrong(policy, base, r, temperature):
        logp_BS, _ = k1_terms(policy, base, r, temperature)
        return logp_BS, logp_BS - k1_terms(base, base, r, temperature)[0].detach()

    assert oracle.error("stage1", score.stage1, wrong) > 1e-3


# --- a step: row by row, from the definitions -----------------------------------------------------

REWARDS = [
    [1.0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 1],
    [1.0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0],
]
SHAPED = [r2 + 4.0 * (r2 - r1) for r1, r2 in zip(*REWARDS, strict=True)]
STEP = TINY | dict(batch=12, group=3, temperature=0.7, alpha=4.0, beta1=0.3, beta2=0.8)


def prepared(monkeypatch, folder, **changes):
    """Return a float64 run at its last phase, whose base, and whose policy after the phase before,
    differ from its policy; and what its step will have seen. Rewards are REWARDS."""
    run, seen = made(folder, **STEP | changes), {}
    run.policy.double(), run.base.double()
    for size, other in ((0.1, run.base), (0.2, copy.deepcopy(run.base))):
        with torch.no_grad():
            for i, weight in enumerate(other.parameters()):
                weight.add_(size * torch.cos(torch.arange(weight.numel()).view(weight.shape) + i))
    run.phase, run.rng = len(run.phases) - 1, np.random.default_rng(5)
    model.save(dict(model=other.state_dict()), folder / f"{run.phases[run.phase - 1].name}.pt")
    seen["before"] = other
    real = rollout.rollout

    def sampled(author, task, prompts, noise_KBN, temperature):
        seen.setdefault("authors", []).append((author, len(noise_KBN), temperature))
        return real(author, task, prompts, noise_KBN, temperature)

    def graded(r, problems, task):
        seen["problems"] = problems
        return torch.tensor(REWARDS).double()

    monkeypatch.setattr(methods, "grade", graded)
    monkeypatch.setattr(methods, "rollout", sampled)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, **__: torch.tensor(0.0))
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    return run, seen


def others(values, b, G=3):
    group = [values[i] for i in range(b // G * G, b // G * G + G) if i != b]
    return sum(group) / len(group)


def by_rows(run, r, reference, earned, held, offline=0):
    """Return the gradient of one step, token by token. earned: by attempt and row, None of an
    attempt that is not paid; held: the weight of each attempt's KL."""
    c, loss = run.config, 0.0
    policy = copy.deepcopy(run.policy)
    policy.zero_grad()
    for b, x in enumerate(zip(*r.attempts, strict=True)):
        ids = r.ids_BT[b : b + 1]
        p, q = (torch.log_softmax(m(ids)[0] / c.temperature, -1) for m in (policy, reference))
        start = c.size  # where the prompt has its target, and ends
        for turn, attempt in enumerate(x):
            steps = range(start, start + len(attempt))
            assert ids[0, start + 1 : start + 1 + len(attempt)].tolist() == attempt
            start += len(attempt) + 1
            if turn == 0 and b < offline:
                continue
            came = [p[s, ids[0, s + 1]] for s in steps]
            cost = [
                sum(math.e ** p[s, v] * (p[s, v] - q[s, v]) for v in range(CHECK + 1))
                for s in steps
            ]
            future = [sum(x.item() for x in cost[i + 1 :]) for i in range(len(cost))]
            pay = 0.0 if earned[turn] is None else earned[turn][b] - others(earned[turn], b)
            for x, now, later in zip(came, cost, future, strict=True):
                loss = loss + held[turn] * (now + x * later) - pay * x
    (loss / c.batch).backward()
    return [w.grad for w in policy.parameters()]


STEPS = {  # settings; attempts that are paid, and held; rows of the base
    "single turn": (dict(method="single_turn"), [REWARDS[0], None], [0.3, 0], 0),
    "all offline": (dict(offline=1.0), [None, SHAPED], [0, 0.3], 12),
    "half offline": (dict(offline=0.5), [REWARDS[0], SHAPED], [0.3, 0.3], 6),
    "without bonus": (dict(method="multi_turn"), REWARDS[:2], [0.3, 0.3], 0),
    "Stage II without bonus": (dict(method="no_bonus"), REWARDS[:2], [0.3, 0.3], 0),
    "leak": (
        dict(leak=1), [[a + 4 * (b - a) for a, b in zip(*REWARDS, strict=True)], SHAPED],
        [0.3, 0.3], 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_whole_step_takes_the_gradient_of_its_definition(monkeypatch, tmp_path, name):
    changes, earned, held, offline = STEPS[name]
    run, seen = prepared(monkeypatch, tmp_path / "run", **changes)

    def update(run, r, *given):
        seen["r"] = r
        return methods.rl_update(run, r, *given)

    run.phases[-1].step(run, update=update)
    expected = by_rows(run, seen["r"], run.base, earned, held, offline)
    for weight, gradient in zip(run.policy.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-6, atol=1e-9)
    authors = [(run.policy, len(earned))] if not offline else [(run.base, 1), (run.policy, 1)]
    assert [x[:2] for x in seen["authors"][: len(authors)]] == authors
    assert {x[2] for x in seen["authors"]} == {0.7}


def test_offline_attempts_are_context_and_all_others_are_as_ever(monkeypatch, tmp_path):
    """The base's attempts are those that it writes by itself; of none of its own, the rows and
    log-probabilities are those of the sampler."""
    run, _ = prepared(monkeypatch, tmp_path / "run")
    task, prompts = run.task, [run.task.encode(x) for x in ("1 2 1 =2", "3 4 4 =3", "4 4 4 =12")]
    noise = torch.tensor(np.random.default_rng(0).random((2, 6, task.max_new)))
    theirs, ours = (rollout.rollout(m, task, prompts, noise, 0.7) for m in (run.base, run.policy))
    assert theirs.attempts[0] != ours.attempts[0]
    r = methods.offline_rollout(run.policy, run.base, task, prompts, noise, 0.7, 0)
    assert r.attempts == ours.attempts and torch.equal(r.turn_BS, ours.turn_BS)
    torch.testing.assert_close(r.logp_BS, ours.logp_BS, rtol=0, atol=1e-12)
    r = methods.offline_rollout(run.policy, run.base, task, prompts, noise, 0.7, 2)
    assert r.attempts[0] == theirs.attempts[0][:4] + ours.attempts[0][4:]
    assert (r.turn_BS == 1).any(dim=1).tolist() == [False] * 4 + [True] * 2
    assert (r.turn_BS == 2).sum(dim=1).tolist() == list(map(len, r.attempts[1]))
    assert not r.logp_BS[r.turn_BS == 0].any() and r.attempts[1][4:] == ours.attempts[1][4:]


# --- imitation ------------------------------------------------------------------------------------


def numbered(n):
    """Return rows whose attempts are two digits that name row and turn: 01, 02, 11, 12, .."""
    attempts = [[[b, k, 12] for b in range(n)] for k in (1, 2)]
    return rollout.make_rows([[1, 10, 1, 11]] * n, attempts, [13], "cpu")


def chosen(rows, mask_BS):
    """Return {row: the digits that are imitated in it}."""
    ids_BS = rows.ids_BT[:, 1:]
    return {
        b: tuple(ids_BS[b][mask_BS[b]].tolist()[:2]) for b in range(len(ids_BS)) if mask_BS[b].any()
    }


def test_star_imitates_rows_that_went_from_wrong_to_right():
    reward_KB = torch.tensor([[0.0, 0, 1, 1], [1, 0, 1, 0]])
    for plus, expected in ((False, {0: (0, 2)}), (True, {0: (0, 2), 2: (2, 2)})):
        rows, mask_BS = methods.star_examples(None, numbered(4), None, reward_KB, plus)
        assert chosen(rows, mask_BS) == expected and int(mask_BS.sum()) == 3 * len(expected)


def test_pair_sft_draws_among_all_right_answers_to_the_same_problem(tmp_path):
    """Rows 0-2 are one problem with right answers 11 and 22, rows 3-5 one with 41, rows 6-8 one
    without any."""
    run = made(tmp_path / "run", batch=9, group=3)
    run.rng, problems = np.random.default_rng(0), [verify.Problem("1 1 =2", "+1+1")] * 9
    reward_KB = torch.tensor([[0.0, 1, 0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0]])
    seen = {}
    for _ in range(200):
        rows, mask_BS = methods.pair_examples(run, numbered(9), problems, reward_KB, False)
        assert rows.attempts[0] == numbered(9).attempts[0]
        for b, digits in chosen(rows, mask_BS).items():
            seen.setdefault(b, []).append(digits)
    assert {b: set(found) for b, found in seen.items()} == {
        0: {(1, 1), (2, 2)}, 2: {(1, 1), (2, 2)}, 3: {(4, 1)}, 5: {(4, 1)}
    }  # fmt: skip
    assert all(len(found) == 200 for found in seen.values())
    assert 70 < seen[0].count((1, 1)) < 130
    plus = methods.pair_examples(run, numbered(9), problems, reward_KB, True)
    assert list(chosen(*plus)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("method", ["star_stage2", "pair_sft"])
def test_imitation_learns_second_attempts_of_its_author(monkeypatch, tmp_path, method):
    """STaR's author is the policy as the phase before left it, Pair-SFT's the base. The gradient is
    that of the mean negative log-likelihood of the imitated tokens, given all before them."""
    run, seen = prepared(monkeypatch, tmp_path / "run", method=method)
    real, learned = score.sft_update, []
    log = run.phases[-1].step(run, update=lambda *x: learned.append(x[1:3]) or real(*x))
    ((author, _, temperature),), ((rows, mask_BS),) = seen["authors"], learned
    expected = run.base if method == "pair_sft" else seen["before"]
    assert same(author.state_dict(), expected.state_dict()) and temperature == 0.7
    examples = {b: rows.attempts[1][b] for b in chosen(rows, mask_BS)}
    assert {1, 6, 10} <= set(examples) and (method == "pair_sft" or len(examples) == 3 + 3)
    policy, loss, tokens = copy.deepcopy(run.policy), 0.0, 0
    policy.zero_grad()
    for b, second in examples.items():
        context = run.task.encode(seen["problems"][b].prompt) + rows.attempts[0][b]
        context += run.task.instruction
        logp = torch.log_softmax(policy(torch.tensor([context + second]))[0] / 0.7, -1)
        loss = loss - sum(logp[len(context) - 1 + i, x] for i, x in enumerate(second))
        tokens += len(second)
    (loss / tokens).backward()
    assert log["examples"] == pytest.approx(len(examples) / 12) and "reward" not in log
    for weight, mine in zip(run.policy.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, mine.grad, rtol=1e-6, atol=1e-9)


def test_nothing_to_imitate_changes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(methods, "grade", lambda r, problems, task: torch.zeros(2, len(problems)))
    for method in ("star_plus", "pair_sft_plus"):
        rows = trained(tmp_path / method, method=method)
        assert all(row["examples"] == 0 == row["loss"] for row in rows if row["phase"] == method)
        assert same(
            weights(tmp_path / method / "base.pt"), weights(tmp_path / method / f"{method}.pt")
        )


def test_star_samples_from_what_its_last_iteration_has_become(tmp_path):
    authors, policies = [], []

    def collect(run, author):
        authors.append(copy.deepcopy(author.state_dict()))
        policies.append(copy.deepcopy(run.policy.state_dict()))
        return *methods.collect(run, author)[:2], torch.tensor([[0.0] * 8, [1.0] * 8])

    run = made(tmp_path / "run", method="star", stage1_steps=4)  # 7 steps: from 0, 2 and 4
    run.phases[1:] = [x._replace(step=partial(x.step, collect=collect)) for x in run.phases[1:]]
    score.drive(run)
    for i, start in enumerate([0, 0, 2, 2, 4, 4, 4]):
        assert same(authors[i], policies[start])
    assert not same(policies[0], policies[2]) and not same(policies[2], policies[4])


# --- the base, the schedule, runs -----------------------------------------------------------------


def plan(**changes):
    c = methods.Config(**dict(stage1_steps=7, stage2_steps=5) | changes)
    base, *rest = methods.schedule(c)
    assert base[:2] + base[3:] == ("base", c.sft_steps, c.sft_lr, 0, 100)
    total, left = sum(x.steps for x in rest), sum(x.steps for x in rest)
    for x in rest:  # the rate falls to just 0 over the steps of all
        assert (x.lr, x.warmup) == (pytest.approx(c.lr * left / total), c.warmup)
        left -= x.steps
        assert x.final == pytest.approx(c.lr * left / total, rel=1e-9, abs=0)
    return [(x.name, x.steps) for x in rest]


def test_the_phases_of_every_method_and_their_equal_budget():
    special = dict(
        base=[], **{x: [("stage1", 7), (x, 5)] for x in ("score", "no_bonus", "star_stage2")}
    )
    for x in ("star", "star_plus"):
        special[x] = [(f"{x}-1", 4), (f"{x}-2", 4), (x, 4)]
    special["star_stage2"][1:] = [("star_stage2-1", 1), ("star_stage2-2", 2), ("star_stage2", 2)]
    for method in methods.METHODS:
        assert plan(method=method) == special.get(method, [(method, 12)])


def test_the_default_is_score_pys_own_run_and_another_runs_base_is_as_good_as_ones_own(tmp_path):
    log = trained(tmp_path / "study")
    folder = score.create(score.Config(**TINY), tmp_path / "core")
    score.drive(score.open_run(folder))
    core = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert core == [{key: row[key] for key in row.keys() - {*methods.KEYS}} for row in log]
    later = trained(tmp_path / "part", base=str(folder), control=1, eval_n=7)
    assert later[0] == dict(phase="base", step=1) and later[1:] == log[4:]
    for name in ("base", "score"):
        assert same(weights(folder / f"{name}.pt"), weights(tmp_path / f"part/{name}.pt"))
    for change in (dict(seed=1), dict(careless=0.5), dict(slip=0.3)):
        with pytest.raises(ValueError, match=f"other settings: {list(change)[0]}$"):
            made(tmp_path / "other", base=str(folder), **change)
    (folder / "base.pt").unlink()
    with pytest.raises(ValueError, match="no checkpoint"):
        made(tmp_path / "other", base=str(folder))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [(dict(method="magic"), "--method .* 'magic'"), (dict(leak=2), "--leak"),
     (dict(iterations=0), "--iterations")],
)  # fmt: skip
def test_impossible_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        methods.Config(**change)


CHANGED = dict(alpha=3.0, beta1=0.5, beta2=3.0, control=1, iterations=2, leak=1, offline=0.5)


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_method_uses_just_the_settings_that_are_said_of_it(monkeypatch, tmp_path, method):
    """Each of these changes what is logged, and all others together change nothing. A command is
    refused the others, one by one."""
    rewards = torch.tensor([[0.0, 1, 0, 0, 1, 0, 0, 0], [1.0, 0] * 4])
    monkeypatch.setattr(methods, "grade", lambda *_: rewards)
    usual, used = trained(tmp_path / "usual", method=method), methods.METHODS[method].split()
    assert {*used} < {*methods.SOME} == {*CHANGED}
    for name in used:
        assert trained(tmp_path / name, method=method, **{name: CHANGED[name]}) != usual, name
    others = {name: x for name, x in CHANGED.items() if name not in used}
    assert trained(tmp_path / "others", method=method, **others) == usual
    methods.Asked(method=method, **{name: CHANGED[name] for name in used})
    for name, x in (others | dict(control=0)).items():
        with pytest.raises(ValueError, match=f"{method} of .* does not use --{name}, got {x}$"):
            methods.Asked(method=method, **{name: x})


def test_the_command_refuses_what_its_method_does_not_use_and_a_task_has_its_own_defaults(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(tasks.addition, "SETTINGS", dict(alpha=3.0))
    given = ["x", "--run", str(tmp_path / "run"), "--method", "multi_turn", "--task", "addition"]
    assert score.parse(given[1:], methods.Asked)[1].alpha == 3
    monkeypatch.setattr(sys, "argv", [*given, "--alpha", "10"])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(methods.__file__, run_name="__main__")
    error = "score.py: error: multi_turn of 100 + 30 steps does not use --alpha, got 10.0"
    assert capsys.readouterr().err.splitlines() == [error] and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="score of 0 . 30 steps does not use --beta2, got 3.0"):
        methods.Asked(stage1_steps=0, beta2=3.0)
    score.parse(["--stage1-steps=0", "--beta2=3"], methods.Config)  # a study's, of many methods


RESUMED = {
    "star": dict(method="star", lr=0.01), "pair_sft_plus": dict(method="pair_sft_plus"),
    "star_stage2": dict(method="star_stage2"),
    "all else": dict(offline=0.5, leak=1, stage1_steps=6, stage2_steps=6),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_dies_at_any_step_goes_on_bit_for_bit(tmp_path, monkeypatch, name):
    """Killed after every third step, where it is saved after every second."""
    monkeypatch.setattr(score, "BLOCK", 2)
    rewards = torch.tensor([[0.0] * 8, [1.0, 0.0] * 4])
    monkeypatch.setattr(methods, "grade", lambda *_: rewards)
    trained(tmp_path / "whole", **RESUMED[name])
    made(tmp_path / "run", **RESUMED[name])
    for _ in range(50):
        run, taken = score.open_run(tmp_path / "run"), []

        def dying(run, step, taken=taken):
            taken.append(0)
            if len(taken) > 3:
                raise ZeroDivisionError
            return step(run)

        run.phases = [
            x._replace(step=lambda run, x=x, dying=dying: dying(run, x.step)) for x in run.phases
        ]
        try:
            score.drive(run)
            break
        except ZeroDivisionError:
            pass
    else:
        raise AssertionError("it comes to no end")
    for path in (tmp_path / "whole").iterdir():
        other = tmp_path / "run" / path.name
        if path.suffix == ".pt":
            assert flat(model.load(path)) == flat(model.load(other)), path.name
        else:
            assert path.read_text() == other.read_text()


def flat(x):
    if isinstance(x, torch.Tensor):
        return x.tolist()
    if isinstance(x, dict):
        return {key: flat(value) for key, value in x.items()}
    return [flat(value) for value in x] if isinstance(x, (list, tuple)) else x
