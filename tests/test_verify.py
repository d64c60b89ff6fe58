"""The verifier is strict and total; the splits are disjoint; the corpus is what it says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import verify

NINES = "9" * 99


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("999", "right"), ("0999", "right"), ("00000999", "right"), (" 999\n", "right"),
        ("998", "wrong"), ("-999", "wrong"), ("9990", "wrong"), ("0", "wrong"), (NINES, "wrong"),
        ("", "unparsed"), (" \n", "unparsed"), ("-", "unparsed"), ("+999", "unparsed"),
        ("999.0", "unparsed"), ("9_99", "unparsed"), ("9,99", "unparsed"), ("9 99", "unparsed"),
        ("999=999", "unparsed"), ("999<|revise|>", "unparsed"), ("９９９", "unparsed"),
        ("٩٩٩", "unparsed"), ("\u00a0999", "unparsed"), ("999\0", "unparsed"),
        ("0x3e7", "unparsed"), ("999 or 998", "unparsed"), ("1e3", "unparsed"),
        ("00" + NINES, "unparsed"), ("9" * 10**6, "unparsed"),
    ],
)  # fmt: skip
def test_status_and_reward(answer, status):
    verdict = verify.arithmetic(answer, "999")
    assert verdict.status == status
    assert verdict.reward == (1 if status == "right" else 0)
    assert (verdict.detail == "") == (status in ("right", "wrong"))


@pytest.mark.parametrize("gold", ["", "x", "1.5", "None", "٣"])
def test_an_unreadable_gold_is_our_error_and_never_a_reward(gold):
    for answer in (gold, "1", ""):
        assert verify.arithmetic(answer, gold)[:2] == (None, "error")


@given(st.text(), st.text(min_size=1).filter(lambda s: s.strip(" \t\r\n0123456789")))
def test_any_text_gets_a_verdict_and_added_text_never_earns(text, junk):
    assert verify.arithmetic(text, "-7").status in ("right", "wrong", "unparsed")
    assert verify.arithmetic("-7" + junk, "-7").reward == 0
    assert verify.arithmetic("-7", "-07").reward == 1


@pytest.mark.parametrize(
    ("reward", "status", "cut"),
    [
        (1, "right", (0, "unparsed")), (0, "wrong", (0, "wrong")),
        (0, "timeout", (0, "timeout")), (None, "error", (None, "error")),
    ],
)  # fmt: skip
def test_the_problems_own_verifier_judges_and_a_cut_answer_is_never_paid(reward, status, cut):
    """Whatever the verifier says; one that fails is not turned into a wrong answer."""

    def verifier(answer, gold):
        assert (answer, gold) == ("an answer", "the gold one")
        return verify.Verdict(reward, status)

    problem = verify.Problem("a problem", "the gold one", verifier)
    assert verify.judge(problem, "an answer", truncated=False)[:2] == (reward, status)
    assert verify.judge(problem, "an answer", truncated=True)[:2] == cut
    assert verify.judge(verify.Problem("5+2=", "7"), "07", truncated=False).reward == 1


# --- problems -------------------------------------------------------------------------------------


def all_pairs(digits):
    values = np.arange(10**digits)
    return [x.ravel() for x in np.meshgrid(values, values)]


def test_splits_follow_their_shares_and_mirror_images_share_one():
    """All 10,000 two-digit problems; the share of each split within 5 standard deviations."""
    a, b = all_pairs(2)
    split = verify.split_of(a, b)
    for name, share in (("train", 0.8), ("dev", 0.1), ("test", 0.1)):
        unordered = 5050
        assert abs((split == name).mean() - share) < 5 * (share * (1 - share) / unordered) ** 0.5
    assert set(split) == {"train", "dev", "test"}
    assert (split == verify.split_of(b, a)).all()


def test_a_problem_stays_in_its_split():
    """Published numbers depend on it. Recorded, not derived."""
    split = verify.split_of(np.arange(36) * 27_182_818, np.arange(36) ** 2 * 31_415)
    assert (
        "".join({"train": "."}.get(x, x[0]) for x in split)
        == "t.t...d.....t.......d.......d......."
    )


def pair(prompt):
    a, b = prompt.removesuffix("=").split("+")
    return a, b


def split_of(prompts):
    a, b = zip(*map(pair, prompts), strict=True)
    return set(verify.split_of(np.array(a, dtype=int), np.array(b, dtype=int)))


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_drawn_problems_are_well_formed_of_their_split_and_reproducible(split):
    for digits in range(1, 10):
        drawn, again = (
            verify.problems(30, split, np.random.default_rng(digits), digits) for _ in range(2)
        )
        assert drawn == again and len(drawn) == 30
        assert split_of([x.prompt for x in drawn]) == {split}
        for prompt, gold, verifier in drawn:
            a, b = pair(prompt)
            assert len(a) == len(b) == digits and gold == str(int(a) + int(b))
            assert verifier is verify.arithmetic


def test_columns_sum_to_9_half_of_the_time_and_are_uniform_otherwise():
    """Chi-squared of 40,000 columns over the 100 pairs of digits, 99 degrees of freedom: a right
    generator exceeds 180 with probability 1e-6, and the seed is fixed."""
    a, b = verify.operands(8000, "train", np.random.default_rng(0), digits=5)
    count = np.zeros((10, 10))
    for power in 10 ** np.arange(5):
        np.add.at(count, (a // power % 10, b // power % 10), 1)
    expected = np.full((10, 10), 0.5 / 100) + 0.05 * np.eye(10)[::-1]
    expected *= count.sum()
    assert ((count - expected) ** 2 / expected).sum() < 180


@pytest.mark.parametrize(
    ("split", "digits", "named"),
    [("train", 0, "got 0"), ("train", 10, "got 10"), ("valid", 3, "'valid'")],
)
def test_impossible_problems_are_refused_by_name(split, digits, named):
    with pytest.raises(ValueError, match=named):
        verify.problems(1, split, np.random.default_rng(0), digits)


def test_a_split_without_problems_is_an_error_and_not_a_loop_without_end(monkeypatch):
    monkeypatch.setattr(verify, "split_of", lambda a, b: np.full(len(a), "train"))
    with pytest.raises(ValueError, match="only 0 of 3 problems of 2 digits in 'dev'"):
        verify.problems(3, "dev", np.random.default_rng(0), digits=2)


# --- what the base reads --------------------------------------------------------------------------


@pytest.mark.parametrize(("slip", "slip_hard"), [(0.3, 0.7), (0.0, 0.0), (1.0, 0.0)])
def test_a_careless_sum_is_that_of_a_walk_along_the_columns(slip, slip_hard):
    """One column after another from the right, by hand: the carry that is right, the carry that is
    written, and how many columns in a row have summed to 9."""
    rng = np.random.default_rng(1)
    a, b = verify.operands(300, "train", rng, digits=6)
    seed = int(rng.integers(10**9))
    found = verify.careless_sum(a, b, slip, slip_hard, np.random.default_rng(seed), digits=6)
    numbers = np.random.default_rng(seed).random((6, 300))  # of each column, then of each problem
    for n, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        wrote, row, text = 0, 0, ""
        for column in range(6):
            u, v = int(f"{x:06d}"[-1 - column]), int(f"{y:06d}"[-1 - column])
            text = str((u + v + wrote) % 10) + text
            below = 10 ** (column + 1)
            wrote = 1 if x % below + y % below >= below else 0
            row = row + 1 if u + v == 9 else 0
            if row and numbers[column, n] < (slip_hard if row >= 3 else slip):
                wrote = 1 - wrote
        assert "".join(map(str, found[n])) == str(wrote) + text
        assert slip or int(str(wrote) + text) == x + y


def corpus(n, digits=4, **changes):
    shares = dict(slip=0.35, slip_hard=0.75, rights=0.25, copies=0.45) | changes
    return verify.corpus(n, np.random.default_rng(0), digits, **shares)


def test_revisions_are_right_copied_or_careless_in_the_given_shares():
    """Of wrong drafts, so that the three kinds can be told apart; 5 standard deviations at most."""
    documents = corpus(20_000)
    assert split_of([prompt for prompt, _, _ in documents]) == {"train"}
    gold = [sum(map(int, pair(prompt))) for prompt, _, _ in documents]
    wrong = [(d, r, g) for (_, d, r), g in zip(documents, gold, strict=True) if int(d) != g]
    n = len(wrong)
    assert 0.2 < n / 20_000 < 0.8
    copied, right = sum(d == r for d, r, _ in wrong) / n, sum(int(r) == g for _, r, g in wrong) / n
    for found, share in ((copied, 0.45), (right, 0.25 + 0.3 * 0.85**5)):
        assert abs(found - share) < 5 * (share * (1 - share) / n) ** 0.5


def test_careless_digits_are_one_too_large_or_one_too_small():
    documents, steps = corpus(5000, rights=0.0, copies=0.0), []
    for prompt, _, revision in documents:
        right = f"{sum(map(int, pair(prompt))):05d}"
        steps += [(int(x) - int(y)) % 10 for x, y in zip(revision, right, strict=True)]
    shares = [steps.count(step) / len(steps) for step in (0, 1, 9)]
    assert sum(shares) == pytest.approx(1)
    assert np.abs(np.array(shares) - [0.85, 0.075, 0.075]).max() < 5 * 0.5 / len(steps) ** 0.5


def test_extremes_of_the_corpus():
    """Right drafts; nothing but copies; nothing but right revisions. All are padded with zeros."""
    for prompt, draft, revision in corpus(300, slip=0.0, slip_hard=0.0, rights=0.0, copies=1.0):
        assert draft == revision == f"{sum(map(int, pair(prompt))):05d}"
    for prompt, _, revision in corpus(300, rights=1.0, copies=0.0):
        assert revision == f"{sum(map(int, pair(prompt))):05d}"
