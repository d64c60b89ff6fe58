"""The grammar is strict, its values are exact, no problem leaks, and the second toy trains."""

import ast
import functools
import itertools
import json
import math
import operator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import score
import verify
from tasks import countdown

BY_NODE = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
           ast.Div: operator.truediv}  # fmt: skip


def python_value(text):
    """Evaluate a *trusted* expression by Python's own grammar, in fractions."""

    def walk(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        return BY_NODE[type(node.op)](walk(node.left), walk(node.right))

    try:
        return walk(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        return math.nan


@functools.cache
def in_grammar(text):
    """Decide by the definition, read off as a recursive search over all ways to take it apart."""
    if text.isascii() and text.isdigit():
        return len(text) <= 4 and (text == "0" or text[0] != "0")
    if text[:1] == "(" and text[-1:] == ")" and in_grammar(text[1:-1]):
        return True
    return any(
        c in "+-*/" and in_grammar(text[:i]) and in_grammar(text[i + 1 :])
        for i, c in enumerate(text)
    )


def check_reading(text):
    try:
        numbers, value = countdown.evaluate(text)
    except ValueError:
        assert not in_grammar(text), text
        return
    assert in_grammar(text), text
    constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    assert sorted(numbers) == sorted(constants)
    assert str(value) == str(python_value(text)), text


def test_exactly_the_grammar_is_read_and_its_values_are_pythons():
    """All 37,449 texts of up to 5 of these characters."""
    for n in range(6):
        for text in itertools.product("02-*/() ", repeat=n):
            check_reading("".join(text))


OPERAND = st.integers(0, 30).map(str)
EXPRESSION = st.recursive(
    OPERAND | OPERAND.map("({})".format),
    lambda part: (
        st.builds("{}{}{}".format, part, st.sampled_from("+-*/"), part)
        | st.builds("({}{}{})".format, part, st.sampled_from("+-*/"), part)
    ),
    max_leaves=6,
)


@given(EXPRESSION | st.text("0123456789+-*/()", max_size=12) | st.text(max_size=12))
@example("8-6/2*3+1")
@example("8/(4/2)/5+0/0")
@example("10000")
@example("1+1\n")
def test_longer_texts_too(text):
    check_reading(text)


def test_what_is_too_long_is_refused_and_the_longest_is_exact():
    assert countdown.evaluate("9999*" * 19 + "9999")[1] == 9999**20
    assert countdown.evaluate("(" * 49 + "11" + ")" * 49) == ([11], 11)
    for text in ("1+" * 50 + "1", "(" * 10**6, "9" * 10**6):
        with pytest.raises(ValueError):
            countdown.evaluate(text)


@pytest.mark.parametrize(
    ("status", "answers"),
    [
        ("right", ["3+8+3-1", "8-1+3+3", "(3+8)+(3-1)", " 3+8+3-1\n"]),
        ("wrong", ["3+8+1-3", "8/(3-3)+1", "3*3+8/1", "5+8", "3+8+3-1+0", "3+3+8+3-1-3"]),
        (
            "unparsed",
            ["", " ", "3 8 3 1", "3+8+3-1=13", "+3+8+3-1", "3 + 8 + 3 - 1", "3+8+3-1<|end|>",
             "8(3-1)-3", "__import__('os').system('true')", "9**9**9**9", "1e9", "1_0", "٣+1",
             "３+1", "1//1", "∞", "\u00a03+8+3-1", "3+8+3-1\0"],
        ),
    ],
)  # fmt: skip
def test_the_verdict_on_an_answer(status, answers):
    for answer in answers:
        verdict = countdown.verdict(answer, "3+8+3-1")
        assert verdict[:2] == (int(status == "right"), status), answer


def every_expression(numbers):
    if len(numbers) == 1:
        return [str(numbers[0])]
    return [
        f"({a}{sign}{b})"
        for i in range(1, len(numbers))
        for a in every_expression(numbers[:i])
        for b in every_expression(numbers[i:])
        for sign in "+-*/"
    ]


def test_right_is_every_expression_of_these_numbers_with_this_value_and_no_other():
    texts = [t for order in itertools.permutations([4, 1, 6]) for t in every_expression(order)]
    for gold in ("4+1+6", "4/(1-6)", "6-4-1"):
        right = [text for text in texts if countdown.verdict(text, gold).reward]
        assert right == [text for text in texts if python_value(text) == python_value(gold)]


@pytest.mark.parametrize("gold", ["", "x", "3+", "3 8:11=", "3/(8-8)"])
def test_an_unreadable_gold_is_our_error_and_never_a_reward(gold):
    for answer in (gold, "3+8", ""):
        assert countdown.verdict(answer, gold)[:2] == (None, "error")


# --- problems and documents -----------------------------------------------------------------------


def settings(**changes):
    return score.Config(task="countdown", **countdown.SETTINGS | changes)


def read_prompt(text):
    numbers, target = text.removesuffix("=").split(":")
    return [int(x) for x in numbers.split(" ")], int(target)


@pytest.mark.parametrize("size", [2, 4, 6])
def test_problems_are_solvable_fit_a_row_and_are_the_same_for_the_same_seed(size):
    task = countdown.task(settings(size=size))
    problems, again = (task.draw(300, "train", np.random.default_rng(3)) for _ in range(2))
    assert problems == again != task.draw(300, "train", np.random.default_rng(4))
    for problem in problems:
        numbers, target = read_prompt(problem.prompt)
        assert len(numbers) == size and set(numbers) <= set(range(1, 10)) and target >= 0
        assert countdown.evaluate(problem.gold) == (numbers, target)
        assert verify.judge(problem, problem.gold, truncated=False).reward == 1
        prompt, gold = task.encode(problem.prompt), task.encode(problem.gold)
        assert len(gold) + 1 == task.max_new
        assert len(prompt) + 10 * task.max_new + 9 <= task.max_positions


def test_no_problem_leaks_into_another_split_whatever_the_order_of_its_numbers():
    task, seen = countdown.task(settings(size=3)), {}
    for split in ("train", "dev", "test"):
        drawn = task.draw(5000, split, np.random.default_rng(1))
        seen[split] = {(tuple(sorted(x)), t) for x, t in (read_prompt(p.prompt) for p in drawn)}
    total = len(set.union(*seen.values()))
    assert total == sum(map(len, seen.values())) > 450  # of 165 multisets with up to 4 targets
    for split, share in (("train", 0.8), ("dev", 0.1), ("test", 0.1)):
        assert abs(len(seen[split]) / total - share) < 5 * (share * (1 - share) / total) ** 0.5


def test_documents_are_of_training_problems_and_end():
    task = countdown.task(settings())
    held_out = {
        p.prompt for s in ("dev", "test") for p in task.draw(4000, s, np.random.default_rng(0))
    }
    rates = {}
    for clean in (True, False):
        prompts, attempts = task.documents(1000, np.random.default_rng(0), clean)
        assert not held_out & set(map(task.decode, prompts)) and len(attempts) == 2
        assert {ids[-1] for column in attempts for ids in column} == {task.end_id}
        rates[clean] = np.mean([
            is_right(task.decode(prompt), task.decode(revision[:-1]))
            for prompt, revision in zip(prompts, attempts[1], strict=True)
        ])  # fmt: skip
    assert rates[True] == 1 and 0.2 < rates[False] < 0.8


def corpus(n=4000, **shares):
    return countdown.corpus(n, "train", np.random.default_rng(0), 4, **shares)


def is_right(prompt, answer):
    return countdown.evaluate(answer) == read_prompt(prompt)


def signs(text):
    return [c for c in text if c in "+-"]


def test_right_revisions_are_right_and_turn_as_few_signs_as_can_be():
    repaired = 0
    for prompt, draft, revision in corpus(1000, slip=0.3, slip_hard=0.9, rights=1.0):
        numbers, _ = read_prompt(prompt)
        least = min(
            sum(x != y for x, y in zip(signs(draft), choice, strict=True))
            for choice in itertools.product("+-", repeat=3)
            if is_right(prompt, "{0}{4}{1}{5}{2}{6}{3}".format(*numbers, *choice))
        )
        turned = sum(x != y for x, y in zip(signs(draft), signs(revision), strict=True))
        assert is_right(prompt, revision) and turned == least
        repaired += not is_right(prompt, draft)
    assert repaired > 300


@pytest.mark.parametrize(("slip", "slip_hard"), [(0.0, 1.0), (0.2, 0.0), (0.15, 0.85)])
def test_signs_slip_where_and_as_often_as_asked(slip, slip_hard):
    """Against the slipless draft of the same problem, within 5 standard deviations."""
    counts = {True: [], False: []}
    for (prompt, clean, _), (same, draft, _) in zip(
        corpus(), corpus(slip=slip, slip_hard=slip_hard), strict=True
    ):
        assert prompt == same and is_right(prompt, clean)
        numbers, _ = read_prompt(prompt)
        for i, (x, y) in enumerate(zip(signs(clean), signs(draft), strict=True)):
            counts[x == "-" and numbers[i + 1] > numbers[i]].append(x != y)
    for hard, p in ((True, slip_hard), (False, slip)):
        n = len(counts[hard])
        assert n > 1000 and abs(np.mean(counts[hard]) - p) <= 5 * (p * (1 - p) / n) ** 0.5


def test_revisions_are_right_copied_or_careless_in_the_given_shares():
    """Of one seed, drafts and each kind of revision are the same whatever the shares; rows in which
    the three differ tell how often each was taken. A careless one turns signs with 0.15."""
    turned = dict(slip=1.0, slip_hard=1.0)
    right, copied, careless, mixed = (
        [revision for _, _, revision in corpus(**turned, **shares)]
        for shares in (dict(rights=1.0), dict(copies=1.0), {}, dict(rights=0.2, copies=0.3))
    )
    rows = [x for x in zip(right, copied, careless, mixed, strict=True) if len({*x[:3]}) == 3]
    for kind, share in enumerate((0.2, 0.3, 0.5)):
        found = np.mean([row[3] == row[kind] for row in rows])
        assert len(rows) > 500 and abs(found - share) < 5 * (share * (1 - share) / len(rows)) ** 0.5
    assert copied == [draft for _, draft, _ in corpus(**turned)]
    slips = [
        x != y
        for (_, first, _), revision in zip(corpus(), careless, strict=True)
        for x, y in zip(signs(first), signs(revision), strict=True)
    ]
    assert abs(np.mean(slips) - 0.15) < 5 * (0.15 * 0.85 / len(slips)) ** 0.5


# --- a run ----------------------------------------------------------------------------------------


def test_the_commands_defaults_are_the_tasks_and_what_is_impossible_is_said():
    c = score.parse(["--task", "countdown", "--sft-steps", "7"], score.Config)[1]
    assert c == settings(sft_steps=7) != settings()
    for size in (1, 7):
        with pytest.raises(ValueError, match=f"--size must be 2 to 6 .* got {size}"):
            countdown.task(settings(size=size))
    with pytest.raises(ValueError, match="'tset'"):
        countdown.task(settings()).draw(1, "tset", np.random.default_rng(0))


def test_a_tiny_run_trains_both_stages(tmp_path):
    small = dict(sft_steps=3, stage1_steps=2, stage2_steps=2, d_model=8, d_ff=8, n_layer=1)
    run = score.open_run(score.create(settings(**small, sft_batch=8, batch=8), tmp_path / "run"))
    score.drive(run)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in log] == ["base"] * 3 + ["stage1"] * 2 + ["score"] * 2
    assert all(0 <= row["acc_t2"] <= 1 for row in log[3:])
