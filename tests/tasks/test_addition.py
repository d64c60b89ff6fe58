"""The verifier is strict and total, no sum leaks into another split, and the second toy trains."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import score
import verify
from tasks import addition

NINES = "9" * 98


@pytest.mark.parametrize(
    ("status", "answers"),
    [
        ("right", ["999", "0999", "00000999", " 999\n"]),
        ("wrong", ["998", "-999", "9990", "0", NINES]),
        ("unparsed", [
            "", " \n", "-", "+999", "999.0", "9_99", "9,99", "9 99", "999=999", "999<|revise|>",
            "９９９", "٩٩٩", "\u00a0999", "999\0", "0x3e7", "999 or 998", "1e3", "00" + NINES,
            "9" * 10**6,
        ]),
    ],
)  # fmt: skip
def test_the_verdict_on_an_answer(status, answers):
    for answer in answers:
        verdict = addition.arithmetic(answer, "999")
        assert verdict[:2] == (int(status == "right"), status), answer
        assert (verdict.detail == "") == (status != "unparsed")


@pytest.mark.parametrize("gold", ["", "x", "1.5", "None", "٣"])
def test_an_unreadable_gold_is_our_error_and_never_a_reward(gold):
    for answer in (gold, "1", ""):
        assert addition.arithmetic(answer, gold)[:2] == (None, "error")


@given(st.text(), st.text(min_size=1).filter(lambda s: s.strip(" \t\r\n0123456789")))
def test_any_text_gets_a_verdict_and_added_text_never_earns(text, junk):
    assert addition.arithmetic(text, "-7").status in ("right", "wrong", "unparsed")
    assert addition.arithmetic("-7" + junk, "-7").reward == 0
    assert addition.arithmetic("-7", "-07").reward == 1


# --- problems -------------------------------------------------------------------------------------


def settings(**changes):
    return score.Config(task="addition", **addition.SETTINGS | changes)


def pair(prompt):
    a, b = prompt.removesuffix("=").split("+")
    return a, b


@pytest.mark.parametrize("size", range(1, 10))
def test_problems_are_distinct_fit_a_row_and_are_the_same_for_the_same_seed(size):
    task = addition.task(settings(size=size))
    problems, again = (task.draw(40, "train", np.random.default_rng(size)) for _ in range(2))
    assert problems == again and len({x.prompt for x in problems}) == 40
    for problem in problems:
        a, b = pair(problem.prompt)
        assert len(a) == len(b) == size and problem.gold == str(int(a) + int(b))
        answer = problem.gold.zfill(size + 1)
        assert verify.judge(problem, answer, truncated=False).reward == 1
        prompt, ids = task.encode(problem.prompt), task.encode(answer)
        assert task.decode(ids) == answer and len(ids) + 1 == task.max_new
        assert len(prompt) + 2 * task.max_new + 1 <= task.max_positions


def test_no_sum_leaks_into_another_split_whatever_the_order_of_its_operands():
    """Of nearly all 5,050 two-digit sums; the share of each split within 5 standard deviations."""
    seen = {}
    for split in ("train", "dev", "test"):
        pairs = addition.operands(100_000, split, np.random.default_rng(1), D=2).T.tolist()
        seen[split] = {(min(x), max(x)) for x in pairs}
    total = len(set.union(*seen.values()))
    assert total == sum(map(len, seen.values())) > 4900
    for split, share in (("train", 0.8), ("dev", 0.1), ("test", 0.1)):
        assert abs(len(seen[split]) / total - share) < 5 * (share * (1 - share) / total) ** 0.5


def test_columns_sum_to_9_half_of_the_time_and_are_uniform_otherwise():
    """Chi-squared of 40,000 columns over the 100 pairs of digits, 99 degrees of freedom: a right
    generator exceeds 180 with probability 1e-6, and the seed is fixed."""
    a, b = addition.operands(8000, "train", np.random.default_rng(0), D=5)
    count = np.zeros((10, 10))
    for power in 10 ** np.arange(5):
        np.add.at(count, (a // power % 10, b // power % 10), 1)
    expected = (np.full((10, 10), 0.5 / 100) + 0.05 * np.eye(10)[::-1]) * count.sum()
    assert ((count - expected) ** 2 / expected).sum() < 180


def test_what_is_impossible_is_said_by_name():
    for size in (0, 10):
        with pytest.raises(ValueError, match=f"--size must be 1 to 9 .* got {size}"):
            addition.task(settings(size=size))
    task = addition.task(settings(size=1))
    with pytest.raises(ValueError, match="'tset'"):
        task.draw(1, "tset", np.random.default_rng(0))
    some = addition.operands(5000, "dev", np.random.default_rng(0), D=1).T.tolist()
    n = len(set(map(tuple, some)))
    assert n == len(task.draw(n, "dev", np.random.default_rng(0)))
    with pytest.raises(ValueError, match=f"'dev' has {n} problems of 1 digits, not {n + 1}:"):
        task.draw(n + 1, "dev", np.random.default_rng(0))


# --- what the base reads --------------------------------------------------------------------------


@pytest.mark.parametrize(("slip", "slip_hard"), [(0.3, 0.7), (0.0, 0.0), (1.0, 0.0)])
def test_a_careless_sum_is_wrong_left_of_a_run_of_nines_alone(slip, slip_hard):
    """One digit after another, by hand: the right one, and the text of the columns before it."""
    a, b = addition.operands(300, "train", np.random.default_rng(1), D=6)
    found = addition.careless_sum(a, b, slip, slip_hard, np.random.default_rng(2), D=6)
    numbers = np.random.default_rng(2).random((7, 300))  # of each column, then of each problem
    for n, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        sums = [int(u) + int(v) for u, v in zip(f"{x:07d}", f"{y:07d}", strict=True)]
        nines = "".join("9" if total == 9 else " " for total in sums)
        for i, right in enumerate(f"{x + y:07d}"):
            behind = nines[i + 1 :] + " "
            run = len(behind) - len(behind.lstrip("9"))
            chance = 0 if run == 0 or nines[i] == "9" else slip if run == 1 else slip_hard
            if numbers[6 - i, n] < chance:  # a carry too many or too few
                carried = (int(right) - sums[i]) % 10
                right = str((sums[i] + 1 - carried) % 10)
            assert found[n, i] == int(right)


def corpus(n, **changes):
    """Return drafts, revisions and right answers, as texts of five digits."""
    shares = dict(slip=0.35, slip_hard=0.75, rights=0.25, careless=0.3) | changes
    rows = addition.corpus(n, np.random.default_rng(0), 4, **shares)
    return [(draft, revision, f"{sum(map(int, pair(x))):05d}") for x, draft, revision in rows]


def test_revisions_are_right_careless_or_copied_in_the_given_shares():
    """Of wrong drafts, so that the three kinds can be told apart; 5 standard deviations at most."""
    wrong = [row for row in corpus(20_000) if row[0] != row[2]]
    n = len(wrong)
    assert 4000 < n < 16_000
    copied, right = (sum(row[1] == row[i] for row in wrong) / n for i in (0, 2))
    for found, share in ((copied, 0.45), (right, 0.25 + 0.3 * 0.85**5)):
        assert abs(found - share) < 5 * (share * (1 - share) / n) ** 0.5
    for draft, revision, right in corpus(300, slip=0.0, slip_hard=0.0, rights=0.0, careless=0.0):
        assert draft == revision == right


def test_careless_digits_are_one_too_large_or_one_too_small():
    rows = corpus(5000, rights=0.0, careless=1.0)
    steps = [(int(x) - int(y)) % 10 for _, *row in rows for x, y in zip(*row, strict=True)]
    shares = [steps.count(step) / len(steps) for step in (0, 1, 9)]
    assert sum(shares) == pytest.approx(1)
    assert np.abs(np.array(shares) - [0.85, 0.075, 0.075]).max() < 5 * 0.5 / len(steps) ** 0.5


@pytest.mark.parametrize(("checks", "asked"), [(0.25, 20), (0.0, 0), (1.0, 80)])
def test_documents_that_ask_to_check_have_right_revisions_and_the_others_what_was_set(
    checks, asked
):
    """Here copies; all end, and are of training problems."""
    task = addition.task(settings(size=2, checks=checks, right_revisions=0.0))
    held_out = {x.prompt for x in task.draw(500, "test", np.random.default_rng(0))}
    prompts, attempts = task.documents(80, np.random.default_rng(0))
    revise, check = ([addition.TOKENS.index(f"<|{word}|>")] for word in ("revise", "check"))
    assert [x[-1:] == check for x in prompts] == [True] * asked + [False] * (80 - asked)
    assert task.instruction == revise
    for i, (prompt, draft, revision) in enumerate(zip(prompts, *attempts, strict=True)):
        if i < asked:
            assert revision == []
            prompt, draft, revision = prompt[:6], prompt[6:-1], draft
        text = task.decode(prompt)
        right = task.encode(f"{sum(map(int, pair(text))):03d}")
        assert text not in held_out and len(draft) == task.max_new and draft[-1] == task.end_id
        assert revision == ([*right, task.end_id] if i < asked else draft)


# --- a run ----------------------------------------------------------------------------------------


def test_the_commands_defaults_are_the_tasks():
    c = score.parse(["--task", "addition", "--sft-steps", "7"], score.Config)[1]
    assert c == settings(sft_steps=7) != settings()


def test_a_tiny_run_trains_both_stages(tmp_path):
    small = dict(sft_steps=3, stage1_steps=2, stage2_steps=2, d_model=8, d_ff=8, n_layer=1)
    c = settings(**small, control=0, sft_batch=8, batch=8)
    run = score.open_run(score.create(c, tmp_path / "run"))
    score.drive(run)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in log] == ["base"] * 3 + ["stage1"] * 2 + ["score"] * 2
    assert all(0 <= row["acc_t2"] <= 1 for row in log[3:])
