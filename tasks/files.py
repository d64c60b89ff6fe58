"""Which problems stand in a file? Rows of MATH, GSM8K, MBPP and HumanEval, as published.

A row's fields tell the data set. Files are JSON lines (.jsonl, .jsonl.gz) or a JSON list (.json).

    python -c "import verify; print(verify.load('train.jsonl')[0])"
"""

import gzip
import json
import os
import re
import zlib
from functools import partial
from pathlib import Path

import verify
from tasks import programs
from tasks.answers import BOX
from verify import Problem

NUMBER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")  # with thousands commas


def read(path: str | os.PathLike) -> list[tuple[Problem, str]]:
    """Return the problems in a local file, each with its worked answer, in the form that its
    verifier reads; "" where there is none.

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


def rows_of(path: Path) -> list[tuple[str, object]]:
    """Return (place, row) of all rows of a JSON or JSON-lines file; the place is for messages."""
    try:
        data = path.read_bytes()
        whole = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not path.name.removesuffix(".gz").endswith(".json"):
        lines = ((f"{path}, line {i}", line) for i, line in enumerate(whole.split("\n"), 1))
        return [(place, parse(line, place)) for place, line in lines if line.strip()]
    rows = parse(whole, path)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must be a list of problems, got {str(rows)[:50]!r}")
    return [(f"{path}, row {i}", row) for i, row in enumerate(rows, 1)]


def parse(text: str, place):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON: {error}") from None


def problem_of(row: dict) -> tuple[Problem, str]:
    """Return a row's problem and its worked answer."""
    for name, of_row in READERS.items():
        if name in row:
            return of_row(row)
    raise ValueError(f"none of the fields {', '.join(map(repr, READERS))} is there")


def field(row: dict, name: str) -> str:
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f"field {name!r} must be a text, got {row[name]!r:.50}")
    return row[name]


def of_math(row: dict) -> tuple[Problem, str]:
    """MATH's solution holds the answer, in its box; MATH-500 gives it besides."""
    gold = field(row, "answer" if "answer" in row else "solution")
    worked = str(row.get("solution"))
    boxed = BOX.search(worked)
    if "answer" not in row and not boxed:
        raise ValueError("field 'solution' holds no \\boxed{}")
    return Problem(field(row, "problem"), gold, verify.math), worked if boxed else ""


def of_gsm8k(row: dict) -> tuple[Problem, str]:
    """GSM8K's steps hold <<a calculator's input>>; its answer stands behind "#### "."""
    steps, mark, number = field(row, "answer").rpartition("#### ")
    if not mark or not NUMBER.fullmatch(number.strip()):
        raise ValueError("field 'answer' must end in '#### ' and a number")
    gold, steps = number.strip().replace(",", ""), re.sub(r"<<[^<>]*>>", "", steps)
    return Problem(field(row, "question"), gold, verify.math), f"{steps}\\boxed{{{gold}}}"


def of_humaneval(row: dict) -> tuple[Problem, str]:
    """HumanEval's prompt is the head of a function and its docstring; its solution goes on."""
    about = dict(entry_point=field(row, "entry_point"), prompt=field(row, "prompt"))
    problem = Problem(row["prompt"], field(row, "test"), partial(programs.attempt, **about))
    return problem, fenced(row["prompt"], row.get("canonical_solution"))


def of_mbpp(row: dict) -> tuple[Problem, str]:
    """MBPP's tests are asserts, with code to stand before them."""
    setup = [row.get("test_setup_code") or "", *row.get("test_imports", [])]
    lines = row["test_list"]
    if not isinstance(lines, list) or not lines or not all(isinstance(x, str) for x in lines):
        raise ValueError(f"field 'test_list' must be a list of texts, got {lines!r:.50}")
    tests = "\n".join([line for line in setup if line] + lines)
    prompt = field(row, "text" if "text" in row else "prompt")
    return Problem(prompt, tests, programs.attempt), fenced(row.get("code"))


READERS = {  # by the field that only this data set has
    "problem": of_math, "question": of_gsm8k, "entry_point": of_humaneval, "test_list": of_mbpp,
}  # fmt: skip


def fenced(*parts: str | None) -> str:
    """Return a program in a fenced block; nothing if a part of it is missing."""
    if not all(isinstance(part, str) and part for part in parts):
        return ""
    code = "".join(parts).replace("\r\n", "\n").strip("\n")
    return f"```python\n{code}\n```"
