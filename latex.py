"""What does a final answer say, and do two answers say the same? LaTeX, read strictly.

A tokeniser and a recursive-descent parser turn the text of an answer into plain data: exact
fractions, tuples such as ("add", x, y), and a few shapes (list, set, interval, matrix, equation).
They raise `Unreadable` at the first thing that they do not know: nothing is guessed, nothing that a
model wrote is ever evaluated as a program. Arithmetic on fractions is exact and bounded before it
is done. Where that does not decide, `algebra` looks for a proof that a difference is zero.

    python -c "import latex; print(latex.same(r'\\frac{\\sqrt{8}}{4}', r'1/\\sqrt2'))"

A node is a Fraction, or a tuple that starts with its kind:
    ("sym", name) ("const", "pi" | "e" | "i" | "oo") ("add" | "mul", x, y, ...) ("pow", x, y)
    ("fn", name, x, ...) ("call", name, x) ("pm", x, sign)    numbers and expressions
    ("percent", x) ("unit", x, name) ("base", digits, b)     marked numbers
    ("list", x, ...) ("set", x, ...) ("seq", "[", x, ..., ")") ("ratio", x, ...)
    ("union", x, ...) ("matrix", row, ...) ("rel", (op, ...), x, y, ...)
"""

import functools
import math
import re
import time
from fractions import Fraction

import algebra

MAX_CHARS = 2000  # of an answer
MAX_DEPTH = 20  # of nested brackets, arguments and powers
MAX_TOKENS = 400
MAX_BITS = 60_000  # of a numerator or denominator; checked before a power is taken
MAX_ITEMS = 24  # of a list: lists are matched item by item
SURE_DIGITS = 12  # a decimal of so many significant digits stands for what it rounds


class Unreadable(ValueError):
    """The text is not an answer that this parser knows, or is too large; the message says why."""


# --- tokens ---------------------------------------------------------------------------------------

UNICODE = {
    "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "×": r"\times ", "·": r"\cdot ", "−": "-",
    "–": "-", "∗": "*", "÷": r"\div ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ",
    "≈": r"\approx ",
    "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "²": "^{2}",
    "³": "^{3}", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "θ": r"\theta ",
    "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "′": "'", "€": r"\text{euro}",
    "£": r"\text{sterling}", "¢": r"\text{cent}",
}  # fmt: skip
GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho "
    "sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell".split()
)
FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh exp ln log abs".split()
)
CURRENCIES = ("dollar", "euro", "sterling")  # which stand before the number, too
TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")
SAME_COMMAND = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom",
    "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=",
    "lt": "<", "gt": ">", "ne": "!=", "neq": "!=", "approx": "~", "in": "in",
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "bmod": "mod", "lvert": "|", "rvert": "|",
    "vert": "|", "mid": "|", "colon": ":", "lbrace": r"\{", "rbrace": r"\}",
    "varnothing": "emptyset",
    "lor": "and", "lbrack": "[", "rbrack": "]", "langle": "(", "rangle": ")",
    "degree": "circ", "bigcup": "cup",
}  # fmt: skip
IGNORED = set(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr quad qquad displaystyle textstyle limits "
    "nolimits mathopen mathclose angle triangle vec overrightarrow".split()
)
STYLED = (
    r"\\(?:text|mathbb|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox|operatorname\*?)"
)
UNITS = {
    "unit": "units", "square unit": "units^2", "sq unit": "units^2", "cubic unit": "units^3",
    "mm": "mm", "cm": "cm", "m": "m", "km": "km", "meter": "m", "metre": "m", "centimeter": "cm",
    "kilometer": "km", "millimeter": "mm", "in": "in", "inch": "in", "inche": "in", "ft": "ft",
    "foot": "ft", "feet": "ft", "yard": "yd", "yd": "yd", "mi": "mi", "mile": "mi", "mph": "mph",
    "mile per hour": "mph", "km/h": "km/h", "m/s": "m/s", "g": "g", "gram": "g", "kg": "kg",
    "kilogram": "kg", "lb": "lb", "pound": "lb", "ounce": "oz", "oz": "oz", "second": "s", "s": "s",
    "sec": "s", "minute": "min", "min": "min", "hour": "h", "hr": "h", "h": "h", "day": "day",
    "week": "week", "month": "month", "year": "year", "dollar": "dollar", "cent": "cent",
    "degree": "degree", "deg": "degree", "radian": "rad", "liter": "l", "gallon": "gal",
    "people": "people", "person": "people", "euro": "euro", "sterling": "sterling", "ml": "ml",
}  # fmt: skip
COUNTED = set(  # things, in the singular or what a plural is without its s
    "cup apple orange marble ball book page ticket stamp card tile block cube boxe box cookie game "
    "player team member child children adult girl boy man men woman women car tree chair table "
    "triangle circle rectangle edge face vertice vertex diagonal digit number integer factor term "
    "solution value pair combination arrangement outcome path route line word letter round lap "
    "step trip root dog cat bird fish friend worker guest calorie student way time point side "
    "square coin".split()
)

TOKEN = re.compile(
    r"(?P<space>\s+|~|\\[,;:!> ]|\$)|(?P<break>\\\\(?:\[[^\]]*\])?)|(?P<dollar>\\\$)"
    rf"|{STYLED}\s*\{{(?P<words>[^{{}}]*)\}}|\\(?P<edge>begin|end)\s*\{{(?P<name>[a-z]+)\*?\}}"
    r"|(?P<repeating>[0-9]*\.[0-9]*\\overline\s*\{[0-9]+\})"
    r"|(?P<number>[0-9]*\.[0-9]+(?:[eE][+-]?[0-9]+(?![0-9A-Za-z]))?"
    r"|[0-9]+(?:[eE][0-9]+(?![0-9A-Za-z]))?)"  # 2e-3 without a point is 2e - 3
    r"|\\(?P<command>[A-Za-z]+)|(?P<letters>[A-Za-z]+)"
    r"|(?P<op>\\[{}]|\\?%|\*\*|<=|>=|!=|[-+*/^_!'=<>(){}\[\],;:|&])"
)
LOOSE = re.compile(r"(?<=[0-9])\s*(?:,\s*\\!|\\!\s*,|\{\s*,\s*\})\s*(?=[0-9]{3})")
GROUPED = re.compile(r"[1-9][0-9]{0,2}((?:\{,\}|\\,| )[0-9]{3})+(?![0-9])(\.[0-9]+)?")
COMMAS = re.compile(r"[0-9]+(?:,[0-9]+)+(\.[0-9]+)?")
OPENING, CLOSING = ("(", "[", r"\{"), (")", "]", r"\}")


def tokens(text: str) -> list[tuple[str, str]]:
    """Return (kind, text) pairs; kinds: num, sym, cmd, unit, op, begin, end.

    Thousands are grouped here, as only here it is known whether a comma stands inside brackets,
    where it separates: "1,234" is one number, "(1,234)" a pair, "1, 234" two numbers, "1,2,345"
    three.

    >>> tokens(r"1,234\\pi"), [text for _, text in tokens("(1,234)")]
    ([('num', '1234'), ('cmd', 'pi')], ['(', '1', ',', '234', ')'])
    """
    if len(text) > MAX_CHARS:
        raise Unreadable(f"longer than {MAX_CHARS} characters")
    text = re.sub(r"√\s*([0-9]+)", r"\\sqrt{\1}", text.replace("^°", "°")).replace("√", r"\sqrt ")
    text = LOOSE.sub("{,}", "".join(UNICODE.get(letter, letter) for letter in text))
    found, at, depth = [], 0, 0
    while at < len(text):
        grouped = None
        if found[-1:] not in ([("op", "_")], [("op", "^")]):
            grouped = GROUPED.match(text, at)
            if not grouped and depth == 0 and (grouped := COMMAS.match(text, at)):
                whole = re.fullmatch(r"[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?", grouped[0])
                grouped = grouped if whole and text[at - 1 : at] != "," else None
        if grouped:
            found.append(("num", re.sub(r"[^0-9.]", "", grouped[0])))
            at = grouped.end()
            continue
        match = TOKEN.match(text, at)
        if not match:
            raise Unreadable(f"unknown character {text[at]!r}")
        new = read_token(match)
        depth += sum((text in OPENING) - (text in CLOSING) for kind, text in new if kind == "op")
        found, at = found + new, match.end()
    if len(found) > MAX_TOKENS:
        raise Unreadable(f"more than {MAX_TOKENS} tokens")
    return found


def read_token(match: re.Match) -> list[tuple[str, str]]:
    """Return the tokens of one match of TOKEN: none for a space, several for a run of letters."""
    kind, text = match.lastgroup, match[0]
    if kind == "space":
        return []
    if kind == "dollar":
        return [("unit", "dollar")]
    if kind == "break":
        return [("op", r"\\")]
    if kind == "name":
        return [(match["edge"], match["name"])]
    if kind in ("number", "repeating"):
        return [("num", text)]
    if kind == "words":
        return read_words(match["words"])
    if kind == "letters":
        if (
            len(text) in (4, 5, 6)
            and text.islower()
            and match.string[: match.start()][-1:].isdigit()
        ):
            return [token for letter in text for token in read_letters(letter)]  # 24abcd
        return read_letters(text)
    if kind == "op":
        return [("op", {"**": "^", r"\%": "%"}.get(text, text))]
    name = SAME_COMMAND.get(match["command"], match["command"])
    if name in IGNORED:
        return []
    if not name.isalpha() or name in ("in", "mod", "and"):
        return [("op", name)]
    return [("sym", name)] if name in GREEK else [("cmd", name)]


def unit(words: str) -> str | None:
    """Return the one name that a known unit has here, or None.

    >>> unit("square  inches"), unit("feet"), unit("or 6")
    ('in^2', 'ft', None)
    """
    words = [word.removesuffix(".") for word in words.lower().split()]
    words = " ".join(word[:-1] if len(word) > 3 and word[-1] == "s" else word for word in words)
    for prefix, power in (("square ", "^2"), ("sq ", "^2"), ("cubic ", "^3")):
        if words.startswith(prefix) and (name := unit(words.removeprefix(prefix))):
            return name + power
    return UNITS.get(words) or (words if words in COUNTED else None)


def read_words(words: str) -> list[tuple[str, str]]:
    r"""Return the tokens of the content of \text{...}: a separator, a symbol, a unit; or raise."""
    plain = words.strip()
    if plain.strip(", ") in ("and", "or"):
        return [("op", ",")] * plain.startswith(",") + [("op", "and")]
    if plain in ("percent", "pct", "per cent", r"\%", "%"):
        return [("op", "%")]
    if name := unit(plain):
        return [("unit", name)]
    if plain in FUNCTIONS:
        return [("cmd", plain)]
    if plain[:1].isdigit() and len(plain) > 1:  # "2 hours", "6 and 8"
        return tokens(plain)
    if len(plain) == 1 or not plain:
        return read_letters(plain) if plain.isalpha() else tokens(plain)
    raise Unreadable(f"unknown words {plain[:40]!r}")


def read_letters(run: str) -> list[tuple[str, str]]:
    """Return the tokens of a run of letters: a known name, or up to three variables, multiplied.

    Capitals together, as AB of a segment or of an order, are one name: AB is not BA.
    """
    if run in ("and", "or"):
        return [("op", "and")]
    if run in ("percent", "pct"):
        return [("op", "%")]
    if run in FUNCTIONS or run in ("sqrt", "pi"):
        return [("cmd", run)]
    if run.lower() in ("infinity", "infty", "inf", "oo"):
        return [("cmd", "infty")]
    if len(run) > 1 and (name := unit(run)):
        return [("unit", name)]
    if len(run) > 3 or re.fullmatch("[A-Z][a-z]{2}", run):
        raise Unreadable(f"unknown word {run[:40]!r}")
    if len(run) > 1 and run.isupper():
        return [("sym", run)]
    return [("cmd" if letter in "ei" else "sym", letter) for letter in run]


# --- exact arithmetic, bounded before it is done --------------------------------------------------


def bits(x: Fraction) -> int:
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def bounded(x: Fraction) -> Fraction:
    if bits(x) > MAX_BITS:
        raise Unreadable("a number is too large")
    return x


def add(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return bounded(a + b)
    return b if a == 0 else a if b == 0 else flat("add", a, b)


def mul(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return bounded(a * b)
    return b if a == 1 else a if b == 1 else flat("mul", a, b)


def flat(kind: str, a, b):
    """Return the node of a sum or product: a long one is wide, not deep, to recurse into."""
    return (kind, *(a[1:] if isinstance(a, tuple) and a[0] == kind else (a,)), b)


def negative(a):
    return mul(Fraction(-1), a)


def power(a, b):
    """Return a to the power b: a Fraction where both are and the root is exact, else a node."""
    if a == 0 and isinstance(b, Fraction) and b <= 0:
        raise Unreadable("division by zero, or 0 to the power 0")
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        return a if b == 1 else ("pow", a, b)
    if b.denominator != 1:
        root = exact_root(a, b.denominator)
        if root is None:
            return ("pow", a, b)
        a = root
    if abs(a) in (0, 1):
        return a if b.numerator % 2 else a * a
    if abs(b.numerator) * max(bits(a) - 1, 1) > MAX_BITS:
        raise Unreadable("a power is too large")
    return a**b.numerator


def exact_root(x: Fraction, n: int) -> Fraction | None:
    """Return the non-negative n-th root of x if it is a fraction, else None."""
    if x < 0 or n > 64 or bits(x) > 3000:
        return None
    parts = []
    for whole in (x.numerator, x.denominator):
        low, high = 0, 1 << (whole.bit_length() // n + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**n <= whole else (low, middle - 1)
        if low**n != whole:
            return None
        parts.append(low)
    return Fraction(*parts)


def factorial(a):
    if not isinstance(a, Fraction):
        return ("fn", "factorial", a)
    if a.denominator != 1 or not 0 <= a <= 3000:
        raise Unreadable("factorial of a number that is not an integer from 0 to 3000")
    return Fraction(math.factorial(int(a)))


def binomial(n, k):
    if not (isinstance(n, Fraction) and isinstance(k, Fraction)):
        return ("fn", "binomial", n, k)
    if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= 3000:
        raise Unreadable("binomial of numbers that are not integers, 0 <= k <= n <= 3000")
    return Fraction(math.comb(int(n), int(k)))


def number(text: str) -> Fraction:
    """Return the exact value of a literal: digits, decimals, 1.2e-3, 0.1\\overline{6}."""
    if len(text) > 1000:
        raise Unreadable("a number of more than 1000 characters")
    if "overline" in text:
        whole, fixed, cycle = re.fullmatch(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}", text).groups()
        nines = (10 ** len(cycle) - 1) * 10 ** len(fixed)
        return Fraction(f"{whole or 0}.{fixed or 0}") + Fraction(int(cycle), nines)
    mantissa, _, exponent = text.lower().partition("e")
    if abs(int(exponent or 0)) > 1000:
        raise Unreadable("an exponent above 1000")
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


# --- the parser -----------------------------------------------------------------------------------

RELATIONS = ("=", "~", "<", ">", "<=", ">=", "!=", "in")
MATRICES = ("matrix", "pmatrix", "bmatrix", "array", "smallmatrix")
SCALARS = ("sym", "call", "const", "add", "mul", "pow", "fn", "pm")


def kind(x) -> str:
    """Return what a node is: "number" (also with variables), "list", "set", "rel", ..."""
    return "number" if isinstance(x, Fraction) or x[0] in SCALARS else x[0]


def scalar(x):
    if kind(x) != "number":
        raise Unreadable(f"arithmetic on a {kind(x)}")
    return x


def is_equation(x) -> bool:
    return kind(x) == "rel" and x[1] == ("=",)


class Parser:
    """Recursive descent over `tokens`; each method reads what it is named after.

    answer    = group { (";" | "and") group } ;  group = relation { "," relation }
    relation  = union { ("=" | "<" | ...) union } ;  union = ratio { cup ratio }
    ratio     = sum { ":" sum } ;  sum = term { ("+" | "-" | pm) term }
    term      = factor { ["*" | "/" | mod] factor } ;  factor = primary { postfix }
    """

    def __init__(self, text: str):
        self.tokens, self.at, self.depth, self.bars = tokens(text), 0, 0, 0

    def peek(self, ahead: int = 0):
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else ("end of text", "")

    def take(self, *wanted: str, kind: str = "op") -> str | None:
        """Step over the next token and return its text if it is one of those wanted."""
        found = self.peek()
        if found[0] != kind or found[1] not in wanted:
            return None
        self.at += 1
        return found[1]

    def expect(self, *wanted: str, kind: str = "op") -> str:
        found = self.take(*wanted, kind=kind)
        if found is None:
            raise Unreadable(f"expected {' or '.join(wanted)}, found {self.peek()[1] or 'the end'}")
        return found

    def answer(self):
        if not self.tokens:
            raise Unreadable("empty answer")
        groups = [self.items()]
        while self.take(";", "and"):
            groups.append(self.items())
        if self.at < len(self.tokens):
            raise Unreadable(f"unexpected {self.peek()[1]!r}")
        # "p = 5, q = 2 and p = 7, q = 2" are two pairs; "1, 2 and 3" is one list
        if len(groups) > 1 and all(len(g) > 1 and is_equation(g[0]) for g in groups):
            return ("list", *(("list", *group) for group in groups))
        items = [both for group in groups for item in group for both in both_signs(item)]
        return items[0] if len(items) == 1 else ("list", *items)

    def items(self) -> list:
        """Read what commas separate."""
        found = [self.relation()]
        while self.take(","):
            if self.peek() == ("op", "and"):  # "1, 2, and 3"
                break
            found.append(self.relation())
        if len(found) > MAX_ITEMS:
            raise Unreadable(f"more than {MAX_ITEMS} items")
        return found

    def relation(self):
        sides, signs = [self.union()], []
        while self.peek()[0] == "op" and self.peek()[1] in RELATIONS:
            signs.append(self.expect(*RELATIONS))
            sides.append(self.union())
        return relate(sides, signs)

    def union(self):
        parts = [self.ratio()]
        while self.take("cup", kind="cmd"):
            parts.append(self.ratio())
        if len(parts) == 1:
            return parts[0]
        if any(kind(part) not in ("seq", "set") for part in parts):
            raise Unreadable("a union of what are not sets")
        return ("union", *parts)

    def ratio(self):
        parts = [self.sum()]
        while self.take(":"):
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else ("ratio", *map(scalar, parts))

    def sum(self):
        x = self.signed()
        while True:
            if self.take("+"):
                x = add(scalar(x), scalar(self.signed()))
            elif self.take("-"):
                x = add(scalar(x), negative(scalar(self.signed())))
            elif sign := self.take("pm", "mp", kind="cmd"):
                x = add(scalar(x), ("pm", scalar(self.term()), sign))
            else:
                return x

    def signed(self):
        if sign := self.take("pm", "mp", kind="cmd"):
            return ("pm", scalar(self.term()), sign)
        minus = False
        while sign := self.take("+", "-"):
            minus ^= sign == "-"
        x = self.term()
        if not minus:
            return x
        if kind(x) in ("percent", "unit"):
            return (x[0], negative(x[1]), *x[2:])
        return negative(scalar(x))

    def term(self):
        x = self.factor()
        while True:
            if self.take("*"):
                x = times(x, self.after_sign())
            elif self.take("/"):
                x = mul(scalar(x), power(scalar(self.after_sign()), Fraction(-1)))
            elif self.take("mod"):
                x = modulo(x, self.factor())
            elif self.starts_factor():
                x = times(x, self.factor())
            else:
                return x

    def after_sign(self):
        if not self.take("-"):
            return self.factor()
        return negative(scalar(self.factor()))

    def starts_factor(self) -> bool:
        """Is the next token a factor that is multiplied without a sign?"""
        kind, text = self.peek()
        if kind == "num":  # "2^6 3^5" and "(2) 3", but never "2 3"
            power_before = self.tokens[max(self.at - 2, 0) : self.at - 1] == [("op", "^")]
            return power_before or self.tokens[self.at - 1] in (("op", ")"), ("op", "}"))
        if kind == "cmd":
            return text in FUNCTIONS or text in PRIMARIES
        return kind == "sym" or (
            kind == "op" and (text in ("(", "{") or text == "|" and not self.bars)
        )

    def factor(self):
        x, raised, start = self.primary(), False, self.at
        while True:
            if self.at - start > 12 and self.peek()[1] in ("!", "'"):  # they nest without brackets
                raise Unreadable("too many signs after a factor")
            if self.take("^"):
                if raised:
                    raise Unreadable("two exponents in a row")
                raised = True
                if self.take("circ", kind="cmd") or self.take_braced("circ"):
                    x = ("unit", scalar(x), "degree")
                else:
                    x = power(scalar(x), scalar(self.exponent()))
            elif self.take("!"):
                if self.peek() == ("op", "!"):
                    raise Unreadable("a double factorial")
                x = factorial(scalar(x))
            elif self.take("%"):
                x = ("percent", scalar(x))
            elif self.take("circ", kind="cmd"):
                x = ("unit", scalar(x), "degree")
            elif self.take("'"):
                primes = 1
                while self.take("'"):
                    primes += 1
                x = ("fn", f"prime {primes}", scalar(x))
            elif self.peek()[0] == "unit":
                x = ("unit", scalar(x), self.unit_name())
            else:
                return x

    def unit_name(self) -> str:
        name = self.tokens[self.at][1]
        self.at += 1
        if self.take("^"):
            size = self.argument()
            if size not in (2, 3):
                raise Unreadable("a unit to a power that is not 2 or 3")
            name += f"^{size}"
        return name

    def take_braced(self, command: str) -> bool:
        found = self.tokens[self.at : self.at + 3]
        if found == [("op", "{"), ("cmd", command), ("op", "}")]:
            self.at += 3
            return True
        return False

    def exponent(self):
        """Read what follows ^: {x}, (x), a letter, a command, or a whole number, as in 2^10."""
        minus = self.take("-")
        if self.peek()[0] == "num":
            x = number(self.tokens[self.at][1])
            self.at += 1
        else:
            x = scalar(self.argument())
        return negative(x) if minus else x

    def argument(self):
        """Read the argument of a command: {x}, or one token, of a number its first digit."""
        kind, text = self.peek()
        if kind == "num":
            if not text.isdigit():
                raise Unreadable("a decimal as an argument, without braces")
            self.tokens[self.at : self.at + 1] = [("num", text[1:])] * (len(text) > 1)
            return Fraction(int(text[0]))
        if self.take("{"):
            return self.bracketed("{")
        return self.primary()

    def bracketed(self, opening: str):
        """Read on to the closing bracket: a group, a tuple, an interval or a set."""
        bars, self.bars = self.bars, 0
        if opening == r"\{" and self.take(r"\}"):
            items, closing = [], r"\}"
        else:
            items = self.items()
            while self.take(";"):
                items += self.items()
            closing = self.expect(*{"{": "}", r"\{": [r"\}"]}.get(opening, (")", "]")))
        self.bars = bars
        if opening == r"\{" or (opening == "{" and len(items) > 1):
            return ("set", *(both for item in items for both in both_signs(item)))
        if len(items) == 1 and (opening + closing in ("()", "{}") or kind(items[0]) == "matrix"):
            return items[0]
        return ("seq", opening, *items, closing)

    def primary(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"nested more than {MAX_DEPTH} deep")
        x = self.unbounded_primary()
        self.depth -= 1
        return x

    def unbounded_primary(self):
        kind, text = self.peek()
        self.at += 1
        if kind == "num":
            return self.after_number(text)
        if kind == "sym":
            return self.symbol(text)
        if kind == "unit" and text in CURRENCIES:
            return ("unit", scalar(self.factor()), text)
        if kind == "begin":
            return self.matrix(text)
        if kind == "op" and text in ("(", "[", r"\{", "{"):
            return self.bracketed(text)
        if kind == "op" and text == "|":
            self.bars += 1
            inside = scalar(self.sum())
            self.expect("|")
            self.bars -= 1
            return absolute(inside)
        if kind == "cmd" and text in FUNCTIONS:
            return self.function(text)
        if kind == "cmd" and text in PRIMARIES:
            return PRIMARIES[text](self)
        raise Unreadable(f"unexpected {text or 'end'!r}")

    def after_number(self, text: str):
        """Read on after a literal: 12_3 in another base, or the fraction of a mixed number."""
        if self.take("_"):
            base = self.argument()
            if not isinstance(base, Fraction) or base not in range(2, 37) or not text.isdigit():
                raise Unreadable("a base that is not an integer from 2 to 36")
            if int(max(text)) >= base:
                raise Unreadable(f"{text[:40]} is not a number in base {base}")
            return ("base", text.lstrip("0"), int(base))
        x = number(text)
        if x.denominator != 1:
            return x
        if self.peek() == ("cmd", "frac"):
            start, before = self.at, list(self.tokens)
            self.at += 1
            top, bottom = self.argument(), self.argument()
            if isinstance(top, Fraction) and isinstance(bottom, Fraction) and 0 <= top < bottom:
                return bounded(x + top / bottom)
            if isinstance(top, Fraction) and isinstance(bottom, Fraction):
                raise Unreadable("a mixed number with an improper fraction")
            self.at, self.tokens = start, before
        found = self.tokens[self.at : self.at + 3]
        if [kind for kind, _ in found] == ["num", "op", "num"] and found[1][1] == "/":
            top, bottom = number(found[0][1]), number(found[2][1])
            if not 0 < top < bottom or top.denominator != 1 or bottom.denominator != 1:
                raise Unreadable("a mixed number with an improper fraction")
            self.at += 3
            return x + top / bottom
        return x

    def symbol(self, name: str):
        """Read on after a letter: its subscript; or f(2), A(x), a function's value."""
        after_digit = self.at > 1 and self.tokens[self.at - 2][0] == "num"
        subscript = self.subscript()
        if after_digit and name.isupper() and subscript.strip("_").isdigit():
            raise Unreadable("a number whose digits go beyond 9")
        inverse = [("op", "^"), ("op", "{"), ("op", "-"), ("num", "1"), ("op", "}"), ("op", "(")]
        function = name in "fghpq" or name.isupper()
        name += subscript
        if function and self.tokens[self.at : self.at + 6] == inverse:
            self.at, name = self.at + 5, name + " inverse"
        found = self.tokens[self.at : self.at + 3]
        if function and len(found) == 3:
            if [found[0], found[2]] == [("op", "("), ("op", ")")] and found[1][0] in ("num", "sym"):
                self.at += 3
                inside = found[1][1] if found[1][0] == "num" else ("sym", found[1][1])
                return ("call", name, number(inside) if isinstance(inside, str) else inside)
        return ("sym", name)

    def subscript(self) -> str:
        """Return what stands after _, as text, or nothing."""
        if not self.take("_"):
            return ""
        if not self.take("{"):
            self.at += 1
            return f"_{self.peek(-1)[1]}"
        start = self.at
        while not self.take("}"):
            if self.peek()[0] not in ("num", "sym", "cmd", "op") or self.peek()[1] in "{^":
                raise Unreadable("a subscript that is not simple")
            self.at += 1
        return "_" + "".join(text for _, text in self.tokens[start : self.at - 1])

    def matrix(self, name: str):
        if name not in MATRICES:
            raise Unreadable(f"unknown environment {name!r}")
        if name == "array" and self.take("{"):
            while not self.take("}"):
                if self.peek()[0] not in ("sym", "op"):
                    raise Unreadable("columns of an array that are not simple")
                self.at += 1
        rows, row = [], []
        while not self.take(name, kind="end"):
            row.append(scalar(self.sum()))
            if self.take(r"\\"):
                rows, row = [*rows, ("list", *row)], []
            elif self.peek() != ("end", name):
                self.expect("&")
        rows += [("list", *row)] * bool(row)
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("rows of a matrix that differ in length")
        return ("matrix", *rows)

    def function(self, name: str):
        r"""Read a function's argument: sin(x), \sin x, \sin^2 x, \log_2 x, \sin^{-1} x."""
        base = self.argument() if name == "log" and self.take("_") else None
        size = scalar(self.exponent()) if self.take("^") else None
        if self.take("("):
            inside = self.bracketed("(")
        elif self.take("{"):
            inside = self.bracketed("{")
        else:  # \sin 2x: up to the next sign or function
            inside = self.factor()
            while self.starts_factor() and self.peek()[1] not in FUNCTIONS:
                inside = mul(scalar(inside), scalar(self.factor()))
        if size == -1 and name in ("sin", "cos", "tan", "cot"):
            name, size = "arc" + name, None
        if isinstance(size, Fraction) and size < 0:
            raise Unreadable(f"{name} to a negative power")
        if kind(inside) == "unit" and inside[2] == "degree" and name[:3] in TRIGONOMETRIC:
            inside = mul(inside[1], mul(("const", "pi"), Fraction(1, 180)))
        x = function(name, scalar(inside), base)
        return x if size is None else power(x, size)

    def fraction(self):
        top, bottom = scalar(self.argument()), scalar(self.argument())
        return mul(top, power(bottom, Fraction(-1)))

    def root(self):
        index = Fraction(2)
        if self.take("["):
            index = self.signed()
            self.expect("]")
        if self.peek()[0] == "num" and len(self.peek()[1]) > 1:
            raise Unreadable("a root of several digits without braces")
        x = scalar(self.argument())
        if isinstance(x, Fraction) and x < 0 and isinstance(index, Fraction) and index % 2 == 1:
            return negative(power(-x, 1 / index))  # the real root, as schools have it
        return power(x, power(scalar(index), Fraction(-1)))

    def binomial(self):
        return binomial(scalar(self.argument()), scalar(self.argument()))

    def rounded(self, name: str):
        inside = self.sum()
        self.expect("r" + name, kind="cmd")
        if isinstance(inside, Fraction):
            return Fraction(math.floor(inside) if name == "floor" else math.ceil(inside))
        return ("fn", name, scalar(inside))

    def segment(self):
        self.expect("{")
        start = self.at
        while self.peek()[0] == "sym":
            self.at += 1
        name = "".join(text for _, text in self.tokens[start : self.at])
        self.expect("}")
        return ("sym", f"overline {name}")


PRIMARIES = {
    "frac": Parser.fraction, "sqrt": Parser.root, "binom": Parser.binomial,
    "overline": Parser.segment, "pi": lambda _: ("const", "pi"), "e": lambda _: ("const", "e"),
    "i": lambda _: ("const", "i"), "infty": lambda _: ("const", "oo"),
    "emptyset": lambda _: ("set",), "lfloor": lambda self: self.rounded("floor"),
    "lceil": lambda self: self.rounded("ceil"),
}  # fmt: skip


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


def times(x, y):
    """Return x y; a mark on the last factor, as the unit in 5 sqrt 3 cm, is one of the product."""
    if kind(y) in ("unit", "percent"):
        return (y[0], mul(scalar(x), y[1]), *y[2:])
    return mul(scalar(x), scalar(y))


def absolute(x):
    return abs(x) if isinstance(x, Fraction) else ("fn", "abs", x)


def modulo(a, b):
    if not (isinstance(a, Fraction) and isinstance(b, Fraction) and b > 0):
        raise Unreadable("mod of what are not numbers")
    return a % b


def function(name: str, x, base):
    if name == "abs":
        return absolute(x)
    if name == "exp":
        return power(("const", "e"), x)
    if name == "log" and base is not None:
        return mul(("fn", "ln", x), power(("fn", "ln", scalar(base)), Fraction(-1)))
    return ("fn", name, x)


def parse(text: str):
    """Return the node of an answer without dollar signs around it.

    Raises:
      Unreadable: with the first thing that is not known.

    >>> parse(r"2\\frac12"), parse("x^2=-1")[2]
    (Fraction(5, 2), ('pow', ('sym', 'x'), Fraction(2, 1)))
    """
    return Parser(text).answer()


# --- do two answers say the same? -----------------------------------------------------------------


def same(a: str, b: str, timeout: float = 2.0) -> bool:
    """Return whether two answers are equal, by the policies of `verify.math`. Symmetric.

    Raises:
      Unreadable: one of them is not known here. algebra.TimedOut: sympy did not decide in time.

    >>> same("0.5", r"\\frac{2}{4}"), same("(0,1)", "[0,1)"), same("x=3", "3")
    (True, False, True)
    """
    deadline = time.monotonic() + timeout
    x, y = parse(a), parse(b)
    if equal(x, y, deadline):
        return True
    halves = sure_decimal(a), sure_decimal(b)
    if (halves[0] is None) == (halves[1] is None):
        return False
    half, decimal, other = (halves[0], x, y) if halves[1] is None else (halves[1], y, x)
    if isinstance(other, Fraction):
        return other.denominator != 1 and abs(decimal - other) <= half
    return other[0] in SCALARS and algebra.ask("near", decimal, other, half, deadline)


def sure_decimal(text: str) -> Fraction | None:
    """Return half a unit in the last place of a decimal with at least SURE_DIGITS digits, or None.

    >>> sure_decimal("0.333333333333"), sure_decimal("0.3333")
    (Fraction(1, 2000000000000), None)
    """
    match = re.fullmatch(
        r"\s*-?\s*(\d*)\.(\d+)(?:\s*\\(?:times|cdot)\s*10\s*\^\s*(?:\{\s*(-?\d{1,3})\s*\}|(-?\d{1,3})))?\s*",
        text, re.ASCII,
    )  # fmt: skip
    if not match or len((match[1] + match[2]).lstrip("0")) < SURE_DIGITS:
        return None
    return Fraction(10) ** (int(match[3] or match[4] or 0) - len(match[2])) / 2


def equal(x, y, deadline: float) -> bool:
    """Return whether two nodes say the same."""
    if x == y:
        return True
    kinds = kind(x), kind(y)
    if "rel" in kinds:
        if kinds[0] == kinds[1]:
            return same_relation(x, y, deadline)
        relation, other = (x, y) if kinds[0] == "rel" else (y, x)
        value = value_of(relation)
        return value is not None and equal(value, other, deadline)
    if "percent" in kinds:
        if kinds[0] == kinds[1]:
            return equal(x[1], y[1], deadline)
        marked, plain = (x, y) if kinds[0] == "percent" else (y, x)
        if kind(plain) == "unit":
            return False
        hundredth = mul(marked[1], Fraction(1, 100))
        return equal(marked[1], plain, deadline) or equal(hundredth, plain, deadline)
    if "base" in kinds:  # the digits are the answer: 12_3 may be written 12, never 5
        digits, other = (x[1], y) if kinds[0] == "base" else (y[1], x)
        return digits.isdigit() and len(digits) < 1000 and other == Fraction(digits)
    if "unit" in kinds:
        if kinds[0] == kinds[1]:
            return x[2] == y[2] and equal(x[1], y[1], deadline)
        return equal(x[1] if kinds[0] == "unit" else x, y[1] if kinds[1] == "unit" else y, deadline)
    if set(kinds) <= {"list", "set"}:
        if not any(map(is_equation, x[1:])) or not any(map(is_equation, y[1:])):
            x, y = drop_names(x), drop_names(y)
        return matched(x[1:], y[1:], deadline)
    if kinds[0] != kinds[1] or (kinds[0] != "number" and len(x) != len(y)):
        return False
    if kinds[0] == "seq":
        return (x[1], x[-1]) == (y[1], y[-1]) and in_order(x[2:-1], y[2:-1], deadline)
    if kinds[0] == "union":
        return matched(x[1:], y[1:], deadline)
    if kinds[0] == "matrix":
        return all(
            len(p) == len(q) and in_order(p[1:], q[1:], deadline)
            for p, q in zip(x[1:], y[1:], strict=True)
        )
    if kinds[0] == "ratio":
        return in_order(x[1:], y[1:], deadline)
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return False
    return algebra.ask("zero", x, y, None, deadline)


def in_order(xs, ys, deadline) -> bool:
    return len(xs) == len(ys) and all(equal(x, y, deadline) for x, y in zip(xs, ys, strict=True))


def matched(xs, ys, deadline) -> bool:
    """Return whether each item has its equal on the other side: order and repetition are free."""

    def found(x, items):  # "x = 1, y = 2" is not "2, 1": no name is dropped from a single item
        return any(
            (kind(x) == "rel") == (kind(y) == "rel") and equal(x, y, deadline) for y in items
        )

    xs, ys = dict.fromkeys(xs), dict.fromkeys(ys)
    if len(xs) != len(ys):  # as many, or "10, 0.1" would be 10 %
        return False
    return all(found(x, ys) for x in xs) and all(found(y, xs) for y in ys)


def value_of(x):
    """Return the value in "x = 5", "5 = x", "2 + 3 = 5" or "x in S"; None if there is none."""
    if x[1] not in (("=",), ("in",)):
        return None
    left, right = x[2:]
    if not has_symbol(left):
        return left if is_name(right) else right
    return right if is_name(left) else None


def drop_names(x):
    """Return a list with "x =" dropped from its items, if all that have a name have the same."""
    named = [item for item in x[1:] if is_equation(item)]
    if not named or any(item[2] != named[0][2] or not is_name(item[2]) for item in named):
        return x
    return (x[0], *(item[3] if item in named else item for item in x[1:]))


def is_name(x) -> bool:
    """Is it x, f(x), f', the segments AB, AB/CD or |AB|, V_1 : V_2, or (x, y)?

    It is not -x, 1/x, x^2, xy or sin x, whose value is another thing than that of x.
    """
    if isinstance(x, Fraction):
        return False
    if x[0] == "mul":
        top, bottom = x[1], x[2] if len(x) == 3 and isinstance(x[2], tuple) else ("",)
        return is_segment(top) and bottom[0] == "pow" and is_segment(bottom[1]) and bottom[2] == -1
    if x[0] == "fn":
        return (x[1].startswith("prime") and is_name(x[2])) or (x[1] == "abs" and is_segment(x[2]))
    if x[0] in ("ratio", "seq"):
        names = [part for part in x[1:] if not isinstance(part, str)]  # without the brackets
        in_order = names == sorted(names, key=repr)  # (y, x) = (1, 2) does not say (1, 2)
        return len(names) > 1 and in_order and all(map(is_name, names))
    return x[0] in ("sym", "call")


def is_segment(x) -> bool:
    return isinstance(x, tuple) and x[0] == "sym" and x[1][0].isupper()


def has_symbol(x) -> bool:
    return isinstance(x, tuple) and (x[0] == "sym" or any(has_symbol(part) for part in x[1:]))


def same_relation(x, y, deadline) -> bool:
    """Return whether two equations or inequalities differ by a factor alone (positive for < )."""
    if x[1] != y[1]:
        return False
    if in_order(x[2:], y[2:], deadline):
        return True
    if len(x[1]) > 1 or x[1] == ("in",) or {kind(part) for part in x[2:] + y[2:]} != {"number"}:
        return False
    sides = [add(part[2], negative(part[3])) for part in (x, y)]
    if not all(has_symbol(side) for side in sides):
        return False
    wanted = ("positive",) if x[1][0] in ("<", "<=") else ("positive", "negative")
    return algebra.ask("factor", *sides, None, deadline) in wanted
