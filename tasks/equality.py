r"""Do two answers say the same? First by their form, then exactly, at last by a proof.

Both are read by `latex`. Numbers are compared as fractions, lists and intervals item by item; where
that does not decide, `algebra` looks for a proof that a difference is zero. What the sources leave
open is decided in a table in tasks/README.md.

    python -c "from tasks import equality; print(equality.same(r'\frac{\sqrt{8}}{4}', r'1/\sqrt2'))"
"""

import re
import time
from fractions import Fraction

from tasks import algebra, nodes
from tasks.latex import Parser
from tasks.nodes import add, are_numbers, has_symbol, is_equation, is_name, kind, mul, negative

SURE_DIGITS = 12  # a decimal of so many significant digits stands for what it rounds
MARKED = ("rel", "percent", "base", "unit")  # kinds that what has no such mark may equal


def same(a: str, b: str, timeout: float = 2.0) -> bool:
    r"""Return whether two answers are equal, by the policies of `answers`. Symmetric. Unreadable if
    one of them is not known here, algebra.TimedOut if sympy did not decide in time.

    >>> same("0.5", r"\frac{2}{4}"), same("(0,1)", "[0,1)"), same("x=3", "3")
    (True, False, True)
    """
    deadline = time.monotonic() + timeout
    x, y = read(a, deadline), read(b, deadline)
    if equal(x, y, deadline):
        return True
    half_a, half_b = last_place(a), last_place(b)
    if half_a and half_b:  # two decimals say what their digits are
        return False
    return near(x, y, half_a, deadline) or near(y, x, half_b, deadline)


def read(text: str, deadline: float):
    """Return the node of an answer. Unreadable if it says of numbers that differ that they are
    equal: 5 = 6. A decimal may round the number before it: 1/3 = 0.33."""
    parser = Parser(text)
    x = parser.answer()
    for claim in parser.claims:
        for _, a, b, written in nodes.both_signs(("claim", *claim)):
            rounds = near(b, a, last_place(written, 1), deadline)
            if not (rounds or converts(a, b) or equal(a, b, deadline)):
                raise nodes.Unreadable(f"{written[:40]} does not equal what stands before it")
    return x


def converts(a, b) -> bool:
    """Does the unit or base change? As in 1 h = 60 min and 1011_2 = 11, but not in 6 = 6 cm."""
    old, new = (x[2] if kind(x) in ("unit", "base") else None for x in (a, b))
    return old != new and (old is not None or new == "degree" or kind(b) == "base")


def near(decimal, other, half: Fraction | None, deadline: float) -> bool:
    if half is None or kind(other) != "number":
        return False
    if isinstance(other, Fraction):
        return other.denominator != 1 and abs(decimal - other) <= half
    return algebra.ask("near", decimal, other, deadline, half)


def last_place(text: str, digits: int = SURE_DIGITS) -> Fraction | None:
    """Return half a unit in the last place of a decimal with at least so many digits, or None."""
    match = re.fullmatch(
        r"\s*-?\s*(\d*)\.(\d+)(?:\s*\\(?:times|cdot)\s*10\s*\^\s*(?:\{\s*(-?\d{1,3})\s*\}|(-?\d{1,3})))?\s*",
        text, re.ASCII,
    )  # fmt: skip
    if not match or len((match[1] + match[2]).lstrip("0")) < digits:
        return None
    return Fraction(10) ** (int(match[3] or match[4] or 0) - len(match[2])) / 2


def equal(x, y, deadline: float) -> bool:
    """Return whether two nodes say the same."""
    if x == y:
        return True
    kinds = kind(x), kind(y)
    for mark in MARKED:
        if mark in kinds:
            return marked(x, y, deadline) if kinds[0] == mark else marked(y, x, deadline)
    if set(kinds) <= {"list", "set"}:
        if not any(map(is_equation, x[1:])) or not any(map(is_equation, y[1:])):
            x, y = drop_names(x), drop_names(y)
        return matched(x[1:], y[1:], deadline)
    if kinds[0] != kinds[1] or are_numbers(x, y):
        return False
    if kinds[0] == "union":
        return matched(x[1:], y[1:], deadline)
    if kinds[0] in ("seq", "matrix", "ratio"):  # brackets, too, are equal if they are the same
        return in_order(x[1:], y[1:], deadline)
    return algebra.ask("zero", x, y, deadline)


def marked(x, y, deadline) -> bool:
    """Return whether x, a node of the kinds MARKED, says what y does, with such a mark or not."""
    mark, both = kind(x), kind(y) == kind(x)
    if mark == "rel" and both:
        return same_relation(x, y, deadline)
    if mark == "rel":
        value = value_of(x)
        return value is not None and equal(value, y, deadline)
    if mark == "base":  # the digits are the answer: 12_3 may be written 12, never 5
        return x[1].isdigit() and len(x[1]) < 1000 and y == Fraction(x[1])
    if both:  # of a unit, its name must not differ
        return x[2:] == y[2:] and equal(x[1], y[1], deadline)
    if mark == "percent":
        values = (x[1], mul(x[1], Fraction(1, 100)))
        return kind(y) != "unit" and any(equal(value, y, deadline) for value in values)
    return equal(x[1], y, deadline)


def in_order(xs, ys, deadline) -> bool:
    return len(xs) == len(ys) and all(equal(x, y, deadline) for x, y in zip(xs, ys, strict=True))


def matched(xs, ys, deadline) -> bool:
    """Return whether each item has its equal on the other side: order and repetition are free."""

    def found(x, ys):  # "x = 1, y = 2" is not "2, 1": no name is dropped from a single item
        return any((kind(x) == "rel") == (kind(y) == "rel") and equal(x, y, deadline) for y in ys)

    xs, ys = dict.fromkeys(xs), dict.fromkeys(ys)
    # as many, or "10, 0.1" would be 10 %
    return len(xs) == len(ys) and all(found(x, ys) for x in xs) and all(found(y, xs) for y in ys)


def value_of(x):
    """Return the value in "x = 5", "5 = x", "2 + 3 = 5" or "x in S"; None if there is none."""
    if x[1] not in (("=",), ("in",)):
        return None
    if has_symbol(x[2]):
        return x[3] if is_name(x[2]) else None
    return x[2] if is_name(x[3]) else x[3]


def drop_names(x):
    """Return a list with "x =" dropped from its items, if all that have a name have the same."""
    named = [item for item in x[1:] if is_equation(item)]
    if not named or any(item[2] != named[0][2] or not is_name(item[2]) for item in named):
        return x
    return (x[0], *(item[3] if item in named else item for item in x[1:]))


def same_relation(x, y, deadline) -> bool:
    """Return whether two equations or inequalities differ by a factor alone (positive for < )."""
    if x[1] != y[1]:
        return False
    if in_order(x[2:], y[2:], deadline):
        return True
    if len(x[1]) > 1 or x[1] == ("in",) or {kind(part) for part in x[2:] + y[2:]} != {"number"}:
        return False
    sides = [add(part[2], negative(part[3])) for part in (x, y)]
    what = "positive factor" if x[1][0] in ("<", "<=") else "factor"
    return all(map(has_symbol, sides)) and algebra.ask(what, *sides, deadline)
