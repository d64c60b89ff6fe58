r"""Of which tokens is an answer made? LaTeX, plain text and a little Unicode, by one set of names.

What is written in several ways is one token from here on: \dfrac and \frac, ° and ^{\circ}, hours
and \text{hr}. A word or a sign that no table knows is refused, never skipped: 5\text{ million} is
not 5, and 5\text{ (or 6)} is nothing at all.
"""

import re

from tasks.nodes import Unreadable

MAX_CHARS = 2000  # of an answer
MAX_TOKENS = 400

UNICODE = {
    "π": r"\pi ", "∞": r"\infty ", "°": r"\degree ", "×": r"\times ", "·": r"\cdot ", "−": "-",
    "–": "-", "∗": "*", "÷": r"\div ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ",
    "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ",
    "²": "^{2}", "³": "^{3}", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
    "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ",
    "θ": r"\theta ", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "′": "'", "√": r"\sqrt ",
    "€": r"\text{euro}", "£": r"\text{sterling}", "¢": r"\text{cent}",
}  # fmt: skip
GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho "
    "sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell".split()
)
FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh exp ln log abs".split()
)
WORDS = {
    **dict.fromkeys(("and", "or"), ("op", "and")),
    **dict.fromkeys(("percent", "pct", "per cent", "%", r"\%"), ("op", "%")),
    **dict.fromkeys(("infinity", "Infinity", "infty", "inf", "oo"), ("cmd", "infty")),
    **{name: ("cmd", name) for name in FUNCTIONS | {"sqrt", "pi"}},
}
SAME_COMMAND = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom",
    "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=",
    "lt": "<", "gt": ">", "ne": "!=", "neq": "!=", "approx": "~", "cdot": "*", "times": "*",
    "ast": "*", "div": "/", "bmod": "mod", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|",
    "colon": ":", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "langle": "(",
    "rangle": ")", "lor": "and", "varnothing": "emptyset", "bigcup": "cup", "circ": "degree",
    "$": "dollar",
}  # fmt: skip
IGNORED = set(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr quad qquad displaystyle textstyle limits "
    "nolimits mathopen mathclose angle triangle vec overrightarrow".split()
)
UNITS = {  # the first name of a line is the one that a unit has here; each is in the singular
    word: names.split()[0]
    for names in (
        "mm millimeter|cm centimeter|m meter metre|km kilometer|in inch inche|ft foot feet|yd yard|"
        "mi mile|mph mile/hour|km/h kilometer/hour|m/s meter/second|g gram|kg kilogram|lb pound|"
        "oz ounce|s sec second|min minute|h hr hour|day|week|month|year|dollar|cent|euro|sterling|"
        "degree deg|radian|liter|ml|gallon|unit|people person|men man|women woman|"
        "children child"
    ).split("|")
    for word in names.split()
}
MULTIPLES = set(
    "ten hundred thousand million billion trillion dozen score half halve third quarter".split()
)

STYLED = (
    r"\\(?:text|mathbb|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox|operatorname\*?)"
)
TOKEN = re.compile(
    rf"(?P<space>\s+|~|\\[,;:!> ]|\$)|{STYLED}\s*\{{(?P<words>[^{{}}]*)\}}"
    r"|\\(?P<edge>begin|end)\s*\{(?P<name>[a-z]+)\*?\}(?:(?<=begin\{array\})\s*\{[a-z|\s]*\})?"
    r"|(?P<num>[0-9]*\.[0-9]*\\overline\s*\{[0-9]+\}"
    r"|[0-9]*\.[0-9]+(?:[eE][+-]?[0-9]+(?![0-9A-Za-z]))?"
    r"|[0-9]+(?:[eE][0-9]+(?![0-9A-Za-z]))?)"  # 2e-3 without a point is 2e - 3
    r"|\\(?P<command>[A-Za-z]+|\$)|(?P<letters>[A-Za-z]+)"
    r"|(?P<op>\\[{}\\]|\\?%|\*\*|<=|>=|!=|[-+*/^_!'=<>(){}\[\],;:|&])"
)
DEGREE = re.compile(r"\^\s*(\{\s*)?(?:°|\\(?:circ|degree)(?![A-Za-z]))(?(1)\s*\})")
LOOSE = re.compile(r"(?<=[0-9])\s*(?:,\s*\\!|\\!\s*,|\{\s*,\s*\})\s*(?=[0-9]{3})")
GROUPED = re.compile(r"[1-9][0-9]{0,2}((?:\{,\}|\\,| )[0-9]{3})+(?![0-9])(\.[0-9]+)?")
COMMAS = re.compile(r"(?<!,)[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!,?[0-9])(\.[0-9]+)?")
OPENING, CLOSING = ("(", "[", r"\{"), (")", "]", r"\}")


def tokens(text: str) -> list[tuple[str, str]]:
    r"""Return (kind, text) pairs; kinds: num, sym, cmd, unit, op, begin, end.

    Thousands are grouped here, as only here it is known whether a comma stands inside brackets,
    where it separates: "1,234" is one number, "(1,234)" a pair, "1, 234" two, "1,2,345" three.
    """
    if len(text) > MAX_CHARS:
        raise Unreadable(f"longer than {MAX_CHARS} characters")
    text = DEGREE.sub(r"\\degree ", re.sub(r"√\s*([0-9]+)", r"\\sqrt{\1}", text))
    text = LOOSE.sub("{,}", "".join(UNICODE.get(letter, letter) for letter in text))
    found, at, depth = [], 0, 0
    while at < len(text):
        grouped = GROUPED.match(text, at) or (depth == 0 and COMMAS.match(text, at))
        if grouped and found[-1:] not in ([("op", "_")], [("op", "^")]):
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
    if kind == "name":
        return [(match["edge"], match["name"])]
    if kind == "words":
        return read_words(match["words"])
    if kind == "letters":
        return read_letters(text)
    if kind != "command":
        return [(kind, {"**": "^", r"\%": "%"}.get(text, text))]
    name = SAME_COMMAND.get(match["command"], match["command"])
    if name in IGNORED:
        return []
    if name in ("degree", "dollar"):
        return [("unit", name)]
    if not name.isalpha() or name in ("in", "mod", "and", "pm", "mp", "cup"):
        return [("op", name)]
    return [("sym" if name in GREEK else "cmd", name)]


def unit(words: str) -> str | None:
    """Return the one name that a unit has here, as "ft", or a counted thing, "apple"; or None."""
    words = [word.removesuffix(".") for word in words.lower().split()]
    name = " ".join(word[:-1] if len(word) > 3 and word[-1] == "s" else word for word in words)
    for prefix, size in (("square ", "^2"), ("sq ", "^2"), ("cubic ", "^3")):
        if name.startswith(prefix) and (base := unit(name.removeprefix(prefix))):
            return base + size
    if known := UNITS.get(name.replace(" per ", "/")):
        return known
    plural = re.fullmatch(r"[a-z]{3,}s", words[0] if len(words) == 1 else "")
    # what changes the number is no unit: millions, fifths, minus, less
    changes = name in MULTIPLES or name.endswith(("th", "s", "u", "i"))
    return name if plural and not changes else None


def read_words(words: str) -> list[tuple[str, str]]:
    r"""Return the tokens of the content of \text{...}: a separator, a symbol, a unit; or raise."""
    plain = words.strip()
    if plain.strip(", ") in ("and", "or"):
        return [("op", ",")] * plain.startswith(",") + [("op", "and")]
    if plain in WORDS:
        return [WORDS[plain]]
    if name := unit(plain):
        return [("unit", name)]
    if plain[:1].isdigit() or len(plain) < 2:  # "2 hours", "6 and 8"
        return tokens(plain)
    raise Unreadable(f"unknown words {plain[:40]!r}")


def read_letters(run: str) -> list[tuple[str, str]]:
    """Return the tokens of a run of letters: a known name, or up to three variables, multiplied.

    Capitals together, as AB of a segment or of an order, are one name: AB is not BA.
    """
    if run in WORDS:
        return [WORDS[run]]
    if len(run) > 1 and (name := unit(run)):
        return [("unit", name)]
    if len(run) > 3 or re.fullmatch("[A-Z][a-z]{2}", run):
        raise Unreadable(f"unknown word {run[:40]!r}")
    if len(run) > 1 and run.isupper():
        return [("sym", run)]
    return [("cmd" if letter in "ei" else "sym", letter) for letter in run]
