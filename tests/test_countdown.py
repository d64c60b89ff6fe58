"""The grammar is strict, its values are exact, no problem leaks, and the second toy trains."""

import ast
import itertools
import operator
import string
import subprocess
import sys
import types
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_run import options, refused
from test_score import TINY
from truth import ROOT

import chat
import countdown
import run as runs
import verify

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv}  # fmt: skip


def python_value(text):
    """Evaluate a *trusted* expression by Python's own grammar, in fractions."""

    def walk(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        return OPERATORS[type(node.op)](walk(node.left), walk(node.right))

    try:
        return walk(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        return None


def joined(parts):
    """Return an expression of two, sometimes in brackets."""
    left, sign, right, brackets = parts
    return f"({left}{sign}{right})" if brackets else f"{left}{sign}{right}"


NUMBERS = st.integers(0, 30).map(str)
EXPRESSIONS = st.recursive(
    NUMBERS | NUMBERS.map("({})".format),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner, st.booleans()).map(joined),
    max_leaves=8,
)


@given(EXPRESSIONS)
@example("1-2-3")
@example("8/4/2")
@example("8-6/2*3+1")
@example("((1-(2-3)))/0*0")
def test_values_are_those_of_pythons_own_grammar(text):
    numbers, value = countdown.evaluate(text)
    assert value == python_value(text)
    tree = ast.walk(ast.parse(text, mode="eval"))
    assert sorted(numbers) == sorted(x.value for x in tree if isinstance(x, ast.Constant))


def accepted(text):
    try:
        countdown.evaluate(text)
    except countdown.Malformed:
        return False
    return True


def in_grammar(text, depth=0):
    """Decide by the definition, read off as a recursive search over all ways to take it apart."""
    if text.isascii() and text.isdigit():
        return len(text) <= 4 and (text == "0" or text[0] != "0")
    if text[:1] == "(" and text[-1:] == ")" and in_grammar(text[1:-1]):
        return True
    return any(
        c in "+-*/" and in_grammar(text[:i]) and in_grammar(text[i + 1 :])
        for i, c in enumerate(text)
    )


SHORT = ["".join(x) for n in range(6) for x in itertools.product("01-*/() ", repeat=n)]


def test_exactly_the_grammar_is_accepted():
    """All 37,449 texts of up to 5 of these characters."""
    for text in SHORT:
        assert accepted(text) == in_grammar(text), text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0|[1-9][0-9]{0,3}", "[0-9]{1,4}"),
        ("[0-9]{0,3}", "[0-9]{0,4}"),
        ("NUMBER.fullmatch(token)", "NUMBER.match(token)"),
        ("len(text) > MAX_CHARS", "False"),
        ('"*": 2, "/": 2', '"*": 1, "/": 1'),
        (">= precedence", "> precedence"),
        ('elif operand_due and token == "("', 'elif token == "("'),
        ('not operand_due and token == ")"', 'token == ")"'),
        ("not operand_due and token in", "token in"),
        ('")" and "(" in waiting', '")"'),
        ('operand_due or "(" in waiting', "operand_due"),
        ('operand_due or "(" in waiting', '"(" in waiting'),
        (' or (operator == "/" and b == 0)', ""),
        ("a is None or b is None", "a is None"),
        ("a is None or b is None", "b is None"),
        ("numbers.append(int(token))", "pass"),
        (", re.DOTALL):", "):"),
    ],
)
def test_every_rule_of_the_grammar_matters(old, new):
    """Of the source without a rule, some short text shows the lack."""
    source = (ROOT / "countdown.py").read_text()
    assert source.count(old) == 1
    mutant = types.ModuleType("mutant")
    exec(compile(source.replace(old, new), "mutant", "exec"), mutant.__dict__)

    def outcome(module, text):
        try:
            return module.evaluate(text)
        except Exception as error:
            return type(error).__name__

    texts = ["10000", "1+" * 50 + "1", "1\n", "1/0-1", *SHORT]
    assert any(outcome(mutant, text) != outcome(countdown, text) for text in texts)


@given(st.text(string.digits + "+-*/()", max_size=14))
def test_longer_texts_of_its_characters_too(text):
    assert accepted(text) == in_grammar(text)


@given(st.text(max_size=30))
@example("__import__('os').system('true')")
@example("9**9**9**9")
@example("1e9")
@example("1_0+1")
@example("٣+1")
@example("３+1")
@example("²+1")
@example("1+1\0")
@example("1+1\n")
@example("1//1")
@example("-1+3")
@example("2(3)")
@example("3:8=")
@example("∞")
def test_hostile_texts_are_told_from_expressions(text):
    assert accepted(text) == in_grammar(text)
    assert verify.countdown(text, "1+1").status in ("right", "wrong", "unparsed")


@pytest.mark.parametrize(
    "text", ["(" * 10**6, "1+" * 10**6 + "1", "9" * 10**6, "(" * 49 + "1" + ")" * 49 + "-", "10000"]
)
def test_what_is_too_long_or_too_large_is_refused(text):
    assert not accepted(text)


def test_the_longest_products_and_the_deepest_brackets_are_exact():
    assert countdown.evaluate("9999*" * 19 + "9999")[1] == 9999**20
    assert countdown.evaluate("(" * 49 + "11" + ")" * 49) == ([11], 11)


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("3+8+3-1", "right"), ("8-1+3+3", "right"), ("(3+8)+(3-1)", "right"),
        (" 3+8+3-1\n", "right"), ("3*3+8/(1+1)", "wrong"), ("3*3+8/1", "wrong"),
        ("3*3*1+8", "wrong"), ("3/3+8+1", "wrong"), ("8+3+3/1", "wrong"),
        ("3+8+3+1", "wrong"), ("3+8+1-3", "wrong"), ("5+8", "wrong"), ("13", "wrong"),
        ("3+8+3", "wrong"), ("3+8+3-1+0", "wrong"), ("3+8+2", "wrong"), ("3+3+8+3-1-3", "wrong"),
        ("38-33+8", "wrong"), ("3+8+3-1*1", "wrong"), ("8/(3-3)+1", "wrong"),
        ("", "unparsed"), (" ", "unparsed"), ("3+8+3-1=13", "unparsed"), ("3 8 3 1", "unparsed"),
        ("3+8+3-", "unparsed"), ("+3+8+3-1", "unparsed"), ("3+8+3--1", "unparsed"),
        ("3 + 8 + 3 - 1", "unparsed"), ("3+8+3-01", "unparsed"), ("(3+8+3-1", "unparsed"),
        ("3+8)+3-1", "unparsed"), ("3+8+3-1<|end|>", "unparsed"), ("8(3-1)-3", "unparsed"),
    ],
)  # fmt: skip
def test_status_and_reward(answer, status):
    verdict = verify.countdown(answer, "3+8+3-1")
    assert verdict.status == status
    assert verdict.reward == (1 if status == "right" else 0)
    assert verdict == verify.judge(verify.Problem("3 8 3 1:13=", "3+8+3-1", "countdown"), answer)


def test_truncated_answers_earn_nothing_and_say_so():
    problem = verify.Problem("3 8:11=", "3+8", "countdown")
    assert verify.judge(problem, "3+8", truncated=True)[:2] == (0, "unparsed")
    assert "truncated" in verify.countdown("3+8", "3+8", truncated=True).detail


@pytest.mark.parametrize("gold", ["", "x", "3+", "3 8:11=", "3/(8-8)"])
def test_an_unreadable_gold_is_our_error_and_never_a_reward(gold):
    for answer in (gold, "3+8", ""):
        assert verify.countdown(answer, gold)[:2] == (None, "error")


def every_value(numbers):
    """Return all values that one expression of these numbers, each used once, can have."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    found = set()
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            rest = [x for i, x in enumerate(numbers) if i not in chosen]
            for a in every_value([numbers[i] for i in chosen]):
                for b in every_value(rest):
                    found |= {a + b, a - b, a * b} | ({a / b} if b else set())
    return found


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


def test_an_exhaustive_solver_agrees_on_what_can_be_reached():
    """Of 4, 1, 6 in all orders and brackets: every target of the solver's is accepted, no other."""
    texts = [t for order in itertools.permutations([4, 1, 6]) for t in every_expression(order)]
    reached = {}
    for text in texts:
        value = countdown.evaluate(text)[1]
        if value is not None:
            reached.setdefault(value, text)
    assert set(reached) == every_value([4, 1, 6])
    for target, gold in reached.items():
        right = [text for text in texts if verify.countdown(text, gold).reward]
        assert right == [text for text in texts if python_value(text) == target]


def read_prompt(text):
    numbers, target = text.removesuffix("=").split(":")
    return [int(x) for x in numbers.split(" ")], int(target)


@pytest.mark.parametrize(("M", "largest"), [(2, 99), (4, 9), (6, 3)])
def test_problems_are_what_they_say_and_solvable(M, largest):
    for prompt, gold in countdown.problems(300, "train", np.random.default_rng(0), M, largest):
        numbers, target = read_prompt(prompt)
        assert len(numbers) == M and 1 <= min(numbers) and max(numbers) <= largest
        assert countdown.evaluate(gold) == (numbers, target) and target >= 0
        most = countdown.lengths(M, largest)
        assert len(prompt) <= most[0] and len(gold) <= most[1]


def test_no_problem_leaks_into_another_split_whatever_the_order_of_its_numbers():
    seen = {}
    for split in ("train", "dev", "test"):
        drawn = countdown.problems(5000, split, np.random.default_rng(1), 3, 9)
        seen[split] = {(tuple(sorted(x)), t) for x, t in map(read_prompt, dict(drawn))}
    assert (
        not seen["train"] & seen["dev"] | seen["train"] & seen["test"] | seen["dev"] & seen["test"]
    )
    assert len(set.union(*seen.values())) > 500  # of 165 multisets with up to 4 targets: most


def test_the_shares_of_the_splits_and_that_their_seed_matters():
    """Within 5 standard deviations over all 5,700 problems of two numbers up to 19 and a target."""
    pairs = itertools.combinations_with_replacement(range(1, 20), 2)
    problems = [(list(pair), t) for pair in pairs for t in range(30)]
    of = [countdown.split_of(x, t) for x, t in problems]
    for name, share in (("train", 0.8), ("dev", 0.1), ("test", 0.1)):
        assert abs(of.count(name) / len(of) - share) < 5 * (share * (1 - share) / len(of)) ** 0.5
    moved = [countdown.split_of(x, t, 1) != name for (x, t), name in zip(problems, of, strict=True)]
    assert 0.28 < np.mean(moved) < 0.40  # 0.34 expected of independent partitions


def test_the_same_seed_draws_the_same():
    a, b = (countdown.problems(50, "dev", np.random.default_rng(3), 4, 9) for _ in range(2))
    assert a == b != countdown.problems(50, "dev", np.random.default_rng(4), 4, 9)


def corpus(n=4000, M=4, **changes):
    shares = dict(forget=0.0, lose=0.0, right_revision=0.0, copy=0.0) | changes
    return countdown.corpus(n, np.random.default_rng(0), M, 9, **shares)


def is_right(prompt, answer):
    numbers, target = read_prompt(prompt)
    return countdown.evaluate(answer) == (numbers, target)


def signs(text):
    return [c for c in text if c in "+-"]


def test_documents_are_of_training_problems_and_use_the_numbers_in_order():
    for prompt, draft, revision in corpus(1000, forget=0.3, lose=0.9, right_revision=0.3, copy=0.3):
        numbers, target = read_prompt(prompt)
        assert countdown.split_of(numbers, target) == "train"
        for text in (draft, revision):
            assert countdown.evaluate(text)[0] == numbers and len(signs(text)) == 3


def test_without_slips_drafts_are_right_and_copies_are_copies():
    assert all(is_right(prompt, draft) for prompt, draft, _ in corpus())
    assert all(a == b for _, a, b in corpus(forget=0.4, lose=0.8, copy=1.0))


def test_right_revisions_are_right_and_turn_as_few_signs_as_can_be():
    repaired = 0
    for prompt, draft, revision in corpus(1000, forget=0.3, lose=0.9, right_revision=1.0):
        numbers, target = read_prompt(prompt)
        least = min(
            sum(x != y for x, y in zip(signs(draft), choice, strict=True))
            for choice in itertools.product("+-", repeat=3)
            if is_right(prompt, countdown.expression(numbers, [c == "-" for c in choice]))
        )
        turned = sum(x != y for x, y in zip(signs(draft), signs(revision), strict=True))
        assert is_right(prompt, revision) and turned == least
        repaired += not is_right(prompt, draft)
    assert repaired > 300


@pytest.mark.parametrize(("forget", "lose"), [(0.0, 1.0), (0.2, 0.0), (0.15, 0.85)])
def test_signs_slip_where_and_as_often_as_asked(forget, lose):
    """Against the slipless draft of the same problem, within 5 standard deviations."""
    counts = {True: [0, 0], False: [0, 0]}
    slipping = corpus(forget=forget, lose=lose)
    for (prompt, clean, _), (same, draft, _) in zip(corpus(), slipping, strict=True):
        assert prompt == same
        numbers, _ = read_prompt(prompt)
        for i, (x, y) in enumerate(zip(signs(clean), signs(draft), strict=True)):
            hard = x == "-" and numbers[i + 1] > numbers[i]
            counts[hard][0] += x != y
            counts[hard][1] += 1
    for hard, p in ((True, lose), (False, forget)):
        slips, n = counts[hard]
        assert n > 1000 and abs(slips / n - p) <= 5 * (p * (1 - p) / n) ** 0.5


def test_what_is_neither_right_nor_a_copy_is_careless():
    """A careless revision turns each sign with probability 0.15."""
    rows = corpus(lose=1.0, forget=1.0)  # drafts with every sign turned: no revision starts there
    clean = corpus()
    turned = [
        x != y
        for (_, a, _), (_, _, b) in zip(clean, rows, strict=True)
        for x, y in zip(signs(a), signs(b), strict=True)
    ]
    assert abs(np.mean(turned) - 0.15) < 5 * (0.15 * 0.85 / len(turned)) ** 0.5


def test_its_encoding_is_one_token_a_character_and_the_additions_is_as_it_was():
    encoding = chat.encoding_of("countdown")
    text = "8 3:05=(8-3)*1/1+0"
    ids = chat.encode(encoding, text + chat.REVISE + chat.END)
    assert len(ids) == len(text) + 2 and encoding.decode(ids[:-2]) == text
    assert encoding.n_vocab == len(set("0123456789+-*/()=: ")) + 2
    assert chat.encoding_of("addition").n_vocab == 14
    assert runs.Config().model().vocab_size == 14 and runs.Config().model().max_positions == 116


def test_the_preset_is_a_default_that_the_command_line_overrides():
    preset = runs.PRESETS["countdown"]
    config, folder, _ = runs.parse(["--task", "countdown"])
    assert config == runs.Config(task="countdown", **preset)
    assert str(folder) == "runs/countdown-score-seed0"
    config, *_ = runs.parse(["--sft-steps", "7", "--task", "countdown"])
    assert config == runs.Config(task="countdown", **preset | dict(sft_steps=7))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "poetry"], ["--task", "poetry", "addition"]),
        (["--task", "countdown", "--numbers", "1"], ["--numbers", "1", "between 2 and 6"]),
        (["--task", "countdown", "--largest", "100"], ["--largest", "100", "between 1 and 99"]),
        (
            ["--task", "countdown", "--numbers", "2", "--largest", "1", "--split-seed", "1"],
            ["found only 0", "2 numbers up to 1", "'test'"],
        ),
        (["--task", "countdown", "--max-new", "7"], ["--max-new", "at least 8", "7"]),
    ],
)
def test_impossible_settings_are_one_line(tmp_path, capsys, words, message):
    refused(capsys, ["--run", str(tmp_path / "run"), *options(**TINY), *words], *message)
    assert not list(tmp_path.iterdir())


def test_a_tiny_run_from_the_command_line_and_its_base_taken_by_another(tmp_path):
    """It trains, and reports on held-out problems; a run of additions cannot take its base."""
    small = options(**TINY, task="countdown", numbers=3, largest=6)
    command = [sys.executable, str(ROOT / "score.py"), *small]
    folder = tmp_path / "run"
    done = subprocess.run([*command, "--run", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0 and "| SCoRe |" in done.stdout, done.stderr
    log = (folder / "log.jsonl").read_text().splitlines()
    assert len(log) == TINY["sft_steps"] + TINY["stage1_steps"] + TINY["stage2_steps"]
    config, _ = runs.read_about(folder)
    with pytest.raises(ValueError, match="--task countdown, not addition"):
        runs.create(runs.Config(**TINY), tmp_path / "other", folder)
    again = runs.create(config, tmp_path / "again", folder)
    base = runs.load(folder / "base.pt")["model"]
    assert all((again.policy.state_dict()[name] == base[name]).all() for name in base)
