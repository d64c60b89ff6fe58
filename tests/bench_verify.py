"""How often right, and how fast, are the verifiers on rows whose verdict is known?

Reads ../shared, next to the repository, and says what it does not find there. Math-Verify, of
tests/requirements.txt, judges the same pairs in the same run, taking turns with `verify.math`.

    python tests/bench_verify.py                     # writes tests/results/verify.json; 10 minutes
    python tests/bench_verify.py --only pairs,prose --out /tmp/verify.json

For each set: the rows, how many verdicts are as they must be, how many wrong answers were accepted,
milliseconds a call (median, 95th percentile), and calls a second that one core does (user and
system time of all processes).
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import verify  # noqa: E402

SHARED = ROOT.parent / "shared"
RESULTS = Path(__file__).parent / "results" / "verify.json"
NUMPY = """
class np:  # all that the + variants use of numpy, which tests do not have
    ndarray, float32, float64 = (), float, float

    def allclose(a, b, rtol, atol):
        a, b = ([x] if isinstance(x, (int, float)) else list(x) for x in (a, b))
        return len(a) == len(b) and all(abs(x - y) <= atol + rtol * abs(y) for x, y in zip(a, b))
"""


def rows(name: str) -> list[dict]:
    return [row for _, row in verify.rows_of(SHARED / name)]


# --- the sets: each yields a row's name, the reward that it must earn, and a call -----------------


def pairs(prose=False):
    for row in rows("checks/math_pairs.jsonl"):
        if prose == (row["kind"] == "completion" and not row["boxed"]):

            def accepted(row=row):
                verdict = verify.math(row["answer"], row["gold"])
                return verdict._replace(reward=int(verdict.reward == 1))

            yield row["id"], int(row["equal"]), accepted


def prose():
    return pairs(prose=True)


def math_verify(judged):
    """The rows of a set of pairs for Math-Verify, which wants dollar signs round bare LaTeX."""
    from math_verify import parse
    from math_verify import verify as same

    texts = {row["id"]: row for row in rows("checks/math_pairs.jsonl")}

    def read(text, row):
        bare = row["kind"] == "pair" and "$" not in text and "boxed" not in text
        return parse(f"${text}$" if bare else text)

    for name, due, _ in judged:
        row = texts[name]

        def accepted(row=row):
            equal = same(read(row["gold"], row), read(row["answer"], row))
            return verify.Verdict(int(equal), "right" if equal else "wrong")

        yield name, due, accepted


def pairs_math_verify():
    return math_verify(pairs())


def prose_math_verify():
    return math_verify(prose())


def gsm8k():
    for problem in verify.load(SHARED / "data" / "gsm8k" / "test.jsonl"):
        text = f"So \\$3 it is.\n\\boxed{{{problem.gold}}}"
        yield problem.prompt, 1, lambda text=text, gold=problem.gold: verify.math(text, gold)


def program(source: str, tests: str, **task):
    return lambda: verify.program(source, tests, 10.0, **task)


def humaneval(file="HumanEval.jsonl.gz", body=None, due=1):
    for row in rows(f"data/humaneval/{file}"):
        task = {"entry_point": row["entry_point"], "prompt": row["prompt"]}
        source = row["prompt"] + (body or row["canonical_solution"])
        tests = row["test"].replace("import numpy as np\n", NUMPY)
        yield row["task_id"], due, program(source, tests, **task)


def humaneval_none():
    return humaneval(body="    return None\n", due=0)


def humaneval_plus():
    return humaneval("HumanEvalPlus-OriginFmt.jsonl.gz")


def mbpp():
    for row in rows("data/mbpp/mbpp.jsonl"):
        yield row["task_id"], 1, program(row["code"], verify.problem_of(row).gold)


def mbpp_sanitized():
    for row in rows("data/mbpp/sanitized-mbpp.json"):
        yield row["task_id"], 1, program(row["code"], verify.problem_of(row).gold)


def mbpp_plus():
    for row in rows("data/mbpp/MbppPlus-OriginFmt.jsonl.gz"):
        tests = row["test"].replace("import numpy as np\n", NUMPY)
        yield row["task_id"], 1, program(row["code"], "\n".join([*row["test_imports"], tests]))


SETS = {  # title, the columns that are measured in turns, and calls at a time
    "pairs": ("pairs of public graders' tests, bare or boxed", (pairs, pairs_math_verify), 1),
    "prose": ("the same, prose without a box", (prose, prose_math_verify), 1),
    "gsm8k": ("GSM8K test answers, boxed", (gsm8k,), 1),
    "humaneval": ("HumanEval solutions", (humaneval,), 2),
    "humaneval_none": ("HumanEval, body `return None`", (humaneval_none,), 2),
    "humaneval_plus": ("HumanEval+ solutions", (humaneval_plus,), 2),
    "mbpp": ("MBPP solutions", (mbpp,), 2),
    "mbpp_sanitized": ("MBPP sanitised solutions", (mbpp_sanitized,), 2),
    "mbpp_plus": ("MBPP+ solutions", (mbpp_plus,), 2),
}


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
    rate = len(turns) * len(columns) / (cpu_seconds() - start)
    found = []
    for cases, results in zip(columns, zip(*turns, strict=True), strict=True):
        took = sorted(milliseconds for _, milliseconds in results)
        wrong = [
            (name, due, verdict)
            for (name, due, _), (verdict, _) in zip(cases, results, strict=True)
            if verdict.reward != due
        ]
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


def short(x: float) -> str:
    return f"{x:.0f}" if x >= 10 else f"{x:.2g}"


def table(results: dict) -> str:
    """Return README's table."""
    lines = [
        "| rows | verifier | n | as due | accepted wrongly | ms: median, p95 | a core, 1/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results["sets"].items():
        title, columns, _ = SETS[name]
        kind = "`math`" if columns[0].__name__ in ("pairs", "prose", "gsm8k") else "`program`"
        for verifier, m in zip((kind, "Math-Verify 0.9"), found, strict=False):
            rate = m["per_second_a_core"] or ""
            share, took = 100 * m["as_due"] / m["n"], (short(m["median_ms"]), short(m["p95_ms"]))
            lines.append(
                f"| {title} | {verifier} | {m['n']} | {m['as_due']} ({share:.1f} %) | "
                f"{m['accepted_wrongly']} | {', '.join(took)} | {rate} |"
            )
    lines += ["", f"({results['machine']}; commit {results['commit']})"]
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SETS), help="sets, joined by commas")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if unknown := set(args.only.split(",")) - set(SETS):
        sys.exit(f"--only: unknown {', '.join(sorted(unknown))}; there are {', '.join(SETS)}")
    if not SHARED.exists():
        sys.exit(f"no rows to judge: {SHARED} is not here")
    git = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    results = {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "sets": {},
    }
    verify.math(r"\sqrt2\sqrt3", r"\sqrt6")  # starts sympy before anything is timed
    for name in args.only.split(","):
        _, columns, threads = SETS[name]
        results["sets"][name] = measure([list(column()) for column in columns], threads)
        for m in results["sets"][name]:
            print(name, {k: v for k, v in m.items() if v is not None}, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + table(results))


if __name__ == "__main__":
    main()
