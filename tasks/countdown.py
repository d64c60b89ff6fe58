"""Can these numbers reach that target? A second toy, whose answers are expressions, not one string.

A problem gives numbers and a target, `3 8 3 1:13=`; an answer is an expression that uses each of
the numbers once, in any order, with + - * / and brackets, and has the target as its exact value:
`3+8+3-1`. Any such expression is right. Every problem here can be solved by a *plan*: + and -
alone, the numbers in the order given; all that the base model has read is of that form.

A first attempt must choose its first sign before it knows where the others lead. Once a plan
stands on the page its value can be added up, and how far it misses says which sign is wrong:
turning the sign of a number moves the value by twice that number.

    python score.py --task countdown
    python -c "from tasks import countdown; print(countdown.evaluate('(1+3/8)*8'))"

Dimension key: N problems, M numbers of each, P = 2**(M - 1) plans.
"""

import itertools
import math
import operator
import re
from fractions import Fraction

import numpy as np

from rollout import Task
from verify import Problem, Verdict, split_of

SETTINGS = dict(  # where score.py's defaults differ for this task
    size=4, d_ff=192, sft_steps=2000, slip=0.15, clean=0.8, right_revisions=0.22, copies=0.73,
    stage1_steps=80, lr=5e-4,
)  # fmt: skip
TOKENS = [*"0123456789+-*/()=: ", "<|end|>", "<|revise|>"]
MAX_CHARS = 100  # of an expression: bounds the work, and with the next line the fractions
NUMBER = re.compile(r"0|[1-9][0-9]{0,3}")  # no leading zeros; [0-9], not every script's digits
OPERATORS = {  # how closely they bind, and what they do
    "+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul),
    "/": (2, lambda a, b: a / b if b else math.nan),
}  # fmt: skip


def evaluate(text: str) -> tuple[list[int], Fraction | float]:
    """Return the numbers of an expression, in order, and its exact value, nan if it divides by 0.

    expression = operand, or expression operator expression, with * and / before + and -, and equals
    from the left; operand = number, or ( expression ). There are no signs before a number, no
    spaces, and no product without its *. Text is never evaluated by Python.

    Raises:
      ValueError: the text is longer than MAX_CHARS, or not of this form to its last character.

    >>> evaluate("8-3-2*4"), evaluate("2/(4-4)")
    (([8, 3, 2, 4], Fraction(-3, 1)), ([2, 4, 4], nan))
    """
    if len(text) > MAX_CHARS:
        raise ValueError(f"more than {MAX_CHARS} characters")
    numbers, tokens = [], [*re.findall(r"[0-9]+|.", text, re.DOTALL), "the end"][::-1]

    def operand():
        token = tokens.pop()
        if NUMBER.fullmatch(token):
            numbers.append(int(token))
            return Fraction(token)
        if token == "(":
            value, token = expression(1), tokens.pop()
            if token == ")":
                return value
        raise ValueError(f"unexpected {token[:10]!r}")

    def expression(least):
        value = operand()
        while tokens[-1] in OPERATORS and OPERATORS[tokens[-1]][0] >= least:
            binds, apply = OPERATORS[tokens.pop()]
            value = apply(value, expression(binds + 1))
        return value

    value = expression(1)
    if tokens != ["the end"]:
        raise ValueError(f"unexpected {tokens[-1][:10]!r}")
    return numbers, value


def verdict(answer: str, gold: str) -> Verdict:
    """Return the verdict on an expression. Right is every one with the numbers of the gold answer,
    each as often as there, in any order, and with its value."""
    try:
        numbers, target = evaluate(gold)
    except ValueError as error:
        return Verdict(None, "error", f"gold answer is not an expression: {error}")
    if math.isnan(target):
        return Verdict(None, "error", "gold answer divides by zero")
    try:
        used, value = evaluate(answer.strip(" \t\r\n"))
    except ValueError as error:
        return Verdict(0, "unparsed", f"not an expression: {error}")
    if sorted(used) != sorted(numbers):
        return Verdict(0, "wrong", "does not use the given numbers once each")
    return Verdict(1, "right") if value == target else Verdict(0, "wrong")


def plans(M: int) -> np.ndarray:
    """Return all ways to sign M numbers, 1 or -1 [P, M]: the first never, the second in turns."""
    return np.array([(1, *signs[::-1]) for signs in itertools.product((1, -1), repeat=M - 1)])


def draw(n: int, split: str, rng: np.random.Generator, M: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw n problems of one split: numbers [N, M], uniform in 1 to 9, and targets [N], each
    the value of a random plan, and not negative. The same numbers in another order, with the same
    target, are always in the same split."""
    if split not in ("train", "dev", "test"):
        raise ValueError(f"split must be train, dev or test, got {split!r}")
    x_NM, target_N = np.zeros((0, M), int), np.zeros(0, int)
    while len(x_NM) < n:
        more_NM = rng.integers(1, 10, (2 * n, M))
        more_N = (more_NM * rng.choice(plans(M), 2 * n)).sum(axis=1)
        sorted_N = np.sort(more_NM) @ 10 ** np.arange(M)
        kept_N = (more_N >= 0) & (split_of(sorted_N, abs(more_N)) == split)
        x_NM, target_N = np.r_[x_NM, more_NM[kept_N]], np.r_[target_N, more_N[kept_N]]
    return x_NM[:n], target_N[:n]


def corpus(
    n: int, split: str, rng, M: int, slip=0.0, slip_hard=0.0, rights=0.0, copies=0.0
) -> list[tuple[str, str, str]]:
    """Draw n documents (prompt, draft, revision) that teach the base model to draft and revise.

    A draft is the first right plan in the order of `plans`, with slips: every sign is turned with
    probability `slip`, but a minus before a number that is larger than the one on its left with
    probability `slip_hard`, as people like to take the smaller from the larger. With slip < 0.5 <
    slip_hard a trained model's greedy draft is wrong where the right plan has such a minus.

    rights, copies: probabilities of a right revision, which turns as few signs of the draft as can
    be (none if it is right), and of a copy of the draft; the other revisions are careless: the
    first right plan with each sign turned with probability 0.15.
    """

    def slips(chance):  # of the first number, too, whose sign is not written
        return np.where(rng.random((n, M)) < chance, -1, 1)

    (x_NM, target_N), plan_PM = draw(n, split, rng, M), plans(M)
    solves_NP = x_NM @ plan_PM.T == target_N[:, None]
    first_NM = plan_PM[solves_NP.argmax(axis=1)]
    hard_NM = (first_NM < 0) & (x_NM > np.roll(x_NM, 1, axis=1))
    draft_NM = first_NM * slips(np.where(hard_NM, slip_hard, slip))
    turns_NP = (draft_NM[:, None] != plan_PM).sum(axis=2)
    right_NM = plan_PM[np.where(solves_NP, turns_NP, M + 1).argmin(axis=1)]
    kind_N1 = rng.random((n, 1))
    revision_NM = np.where(kind_N1 < rights + copies, draft_NM, first_NM * slips(0.15))
    revision_NM = np.where(kind_N1 < rights, right_NM, revision_NM)
    drafts, revisions = (
        ["".join(signed)[1:] for signed in np.char.mod("%+d", x_NM * plan_NM)]
        for plan_NM in (draft_NM, revision_NM)
    )
    rows = zip(x_NM.astype(str), target_N, strict=True)
    prompts = [f"{' '.join(x)}:{target:02d}=" for x, target in rows]
    return list(zip(prompts, drafts, revisions, strict=True))


def task(c) -> Task:
    """Return the task; c: score.py's settings, of which size, here 2 to 6 numbers."""
    if not 2 <= c.size <= 6:
        raise ValueError(f"--size must be 2 to 6 numbers for --task countdown, got {c.size}")
    end_id, revise_id = TOKENS.index("<|end|>"), TOKENS.index("<|revise|>")

    def encode(text):
        return [TOKENS.index(character) for character in text]

    def documents(n, rng, clean):
        revised = (1.0, 0.0) if clean else (c.right_revisions, c.copies)
        rows = corpus(n, "train", rng, c.size, c.slip, c.slip_hard, *revised)
        prompts, *attempts = (map(encode, column) for column in zip(*rows, strict=True))
        return list(prompts), [[[*ids, end_id] for ids in column] for column in attempts]

    return Task(  # a draft without slips is a right answer
        draw=lambda *which: [Problem(x, y, verdict) for x, y, _ in corpus(*which, c.size)],
        documents=documents, encode=encode, decode=lambda ids: "".join(TOKENS[x] for x in ids),
        instruction=[revise_id], end_id=end_id, vocab_size=len(TOKENS), max_new=2 * c.size,
        max_positions=2 * c.size + 3 + 10 * (2 * c.size + 1),  # a prompt and ten attempts
    )  # fmt: skip
