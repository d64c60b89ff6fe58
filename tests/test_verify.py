"""The verifier is strict and total; the splits are disjoint; the corpus is what it says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import verify


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("999", "right"), ("0999", "right"), ("00000999", "right"), (" 999\n", "right"),
        ("998", "wrong"), ("-999", "wrong"), ("9990", "wrong"), ("0", "wrong"),
        ("", "unparsed"), (" \n", "unparsed"), ("-", "unparsed"), ("+999", "unparsed"),
        ("999.0", "unparsed"), ("9_99", "unparsed"), ("9,99", "unparsed"), ("9 99", "unparsed"),
        ("999=999", "unparsed"), ("999<|revise|>", "unparsed"), ("９９９", "unparsed"),
        ("٩٩٩", "unparsed"), ("\u00a0999", "unparsed"), ("999\0", "unparsed"),
        ("0x3e7", "unparsed"), ("999 or 998", "unparsed"),
        ("9" * 10**6, "unparsed"), ("1e3", "unparsed"),
    ],
)  # fmt: skip
def test_status_and_reward(answer, status):
    verdict = verify.arithmetic(answer, "999")
    assert verdict.status == status
    assert verdict.reward == (1 if status == "right" else 0)
    assert (verdict.detail == "") == (status in ("right", "wrong"))


def test_truncated_answers_earn_nothing_and_say_so():
    assert verify.arithmetic("999", "999", truncated=True)[:2] == (0, "unparsed")
    assert "truncated" in verify.arithmetic("", "999", truncated=True).detail


@pytest.mark.parametrize("gold", ["", "x", "1.5", "None", "٣"])
def test_an_unreadable_gold_is_our_error_and_never_a_reward(gold):
    for answer in (gold, "1", ""):
        assert verify.arithmetic(answer, gold)[:2] == (None, "error")


@given(st.integers(-(10**40), 10**40), st.integers(-(10**40), 10**40))
def test_equal_integers_and_only_they_are_right(a, b):
    assert verify.arithmetic(str(a), str(a)).reward == 1
    assert verify.arithmetic(str(a), str(b)).reward == int(a == b)


@given(st.text(), st.text(min_size=1).filter(lambda s: s.strip(" \t\r\n0123456789")))
def test_any_text_gets_a_verdict_and_added_text_never_earns(text, junk):
    assert verify.arithmetic(text, "7").status in ("right", "wrong", "unparsed")
    assert verify.arithmetic("7" + junk, "7").reward == 0


def all_pairs(digits):
    values = np.arange(10**digits)
    return [x.ravel() for x in np.meshgrid(values, values)]


def test_splits_partition_all_problems_and_follow_their_shares():
    """All 10,000 two-digit problems; the share of each split within 5 standard deviations."""
    a, b = all_pairs(2)
    split = verify.split_of(a, b)
    for name, share in (("train", 0.8), ("dev", 0.1), ("test", 0.1)):
        unordered = 5050
        assert abs((split == name).mean() - share) < 5 * (share * (1 - share) / unordered) ** 0.5
    assert set(split) == {"train", "dev", "test"}


def test_a_problem_and_its_mirror_image_share_a_split_and_the_seed_matters():
    a, b = all_pairs(2)
    assert (verify.split_of(a, b) == verify.split_of(b, a)).all()
    moved = verify.split_of(a, b, split_seed=1) != verify.split_of(a, b, split_seed=0)
    assert 0.2 < moved.mean() < 0.5  # 0.34 expected of independent partitions
    assert set(verify.split_of(a, b, split_seed=2**31)) == {"train", "dev", "test"}


def test_training_and_evaluation_problems_are_disjoint():
    """At 2 digits four fifths of all problems are drawn, so an overlap could not hide."""
    drawn = {}
    for i, split in enumerate(("train", "dev", "test")):
        problems = verify.problems(20_000, split, np.random.default_rng(i), digits=2)
        drawn[split] = {tuple(sorted(p.prompt.rstrip("=").split("+"))) for p in problems}
    assert not drawn["train"] & drawn["test"]
    assert not drawn["train"] & drawn["dev"]
    assert not drawn["dev"] & drawn["test"]
    assert len(set.union(*drawn.values())) > 4000  # of 5,050 unordered pairs


def test_the_corpus_never_shows_an_evaluation_problem():
    documents = corpus(20_000, digits=2)
    for prompt, _, _ in documents:
        a, b = map(int, prompt.rstrip("=").split("+"))
        assert verify.split_of(np.array([a]), np.array([b]))[0] == "train"


@given(st.integers(1, 9), st.integers(0, 2**32))
def test_problems_are_well_formed_and_reproducible(digits, seed):
    first, again = (
        verify.problems(5, "train", np.random.default_rng(seed), digits) for _ in range(2)
    )
    assert first == again
    for prompt, gold, *_ in first:
        a, b = prompt.removesuffix("=").split("+")
        assert len(a) == len(b) == digits
        assert int(a) + int(b) == int(gold)


def test_carries_run_far():
    """A column sums to 9 with probability 0.5 + 0.5 / 10; 20,000 columns, 5 deviations."""
    problems = verify.problems(4000, "train", np.random.default_rng(0), digits=5)
    nines = [
        int(x) + int(y) == 9
        for prompt, *_ in problems
        for x, y in zip(*prompt.removesuffix("=").split("+"), strict=True)
    ]
    assert abs(np.mean(nines) - 0.55) < 5 * (0.55 * 0.45 / len(nines)) ** 0.5


def corpus(n, digits=4, **changes):
    shares = dict(forget=0.35, lose=0.75, right_revision=0.25, copy=0.45) | changes
    return verify.corpus(n, np.random.default_rng(0), digits, **shares)


def slips(prompt, draft):
    """Return (nines in a row, is its carry out wrong) of each column, by walking the digits."""
    a, b = prompt.removesuffix("=").split("+")
    found, row, written = [], 0, 0
    for i in range(1, len(a) + 1):
        x, y = int(a[-i]), int(b[-i])
        assert (x + y + written) % 10 == int(draft[-i])
        above = int(draft[-i - 1]) - (int(a[-i - 1]) + int(b[-i - 1]) if i < len(a) else 0)
        written = above % 10
        assert written in (0, 1)
        row = row + 1 if x + y == 9 else 0
        found.append((row, written != (int(a[-i:]) + int(b[-i:])) // 10**i))
    return found


def test_drafts_slip_only_where_a_column_sums_to_9_and_as_often_as_asked():
    columns = [c for p, d, _ in corpus(6000, forget=0.3, lose=0.6) for c in slips(p, d)]
    for rows, share in (((1,), 0.3), ((2,), 0.3), ((3,), 0.6), ((4,), 0.6)):
        wrong = [slipped for row, slipped in columns if row in rows]
        assert abs(np.mean(wrong) - share) < 5 * (share * (1 - share) / len(wrong)) ** 0.5
    assert not any(slipped for row, slipped in columns if row == 0)


def test_slips_of_one_draft_are_independent():
    pairs = []
    for prompt, draft, _ in corpus(20_000, digits=5, forget=0.3):
        single = [slipped for row, slipped in slips(prompt, draft) if row == 1]
        pairs += [all(single[:2])] * (len(single) >= 2)
    assert len(pairs) > 5000 and abs(np.mean(pairs) - 0.09) < 5 * (0.09 * 0.91 / len(pairs)) ** 0.5


def test_careless_digits_are_one_too_large_or_one_too_small():
    steps = [
        (int(r) - int(f"{gold(p):05d}"[i])) % 10
        for p, _, revision in corpus(5000, right_revision=0.0, copy=0.0)
        for i, r in enumerate(revision)
    ]
    shares = [steps.count(step) / len(steps) for step in (0, 1, 9)]
    assert sum(shares) == pytest.approx(1)
    assert np.abs(np.array(shares) - [0.85, 0.075, 0.075]).max() < 5 * 0.5 / len(steps) ** 0.5


def gold(prompt):
    return sum(map(int, prompt.removesuffix("=").split("+")))


def test_revisions_are_right_copied_or_careless_in_the_given_shares():
    """Drafts all wrong (or rightly summed by luck), so the three kinds can be told apart."""
    documents = [(p, d, r) for p, d, r in corpus(20_000) if int(d) != gold(p)]
    n = len(documents)
    copied = sum(d == r for _, d, r in documents) / n
    right = sum(int(r) == gold(p) for p, _, r in documents) / n
    careless_right = 0.3 * 0.85**5
    assert abs(copied - 0.45) < 0.02
    assert abs(right - 0.25 - careless_right) < 0.02


def test_extremes_of_the_corpus():
    assert all(int(d) == gold(p) for p, d, _ in corpus(500, forget=0.0, lose=0.0))
    assert all(d == r for _, d, r in corpus(500, right_revision=0.0, copy=1.0))
    assert all(int(r) == gold(p) for p, _, r in corpus(500, right_revision=1.0, copy=0.0))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((1, "train", 0), "digits"), ((1, "train", 10), "digits"), ((1, "valid", 3), "valid"),
    ],
)  # fmt: skip
def test_impossible_problems_are_refused_by_name(arguments, named):
    n, split, digits = arguments
    with pytest.raises(ValueError, match=named):
        verify.problems(n, split, np.random.default_rng(0), digits)
