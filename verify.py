"""Is an attempt right? The rewards of SCoRe, and the toy problems that they are measured on.

The paper's oracle reward r(y, y*) is 0 or 1, is used in training only, and is never shown to the
policy (arXiv 2409.12917v2, section 3). Here it is `arithmetic`: one strict integer, compared
exactly. For the second toy it is `countdown`: any expression with the right value. Nothing that a
model wrote is ever run as code here; `program` has it run by `sandbox.py`.

The toy is addition, `483510+516489=`, answered from the left in a fixed number of digits. Half of
the columns are made to sum to 9, so that a carry runs far: a small model that writes the leading
digit first must foresee every carry, but on a second attempt it finds the digits to the right
already on the page and can check each carry locally. That gap is what there is to learn.

    python -c "import verify; print(verify.arithmetic('0999999', '999999'))"

Dimension key: N problems, D digits (one column each, most significant first).
"""

import gzip
import json
import os
import re
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import algebra
import latex
import sandbox
from countdown import Malformed, evaluate

MAX_INTEGER_DIGITS = 100  # int() of a long string is quadratic: a bound before any conversion
MAX_OPERAND_DIGITS = 9  # both operands, side by side, are hashed as one 64-bit number
FENCE = re.compile(r"[ \t]*(```+|~~~+)[ \t]*(\w*)[ \t]*")  # a whole line
INTEGER = re.compile(r"-?[0-9]+")  # [0-9], as \d would accept digits of every script


# --- the verifier ---------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What a verifier says of one attempt.

    reward: 1 right, 0 not right, None if the gold answer is unreadable or the verifier failed.
    status: "right", "wrong", "unparsed", "timeout" (reward 0) or "error" (reward None).
    detail: why, in words; empty where the status says it all.
    """

    reward: int | None
    status: str
    detail: str = ""


def integer(text: str) -> int | None:
    """Return the integer that `text` is, or None: ASCII digits with an optional minus, no more.

    Surrounding ASCII white space and leading zeros are allowed; signs of plus, separators, decimal
    points, other scripts' digits and more than MAX_INTEGER_DIGITS digits are not.

    >>> integer("0042"), integer("-7"), integer("1_000"), integer("4 2"), integer("٣")
    (42, -7, None, None, None)
    """
    text = text.strip(" \t\r\n")
    if len(text) > MAX_INTEGER_DIGITS or not INTEGER.fullmatch(text):
        return None
    return int(text)


def arithmetic(answer: str, gold: str, truncated: bool = False) -> Verdict:
    """Return the verdict on an integer answer. Pure; safe to call from threads.

    Args:
      answer: the whole attempt as text, without its end-of-turn token.
      gold: the right answer, an integer in text.
      truncated: the attempt ran into the length limit before it ended. It then earns 0 even if its
        digits are right, since a policy that never stops must not be paid.

    >>> arithmetic("0999999", "999999")
    Verdict(reward=1, status='right', detail='')
    >>> arithmetic("", "5")
    Verdict(reward=0, status='unparsed', detail='empty answer')
    """
    expected = integer(gold)
    if expected is None:
        return Verdict(None, "error", f"gold answer is not an integer: {gold[:50]!r}")
    if truncated:
        return Verdict(0, "unparsed", "truncated: no end of turn")
    if not answer.strip(" \t\r\n"):
        return Verdict(0, "unparsed", "empty answer")
    found = integer(answer)
    if found is None:
        return Verdict(0, "unparsed", f"not an integer: {answer[:50]!r}")
    return Verdict(1, "right") if found == expected else Verdict(0, "wrong")


def countdown(answer: str, gold: str, truncated: bool = False) -> Verdict:
    """Return the verdict on an expression with a target. Pure; safe to call from threads.

    Right is every expression of `countdown.evaluate`'s grammar with the numbers of the gold answer,
    each as often as there, in any order, and with its value.

    Args:
      answer, truncated: as in `arithmetic`. gold: one right answer.

    >>> countdown("(8-2)*3", "8+8+2")
    Verdict(reward=0, status='wrong', detail='does not use the given numbers once each')
    >>> countdown("2+8*1", "8+2/1").status, countdown("2+8=10", "8+2").status
    ('right', 'unparsed')
    """
    try:
        numbers, target = evaluate(gold)
    except Malformed as error:
        return Verdict(None, "error", f"gold answer is not an expression: {error}")
    if target is None:
        return Verdict(None, "error", "gold answer divides by zero")
    if truncated:
        return Verdict(0, "unparsed", "truncated: no end of turn")
    answer = answer.strip(" \t\r\n")
    if not answer:
        return Verdict(0, "unparsed", "empty answer")
    try:
        used, value = evaluate(answer)
    except Malformed as error:
        return Verdict(0, "unparsed", f"not an expression: {error}")
    if sorted(used) != sorted(numbers):
        return Verdict(0, "wrong", "does not use the given numbers once each")
    if value is None:
        return Verdict(0, "wrong", "divides by zero")
    return Verdict(1, "right") if value == target else Verdict(0, "wrong")


# --- mathematics ----------------------------------------------------------------------------------

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{)?")
SEGMENT = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b")
SEPARATORS = re.compile(rf"(?:\s|\.|{SEPARATOR.pattern})*")
LEAD_IN = re.compile(  # the last words before the one formula of a sentence
    r"(?:.*\b(?:is|are|that|answer|therefore|thus|hence|so|matrix)\s*:?|[^:]*:)?\s*", re.I | re.S
)
AFTER = re.compile(r"\s*(?:is the (?:answer|solution|result)\s*)?[.!]?\s*", re.I)
PLAIN_WORDS = re.compile(r"[A-Za-z\s.,:;'’-]*")
DENIAL = re.compile(
    r"\b(?:not|no|nor|never|cannot|or|and|either|except|wrong|minus|negative|root|square|half|twice"
    r"|false|mistake|incorrect|untrue|least|most|than|about|approximately|roughly|nearly|other|far|opposite|inverse)\b|n['’]t\b",
    re.I,
)
TEXT_ANSWER = re.compile(r"[A-Za-z][A-Za-z '’.,()-]*")
STYLED_ANSWER = re.compile(r"[A-Za-z][A-Za-z0-9 '’.,()-]*")  # "June 20", in \text{} alone


def math(answer: str, gold: str, timeout: float = 2.0, truncated: bool = False) -> Verdict:
    r"""Return the verdict on an answer in mathematics. Pure; safe to call from threads.

    Args:
      answer: a whole completion, whose last \boxed{} is the answer, or a bare answer. Without a
        box the text must *be* an answer, or plain words round one formula: "The sum is $5$.".
        Nothing is searched for in prose.
      gold: the right answer, in the same forms, for instance a solution of MATH.
      timeout: seconds that sympy may take to prove two expressions equal; waiting for other
        threads' questions does not count.
      truncated: the completion ran into the length limit: it earns 0, as in `arithmetic`.

    status is "unparsed" if the answer cannot be read, "timeout" if sympy did not decide in time
    (both reward 0), "error" if the gold answer cannot be read or the worker died (reward None).

    What the sources leave open is decided so:

      boxes              the last one counts; another, different one in the same line: unparsed
      percent            50\% equals 50 and 0.5; 50\% against 5000\% does not
      rounding           decimals are exact: 0.33 is not 1/3. One of 12 or more significant digits
                         stands for what it rounds: 0.333333333333 is 1/3
      fractions          need not be reduced: 2/4 is 1/2. 2\frac12 and 2 1/2 are mixed numbers
      thousands          1,234 and 1 234 are one number; (1,234) is a pair; 1, 234 are two numbers
      units, degrees     those of latex.UNITS, and \$: may be missing on one side, must not differ
      names              "x = 5", "f(x) = 5", "AB = 5", "x \in S": the name may be missing on one
                         side; in a list only if all its names are the same
      equations          equal up to a factor; so are inequalities, the factor being positive
      a = b = c          says c (or what stands before a sign of approximation)
      lists              1, 2 and {2, 1}: order and repetition are free, as in sets
      (1, 2) [1, 2]      brackets and order count; a list without brackets is neither
      intervals          are not inequalities: (0, 1) is not 0 < x < 1
      a \pm b            is the list of both values
      odd roots          of negative numbers are real: \sqrt[3]{-8} is -2
      capitals           AB is one name, not A times B
      text               whole words; case counts in letters that may be variables; \text{E} is E
      e, i, \pi          are constants, other letters variables; \log has no base, \ln has e
      12_3               may be written 12; it is never 5

    >>> math(r"So it is $\boxed{\frac{2}{4}}$.", "0.5").status, math("It is 5.", "5").status
    ('right', 'unparsed')
    """
    try:
        expected = final_answer(gold)
        if plain_text(expected) is None:
            latex.parse(expected)
    except latex.Unreadable as error:
        return Verdict(None, "error", f"gold answer {gold[-50:]!r}: {error}")
    if truncated:
        return Verdict(0, "unparsed", "truncated: no end of turn")
    try:
        found = final_answer(answer)
        if same_text(found, expected) or latex.same(found, expected, timeout):
            return Verdict(1, "right")
        return Verdict(0, "wrong")
    except latex.Unreadable as error:
        status = "unparsed" if plain_text(answer) is None else "wrong"
        return Verdict(0, status, f"{error}{'' if BOX.search(answer) else '; no box in the text'}")
    except RecursionError:  # the caller stands deep in the stack already
        return Verdict(0, "unparsed", "nested too deep")
    except algebra.TimedOut as error:
        return Verdict(0, "timeout", str(error))
    except algebra.WorkerDied as error:
        return Verdict(None, "error", str(error))


def final_answer(text: str) -> str:
    r"""Return the answer in a completion, as latex.parse reads it: the last box, or a bare answer.

    Raises:
      latex.Unreadable: there is no answer, or more than one.

    >>> final_answer(r"Let $x=4$. So \boxed{\frac{x}{2}}."), final_answer("The sum is $5$.")
    ('\\frac{x}{2}', '5')
    """
    boxes = list(BOX.finditer(text))
    if not boxes:
        return bare(text)
    line = text.rfind("\n", 0, boxes[-1].start()) + 1
    last = [box for box in boxes if box.start() >= line]
    if len(last) > 20:
        raise latex.Unreadable("more than 20 boxes in one line")
    found = [balanced(text, box.end()) if box[1] else None for box in last]
    if found[-1] is None:
        raise latex.Unreadable("a box without braces, or one that is not closed")
    inner = text[last[-1].start() : last[-1].end()] + found[-1] + "}"
    for content in found[:-1]:  # a box round the last box says the same as that
        if content is None or content.split() not in (found[-1].split(), inner.split()):
            raise latex.Unreadable("two answers in one line")
    return clean(found[-1])


def balanced(text: str, start: int) -> str | None:
    """Return what stands between a brace that was opened before `start` and its closing brace."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.S):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : start + brace.start()]
    return None


def bare(text: str) -> str:
    """Return a text without a box as an answer: all of it, or the one formula that it leads to."""
    if len(text) > latex.MAX_CHARS:
        raise latex.Unreadable(f"no box in more than {latex.MAX_CHARS} characters")
    segments = list(SEGMENT.finditer(text))
    outside = SEGMENT.sub(" ", text)
    if len(segments) > 1 and len(SEPARATOR.findall(outside)) < len(segments) - 1:
        raise latex.Unreadable("no box, and more than one formula")
    if not segments or SEPARATORS.fullmatch(outside):
        return clean(SEGMENT.sub(lambda match: f" {match[0].strip('$')} ", text))
    before, after = text[: segments[0].start()], text[segments[-1].end() :]
    lead_in = LEAD_IN.fullmatch(before) and PLAIN_WORDS.fullmatch(before)
    if len(segments) > 1 or not lead_in or DENIAL.search(outside):
        raise latex.Unreadable("no box, and not one formula that plain words lead to")
    formula = next(filter(None, segments[0].groups()))
    mark = after.strip(" .\n")
    if mark in ("%", r"\%") or latex.unit(mark):
        return clean(f"{formula} {mark}")
    if not AFTER.fullmatch(after):
        raise latex.Unreadable("no box, and more than a formula")
    return clean(formula)


def clean(text: str) -> str:
    r"""Return an answer without what never carries meaning: \( \) \[ \], a full stop at the end."""
    text = re.sub(r"\\[()\[\]]", " ", text).strip().rstrip("\\").rstrip()
    return text.removesuffix(".")


def plain_text(text: str) -> str | None:
    r"""Return the words that an answer is, without \text{}; None if it is not made of words."""
    words = re.sub(rf"{latex.STYLED}\s*\{{([^{{}}]*)\}}", r"\1", text)
    form = STYLED_ANSWER if words != text else TEXT_ANSWER
    words = " ".join(words.replace("$", " ").split()).strip(" .")
    if re.fullmatch(r"\([A-Za-z]+\)", words):
        words = words[1:-1]
    return words if form.fullmatch(words) else None


def same_text(a: str, b: str) -> bool:
    r"""Return whether both answers are the same words. Case counts, unless one is in \text{}, as
    "Yes", or cannot be variables.
    """
    x, y = plain_text(a), plain_text(b)
    if x is None or y is None:
        return False
    words = len(x) > 1 and (r"\text" in a + b or not readable(x) or not readable(y))
    return x == y or (words and x.lower() == y.lower())


def readable(text: str) -> bool:
    try:
        latex.parse(text)
    except latex.Unreadable:
        return False
    return True


# --- programs -------------------------------------------------------------------------------------


def program(
    source: str,
    tests: str,
    timeout: float = 3.0,
    *,
    entry_point: str | None = None,
    prompt: str = "",
) -> Verdict:
    """Return the verdict on a Python program, run where it can harm and fool nobody (sandbox.py).

    Args:
      source: the whole program, for HumanEval the prompt and its completion.
      tests: asserts, as of MBPP (imports and setup code in front), or HumanEval's `check`.
      timeout: seconds for everything together.
      entry_point: the function that `check` is called with, where the tests do not call it.
      prompt: trusted code, whose helpers the tests use rather than the program's.

    The detail ends with the isolation that the system granted. Safe to call from threads.

    Raises:
      OSError: the system is neither Linux nor macOS.
      ValueError: the timeout is not positive.

    >>> program("def add(a, b): return a + b", "assert add(2, 3) == 5").status
    'right'
    >>> program("import os; os._exit(0)", "assert add(2, 3) == 5").status
    'wrong'
    """
    status, detail = sandbox.run(source, tests, timeout, entry_point, prompt)
    return Verdict({"right": 1, "error": None}.get(status, 0), status, detail)


# --- the problems ---------------------------------------------------------------------------------


class Problem(NamedTuple):
    """One problem as the policy sees it, and what only the verifier sees.

    prompt: the problem's text. gold: the right answer, or for a program its tests.
    kind: the verifier: "arithmetic", "countdown", "math" or "program".
    entry_point: the function that HumanEval's check(candidate) is called with; else empty.
    solution: a worked answer, to imitate, in the form that the verifier reads; empty if none.
    """

    prompt: str
    gold: str
    kind: str = "arithmetic"
    entry_point: str = ""
    solution: str = ""


def judge(problem: Problem, answer: str, truncated: bool = False) -> Verdict:
    """Return the verdict of the problem's own verifier; a truncated answer is not right."""
    if problem.kind == "arithmetic":
        return arithmetic(answer, problem.gold, truncated)
    if problem.kind == "countdown":
        return countdown(answer, problem.gold, truncated)
    if problem.kind == "math":
        return math(answer, problem.gold, truncated=truncated)
    if truncated:
        return Verdict(0, "unparsed", "truncated: no end of turn")
    block, source = code_of(answer)
    if not problem.entry_point:
        return program(source, problem.gold)
    # HumanEval: a program of its own, which has the prompt's imports; or the prompt, which is a
    # function's head and its docstring, goes on where it ends
    source = problem.prompt + ("\n" if block else "") + source
    return program(source, problem.gold, entry_point=problem.entry_point, prompt=problem.prompt)


def code_of(answer: str) -> tuple[bool, str]:
    """Return whether a program stands in a fenced block, and the last such, or the whole answer.

    Blocks that say that they are Python come before blocks that say nothing; others, and blocks
    without an end, are none.

    >>> code_of("Like this:\\n```python\\nx = 1\\n```\\nor not"), code_of("x = 1")
    ((True, 'x = 1\\n'), (False, 'x = 1'))
    """
    found, mark, language, lines = {}, None, "", []
    for line in answer.replace("\r\n", "\n").split("\n"):
        fence = FENCE.fullmatch(line)
        if mark is None:
            if fence:
                mark, language, lines = fence[1], fence[2].lower(), []
                language = "python" if language in ("py", "python3") else language
        elif fence and fence[1] == mark and not fence[2]:
            found[language] = textwrap.dedent("".join(f"{line}\n" for line in lines))
            mark = None
        else:
            lines.append(line)
    for language in ("python", ""):
        if language in found:
            return True, found[language]
    return False, answer


def split_of(a_N: np.ndarray, b_N: np.ndarray, split_seed: int = 0) -> np.ndarray:
    """Return each problem's split, [N] of "test" (10 %), "dev" (10 %) or "train" (80 %).

    The split is a hash of the unordered pair, so that it needs no list of problems, never leaks
    a + b as b + a, and is the same whatever else is drawn.

    Args:
      a_N, b_N: operands, int64 in [0, 10**MAX_OPERAND_DIGITS).
      split_seed: another seed gives another partition.
    """
    low, high = np.minimum(a_N, b_N).astype(np.uint64), np.maximum(a_N, b_N).astype(np.uint64)
    x = high * np.uint64(10**MAX_OPERAND_DIGITS) + low
    x ^= np.uint64(split_seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    bucket = (x ^ (x >> np.uint64(31))) % np.uint64(10)
    return np.where(bucket == 0, "test", np.where(bucket == 1, "dev", "train"))


def operands(
    n: int, split: str, rng: np.random.Generator, digits: int, split_seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw n pairs of operands from one split: two int64 arrays [N].

    In each column the digits are uniform with probability 0.5, else they sum to 9, where a carry
    that comes in from the right goes out again on the left.

    Raises:
      ValueError: a value is out of range, or the split holds (almost) no problem of this size.
    """
    if not 1 <= digits <= MAX_OPERAND_DIGITS:
        raise ValueError(f"digits must be 1 to {MAX_OPERAND_DIGITS}, got {digits}")
    if split not in ("train", "dev", "test"):
        raise ValueError(f"split must be 'train', 'dev' or 'test', got {split!r}")
    powers_D = 10 ** np.arange(digits - 1, -1, -1)
    a_parts, b_parts, have = [], [], 0
    for _ in range(100):
        if have >= n:
            break
        size = 2 * (n - have) if split == "train" else 12 * (n - have)
        a_ND = rng.integers(0, 10, (size, digits))
        free_ND = rng.integers(0, 10, (size, digits))
        b_ND = np.where(rng.random((size, digits)) < 0.5, 9 - a_ND, free_ND)
        a_N, b_N = a_ND @ powers_D, b_ND @ powers_D
        keep_N = split_of(a_N, b_N, split_seed) == split
        a_parts.append(a_N[keep_N])
        b_parts.append(b_N[keep_N])
        have += int(keep_N.sum())
    if have < n:
        raise ValueError(f"found only {have} of {n} problems of {digits} digits in split {split!r}")
    return np.concatenate(a_parts)[:n], np.concatenate(b_parts)[:n]


def problems(
    n: int, split: str, rng: np.random.Generator, digits: int, split_seed: int = 0
) -> list[Problem]:
    """Draw n problems from one split (with repetition, which is rare from 4 digits on).

    >>> problems(1, "train", np.random.default_rng(0), digits=3)[0][:2]
    ('865+001=', '866')
    """
    a_N, b_N = operands(n, split, rng, digits, split_seed)
    return [
        Problem(f"{a:0{digits}d}+{b:0{digits}d}=", str(a + b))
        for a, b in zip(a_N.tolist(), b_N.tolist(), strict=True)
    ]


# --- what the base model has read -----------------------------------------------------------------


def forgetful_sum(
    a_N: np.ndarray,
    b_N: np.ndarray,
    forget: float,
    lose: float,
    rng: np.random.Generator,
    digits: int,
) -> np.ndarray:
    """Add as a careless human does: [N, digits + 1] digits of a + b, most significant first.

    The carry out of a column that sums to 9 is wrong with probability `forget`, and from the third
    such column in a row on with probability `lose` (both 0 give the right sum). These are mistakes
    that a small model makes by itself; slips at random digits are not, and a base raised on them
    never learns to check its carries. A model that has read enough writes the likelier digit when
    greedy: with forget < 0.5 < lose it is right where no three columns in a row sum to 9, so that
    the base's greedy accuracy hangs more on these documents than on its training.
    """
    carry_N, written_N, run_N = (np.zeros_like(a_N) for _ in range(3))
    columns = []
    for power in 10 ** np.arange(digits):
        pair_N = a_N // power % 10 + b_N // power % 10
        columns.append((pair_N + written_N) % 10)
        carry_N = (pair_N + carry_N) >= 10
        run_N = np.where(pair_N == 9, run_N + 1, 0)
        chance_N = np.where(run_N == 0, 0.0, np.where(run_N < 3, forget, lose))
        written_N = carry_N ^ (rng.random(len(a_N)) < chance_N)
    return np.stack([written_N.astype(np.int64), *reversed(columns)], axis=1)


def corpus(
    n: int,
    rng: np.random.Generator,
    digits: int,
    *,
    forget: float,
    lose: float,
    right_revision: float,
    copy: float,
    split_seed: int = 0,
) -> list[tuple[str, str, str]]:
    """Draw n documents (prompt, draft, revision) that teach the base model to draft and revise.

    It is to be mediocre at both, as the paper's base is: it sometimes repairs a wrong draft, which
    reinforcement learning can amplify, and sometimes spoils a right one.

    Args:
      forget, lose: of the drafts, each a `forgetful_sum`.
      right_revision, copy: probabilities of a right revision and of a copy of the draft; the
        remaining revisions are careless: the right sum with each digit off by one, either way,
        with probability 0.15.
    """
    a_N, b_N = operands(n, "train", rng, digits, split_seed)
    right_ND = forgetful_sum(a_N, b_N, 0.0, 0.0, rng, digits)
    draft_ND = forgetful_sum(a_N, b_N, forget, lose, rng, digits)
    step_ND = rng.choice([-1, 1], right_ND.shape) * (rng.random(right_ND.shape) < 0.15)
    kind_N1 = rng.random((n, 1))
    revision_ND = np.where(kind_N1 < right_revision + copy, draft_ND, (right_ND + step_ND) % 10)
    revision_ND = np.where(kind_N1 < right_revision, right_ND, revision_ND)
    rows = zip(a_N.tolist(), b_N.tolist(), draft_ND.tolist(), revision_ND.tolist(), strict=True)
    return [
        (f"{a:0{digits}d}+{b:0{digits}d}=", "".join(map(str, draft)), "".join(map(str, revision)))
        for a, b, draft, revision in rows
    ]


# --- problems from files --------------------------------------------------------------------------


def gsm8k_answer(text: str) -> str | None:
    """Return what stands after the last "#### ", without thousands commas; None if it is no number.

    >>> gsm8k_answer("48/2 = <<48/2=24>>24\\n#### 1,024"), gsm8k_answer("#### five")
    ('1024', None)
    """
    number = text.rpartition("#### ")[2].strip() if "#### " in text else ""
    if not re.fullmatch(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?", number):
        return None
    return number.replace(",", "")


def load(path: str | os.PathLike) -> list[Problem]:
    """Read problems from a local file of JSON lines (.jsonl, .jsonl.gz) or a JSON list (.json).

    A row is of MATH or MATH-500 (problem, and answer or solution), GSM8K (question, answer), MBPP
    (text or prompt, test_list) or HumanEval (prompt, entry_point, test); more fields do no harm.

    Raises:
      ValueError: names the file, the row, and the field that is missing or not as it must be.
      OSError: the file cannot be read.
    """
    found = []
    for place, row in rows_of(Path(path)):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: must be an object with fields, got {str(row)[:50]!r}")
        try:
            found.append(problem_of(row))
        except (KeyError, TypeError, ValueError) as error:
            missing = f"missing field {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{place}: {missing}") from None
    if not found:
        raise ValueError(f"{path} holds no problem")
    return found


def rows_of(path: Path) -> Iterator[tuple[str, object]]:
    """Yield (place, row) of a JSON or JSON-lines file."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            if path.name.removesuffix(".gz").endswith(".json"):
                rows = json.load(file)
                if not isinstance(rows, list):
                    raise ValueError(f"{path}: must be a list of problems, got {str(rows)[:50]!r}")
                yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
                    yield f"{path}, line {number}", row
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError, json.JSONDecodeError,
            RecursionError) as error:  # fmt: skip
        raise ValueError(f"{path}: {error}") from None


def problem_of(row: dict) -> Problem:
    """Return the problem of a row, told by its fields."""

    def text(name: str) -> str:
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"field {name!r} must be a text, got {row[name]!r:.50}")
        return row[name]

    if "problem" in row:
        if "answer" in row:
            worked = row.get("solution")
            worked = worked if isinstance(worked, str) and BOX.search(worked) else ""
            return Problem(text("problem"), text("answer"), "math", solution=worked)
        if not BOX.search(text("solution")):
            raise ValueError("field 'solution' holds no \\boxed{}")
        return Problem(text("problem"), text("solution"), "math", solution=text("solution"))
    if "question" in row:
        gold = gsm8k_answer(text("answer"))
        if gold is None:
            raise ValueError("field 'answer' must end in '#### ' and a number")
        steps = re.sub(r"<<[^<>]*>>", "", row["answer"].rpartition("#### ")[0])
        return Problem(text("question"), gold, "math", solution=f"{steps}\\boxed{{{gold}}}")
    if "entry_point" in row:
        solution = fenced(row["prompt"], row.get("canonical_solution"))
        return Problem(text("prompt"), text("test"), "program", text("entry_point"), solution)
    if "test_list" in row:
        setup = [row.get("test_setup_code") or "", *row.get("test_imports", [])]
        lines = row["test_list"]
        if not isinstance(lines, list) or not lines or not all(isinstance(x, str) for x in lines):
            raise ValueError(f"field 'test_list' must be a list of texts, got {lines!r:.50}")
        tests = "\n".join([line for line in setup if line] + lines)
        prompt = text("text" if "text" in row else "prompt")
        return Problem(prompt, tests, "program", solution=fenced(row.get("code")))
    raise ValueError(
        "none of the fields 'problem', 'question', 'entry_point', 'test_list' is there"
    )


def fenced(*parts: str | None) -> str:
    """Return a program in a fenced block; nothing if a part of it is missing."""
    if not all(isinstance(part, str) and part for part in parts):
        return ""
    code = "".join(parts).replace("\r\n", "\n").strip("\n")
    return f"```python\n{code}\n```"
