r"""What does an answer in LaTeX say? A strict parser: it refuses whatever it does not know.

Recursive descent over `tokens`, each method named after what it reads, gives the plain data of
`nodes`. Nothing is guessed, and nothing that a model wrote is ever evaluated as a program. Depth,
items and sizes are bounded, so that no text takes long.

    answer    = group { (";" | "and") group } ;  group = relation { "," relation }
    relation  = union { ("=" | "<" | ...) union } ;  union = ratio { cup ratio }
    ratio     = sum { ":" sum } ;  sum = term { ("+" | "-" | pm) term }
    term      = factor { ["*" | "/" | mod] factor } ;  factor = primary { postfix }

    python -c "from tasks import latex; print(latex.parse(r'2\\frac12, x^2=-1'))"
"""

from fractions import Fraction

from tasks import nodes
from tasks.nodes import Unreadable, add, kind, mul, negative, number, power, scalar
from tasks.tokens import FUNCTIONS, tokens

MAX_DEPTH = 20  # of nested brackets, arguments and powers
MAX_ITEMS = 24  # of a list: lists are matched item by item
RELATIONS = ("=", "~", "<", ">", "<=", ">=", "!=", "in")
MATRICES = ("matrix", "pmatrix", "bmatrix", "array", "smallmatrix")
CURRENCIES = ("dollar", "euro", "sterling")  # which stand before the number, too
TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")
SIGNS = (("op", "+"), ("op", "-"), ("op", "pm"), ("op", "mp"))
INVERSE = [("op", "^"), ("op", "{"), ("op", "-"), ("num", "1"), ("op", "}"), ("op", "(")]


def parse(text: str):
    """Return the node of an answer without dollar signs around it, or raise Unreadable."""
    return Parser(text).answer()


class Parser:
    def __init__(self, text: str):
        self.tokens, self.at, self.depth, self.bars = tokens(text), 0, 0, 0
        self.claims = []  # of two numbers: that they are equal; and how the second is written

    def peek(self, ahead: int = 0):
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else ("end of text", "")

    def next(self) -> str:
        """Step over the next token and return its text."""
        self.at += 1
        return self.peek(-1)[1]

    def take(self, *wanted: str) -> str | None:
        """Step over the next token and return its text if it is one of the signs wanted."""
        kind, text = self.peek()
        return self.next() if kind == "op" and text in wanted else None

    def expect(self, *wanted: str) -> str:
        if found := self.take(*wanted):
            return found
        raise Unreadable(f"expected {' or '.join(wanted)}, found {self.peek()[1] or 'the end'}")

    def answer(self):
        if not self.tokens:
            raise Unreadable("empty answer")
        groups = [self.items()]
        while self.take(";", "and"):
            groups.append(self.items())
        if self.at < len(self.tokens):
            raise Unreadable(f"unexpected {self.peek()[1]!r}")
        # "p = 5, q = 2 and p = 7, q = 2" are two pairs; "1, 2 and 3" is one list
        if len(groups) > 1 and all(len(g) > 1 and nodes.is_equation(g[0]) for g in groups):
            return ("list", *(("list", *group) for group in groups))
        items = [both for group in groups for item in group for both in nodes.both_signs(item)]
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
        sides, signs, known = [self.union()], [], []
        while sign := self.take(*RELATIONS):
            known = [side for side in (*known, sides[-1]) if sign == "=" and nodes.is_known(side)]
            signs, start = [*signs, sign], self.at
            sides.append(self.union())
            if known and nodes.is_known(sides[-1]):
                written = "".join(text for _, text in self.tokens[start : self.at])
                self.claims.append((known[-1], sides[-1], written))
        return nodes.relate(sides, signs)

    def union(self):
        parts = [self.ratio()]
        while self.take("cup"):
            parts.append(self.ratio())
        if len(parts) > 1 and any(kind(part) not in ("seq", "set") for part in parts):
            raise Unreadable("a union of what are not sets")
        return parts[0] if len(parts) == 1 else ("union", *parts)

    def ratio(self):
        parts = [self.sum()]
        while self.take(":"):
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else ("ratio", *map(scalar, parts))

    def sum(self):
        x = self.signed()
        while self.peek() in SIGNS:
            x = add(scalar(x), scalar(self.signed()))
        return x

    def signed(self):
        if sign := self.take("pm", "mp"):
            return ("pm", scalar(self.term()), sign)
        minus = False
        while sign := self.take("+", "-"):
            minus ^= sign == "-"
        return nodes.times(Fraction(-1), self.term()) if minus else self.term()

    def term(self):
        x = self.factor()
        while True:
            if self.take("*"):
                x = nodes.times(x, self.after_sign())
            elif self.take("/"):
                x = mul(scalar(x), power(scalar(self.after_sign()), Fraction(-1)))
            elif self.take("mod"):
                x = nodes.modulo(x, self.factor())
            elif self.starts_factor():
                x = nodes.times(x, self.factor())
            else:
                return x

    def after_sign(self):
        return negative(scalar(self.factor())) if self.take("-") else self.factor()

    def starts_factor(self) -> bool:
        """Is the next token a factor that is multiplied without a sign?"""
        kind, text = self.peek()
        if kind == "num":  # "2^6 3^5" and "(2) 3", but never "2 3"
            power_before = self.tokens[max(self.at - 2, 0) : self.at - 1] == [("op", "^")]
            return power_before or self.tokens[self.at - 1] in (("op", ")"), ("op", "}"))
        if kind == "cmd":
            return text in FUNCTIONS or text in PRIMARIES
        opens = text in ("(", "{") or text == "|" and not self.bars
        return kind == "sym" or kind == "op" and opens

    def factor(self):
        x, before = self.primary(), []
        while True:
            sign = self.take("^", "!", "%", "'")
            if sign and sign in before:  # 2^3^2, or a double factorial
                raise Unreadable(f"two {sign} after a factor")
            before.append(sign)
            if sign == "^":
                x = power(scalar(x), scalar(self.exponent()))
            elif sign == "!":
                x = nodes.whole("factorial", scalar(x))
            elif sign == "%":
                x = ("percent", scalar(x))
            elif sign == "'":
                x = ("fn", "prime", scalar(x))
            elif self.peek()[0] == "unit":
                x = ("unit", scalar(x), self.unit_name())
            else:
                return x

    def unit_name(self) -> str:
        name = self.next()
        if not self.take("^"):
            return name
        if (size := self.argument()) not in (2, 3):
            raise Unreadable("a unit to a power that is not 2 or 3")
        return f"{name}^{size}"

    def exponent(self):
        """Read what follows ^: {x}, (x), a letter, a command, or a whole number, as in 2^10."""
        minus = self.take("-")
        x = number(self.next()) if self.peek()[0] == "num" else scalar(self.argument())
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
            return ("set", *(both for item in items for both in nodes.both_signs(item)))
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
        kind, text = self.peek()[0], self.next()
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
            return nodes.function("abs", inside)
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
            if nodes.are_numbers(top, bottom):
                return nodes.mixed(x, top, bottom)
            self.at, self.tokens = start, before
        found = self.tokens[self.at : self.at + 3]
        if [kind for kind, _ in found] == ["num", "op", "num"] and found[1][1] == "/":
            self.at += 3
            return nodes.mixed(x, number(found[0][1]), number(found[2][1]))
        return x

    def symbol(self, name: str):
        """Read on after a letter: its subscript; or f(2), A(x), a function's value."""
        after_digit = self.at > 1 and self.tokens[self.at - 2][0] == "num"
        subscript = self.subscript()
        if after_digit and name.isupper() and subscript.strip("_").isdigit():
            raise Unreadable("a number whose digits go beyond 9")
        function = name in "fghpq" or name.isupper()
        name += subscript
        if function and self.tokens[self.at : self.at + 6] == INVERSE:
            self.at, name = self.at + 5, name + " inverse"
        (kind, text), brackets = self.peek(1), [self.peek(), self.peek(2)]
        if function and kind in ("num", "sym") and brackets == [("op", "("), ("op", ")")]:
            self.at += 3
            return ("call", name, number(text) if kind == "num" else ("sym", text))
        return ("sym", name)

    def subscript(self) -> str:
        """Return what stands after _, as text, or nothing."""
        if not self.take("_"):
            return ""
        if not self.take("{"):
            return "_" + self.next()
        start = self.at
        while not self.take("}"):
            kind, text = self.peek()[0], self.next()
            if kind not in ("num", "sym", "cmd", "op") or text in "{^":
                raise Unreadable("a subscript that is not simple")
        return "_" + "".join(text for _, text in self.tokens[start : self.at - 1])

    def matrix(self, name: str):
        if name not in MATRICES:
            raise Unreadable(f"unknown environment {name!r}")
        rows, row = [], ("seq", "[")
        while self.peek() != ("end", name):
            row += (scalar(self.sum()),)
            if self.take(r"\\"):
                rows, row = [*rows, (*row, "]")], row[:2]
            elif self.peek() != ("end", name):
                self.expect("&")
        self.next()
        rows += [(*row, "]")] * (len(row) > 2)
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("rows of a matrix that differ in length")
        return ("matrix", *rows)

    def function(self, name: str):
        r"""Read a function's argument: sin(x), \sin x, \sin^2 x, \log_2 x, \sin^{-1} x."""
        base = self.argument() if name == "log" and self.take("_") else None
        size = scalar(self.exponent()) if self.take("^") else None
        opening = self.take("(", "{")
        inside = self.bracketed(opening) if opening else self.factor()
        while not opening and self.starts_factor() and self.peek()[1] not in FUNCTIONS:  # \sin 2x
            inside = mul(scalar(inside), scalar(self.factor()))
        if size == -1 and name in ("sin", "cos", "tan", "cot"):
            name, size = "arc" + name, None
        if isinstance(size, Fraction) and size < 0:
            raise Unreadable(f"{name} to a negative power")
        if kind(inside) == "unit" and inside[2] == "degree" and name in TRIGONOMETRIC:
            inside = mul(inside[1], mul(("const", "pi"), Fraction(1, 180)))
        x = nodes.function(name, scalar(inside), base)
        return x if size is None else power(x, size)

    def root(self):
        index = Fraction(2)
        if self.take("["):
            index = self.signed()
            self.expect("]")
        x = scalar(self.argument())
        if isinstance(x, Fraction) and x < 0 and isinstance(index, Fraction) and index % 2 == 1:
            return negative(power(-x, 1 / index))  # the real root, as schools have it
        return power(x, power(scalar(index), Fraction(-1)))


PRIMARIES = {
    "frac": lambda p: mul(scalar(p.argument()), power(scalar(p.argument()), Fraction(-1))),
    "binom": lambda p: nodes.whole("binomial", scalar(p.argument()), scalar(p.argument())),
    "sqrt": Parser.root, "infty": lambda _: ("const", "oo"), "emptyset": lambda _: ("set",),
    "pi": lambda _: ("const", "pi"), "e": lambda _: ("const", "e"), "i": lambda _: ("const", "i"),
}  # fmt: skip
