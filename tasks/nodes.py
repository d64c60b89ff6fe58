"""What is an answer once it is read? Plain data, and arithmetic that is exact and bounded.

A node is a Fraction, or a tuple that starts with its kind:
    ("sym", name) ("const", "pi" | "e" | "i" | "oo") ("add" | "mul", x, y, ...) ("pow", x, y)
    ("fn", name, x, ...) ("call", name, x) ("pm", x, sign)    numbers and expressions
    ("percent", x) ("unit", x, name) ("base", digits, b)     marked numbers
    ("list", x, ...) ("set", x, ...) ("seq", "[", x, ..., ")") ("ratio", x, ...)
    ("union", x, ...) ("matrix", row, ...) ("rel", (op, ...), x, y, ...)

Sums, products and whole powers of numbers are worked out here, on fractions and never on floats;
how large a power or a factorial is, is known before it is taken. Roots and what holds a letter stay
expressions, for `algebra`.
"""

import functools
import math
import re
from fractions import Fraction

MAX_BITS = 60_000  # of a numerator or denominator
SCALARS = ("sym", "call", "const", "add", "mul", "pow", "fn", "pm")


class Unreadable(ValueError):
    """The text is not an answer that the parser knows, or is too large; the message says why."""


def kind(x) -> str:
    """Return what a node is: "number" (also with variables), "list", "set", "rel", ..."""
    return "number" if isinstance(x, Fraction) or x[0] in SCALARS else x[0]


def scalar(x):
    if kind(x) != "number":
        raise Unreadable(f"arithmetic on a {kind(x)}")
    return x


def is_equation(x) -> bool:
    return kind(x) == "rel" and x[1] == ("=",)


def has_symbol(x) -> bool:
    return isinstance(x, tuple) and (x[0] == "sym" or any(has_symbol(part) for part in x[1:]))


def is_known(x) -> bool:
    """Is it a number, or made of numbers: without names, ratios, and logarithms of no base?"""
    if not isinstance(x, tuple):
        return True
    unknown = x[0] in ("sym", "call", "ratio") or x[:2] in (("fn", "log"), ("fn", "prime"))
    return not unknown and all(map(is_known, x[1:]))


def is_name(x) -> bool:
    """Is it x, f(x), the segments AB, AB/CD or |AB|, V_1 : V_2, or (x, y)?

    It is not -x, 1/x, x^2, xy or sin x, whose value is another thing than that of x.
    """
    match x:
        case ("sym" | "call", *_):
            return True
        case ("fn", "abs", inside):
            return is_segment(inside)
        case ("mul", top, ("pow", bottom, -1)):
            return is_segment(top) and is_segment(bottom)
        case ("ratio" | "seq", *parts):
            names = [part for part in parts if not isinstance(part, str)]  # without the brackets
            in_order = names == sorted(names, key=repr)  # (y, x) = (1, 2) does not say (1, 2)
            return len(names) > 1 and in_order and all(map(is_name, names))
    return False


def is_segment(x) -> bool:
    return isinstance(x, tuple) and x[0] == "sym" and x[1][0].isupper()


def number(text: str) -> Fraction:
    r"""Return the exact value of a literal: digits, decimals, 1.2e-3, 0.1\overline{6}."""
    if len(text) > 1000:
        raise Unreadable("a number of more than 1000 characters")
    if "overline" in text:
        whole, fixed, cycle = re.fullmatch(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}", text).groups()
        nines = (10 ** len(cycle) - 1) * 10 ** len(fixed)
        return Fraction(f"{whole or 0}.{fixed or 0}") + Fraction(int(cycle), nines)
    if abs(int(text.lower().partition("e")[2] or 0)) > 1000:
        raise Unreadable("an exponent above 1000")
    return Fraction(text)


def bits(x: Fraction) -> int:
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def bounded(x: Fraction) -> Fraction:
    if bits(x) > MAX_BITS:
        raise Unreadable("a number is too large")
    return x


def are_numbers(*xs) -> bool:
    return all(isinstance(x, Fraction) for x in xs)


def add(a, b):
    if are_numbers(a, b):
        return bounded(a + b)
    return b if a == 0 else a if b == 0 else flat("add", a, b)


def mul(a, b):
    if are_numbers(a, b):
        return bounded(a * b)
    return b if a == 1 else a if b == 1 else flat("mul", a, b)


def flat(kind: str, a, b):
    """Return the node of a sum or product: a long one is wide, not deep, to recurse into."""
    return (kind, *(a[1:] if isinstance(a, tuple) and a[0] == kind else (a,)), b)


def negative(a):
    return mul(Fraction(-1), a)


def power(a, b):
    """Return a to the power b: a Fraction if a is one and b an integer, else a node."""
    if a == 0 and isinstance(b, Fraction) and b <= 0:
        raise Unreadable("division by zero, or 0 to the power 0")
    if not are_numbers(a, b):
        return a if b == 1 else ("pow", a, b)
    if b.denominator != 1 and a not in (0, 1):
        return ("pow", a, b)
    if abs(a) in (0, 1):
        return a if b.numerator % 2 else a * a
    if abs(b.numerator) * max(bits(a) - 1, 1) > MAX_BITS:
        raise Unreadable("a power is too large")
    return a**b.numerator


def whole(name: str, n, *k):
    """Return the node of n! or of n over k."""
    if not are_numbers(n, *k):
        return ("fn", name, n, *k)
    if any(x.denominator != 1 for x in (n, *k)) or not 0 <= (k or (n,))[0] <= n <= 3000:
        raise Unreadable(f"{name} of numbers that are not integers from 0 to 3000")
    return Fraction((math.comb if k else math.factorial)(*map(int, (n, *k))))


def times(x, y):
    """Return x y; a mark on the last factor, as the unit in 5 sqrt 3 cm, is one of the product."""
    if kind(y) in ("unit", "percent"):
        return (y[0], mul(scalar(x), y[1]), *y[2:])
    return mul(scalar(x), scalar(y))


def function(name: str, x, base=None):
    if name == "abs" and are_numbers(x):
        return abs(x)
    if name == "exp":
        return power(("const", "e"), x)
    if name == "log" and base is not None:
        return mul(("fn", "ln", x), power(("fn", "ln", scalar(base)), Fraction(-1)))
    return ("fn", name, x)


def mixed(whole: Fraction, top: Fraction, bottom: Fraction) -> Fraction:
    """Return 5/2 for 2 1/2."""
    if not 0 <= top < bottom or top.denominator != 1 or bottom.denominator != 1:
        raise Unreadable("a mixed number with an improper fraction")
    return bounded(whole + top / bottom)


def modulo(a, b):
    if not are_numbers(a, b) or b <= 0:
        raise Unreadable("mod of what are not numbers")
    return a % b


def relate(sides: list, signs: list[str]):
    """Return the node of "a = b", "a < b <= c", "x in S"; of a = b = 5 only its ends are kept."""
    if not signs:
        return sides[0]
    if set(signs) <= {"=", "~"}:
        while signs[-1] == "~" and not (len(signs) == 1 and is_name(sides[0])):
            sides, signs = sides[:-1], signs[:-1]  # "x = 1/3 ~ 0.33" says 1/3, "x ~ 11" says 11
            if not signs:
                return sides[0]
        if len(sides) > 2 and has_symbol(sides[-1]):
            return ("rel", ("=",) * len(signs), *sides)  # x = y = z
        return ("rel", ("=",), sides[0], sides[-1])
    if set(signs) <= {">", ">="}:
        sides, signs = sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    if set(signs) <= {"<", "<="} or signs in (["!="], ["in"]):
        return ("rel", tuple(signs), *sides)
    raise Unreadable(f"a chain of {' '.join(signs)}")


def both_signs(x) -> list:
    """Return [x], or, if it holds a ±, x with the upper signs and x with the lower ones."""
    upper, lower = choose_sign(x, "pm"), choose_sign(x, "mp")
    return [x] if upper is x else [upper, lower]


def choose_sign(x, plus: str):
    if not isinstance(x, tuple):
        return x
    if x[0] == "pm":
        inside = choose_sign(x[1], plus)
        return inside if x[2] == plus else negative(inside)
    parts = tuple(choose_sign(part, plus) for part in x)
    if all(new is old for new, old in zip(parts, x, strict=True)):
        return x
    fold = {"add": add, "mul": mul, "pow": power}.get(x[0])
    return functools.reduce(fold, parts[1:]) if fold else parts
