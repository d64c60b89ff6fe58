r"""Is the verifier of mathematics right, and can it be fooled, hung or made to run something?

Outside checks (pairs of public graders' own tests, GSM8K) are read from ../shared where it is; the
rest needs nothing. Expressions are checked against values that are computed beside them, never by
the parser that is tested.
"""

import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import types
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import algebra, answers, latex

ROOT = Path(__file__).parents[2]
PAIRS = ROOT.parent / "shared" / "checks" / "math_pairs.jsonl"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
SQRT6 = r"\sqrt2\sqrt3", r"\sqrt6"  # equal, and only sympy knows


def judge(answer, gold, timeout=2.0):
    return answers.judge(answer, gold, timeout)


def reward(answer, gold):
    return judge(answer, gold)[0]


def worker():
    return algebra.worker(os.getpid())


# --- outside checks -------------------------------------------------------------------------------


@pytest.mark.skipif(not PAIRS.exists(), reason="../shared/checks is not here")
def test_pairs_of_public_graders():
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    accepted = {r["id"]: reward(r["answer"], r["gold"]) == 1 for r in rows}
    assert not [r["id"] for r in rows if accepted[r["id"]] and not r["equal"]]
    # 32 rows are prose without a box; those that end with no closing words are refused by contract
    assert sum(accepted[r["id"]] == r["equal"] for r in rows) >= 274 and len(rows) == 287
    inside = [r for r in rows if r["kind"] == "pair" or r["boxed"]]
    right = [accepted[r["id"]] == r["equal"] for r in inside]
    assert len(inside) == 255 and sum(right) / len(right) >= 0.98
    assert all((reward(r["gold"], r["answer"]) == 1) == accepted[r["id"]] for r in rows)


@pytest.mark.skipif(not GSM8K.exists(), reason="../shared/data is not here")
def test_gsm8k_golds():
    text = "".join((GSM8K / f"{name}.jsonl").read_text() for name in ("train", "test"))
    rows = [json.loads(line) for line in text.splitlines()]
    golds = [row["answer"].split("#### ")[1].replace(",", "") for row in rows]
    assert len(golds) == 8792
    for gold in golds:
        assert reward(gold, gold) == 1
        assert reward(f"So she pays \\$5 a day.\n\\boxed{{{gold}}} it is.", gold) == 1
        assert reward(f"So she pays \\$5 a day. The answer is {gold}.", gold) == 1
    for row, gold in zip(rows[7473:], golds[7473:], strict=True):  # the test split's 1,319
        assert reward(row["answer"], gold) == 1, "a solution as written, with #### n at its end"
        assert reward(row["answer"], str(Fraction(gold) + 1)) == 0
    values = sorted(set(golds), key=Fraction)
    for a, b in [*zip(values, values[1:], strict=False), *zip(values, values[7:], strict=False)]:
        assert reward(a, b) == (Fraction(a) == Fraction(b)), (a, b)


# 300 answers as MATH has them, no two of which say the same (by the policies of `answers`)
ANSWERS = [
    *map(str, range(-9, 81)),
    *(rf"\frac{{{p}}}{{{q}}}" for p in (1, 5, 7, 11, 13) for q in (2, 3, 4, 6, 9, 17)),
    *(rf"-\frac{{{p}}}{{8}}" for p in (1, 3, 5, 7)),
    *(rf"{k}\sqrt{{{n}}}" for k, n in itertools.product((2, 3, 4, 5), (2, 3, 5, 6, 7, 10))),
    *(rf"{k}+\sqrt{{{n}}}" for k, n in itertools.product((1, 2), (2, 3, 5, 7))),
    *(rf"\frac{{{k}\pi}}{{{n}}}" for k, n in itertools.product((1, 5), (2, 3, 4, 6, 12))),
    *(rf"{k}\pi" for k in range(1, 8)),
    *(rf"({x},{y})" for x, y in itertools.product((0, 1, 2, -3), (4, 5, 0))),
    *(rf"[{x},{y})" for x, y in itertools.product((0, 1, -3), (4, 5))),
    *(rf"({x},{y}]" for x, y in itertools.product((0, 1, -3), (4, 5))),
    *(rf"[{x},{y}]" for x, y in itertools.product((0, 1, -3), (4, 5))),
    *(rf"(-\infty,{x})\cup({y},\infty)" for x, y in itertools.product((-2, 0, 1), (3, 5))),
    *(rf"x^2+{k}x{c}" for k, c in itertools.product((2, 3, 4), ("+1", "-1", ""))),
    *(rf"({k}x+1)(x-2)" for k in (2, 3, 5)), *(rf"y = {k}x + {c}" for k in (2, 3) for c in (1, 4)),
    *(rf"{n}^{{{m}}}" for n, m in itertools.product((3, 7), (40, 50, 2023))),
    *(rf"{k} \pm \sqrt{{{n}}}" for k, n in itertools.product((1, 4), (11, 13))),
    *(rf"\{{{a},{b}\}}" for a, b in ((1, 2), (1, 3), (2, 3))), "1,2,3", "1,2,4", "2,4,6,8",
    *(rf"\binom{{{n}}}{{{k}}}" for n, k in ((20, 9), (21, 9), (22, 10))),
    *(rf"{k}+{m}i" for k, m in itertools.product((1, 2), (3, 4, 5))), "3i", "-3i",
    *(rf"{k}\%" for k in (250, 9900, 12.5)), *(rf"\text{{{w}}}" for w in ("Evelyn", "even", "odd")),
    r"\text{east}", "A", "B", "C", "x", "y", "xy", "x+y", "2x+y", "x-y", r"\frac{x}{y}", "x^y",
    r"e^{2}", r"e^{-2}", r"\ln 2", r"\ln 3", r"\log_2 3", r"\sin x", r"\cos x", r"\tan x",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}",
    r"\begin{pmatrix}1\\3\end{pmatrix}", r"\begin{pmatrix}1&3\end{pmatrix}", "x<3", r"x\le 3",
    "x>3", "3<x<5", "3:5", "3:6", "12:00", "(1,2,3)", "(1,3,2)", "(0,0,0)", r"\sqrt[3]{2}",
    r"\sqrt[3]{4}", "0.1", "0.123", "1.57", "3.1416", "0.333", r"10^{-7}", "999999",
    "1000001", "1011_2", "1011_5",
]  # fmt: skip


def test_no_two_of_300_answers_are_equal():
    assert len(ANSWERS) >= 300 and len(set(ANSWERS)) == len(ANSWERS)
    for answer in ANSWERS:
        assert judge(f"It is $\\boxed{{{answer}}}$.", answer)[1] == "right", answer
    for a, b in random.Random(0).sample(list(itertools.permutations(ANSWERS, 2)), 3000):
        assert reward(a, b) == 0, (a, b)


# --- what an answer says --------------------------------------------------------------------------


def expressions():
    """Return a strategy of (LaTeX, exact value or None): the value is computed on the way."""

    def joined(pair):
        (a, x), (b, y), form = pair
        if form == "frac":
            return rf"\frac{{{a}}}{{{b}}}", None if x is None or not y else x / y
        if form == "power":
            return rf"\left({a}\right)^{{3}}", None if x is None else x**3
        text = f"({a}){form}({b})"
        if x is None or y is None or (form == "/" and y == 0):
            return text, None
        return text, {"+": x + y, "-": x - y, "/": x / y if y else None}.get(form, x * y)

    literals = st.one_of(
        st.integers(-999, 999).map(lambda n: (str(n), Fraction(n))),
        st.decimals(-50, 50, places=2).map(lambda d: (str(d), Fraction(d))),
        st.integers(1, 9).map(lambda n: (rf"{n}\frac{n}{{12}}", n + Fraction(n, 12))),
        st.integers(1, 30).map(lambda n: (rf"\sqrt{{{n * n}}}", Fraction(n))),
        st.integers(1, 10**25).map(lambda n: (rf"\sqrt[5]{{{n**5}/32}}", Fraction(n, 2))),
    )
    forms = st.sampled_from(["+", "-", "*", r"\cdot", r" \times ", "", "/", "frac", "power"])
    return st.recursive(literals, lambda x: st.tuples(x, x, forms).map(joined), max_leaves=6)


@settings(max_examples=300)
@given(expressions(), st.fractions(max_denominator=7))
def test_exact_value_of_what_was_written(expression, other):
    text, value = expression
    if value is None:  # divides by zero somewhere
        assert reward(text, "1") == 0
        return
    gold = str(value)  # Python's own p/q
    assert reward(text, gold) == reward(gold, text) == 1
    assert reward(text, str(other)) == (other == value)
    assert reward(f"x = {text} = {gold}", gold) == reward(f"{gold} = {text}", gold) == 1
    assert reward(f"{text} = {other}", str(other)) == (other == value), "a false equation is paid"


SAME = [
    (r"50\%", "50"), (r"50\%", "0.5"), ("0.333333333333", "1/3"), ("3.14159265358979", r"\pi"),
    (r"0.\overline{3}", "1/3"), ("2/4", "1/2"), (r"2\frac12", "5/2"), ("2 1/2", "2.5"),
    ("1,234", "1234"), ("1 234", "1234"), (r"1\,234", "1234"), ("(1,234)", "(1, 234)"),
    ("10,100,1000", "10, 100, 1000"), ("1,234, 5,678", "1234, 5678"), ("2e-3", "-3+2e"),
    ("1.5e-3", "0.0015"), ("1e3", "1000"), ("½", "0.5"), ("√16", "4"), ("2π", r"2\pi"),
    (r"5\text{ cm}", "5"), (r"45^\circ", "45"), (r"45^{\circ}", "45°"), ("30^°", "30"),
    (r"\$5", "5"), (r"-\$5", "-5"), (r"5\sqrt{3}\text{ cm}", r"5\sqrt3"),
    (r"100\pi\text{ in}^2", r"100\pi\text{ square inches}"), (r"\text{2 hours}", "2"),
    ("60 mph", r"60\text{ miles per hour}"), (r"\angle ABC = 30^\circ", "30"),
    (r"11\text{ apples}", "11"), (r"\text{3 boxes}", "3"), ("11 apples", r"11\text{ apples}"),
    ("x=5", "5"), ("5=x", "5"), ("f(x)=2x", "2x"), (r"x\in[0,1]", "[0,1]"), ("x=1,x=2", "1,2"),
    ("x=1,y=2", "y=2,x=1"), ("(x,y)=(1,2)", "(1,2)"), ("f(2)=5", "5"), ("f_1(2)=5", "5"),
    (r"f^{-1}(x)=2x", "2x"), ("p(x)=x^2+1", "x^2+1"), ("|AB|=5", "5"), (r"\frac{AB}{CD}=5", "5"),
    ("2x+4y=6", "x+2y-3=0"), ("x>2", "2<x"), ("-x<-2", "x>2"), ("2+2=4", "4"),
    ("x=1/3=0.33", "0.33"), (r"1/3\approx0.33", "1/3"), (r"x=1/3\approx0.33", "1/3"),
    (r"x\approx11", "11"), ("1,2", "2,1"), (r"\{1,2\}", "2,1"), ("1,1,2", "1,2"),
    (r"1\pm2", "-1,3"), ("p=5,q=2 and p=7,q=3", "p=7,q=3;p=5,q=2"), (r"x=1 \lor x=2", "1,2"),
    (r"\text{6 and 8}", "6,8"), (r"\langle 1,234\rangle", "(1,234)"), ("$1$, $2$ and $3$", "1,2,3"),
    (r"\text{Even}", "even"), (r"\text{E}", "E"), ("Evelyn", r"\text{Evelyn}"),
    (r"\text{(C)}", "C"), (r"\text{Yes}", "yes"), (r"\text{No}", "no"), (r"\mathbb{R}", "R"),
    ("i^2", "-1"), (r"e^{i\pi}", "-1"), (r"\ln e^2", "2"), (r"\log 2+\log 3", r"\log 6"),
    (r"\log_2 8", "3"), ("12_3", "12"), (r"\sin^2x+\cos^2x", "1"), (r"(x+1)^2", "x^2+2x+1"),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"), (r"\sqrt{5+2\sqrt6}", r"\sqrt2+\sqrt3"),
    (r"\frac12\frac13", "1/6"), (r"\sin^{-1}\frac12", r"\frac{\pi}{6}"), (r"\sin 30^\circ", "0.5"),
    (r"\sin x^2 \cos x", r"\cos x\sin x^2"), (r"\sqrt[3]{-8}", "-2"), ("ab", "ba"), ("5!", "120"),
    (r"\sqrt{-4}", "2i"), (r"\binom{5}{2}", "10"), (r"|-3|", "3"), (r"17 \bmod 5", "2"),
    ("x'+1", "1+x'"), (r"3\frac{x}12", "6x"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{bmatrix}1&2\end{bmatrix}"),
    (r"\begin{array}{c|c}1&2\\3&4\end{array}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\sqrt{25}=5", "5"), (r"\sqrt2=1.41", "1.41"), (r"45^\circ=\frac{\pi}{4}", r"\pi/4"),
    (r"\frac{\pi}{4}=45^\circ", "45"), (r"2\cdot3=6\text{ cm}", "6"), ("1 h = 60 min", "60"),
    ("1011_2 = 11", "11"), (r"\frac12=50\%", r"50\%"), ("6:10=3:5", "3:5"), ("f(2)=4=4", "4"),
    (r"\log 100=2", "2"), (r"x=\pm\sqrt4=\pm2", "2,-2"), ("(1,2)=(1,4/2)", "(1,2)"),
]  # fmt: skip
DIFFERENT = [
    (r"50\%", r"5000\%"), ("10, 0.1, 20, 0.2", r"10\%, 20\%"), ("1, 2, 0.01", r"1\%, 2"),
    (r"50\%", r"50\text{ cm}"), ("0.33", "1/3"), ("0.333333333334", "1/3"),
    ("0.33333333333", "1/3"), ("3.14159265358978", r"\pi"), ("1.23456789012e12", "1234567890123"),
    ("0.333333333333", "0.3333333333333"), (r"2\frac32", "7/2"), ("1,23", "123"), ("0,123", "123"),
    ("(1,234)", "1234"), ("1, 234", "1234"), ("10,100,1000", "10100, 1000"), ("1,2,345", "1, 2345"),
    ("x_1,234", "x_{1234}"), ("2e-3", "0.002"), ("$2$ $1/2$", "5/2"), (r"\sqrt16", "4"),
    (r"\sqrt16", "6"), (r"\sqrt2\frac12", r"\sqrt{5/2}"), (r"\frac1 2 3/4", "4/11"),
    (r"3\frac{x}12", "3x/12"), (r"\frac12\frac13", r"\frac37"), ("5 cm", r"5\text{ inches}"),
    (r"5\text{ cm}^2", r"5\text{ cm}"), (r"5\text{ cm}^4", "5"),
    (r"2\cdot3\text{ cm}", r"6\text{ m}"), (r"45^\circ", r"\frac{\pi}{4}"), ("5 million", "5"),
    (r"5\text{ millions}", "5"), (r"5\text{ fifths}", "5"), (r"5\text{ minus}", "5"),
    (r"5\text{ less}", "5"), (r"11\text{ apples}", r"11\text{ oranges}"),
    (r"\$5", r"5\text{ cents}"), ("€5", "£5"), ("2x+4y-3=0", "0"), ("x=1,y=2", "2,1"),
    ("x=1,x=2", "y=1,y=2"), ("(y,x)=(1,2)", "(1,2)"), ("xy=1", "1"), ("|x|=5", "5"),
    ("b/a=1/2", "1/2"), ("x=z", "x=y=z"), ("f(2)", "2f"), (r"f^{-1}(2)", r"\frac{2}{f}"),
    (r"f^{-1}(2)", "f(2)"), ("f_1(2)", "f_2(2)"), ("-x=5", "5"), ("1/x=5", "5"), ("x^2=5", "5"),
    (r"\ln x=5", "5"), ("x+y=5", "5"), ("P(-1)=5", "5"), ("A B^2=5", "5"), ("[x]=5", "5"),
    ("2x+4y=6", "x+2y-4=0"), ("-x<-2", "x<2"), ("x<2", r"x\le2"), ("5=5", "4=4"), ("3<5", "4<6"),
    ("x>0", "-x>0"), (r"x\in[0,1]", r"y\in[0,1]"), (r"x\in A", r"A\in x"),
    ("(1,2)", "1,2"), ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"), ("(0,1)", "0<x<1"), (r"1\pm2", "3"), ("a,b", "(a,b)"),
    ("p=5,q=2 and p=7,q=3", "p=5,q=3;p=7,q=2"), (r"a\land b", "a,b"),
    (r"\langle 1,234\rangle", "1234"), ("E", "e"), ("Evelyn", "Carla"), ("x - y", "X - Y"),
    ("AB", "BA"), ("ABC", "CBA"), ("Tom", "moT"), ("abc", "ABC"),
    (r"\text{June 20}", r"\text{June 21}"),
    (r"\log 100", "2"), ("12_3", "5"), ("12_3", "11_4"), ("12_3", "12_4"), ("13_3", "13"),
    ("11", "1011_2"), ("10^{5000}", "1011_2"), ("1A_{16}", "A_{16}"), (r"\sqrt{x^2}", "x"),
    ("3!!", "720"), (r"\csc^{-1}x", r"\sin x"), (r"\frac5{x-x}", r"\frac7{x-x}"), ("0^0", "1"),
    ("2^3^2", "64"), ("12:00", "1:00"), ("x'", "x"), ("4'", "7"), ("24abcd", "24"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    ("5=6", "6"), ("5=6", "5"), ("x=5=6", "6"), ("5=x=6", "6"), ("AB=5=6", "6"),
    ("f(2)=5=6", "6"), ("1=2=1", "1"), ("5=6~6.1", "6"), ("7, 5=6", "7,6"), ("5.6=6", "6"),
    (r"\sqrt{25}=6", "6"), (r"\sqrt2=1.42", "1.42"), ("1/3=0.34", "0.34"), ("0.33=1/3", "1/3"),
    ("23/50=1/2", "1/2"), (r"2\cdot4=6\text{ cm}", "6"), ("5 cm = 6 cm", "6"), (r"5=6\%", r"6\%"),
    (r"5\%=6\%", r"6\%"), (r"\pm5=\pm6", r"\pm6"), ("(1,2)=(3,4)", "(3,4)"),
    ("x=1,x=5=6", "1,6"), (r"\{1,2\}=\{1,3\}", "1,3"),
]  # fmt: skip


def test_policies():
    assert not [(a, b) for a, b in SAME if reward(a, b) != 1 or reward(b, a) != 1]
    # the other way round the gold answer may be one that cannot be read
    assert not [(a, b) for a, b in DIFFERENT if reward(a, b) != 0 or reward(b, a) == 1]


COMPLETIONS = [
    (r"first \boxed{4}" + "\n" + r"no: \boxed{5}", "right"), (r"\boxed{5}, so \boxed{5}", "right"),
    (r"\boxed{ \boxed{5} }", "right"), ("The sum is $5$.", "right"), ("It is $5$ cm", "right"),
    (r"either \boxed{4} or \boxed{5}", "unparsed"), (r"\boxed{5", "unparsed"),
    (r"\boxed{}", "unparsed"), (r"\boxed{5)}", "unparsed"), (r"\boxed 6, \boxed{5}", "unparsed"),
    (r"\boxed{\text{ }}", "unparsed"), ("", "unparsed"),
    ("the answer is 5", "unparsed"), ("minus $5$", "unparsed"), ("It is not $5$", "unparsed"),
    ("The answer is negative $5$.", "unparsed"), ("The square root of $5$", "unparsed"),
    ("It is at least $5$", "unparsed"), ("It is false that $5$", "unparsed"),
    ("It is $5$ million", "unparsed"), ("It is $5$ squared", "unparsed"),
    ("so $x+y=4$ it is $5$", "unparsed"), ("6 is $5$", "unparsed"), ("$5$ or six", "unparsed"),
    (r"\boxed{4 \text{ or } \boxed{5}}", "unparsed"), (r"\boxed{5}\boxed 6", "unparsed"),
    ("\\boxed{5}" * 21, "unparsed"), (r"\boxed{5\text{ (or 6)}}", "unparsed"),
    (r"\boxed{" + "9" * 999 + "!}", "unparsed"), ("$4$ and $5$", "wrong"),
    (r"\boxed{5 \text{ or } 6}", "wrong"), (r"\boxed{5 \text{ or } n+1}", "wrong"),
    (r"\boxed{1,2,3,4,5}", "wrong"), (r"\boxed{(-\infty,\infty)}", "wrong"),
    (r"\boxed{x}", "wrong"),
]  # fmt: skip


CLOSINGS = [  # each says that it is 42, as an evaluation prompt wants it said
    "The answer is 42", "The answer is 42.", "The answer is: 42", "The answer is $42$.",
    "The answer is $$42$$", "The answer is **42**.", "**The answer is 42.**", "The answer is $42.",
    r"The answer is \$42.", r"The answer is \(42\).", "The answer is x = 42.", "Answer: 42",
    "ANSWER: 42", "Answer: $42$", "**Answer:** 42", "**Answer**: 42", "### Answer\n42",
    "Final answer: 42", "Final Answer:\n42", "**Final Answer**\n\n42", "Final Answer:\n$$\n42\n$$",
    "The final answer is 42", "The final answer is $42$. I hope it is correct.",
    "Final Answer: The final answer is $42$. I hope it is correct.",
    "Final Answer: The volume of $ABC$ is 42. I hope it is correct.", "So the answer is 42.",
    "Therefore, the answer is 42.", "Therefore, the answer (arabic numerals) is 42.", "#### 42",
    "Hence the final answer is 42.", "Thus, the answer is 42.", "The correct answer is 42.",
    "The answer is 42 cm.", "The answer is 42 apples.",
    "The answer is 42, because geometry says so.",
    "She has 2*21=<<2*21=42>>42 of them.\n#### 42", "#### 42 ", "First 6*7.\n42", "It is 6.\n$42$",
    "I tried 41, not 42. Is it 43? So the answer is 42.", "Not 41.\n\nThe answer is 42.\n",
    "so $x+y = 1000$ therefore the answer is $42$", "Let $x=4$ and $y=5$.\nThe answer is 42",
    "The answer is 42.\n#### 42", "x " * 3000 + "\nThe answer is 42",
]  # fmt: skip
NOT_CLOSINGS = [  # and none of these says 42, or not for sure
    # two answers
    "The answer is 41 or 42.", "The answer is 42 or 41.", "The answer is 42 and 41.",
    "The answer is 42, 41.", "The answer is 42 (or 41).", "The answer is either 42 or 41.",
    "The answer is 41. The answer is 42.", "Answer: 41\nAnswer: 42", "#### 41\n#### 42",
    "#### 41 42", "#### 41, 42", "The answer is 41.\n#### 42", "Final answer: 41; 42",
    "Answer: 42/41",
    "The answer is $41$ or $42$.", "A. The answer is 41\nB. The answer is 42",
    "1. The answer is 41.\n2. The answer is 42.", "The answer is 41.\n42", "41.\n42",
    "I think the answer is 41.\n42", "It is untrue that\nThe answer is 42", "Even if\nAnswer: 42",
    "The answer is $42 or $41.",
    # a denial
    "The answer is not 42.", "The answer is not $42$.", "The answer isn't 42.",
    "The answer is no 42",
    "The answer is never 42.", "The answer is anything but 42.", "The answer is 42 is false.",
    "The answer is 42, not.", "It is not the case that the answer is 42.",
    "Not so: the answer is 42.",
    "It is wrong that\nthe answer is 42", "Never say:\nThe answer is 42", "The wrong answer is 42.",
    "The answer is other than 42.", "Final Answer: The opposite is 42.", "It is not this one.\n42",
    "The answer is 42 because I was wrong.", "Final Answer: The half of x is 42.",
    # a question
    "Is the answer 42?", "The answer is 42?", "Answer: 42?", "#### 42?",
    "So the answer is 42, right?",
    "The answer is 42. Or is it?", "The answer is ?\n42", "The answer is 42 ??",
    # a quotation
    'Bob says: "The answer is 42."', '"The answer is 42."', "“The answer is 42”",
    "'The answer is 42'",
    "> The answer is 42", "Bob says the answer is 42.", "Bob says:\nThe answer is 42",
    '"I know it.\nThe answer is 42"', "`The answer is 42`", "```\nThe answer is 42\n```",
    "Write 'Answer: 42' at the end.", "The answer is said to be 42.", "The answer is “42”.",
    # a retraction, or more text
    "The answer is 42. No, it is 41.", "The answer is 42. Wait.",
    "The answer is 42\nThat is wrong.",
    "#### 42\nNo.", "The answer is 42. I hope it is not correct.", "Answer: 42 - no",
    "Answer: 42\n41",
    "The answer is 42. I hope it is correct. It is 41.", "The answer is 42.\n\nQ: What is 6*8?",
    "Final answer: 42 (wrong)", "The answer is 42, I mean 41", "The answer was 42.",
    # a range, or about so many
    "The answer is 42 to 43.", "The answer is 41-42.", "The answer is 41–42.", "The answer is ~42.",
    "The answer is between 41 and 42.", "The answer is at least 42.", "The answer is about 42.",
    "The answer is > 42.", "The answer is \\le 42.", "The answer is 42+.",
    "The answer is roughly $42$.",
    r"The answer is $\approx 42$ or so.", "The answer is [42, 43].", "The answer is 42 or more.",
    "The answer is less than 42.", "The answer is 42 give or take 1.", "The answer is 42...",
    # a condition
    "If x = 1, the answer is 42.", "If x is 1,\nThe answer is 42", "The answer is 42 if x = 1.",
    "The answer is 42 when x is odd.", "The answer is 42 unless x = 1.",
    "When $x=1$ the answer is 42.",
    "Assuming so (\nThe answer is 42", "Final Answer: The value if x is 42.",
    "Case odd: the answer is 42",
    # another number, or what is no number
    "The answer is minus 42.", "The answer is -42.", "The answer is 42 million.",
    "The answer is 42%%",
    "The answer is half of 42.", "The answer is 42 squared.", "The answer is 42!",
    "The answer is 4 2.",
    "The answer is 42 tens.", "The answer is 42 less.", "The answer is four 42.",
    "The answer is 0x2a",
    "The answer is 40 + 1.", "The answer is 5 = 42.", "The answer is twice 42",
    "The answer is 42 short of 50.",
    "Answer: A) 42", "The answer is the root of 42.", "The answer is 42_{50}.",
    "The answer is 42e1.",
    # the middle of prose
    "We get 42", "Therefore there are 42 of them.", "the answer is 42",
    "I say that the answer is 42 here.",
    "The answer is clear: 42", "The answer is in line 42.", "My page\n42", "Choose from\n42",
    "Pages:\n42",
    "One is 41, one is\n42", "Answer sheet 42", "# 42", "##### 42", "x#### 42",
    "The answer #### 42",
    "The answer is", "Answer:", "#### ", "#### x42",
    "The answer is 42 of them because 41 is prime.",
]  # fmt: skip


@pytest.mark.parametrize("answer", CLOSINGS)
def test_words_that_close_a_text_lead_to_the_answer(answer):
    assert judge(answer, "42")[1] == "right" and judge(answer, "41")[1] == "wrong"
    assert judge(answer + "\nNo.", "42")[1] == "unparsed", "it does not close the text"
    assert judge(r"\boxed{41} " + answer, "42")[1] == "wrong", "a box comes first"


@pytest.mark.parametrize("answer", NOT_CLOSINGS)
def test_no_other_words_lead_to_an_answer(answer):
    assert reward(answer, "42") == 0
    assert reward("Let x = 7. " + answer, "42") == 0
    assert reward("Six times seven.\n\n" + answer, "42") == 0


def test_a_denial_is_unparsed():
    for text in NOT_CLOSINGS[19:24]:
        assert judge(text, "42")[1] == "unparsed", text


@pytest.mark.parametrize(("answer", "status"), COMPLETIONS)
def test_completions(answer, status):
    assert judge(answer, "5")[1] == status


def test_unreadable_gold_is_an_error_and_not_the_answers_fault():
    ragged = r"\begin{pmatrix}1&2\\3\end{pmatrix}"
    said = "the answer is 5", "The answer is not 5", "5 = 6", r"\sqrt4 = 6"
    for gold in ("", r"\boxed{", r"\zzz", "1/0", "it is 5", ragged, "1," * 27 + "1", *said):
        assert judge("5", gold)[:2] == (None, "error"), gold
        assert reward(gold, gold) is None, "right samples alone would be kept"
    assert "1/0" in judge("5", "1/0")[2]


# --- attacks --------------------------------------------------------------------------------------

HANGS = [
    "9^{9^{9^{9}}}", "2^{2^{100}}", "((((((" * 300, "1" * 1999, "9" * 999 + "!", "3000!!!!",
    r"\sqrt" * 300 + "2", "x^{" * 300, "-" * 1500 + "1", "x+" * 190 + "1", "(x+1)^{999999}",
    r"\frac1" * 300, "1e99999999", r"\binom{99999999}{44444444}", "(" + "1," * 150 + "1)",
    "2" + "^{2}" * 100, "|" * 300, "{" * 300, r"\sin(" * 30 + "x" + ")" * 30,
    r"e^{" * 12 + "1" + "}" * 12, "99!^{99!}", r"0.\overline{" + "7" * 900 + "}",
    r"\begin{matrix}" * 50, "x_{" * 200, r"\text{" * 200, "1_2_3_4", "1/" * 190 + "1",
    r"(1+\sqrt2+\sqrt3+\sqrt5+\sqrt7)^{40}", r"\gcd(10^{9999},3^{9999})", "½" * 300, "\x00",
    "\ud800", "(x" + "!'" * 190 + ", 1)", "xyz " * 132 + "=5", r"\frac{1}{" * 39 + "x" + "}" * 39,
    "x+" * 199 + "x=5", "+".join(rf"{p}^{{-9000}}" for p in range(3, 99, 2)),
]  # fmt: skip


@pytest.mark.parametrize("text", HANGS, ids=range(len(HANGS)))
def test_nothing_hangs_or_exhausts_the_stack(text):
    def deep(depth):
        return judge(text, r"x+\pi", 0.5) if depth == 0 else deep(depth - 1)

    for depth in (0, 300):
        start = time.monotonic()
        got, status, _ = deep(depth)
        assert got == 0 and status in ("wrong", "unparsed", "timeout")
        assert time.monotonic() - start < 5  # includes starting sympy again, where it was killed
    assert reward(r"\pi+x", r"x+\pi") == 1, "the verifier survives it"


ENDINGS = "Answer: ", "\n", " ", "The answer is ", "#### 1\n", "** ", ", because a", "= 1", ". "


@pytest.mark.parametrize(
    "piece", [r"\boxed{", r"\(", r"\[", "$", r"\boxed{5}", "{", "1,", *ENDINGS]
)
def test_long_text_takes_no_longer(piece):
    start = time.perf_counter()
    assert reward(piece * 20_000, "7") == 0
    assert time.perf_counter() - start < 1


@settings(max_examples=300)
@given(st.lists(st.sampled_from([*NOT_CLOSINGS, *CLOSINGS, "\n", " ", ". "]), max_size=4))
def test_what_closes_a_text_is_its_end(texts):
    """Nothing that stands before the last line or sentence earns anything by itself."""
    text = "".join(texts)
    for end in ("\nSo it is.", " Or so.", "\nThe answer is not 42.", "\nThe answer is 41."):
        assert reward(text + end, "42") == 0
    if reward(text, "42"):
        assert any(text.rstrip().endswith(closing.rstrip()) for closing in CLOSINGS)


PIECES = [
    *r"0123456789+-*/^_!()[]{}|,.;:=<>$%&'~ abefinxyzAEIP",
    *r"\frac \sqrt \boxed{ \text{ \left( \right) \pi \infty \pm ^{ \cup \% \{ \} \\ \in".split(),
    *r"\sin \begin{pmatrix} \end{pmatrix} \log_ \overline{ cm √ ½ é __class__ 1e9 10^".split(),
    " or ", "\n", "import os", "**", "The answer is ", "#### ", "Answer: ", ". ", " because ",
    "not ",
]  # fmt: skip
GOLDS = ("7", "1011_2", "5,6", "(1,2)", r"7\%", "x=7", "7 cm", r"\text{Yes}", "P(1)=7")
JUNK = (" or 7", r" \text{ or } 7", ", 7", " is 7", " (maybe 7)", "!?", r"\boxed{8}")


@settings(max_examples=2500)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join), st.sampled_from(GOLDS))
def test_random_text_is_judged_in_time(text, gold):
    with pytest.MonkeyPatch.context() as patch:
        questions, ask = [], algebra.ask
        patch.setattr(algebra, "ask", lambda *args: questions.append(args) or ask(*args))
        took = []
        for _ in range(2):  # the machine may pause; a slow text is slow twice
            start = time.monotonic()
            got, status, _ = judge(text, gold, 1.0)
            took.append(time.monotonic() - start)
            assert got in (0, 1) and status != "error"
            if took[-1] < 0.05:
                break
    assert min(took) < (4.0 if questions else 0.05)
    if gold == "7" and got == 0:
        for junk in JUNK:
            assert reward(text + junk, gold) == 0, "junk made it right"


# --- the worker -----------------------------------------------------------------------------------


def test_a_number_refutes_and_only_a_proof_accepts():
    def both(*texts):
        return [algebra.build(latex.parse(text)) for text in texts]

    assert algebra.refuted(*both(r"\sqrt2+\sqrt3", r"\sqrt{10}"))
    assert algebra.refuted(*both("x^2", "x^2+10^{-15}"))
    assert not algebra.refuted(*both("(x+1)^2", "x^2+2x+1"))
    assert not algebra.refuted(*both(*SQRT6))
    texts = r"\frac{6\sqrt{1789-240\sqrt{21}}+8\sqrt{1236-240\sqrt{21}}}{5}", r"96-10\sqrt{21}"
    a, b = map(latex.parse, texts)
    near = ("add", a, Fraction(1, 10**30))
    assert algebra.decide("zero", a, b, None) and not algebra.decide("zero", near, b, None)
    assert not algebra.refuted(*map(algebra.build, (near, b)))


def test_a_killed_worker_is_replaced_and_an_idle_one_lives_on():
    assert reward(*SQRT6) == 1
    first = worker().process
    first.kill()
    assert judge(*SQRT6, 0.3)[0] == 1
    second = worker().process
    assert second.pid != first.pid
    time.sleep(1.6)  # its own alarm, for the day when its caller has died, is off when it is idle
    assert second.poll() is None


@pytest.mark.parametrize("command", [[sys.executable, "-c", "pass"], ["/nowhere"]])
def test_a_worker_that_does_not_work_is_an_error_and_no_reward(monkeypatch, command):
    real = subprocess.Popen
    monkeypatch.setattr(algebra.subprocess, "Popen", lambda _, **pipes: real(command, **pipes))
    worker().close()
    assert judge(*SQRT6)[:2] == (None, "error")
    monkeypatch.undo()
    assert reward(*SQRT6) == 1


def test_an_interrupted_question_does_not_answer_the_next(monkeypatch):
    """As Ctrl-C would, while the answer (yes) is on its way."""
    assert reward(*SQRT6) == 1

    def asked_then_interrupted(question, pipe):
        pickle.dump(question, pipe)
        pipe.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(algebra, "pickle", types.SimpleNamespace(dump=asked_then_interrupted))
    with pytest.raises(KeyboardInterrupt):
        reward(*SQRT6)
    monkeypatch.undo()
    assert reward(r"\sqrt2\sqrt5", r"\sqrt6") == 0
    assert reward(*SQRT6) == 1


def test_threads_share_a_worker():
    got = []

    def ask(k):
        got.append((k, reward(rf"\sqrt{{{k}}}\sqrt{{{k + 1}}}", rf"\sqrt{{{k * (k + 1)}}}")))
        got.append((-k, reward(rf"\sqrt{{{k}}}\sqrt{{{k + 2}}}", rf"\sqrt{{{k * (k + 1)}}}")))

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(2, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 76 and all(verdict == (k > 0) for k, verdict in got)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_has_its_own_worker_and_none_outlives_its_caller():
    code = (
        "import os, sys\n"
        "from tasks import algebra, answers\n"
        f"ask = lambda: answers.judge(*{SQRT6!r}, 5.0)[0] == 1\n"
        "assert ask()\n"
        "child = os.fork()\n"
        "good = all(ask() for _ in range(20))\n"
        "process = algebra.worker(os.getpid()).process\n"
        "print(process.pid, flush=True)\n"
        "assert good and 'sympy' not in sys.modules\n"
        "if child == 0: sys.exit()\n"  # which runs atexit
        "assert os.waitpid(child, 0)[1] == 0 and process.poll() is None and ask()\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    pids, patience = set(map(int, done.stdout.split())), time.monotonic() + 5
    assert len(pids) == 2
    while any(map(alive, pids)) and time.monotonic() < patience:
        time.sleep(0.1)
    assert not any(map(alive, pids))
