"""The verifier is strict and total; the splits are disjoint; the corpus is what it says."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import verify

GOLD = "+4-2+5-1"


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (GOLD, "right"), (f" {GOLD}\n", "right"), (f"\t{GOLD}\r\n", "right"),
        ("+4+2-5-1", "wrong"), ("-4+2-5+1", "wrong"), ("+4-2+5", "wrong"), (GOLD + "+1", "wrong"),
        ("+2-1+5", "wrong"), ("+3-1+5-1", "wrong"), ("-2+4+5-1", "wrong"), ("-1+5-2+4", "wrong"),
        ("+1" * 99, "wrong"), ("", "unparsed"), (" \n", "unparsed"), ("+", "unparsed"),
        ("4-2+5-1", "unparsed"), ("+42+5-1", "unparsed"), ("+4-2+51", "unparsed"),
        ("+4 -2+5-1", "unparsed"), ("+ 4-2+5-1", "unparsed"), ("+4-2\n+5-1", "unparsed"),
        ("+4-2+5-1=6", "unparsed"), ("=6", "unparsed"), ("6", "unparsed"), ("+4-2+5-", "unparsed"),
        ("++4-2+5-1", "unparsed"), ("+4--2+5-1", "unparsed"), ("+04-2+5-1", "unparsed"),
        ("+4-2+5-1+0", "unparsed"), ("+4-2+5-1-0", "unparsed"), ("+4-2+5-10", "unparsed"),
        ("+4-2+5-1.0", "unparsed"), ("+4,-2,+5,-1", "unparsed"), ("(+4-2+5-1)", "unparsed"),
        ("+4\u22122+5\u22121", "unparsed"), ("\uff0b4-2+5-1", "unparsed"),
        ("+\uff14-2+5-1", "unparsed"), ("+\u0664-2+5-1", "unparsed"),
        ("+4-2+5-\u00b9", "unparsed"), (f"\u00a0{GOLD}", "unparsed"), (f"{GOLD}\0", "unparsed"),
        (f"{GOLD}\x0b", "unparsed"), (f"{GOLD}<|revise|>", "unparsed"),
        (f"{GOLD}\n{GOLD}", "unparsed"), (f"{GOLD} or +4+2", "unparsed"),
        ("+1" * 100, "unparsed"), ("+1" * 10**6, "unparsed"),
    ],
)  # fmt: skip
def test_status_and_reward(answer, status):
    verdict = verify.signs(answer, GOLD)
    assert verdict.status == status
    assert verdict.reward == (1 if status == "right" else 0)
    assert 0 < len(verdict.detail) < 100 if status == "unparsed" else len(answer) < 200


@pytest.mark.parametrize("gold", ["", "x", "6", "4-2", "+4 -2", "+\u0664", "None"])
def test_an_unreadable_gold_is_our_error_and_never_a_reward(gold):
    for answer in (gold, "+1", ""):
        assert verify.signs(answer, gold)[:2] == (None, "error")


@given(st.text(), st.text(min_size=1).filter(lambda s: s.strip(" \t\r\n")))
def test_any_text_gets_a_verdict_and_added_text_never_earns(text, junk):
    assert verify.signs(text, "-7").status in ("right", "wrong", "unparsed")
    for more in ("-7" + junk, junk + "-7"):
        assert verify.signs(more, "-7").reward == 0


def test_the_right_attempts_at_a_problem_are_all_choices_of_signs_with_its_sum():
    """Every row of signed numbers to 3, up to four of them, held against every gold answer of the
    numbers 2, 1, 1, 2: summed and compared by hand."""
    numbers = (2, 1, 1, 2)
    rows = [row for n in range(1, 5) for row in itertools.product((-3, -2, -1, 1, 2, 3), repeat=n)]
    for gold in itertools.product(*((x, -x) for x in numbers)):
        rights = {row for row in itertools.product(*((x, -x) for x in numbers))
                  if sum(row) == sum(gold)}  # fmt: skip
        assert {row for row in rows if verify.signs(told(row), told(gold)).reward} == rights


def told(row):
    return "".join(f"{x:+}" for x in row)


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
    assert verify.judge(verify.Problem("1 2 1 =2", "+1+2-1"), "-1+2+1", False).reward == 1


# --- problems -------------------------------------------------------------------------------------


def read(prompt):
    """Return a problem's numbers and target."""
    *numbers, target = prompt.split(" ")
    assert target[0] == "=" and all(len(x) == 1 for x in numbers)
    return tuple(map(int, numbers)), int(target[1:])


def solutions(numbers, target):
    """Return all signed rows that begin with the first number added and hit the target: those with
    the first plus before the first minus, as a reader would try them."""
    rows = [numbers[:1]]
    for x in numbers[1:]:
        rows = [(*row, y) for row in rows for y in (x, -x)]
    return [row for row in rows if sum(row) == target]


def every_problem(M):
    """Return all problems of M numbers."""
    for numbers in itertools.product(range(1, verify.LARGEST + 1), repeat=M):
        for target in range(sum(numbers) + 1):
            if solutions(numbers, target):
                yield numbers, target


def drawn(n, split, M, seed=0):
    return verify.problems(n, split, np.random.default_rng(seed), M)


@pytest.mark.parametrize("M", [2, 3])
def test_the_splits_share_out_all_problems_and_each_order_of_numbers_is_in_the_same(M):
    """All that a split has can be drawn, none twice, and one more cannot. No two splits have a
    problem of the same numbers and target, in whatever order."""
    whole, keys, counts = list(every_problem(M)), {}, {}
    for split in ("train", "dev", "test"):
        with pytest.raises(ValueError, match=f"'{split}' has .* of {M} numbers, not") as error:
            drawn(len(whole), split, M)
        counts[split] = int(str(error.value).split()[2])
        found = [read(x.prompt) for x in drawn(counts[split], split, M)]
        assert len(set(found)) == counts[split] and set(found) <= set(whole)
        for numbers, target in found:
            keys.setdefault((*sorted(numbers), target), set()).add(split)
    assert sum(counts.values()) == len(whole) and all(len(x) == 1 for x in keys.values())


def test_splits_follow_their_shares():
    """Of 100,000 problems' numbers; each share within 5 standard deviations."""
    split = verify.split_of(np.arange(100_000) * 31_415)
    for name, share in (("train", 0.8), ("dev", 0.1), ("test", 0.1)):
        assert abs((split == name).mean() - share) < 5 * (share * (1 - share) / 100_000) ** 0.5
    assert set(split) == {"train", "dev", "test"}


@pytest.fixture
def to_four(monkeypatch):
    """Problems of the numbers 1 to 4, few enough to have them all."""
    monkeypatch.setattr(verify, "LARGEST", 4)


def test_a_problem_stays_in_its_split(to_four):
    """Published numbers depend on it. Recorded, not derived: of what identifies a problem, and of
    whole problems."""
    split = verify.split_of(np.arange(36) * 27_182_818)
    assert (
        "".join({"train": "."}.get(x, x[0]) for x in split)
        == "tt..........td.......t.....dd...t..."
    )
    assert sorted(x.prompt for x in drawn(4, "test", 2)) == ["2 1 =1", "2 4 =6", "4 2 =2", "4 2 =6"]


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_drawn_problems_are_well_formed_reproducible_and_solved_by_their_gold(split):
    """By the first solution, if plus is tried before minus from the left."""
    for M in range(3, 10):
        found = drawn(12, split, M, seed=M)
        assert found == drawn(12, split, M, seed=M) != drawn(12, split, M, seed=M + 1)
        assert len({x.prompt for x in found}) == 12
        for prompt, gold, verifier in found:
            numbers, target = read(prompt)
            assert len(numbers) == M and set(numbers) <= set(range(1, verify.LARGEST + 1))
            assert target >= 0
            assert gold == told(solutions(numbers, target)[0]) and verifier is verify.signs


def test_numbers_and_signs_are_uniform_but_for_the_target_that_is_not_negative(to_four):
    """Chi-squared of 8,000 draws over the problems of 3 numbers in "train", weighted by how many
    choices of signs give the target. Of a right generator it exceeds its degrees of freedom by more
    than 5 standard deviations with probability 1e-5; the seed is fixed."""
    x_NM, target_N, *_ = verify.draw(8000, "train", np.random.default_rng(0), M=3)
    mine = {read(x.prompt) for x in drawn(143, "train", 3)}
    weight = {x: len(solutions(*x)) for x in mine}
    count = dict.fromkeys(mine, 0)
    for numbers, target in zip(x_NM.tolist(), target_N.tolist(), strict=True):
        count[tuple(numbers), target] += 1
    each = 8000 / sum(weight.values())
    chi2 = sum((count[x] - each * weight[x]) ** 2 / (each * weight[x]) for x in mine)
    assert chi2 < 142 + 5 * (2 * 142) ** 0.5


@pytest.mark.parametrize(
    ("split", "M", "named"), [("train", 1, "got 1"), ("train", 10, "got 10"), ("valid", 3, "valid")]
)
def test_impossible_problems_are_refused_by_name(split, M, named):
    with pytest.raises(ValueError, match=named):
        drawn(1, split, M)


# --- what the base reads --------------------------------------------------------------------------


def corpus(n, M=4, **changes):
    """Return documents: problem, draft and revision, as numbers."""
    settings = dict(slip=0.2, slip_hard=0.7, rights=0.4, careless=0.3) | changes
    for prompt, *texts in verify.corpus(n, np.random.default_rng(0), M, **settings):
        numbers, target = read(prompt)
        draft, revision = (tuple(verify.signed(text)) for text in texts)
        assert tuple(map(abs, draft)) == tuple(map(abs, revision)) == numbers
        assert draft[0] == revision[0] == numbers[0]  # the first number is always added
        yield numbers, target, draft, revision


def turned(a, b):
    return sum(x != y for x, y in zip(a, b, strict=True))


def hasty(numbers, target, wrote):
    """Return the sign that a hasty draft gives the number after those that it wrote."""
    i, left = len(wrote), target - sum(wrote)
    if i < len(numbers) - 2:
        return 1 if left >= 0 else -1
    ends = itertools.product((1, -1), repeat=len(numbers) - i)  # a plus comes first
    return min(ends, key=lambda row: abs(left - np.dot(row, numbers[i:])))[0]


def test_drafts_and_revisions_are_those_of_a_walk_along_the_numbers():
    """One number after another, by hand, from the same random numbers: of a draft's slips, of a
    careless revision's and of the kind of revision."""
    rng, M = np.random.default_rng(0), 5
    verify.draw(400, "train", rng, M)
    slips = [None] + [rng.random(400) for _ in range(M - 1)]
    more, kinds = rng.random((400, M)), rng.random(400)
    seen = set()
    for n, (numbers, target, draft, revision) in enumerate(corpus(400, M)):
        wrote = [numbers[0]]
        for i in range(1, M):
            plan = hasty(numbers, target, wrote)
            hard = plan < 0 and numbers[i] > numbers[i - 1]
            slip = slips[i][n] < (0.7 if hard else 0.2)
            wrote.append(numbers[i] * plan * (-1 if slip else 1))
            seen.add((hard, slip))
        assert draft == tuple(wrote)
        nearest = min(solutions(numbers, target), key=lambda row: turned(row, draft))
        careless = [-x if i and more[n, i] < 0.15 else x for i, x in enumerate(draft)]
        kind = 0 if kinds[n] < 0.4 else 1 if kinds[n] < 0.7 else 2
        assert revision == (nearest, tuple(careless), draft)[kind]
    assert len(seen) == 4


def test_a_right_revision_turns_as_few_signs_as_can_be():
    for numbers, target, draft, revision in corpus(2000, rights=1.0, careless=0.0):
        fewest = min(turned(draft, row) for row in solutions(numbers, target))
        assert sum(revision) == target and turned(draft, revision) == fewest


def test_documents_are_of_the_training_split(to_four):
    mine = {read(x.prompt) for x in drawn(890, "train", 4)}
    assert {x[:2] for x in corpus(3000)} <= mine


def test_extremes_of_the_corpus():
    """Nothing but copies; nothing but careless revisions; drafts without a slip, with slips where
    it is hard alone, and everywhere."""
    copies = list(corpus(300, rights=0.0, careless=0.0))
    assert all(draft == revision for *_, draft, revision in copies)
    careless = list(corpus(2000, rights=0.0, careless=1.0))
    share = sum(turned(revision, draft) for *_, draft, revision in careless) / 6000
    assert abs(share - 0.15) < 5 * (0.15 * 0.85 / 6000) ** 0.5
    for slip, hard in ((0.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        for numbers, target, draft, _ in corpus(300, slip=slip, slip_hard=hard):
            for i in range(1, 4):
                plan = hasty(numbers, target, draft[:i])
                slips = slip or (hard and plan < 0 and numbers[i] > numbers[i - 1])
                assert (draft[i] != plan * numbers[i]) == bool(slips)
    right = [sum(draft) == target for _, target, draft, _ in corpus(4000, 5, slip=0, slip_hard=0)]
    assert abs(sum(right) / 4000 - 2 / 3) < 0.03  # "two in three", says README
