r"""Is the answer of a completion right? Where it stands, and what counts as equal.

The answer is the last \boxed{}; without a box, what evaluation prompts want at the end of a text:
"The answer is 5.", "Final answer: 5", "#### 5"; else the text must *be* an answer, or plain words
round one formula: "The sum is $5$.". Nothing is searched for in prose. What the sources leave open
is decided in a table in tasks/README.md.

    python -c "from tasks import answers; print(answers.judge(r'So \boxed{\frac24}.', '0.5', 2.0))"
"""

import re
import time

from tasks import algebra, equality, latex
from tasks.nodes import Unreadable
from tasks.tokens import MAX_CHARS, STYLED, unit

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{)?")
SEGMENT = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b")
SEPARATORS = re.compile(rf"(?:\s|\.|{SEPARATOR.pattern})*")
LEAD_IN = re.compile(  # the last words before the one formula of a sentence
    r"(?:.*\b(?:is|are|that|answer|therefore|thus|hence|so|matrix)\s*:?|[^:]*:)?\s*", re.I | re.S
)
BOLD = re.compile(r"(?<![\w)}])\*\*([^*\n]+)\*\*(?!\w)")
CLOSING = re.compile(  # the words that evaluation prompts want before the answer that ends a text
    r"""(?:\n|[.!?]\s+)\#{4}[ ](?=[-$\\]*[0-9])  # of GSM8K
    |(?:(?<![:,;(])(?<!that)(?<!if)\n|[.!?]\s+|\$\s+(?=therefore))(?=[A-Z#]|therefore)(?i:(?:\#+\s)?
    (?:(?:(?:so|thus|hence|therefore),?\s)?(?:the\s)?(?:final\s|correct\s|best\s)?
    answer(?:\s\(arabic\ numerals\))?(?:\sis\b:?|:|\n):?\s*){1,2}
    (?:(?<=:[ ])the\s[a-z]+\s(?:of\s\$?[a-z]+\$?\s)?is\s)?)
    |(?<=\.)\n(?=[-$\\]*[0-9][0-9.,]*[%$]*\Z)  # a number in the last line, after a sentence""",
    re.X,
)
END = re.compile(r"(?is)(.*?)((?:,? because [a-z ,'’-]+)?\.?(?:\s+I hope it is correct\.?)?)")
AFTER = re.compile(r"\s*(?:is the (?:answer|solution|result)\s*)?[.!]?\s*", re.I)
PLAIN_WORDS = re.compile(r"[A-Za-z\s.,:;'’-]*")
DENIAL = re.compile(
    r"\b(?:not|no|nor|never|cannot|or|and|either|except|wrong|minus|negative|root|square|half|twice"
    r"|false|mistake|incorrect|untrue|least|most|than|about|approximately|roughly|nearly|other|far|opposite|inverse)\b|n['’]t\b",
    re.I,
)
TEXT_ANSWER = re.compile(r"[A-Za-z][A-Za-z '’.,()-]*")
STYLED_ANSWER = re.compile(r"[A-Za-z][A-Za-z0-9 '’.,()-]*")  # "June 20", in \text{} alone


def judge(answer: str, gold: str, timeout: float) -> tuple[int | None, str, str]:
    r"""Return (reward, status, detail) of an answer: what verify.Verdict holds. Safe in threads.

    answer, gold: a completion with a box or closing words, or a bare answer. timeout: seconds for
    sympy to prove two expressions equal. The reward is None if the gold answer cannot be read or
    sympy's process died, and 0 if sympy did not decide in time.

    >>> [judge(text, "5", 2.0)[1] for text in ("The answer is 5.", "It is 5.", r"\boxed{5 = 6}")]
    ['right', 'unparsed', 'unparsed']
    """
    try:
        expected = final_answer(gold)
        if plain_text(expected) is None:
            equality.read(expected, time.monotonic() + timeout)
    except (Unreadable, algebra.TimedOut, algebra.WorkerDied) as error:
        return None, "error", f"gold answer {gold[-50:]!r}: {error}"
    try:
        found = final_answer(answer)
        if same_text(found, expected) or equality.same(found, expected, timeout):
            return 1, "right", ""
        return 0, "wrong", ""
    except (Unreadable, RecursionError) as error:  # the caller may stand deep in the stack already
        status = "unparsed" if plain_text(answer) is None else "wrong"
        return 0, status, f"{error}{'' if BOX.search(answer) else '; no box in the text'}"
    except algebra.TimedOut as error:
        return 0, "timeout", str(error)
    except algebra.WorkerDied as error:
        return None, "error", str(error)


def final_answer(text: str) -> str:
    r"""Return the answer in a completion, as latex.parse reads it: the last box, what closing words
    lead to, or a bare answer. Unreadable if there is none, or more than one.

    >>> final_answer(r"Let $x=4$. So \boxed{\frac{x}{2}}."), final_answer("The sum is $5$.")
    ('\\frac{x}{2}', '5')
    """
    if not (boxes := list(BOX.finditer(text))):
        return bare(closing(text))
    line = text.rfind("\n", 0, boxes[-1].start()) + 1
    last = [box for box in boxes if box.start() >= line]
    if len(last) > 20:
        raise Unreadable("more than 20 boxes in one line")
    found = [balanced(text, box.end()) if box[1] else None for box in last]
    if found[-1] is None:
        raise Unreadable("a box without braces, or one that is not closed")
    inner = text[last[-1].start() : last[-1].end()] + found[-1] + "}"
    for content in found[:-1]:  # a box round the last box says the same as that
        if content is None or content.split() not in (found[-1].split(), inner.split()):
            raise Unreadable("two answers in one line")
    return clean(found[-1])


def balanced(text: str, start: int) -> str | None:
    """Return what stands between a brace that was opened before `start` and its closing brace."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.S):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : start + brace.start()]
    return None


def closing(text: str) -> str:
    """Return what the words that close a text lead to, as in "The answer is 5."; else the text.
    Unreadable if they lead to two different answers, or are part of a denial."""
    lines = filter(None, map(str.strip, text.splitlines()))
    tail = BOLD.sub(r"\1", "\n" + "\n".join(lines))[-MAX_CHARS:]
    if not (marks := list(CLOSING.finditer(tail))):
        return text
    said = {tail[mark.end() :].split("\n")[0].strip("$. ") for mark in marks}
    rest, end = END.fullmatch(tail, marks[-1].end()).groups()
    words = marks[-1][0].strip() or "\n" + re.split(r"\n|[.!?]\s", tail[: marks[-1].start()])[-1]
    clear = re.match(r"\S|\n(?!.*answer).*[A-Za-z]", words) and not DENIAL.search(words + end)
    if len(said) > 1 or not clear or re.search(r"^~|!$|\n", SEGMENT.sub("", rest)):
        raise Unreadable("no box, and not one answer that closes the text")
    return rest


def bare(text: str) -> str:
    """Return a text without a box as an answer: all of it, or the one formula that it leads to."""
    if len(text) > MAX_CHARS:
        raise Unreadable(f"no box in more than {MAX_CHARS} characters")
    segments = list(SEGMENT.finditer(text))
    outside = SEGMENT.sub(" ", text)
    if len(segments) > 1 and len(SEPARATOR.findall(outside)) < len(segments) - 1:
        raise Unreadable("no box, and more than one formula")
    if not segments or SEPARATORS.fullmatch(outside):
        return clean(SEGMENT.sub(lambda match: f" {match[0].strip('$')} ", text))
    before, after = text[: segments[0].start()], text[segments[-1].end() :]
    lead_in = LEAD_IN.fullmatch(before) and PLAIN_WORDS.fullmatch(before)
    if len(segments) > 1 or not lead_in or DENIAL.search(outside):
        raise Unreadable("no box, and not one formula that plain words lead to")
    formula = next(filter(None, segments[0].groups()))
    if (mark := after.strip(" .\n")) in ("%", r"\%") or unit(mark):
        return clean(f"{formula} {mark}")
    if not AFTER.fullmatch(after):
        raise Unreadable("no box, and more than a formula")
    return clean(formula)


def clean(text: str) -> str:
    r"""Return an answer without what never carries meaning: \( \) \[ \], a full stop at the end."""
    text = re.sub(r"\\[()\[\]]", " ", text).strip().rstrip("\\").rstrip()
    return text.removesuffix(".")


def plain_text(text: str) -> str | None:
    r"""Return the words that an answer is, without \text{}; None if it is not made of words."""
    words = re.sub(rf"{STYLED}\s*\{{([^{{}}]*)\}}", r"\1", text)
    form = STYLED_ANSWER if words != text else TEXT_ANSWER
    words = " ".join(words.replace("$", " ").split()).strip(" .")
    if re.fullmatch(r"\([A-Za-z]+\)", words):
        words = words[1:-1]
    return words if form.fullmatch(words) else None


def same_text(a: str, b: str) -> bool:
    r"""Return whether both are the same words. Case counts, but in \text{} or no variables."""
    x, y = plain_text(a), plain_text(b)
    if x is None or y is None or x.lower() != y.lower():
        return False
    words = r"\text" in a + b
    try:
        for text in (x, y):
            latex.parse(text)
    except Unreadable:
        words = True
    return x == y or (words and len(x) > 1)
