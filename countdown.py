"""Can these numbers reach that target? A second toy, whose answers are expressions, not one string.

A problem gives numbers and a target, `3 8 3 1:13=`; an answer is an expression that uses each of
the numbers once, in any order, with + - * / and brackets, and has the target as its exact value:
`3+8+3-1`. Any such expression is right. Every problem here can be solved with + and - alone, the
numbers in the order given; all that the base model has read is of that form.

What there is to correct is of another kind than a carry. A first attempt must choose its first
sign before it knows where the others lead, among 2**(M-1) plans. Once a plan stands on the page
its value can be added up, and how far it misses says which sign is wrong: turning the sign of a
number moves the value by twice that number. As in the addition, the base's first attempts are low
partly by design, for the slips in the drafts that it has read (`corpus`).

Text is never evaluated by Python: a strict grammar reads it, and fractions are exact.

    python -c "import countdown; print(countdown.evaluate('(1+3/8)*8'))"

Dimension key: N problems, M numbers of each, O = M - 1 signs, P = 2**O plans (ways to set them).
"""

import hashlib
import re
from fractions import Fraction

import numpy as np

MAX_CHARS = 100  # of an expression: bounds the work, and with the next line the fractions
NUMBER = re.compile(r"0|[1-9][0-9]{0,3}")  # no leading zeros; [0-9], not every script's digits
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
MAX_NUMBERS, MAX_LARGEST = 6, 99


# --- expressions ----------------------------------------------------------------------------------


class Malformed(ValueError):
    """A text is not an expression; the message says where it stops being one."""


def evaluate(text: str) -> tuple[list[int], Fraction | None]:
    """Return the numbers of an expression, in order, and its exact value, None if it divides by 0.

    expression = operand, or expression operator expression, with * and / before + and -, and equals
    from the left; operand = number, or ( expression ). There are no signs before a number, no
    spaces, and no product without its *.

    Raises:
      Malformed: the text is longer than MAX_CHARS, or not of this form to its last character.

    >>> evaluate("8-3-2*4"), evaluate("2/(4-4)")
    (([8, 3, 2, 4], Fraction(-3, 1)), ([2, 4, 4], None))
    """
    if len(text) > MAX_CHARS:
        raise Malformed(f"more than {MAX_CHARS} characters")
    numbers, values, waiting = [], [], []  # waiting: operators and brackets without a right side

    def settle(precedence):
        """Compute what binds at least as closely as the operator that comes next."""
        while waiting and PRECEDENCE.get(waiting[-1], 0) >= precedence:
            right = values.pop()
            values[-1] = apply(waiting.pop(), values[-1], right)

    operand_due = True
    for match in re.finditer(r"[0-9]+|.", text, re.DOTALL):
        token = match[0]
        if operand_due and NUMBER.fullmatch(token):
            numbers.append(int(token))
            values.append(Fraction(int(token)))
            operand_due = False
        elif operand_due and token == "(":
            waiting.append(token)
        elif not operand_due and token in PRECEDENCE:
            settle(PRECEDENCE[token])
            waiting.append(token)
            operand_due = True
        elif not operand_due and token == ")" and "(" in waiting:
            settle(1)
            waiting.pop()
        else:
            raise Malformed(f"unexpected {token[:10]!r} at character {match.start() + 1}")
    if operand_due or "(" in waiting:
        raise Malformed("ends too early")
    settle(1)
    return numbers, values[0]


def apply(operator: str, a: Fraction | None, b: Fraction | None) -> Fraction | None:
    """Return a operator b; None if there is no such number."""
    if a is None or b is None or (operator == "/" and b == 0):
        return None
    if operator == "+":
        return a + b
    if operator == "-":
        return a - b
    return a * b if operator == "*" else a / b


# --- the problems ---------------------------------------------------------------------------------


def plans(M: int) -> np.ndarray:
    """Return all ways to set the signs of M numbers but the first: bool [P, O], True for minus.

    >>> plans(3).astype(int).tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    return (np.arange(2 ** (M - 1))[:, None] >> np.arange(M - 1) & 1).astype(bool)


def values(x_NM: np.ndarray) -> np.ndarray:
    """Return the value of every plan, [N, P]."""
    sign_PO = 1 - 2 * plans(x_NM.shape[1]).astype(int)
    return x_NM[:, :1] + x_NM[:, 1:] @ sign_PO.T


def split_of(numbers: list[int], target: int, split_seed: int = 0) -> str:
    """Return a problem's split: "test" (10 %), "dev" (10 %) or "train" (80 %).

    The split is a hash of the target and the numbers whatever their order, so that no problem
    leaks into another split with its numbers shuffled.
    """
    text = f"{split_seed} {sorted(numbers)} {target}"
    bucket = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) % 10
    return {0: "test", 1: "dev"}.get(bucket, "train")


def draw(
    n: int, split: str, rng: np.random.Generator, M: int, largest: int, split_seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw n problems of one split: numbers [N, M], uniform in 1 to `largest`, and targets [N],
    each the value of a random plan, and not negative.

    Raises:
      ValueError: a value is out of range, or the split holds (almost) no problem of this size.
    """
    if not (2 <= M <= MAX_NUMBERS and 1 <= largest <= MAX_LARGEST):
        raise ValueError(f"a problem has 2 to {MAX_NUMBERS} numbers of 1 to {MAX_LARGEST}, "
                         f"got {M} of 1 to {largest}")  # fmt: skip
    if split not in ("train", "dev", "test"):
        raise ValueError(f"split must be 'train', 'dev' or 'test', got {split!r}")
    found = []
    for _ in range(100):
        size = (2 if split == "train" else 16) * (n - len(found))
        x_NM = rng.integers(1, largest + 1, (size, M))
        target_N = values(x_NM)[np.arange(size), rng.integers(0, 2 ** (M - 1), size)]
        drawn = zip(x_NM.tolist(), target_N.tolist(), strict=True)
        found += [(x, t) for x, t in drawn if t >= 0 and split_of(x, t, split_seed) == split]
        if len(found) >= n:
            x, target = zip(*found[:n], strict=True)
            return np.array(x), np.array(target)
    raise ValueError(f"found only {len(found)} of {n} problems of {M} numbers up to {largest} "
                     f"in split {split!r}")  # fmt: skip


def prompt(numbers: list[int], target: int, largest: int) -> str:
    """Return a problem's text; the target has as many digits in all problems of this size.

    >>> prompt([3, 8, 3], 8, largest=9)
    '3 8 3:08='
    """
    width = len(str(len(numbers) * largest))
    return f"{' '.join(map(str, numbers))}:{target:0{width}d}="


def expression(numbers: list[int], minus: list[bool]) -> str:
    """Return a plan as text.

    >>> expression([3, 8, 3], [False, True])
    '3+8-3'
    """
    rest = zip(numbers[1:], minus, strict=True)
    return str(numbers[0]) + "".join(f"{'-' if sign else '+'}{x}" for x, sign in rest)


def lengths(M: int, largest: int) -> tuple[int, int]:
    """Return the most characters of a prompt and of a plan."""
    most = [largest] * M
    return len(prompt(most, 0, largest)), len(expression(most, [True] * (M - 1)))


def problems(
    n: int, split: str, rng: np.random.Generator, M: int, largest: int, split_seed: int = 0
) -> list[tuple[str, str]]:
    """Draw n problems of one split, with repetition: (prompt, a right answer) each.

    >>> problems(1, "train", np.random.default_rng(0), 4, 9)
    [('8 6 5 3:10=', '8-6+5+3')]
    """
    x_NM, target_N = draw(n, split, rng, M, largest, split_seed)
    minus_NO = plans(M)[(values(x_NM) == target_N[:, None]).argmax(axis=1)]
    rows = zip(x_NM.tolist(), target_N.tolist(), minus_NO.tolist(), strict=True)
    return [(prompt(x, t, largest), expression(x, minus)) for x, t, minus in rows]


# --- what the base model has read -----------------------------------------------------------------


def corpus(
    n: int,
    rng: np.random.Generator,
    M: int,
    largest: int,
    *,
    forget: float,
    lose: float,
    right_revision: float,
    copy: float,
    split_seed: int = 0,
) -> list[tuple[str, str, str]]:
    """Draw n documents (prompt, draft, revision) that teach the base model to draft and revise.

    A draft is the first right plan in the order of `plans`, with slips: every sign is turned with
    probability `forget`, but a minus before a number that is larger than the one on its left with
    probability `lose`, as people like to take the smaller from the larger. With forget < 0.5 < lose
    a trained model's greedy draft is wrong where the right plan has such a minus.

    Args:
      right_revision, copy: probabilities of a right revision, which turns as few signs of the draft
        as can be (none if it is right), and of a copy of the draft; the remaining revisions are
        careless: the first right plan with each sign turned with probability 0.15.
    """
    x_NM, target_N = draw(n, "train", rng, M, largest, split_seed)
    plan_PO = plans(M)
    solves_NP = values(x_NM) == target_N[:, None]
    first_NO = plan_PO[solves_NP.argmax(axis=1)]
    hard_NO = first_NO & (x_NM[:, 1:] > x_NM[:, :-1])
    draft_NO = first_NO ^ (rng.random(first_NO.shape) < np.where(hard_NO, lose, forget))
    turns_NP = (draft_NO[:, None, :] != plan_PO).sum(axis=2)
    right_NO = plan_PO[np.where(solves_NP, turns_NP, M).argmin(axis=1)]
    careless_NO = first_NO ^ (rng.random(first_NO.shape) < 0.15)
    kind_N1 = rng.random((n, 1))
    revision_NO = np.where(kind_N1 < right_revision + copy, draft_NO, careless_NO)
    revision_NO = np.where(kind_N1 < right_revision, right_NO, revision_NO)
    columns = (x_NM, target_N, draft_NO, revision_NO)
    return [
        (prompt(x, t, largest), expression(x, draft), expression(x, revision))
        for x, t, draft, revision in zip(*(column.tolist() for column in columns), strict=True)
    ]
