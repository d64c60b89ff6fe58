"""How often right, and how fast, are the verifiers on rows whose verdict is known?

    python tests/bench/bench_verify.py               # writes tests/results/verify.json; 10 minutes
    python tests/bench/bench_verify.py --only pairs,prose

Reads ../shared, next to the repository. Math-Verify, of tests/requirements.txt, judges the same
pairs in the same run, taking turns with `verify.math`. For each set: the rows, how many verdicts
are as they must be, how many wrong answers were accepted, milliseconds a call (median, 95th
percentile), and calls a second that one core does (user and system time of all processes).
"""

import argparse
import resource
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import verify
from tasks import files
from tests.bench.timing import ROOT, about, write

SHARED = ROOT.parent / "shared"
NUMPY = """
class np:  # all that the + variants use of numpy, which tests do not have
    ndarray, float32, float64 = (), float, float

    def allclose(a, b, rtol, atol):
        a, b = ([x] if isinstance(x, (int, float)) else list(x) for x in (a, b))
        return len(a) == len(b) and all(abs(x - y) <= atol + rtol * abs(y) for x, y in zip(a, b))
"""


# --- the sets: a row's name, the reward that it must earn, and a call -----------------------------


def rows(name: str) -> list[dict]:
    return [row for _, row in files.rows_of(SHARED / name)]


def pairs(judge, prose=False):
    for row in rows("checks/math_pairs.jsonl"):
        if prose == (row["kind"] == "completion" and not row["boxed"]):
            yield row["id"], int(row["equal"]), partial(judge, row)


def ours(row) -> verify.Verdict:
    verdict = verify.math(row["answer"], row["gold"])
    return verdict._replace(reward=int(verdict.reward == 1))


def math_verify(row) -> verify.Verdict:
    """Math-Verify's verdict; it wants dollar signs round bare LaTeX."""
    from math_verify import parse
    from math_verify import verify as same

    def read(text):
        bare = row["kind"] == "pair" and "$" not in text and "boxed" not in text
        return parse(f"${text}$" if bare else text)

    equal = same(read(row["gold"]), read(row["answer"]))
    return verify.Verdict(int(equal), "right" if equal else "wrong")


def gsm8k():
    for problem in verify.load(SHARED / "data/gsm8k/test.jsonl"):
        text = f"So \\$3 it is.\n\\boxed{{{problem.gold}}}"
        yield problem.prompt, 1, partial(verify.math, text, problem.gold)


def humaneval(file="HumanEval.jsonl.gz", body=None, due=1):
    for row in rows(f"data/humaneval/{file}"):
        source = row["prompt"] + (body or row["canonical_solution"])
        tests = row["test"].replace("import numpy as np\n", NUMPY)
        task = dict(entry_point=row["entry_point"], prompt=row["prompt"])
        yield row["task_id"], due, partial(verify.program, source, tests, 10.0, **task)


def mbpp(file):
    for row in rows(f"data/mbpp/{file}"):
        if "test" in row:  # of MBPP+
            tests = row["test"].replace("import numpy as np\n", NUMPY)
            tests = "\n".join([*row["test_imports"], tests])
        else:
            tests = files.problem_of(row)[0].gold
        yield row["task_id"], 1, partial(verify.program, row["code"], tests, 10.0)


PLUS = "OriginFmt.jsonl.gz"
BOTH = {"`math`": ours, "Math-Verify 0.9": math_verify}  # measured in turns
SETS = {  # title; by verifier, what makes the rows
    "pairs": (
        "pairs of public graders' tests, bare or boxed",
        {name: partial(pairs, judge) for name, judge in BOTH.items()},
    ),
    "prose": (
        "the same, prose without a box",
        {name: partial(pairs, judge, prose=True) for name, judge in BOTH.items()},
    ),
    "gsm8k": ("GSM8K test answers, boxed", {"`math`": gsm8k}),
    "humaneval": ("HumanEval solutions", {"`program`": humaneval}),
    "humaneval_none": (
        "HumanEval, body `return None`",
        {"`program`": partial(humaneval, body="    return None\n", due=0)},
    ),
    "humaneval_plus": (
        "HumanEval+ solutions", {"`program`": partial(humaneval, f"HumanEvalPlus-{PLUS}")},
    ),
    "mbpp": ("MBPP solutions", {"`program`": partial(mbpp, "mbpp.jsonl")}),
    "mbpp_sanitized": (
        "MBPP sanitised solutions", {"`program`": partial(mbpp, "sanitized-mbpp.json")},
    ),
    "mbpp_plus": ("MBPP+ solutions", {"`program`": partial(mbpp, f"MbppPlus-{PLUS}")}),
}  # fmt: skip


# --- the measurement ------------------------------------------------------------------------------


def cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def timed(case):
    start = time.perf_counter()
    verdict = case[2]()
    return verdict, 1000 * (time.perf_counter() - start)


def measure(columns: list[list], threads: int) -> list[dict]:
    """Judge the rows, every column's verdict on a row before the next row; return a result each."""
    start = cpu_seconds()
    rows = list(zip(*columns, strict=True))
    if threads == 1:  # in the main thread, outside of which Math-Verify does not work
        turns = [list(map(timed, row)) for row in rows]
    else:
        with ThreadPoolExecutor(threads) as executor:
            turns = list(executor.map(lambda row: list(map(timed, row)), rows))
    rate = len(turns) / (cpu_seconds() - start)
    found = []
    for cases, results in zip(columns, zip(*turns, strict=True), strict=True):
        took = sorted(milliseconds for _, milliseconds in results)
        judged = zip(cases, results, strict=True)
        wrong = [(name, due, v) for (name, due, _), (v, _) in judged if v.reward != due]
        found.append(
            {
                "n": len(cases),
                "as_due": len(cases) - len(wrong),
                "accepted_wrongly": sum(due == 0 for _, due, _ in wrong),
                "median_ms": round(statistics.median(took), 2),
                "p95_ms": round(took[int(0.95 * len(took))], 2),
                "per_second_a_core": round(rate, 1) if len(columns) == 1 else None,
                "not_as_due": {str(name): f"{v.status}: {v.detail}" for name, _, v in wrong},
            }
        )
    return found


def table(found: dict) -> str:
    """Return the table of tasks/README.md."""
    lines = [
        "| rows | verifier | n | as due | accepted wrongly | ms: median, p95 | a core, 1/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, columns in found["sets"].items():
        title, makers = SETS[name]
        for verifier, m in zip(makers, columns, strict=True):
            share = 100 * m["as_due"] / m["n"]
            took = [f"{x:.0f}" if x >= 10 else f"{x:.2g}" for x in (m["median_ms"], m["p95_ms"])]
            lines.append(
                f"| {title} | {verifier} | {m['n']} | {m['as_due']} ({share:.1f} %) | "
                f"{m['accepted_wrongly']} | {', '.join(took)} | {m['per_second_a_core'] or ''} |"
            )
    return "\n".join([*lines, "", f"({found['machine']}; commit {found['commit']})"])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"sets, joined by commas: {', '.join(SETS)}")
    only = parser.parse_args(argv).only
    names = only.split(",") if only else list(SETS)
    if unknown := set(names) - set(SETS):
        sys.exit(f"--only: unknown {', '.join(sorted(unknown))}; there are {', '.join(SETS)}")
    if not SHARED.exists():
        sys.exit(f"no rows to judge: {SHARED} is not here")
    verify.math(r"\sqrt2\sqrt3", r"\sqrt6")  # starts sympy before anything is timed
    found = about() | {"sets": {}}
    for name in names:
        makers = SETS[name][1]
        threads = 2 if "`program`" in makers else 1
        found["sets"][name] = measure([list(make()) for make in makers.values()], threads)
        for m in found["sets"][name]:
            print(name, {key: value for key, value in m.items() if value is not None}, flush=True)
    write(found, "verify.json", part=bool(only))
    print("\n" + table(found))


if __name__ == "__main__":
    main()
