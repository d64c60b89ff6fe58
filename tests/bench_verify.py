"""How fast, and how often right, are the verifiers on data sets whose answers are known?

Reads `../shared/data` next to the repository, and says what it does not find there.

    python tests/bench_verify.py [--threads 2] [--only humaneval,mbpp]

For each set: the number of problems, how many verdicts are as they must be, the median and the 95th
percentile of a call in milliseconds, and how many calls a second one core does (user and system
time of all processes).
"""

import argparse
import gzip
import json
import pathlib
import resource
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import verify  # noqa: E402

NUMPY = """
class np:  # all that the + variants use of numpy, which tests do not have
    ndarray, float32, float64 = (), float, float

    def allclose(a, b, rtol, atol):
        a, b = ([x] if isinstance(x, (int, float)) else list(x) for x in (a, b))
        return len(a) == len(b) and all(abs(x - y) <= atol + rtol * abs(y) for x, y in zip(a, b))
"""
DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"


def rows(name: str) -> list[dict]:
    data = (DATA / name).read_bytes()
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
    return (
        json.loads(text)
        if name.endswith(".json")
        else [json.loads(x) for x in text.split("\n") if x]
    )


# --- the sets: of each problem its name, a call, and the reward that it must earn -----------------


def program(source: str, tests: str, **task):
    return lambda: verify.program(source, tests, 10.0, **task)


def humaneval(file="HumanEval.jsonl.gz", body=None, reward=1):
    for row in rows(f"humaneval/{file}"):
        task = {"entry_point": row["entry_point"], "prompt": row["prompt"]}
        source = row["prompt"] + (body or row["canonical_solution"])
        tests = row["test"].replace("import numpy as np\n", NUMPY)
        yield row["task_id"], program(source, tests, **task), reward


def humaneval_without_body():
    return humaneval(body="    return None\n", reward=0)


def humaneval_plus():
    return humaneval("HumanEvalPlus-OriginFmt.jsonl.gz")


def mbpp():
    for row in rows("mbpp/mbpp.jsonl"):
        tests = "\n".join([row["test_setup_code"], *row["test_list"]])
        yield row["task_id"], program(row["code"], tests), 1


def mbpp_sanitized():
    for row in rows("mbpp/sanitized-mbpp.json"):
        yield (
            row["task_id"],
            program(row["code"], "\n".join(row["test_imports"] + row["test_list"])),
            1,
        )


def mbpp_plus():
    for row in rows("mbpp/MbppPlus-OriginFmt.jsonl.gz"):
        tests = row["test"].replace("import numpy as np\n", NUMPY)
        imports = "\n".join(row["test_imports"])
        yield row["task_id"], program(row["code"], f"{imports}\n{tests}"), 1


SETS = (humaneval, humaneval_without_body, humaneval_plus, mbpp, mbpp_sanitized, mbpp_plus)


# --- the measurement ------------------------------------------------------------------------------


def cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def timed(call):
    start = time.perf_counter()
    return call(), 1000 * (time.perf_counter() - start)


def measure(cases: list, threads: int) -> str:
    """Run the cases; return a row of the table, and below it the verdicts that must not be."""
    start = cpu_seconds()
    with ThreadPoolExecutor(threads) as executor:
        results = list(executor.map(lambda case: timed(case[1]), cases))
    rate = len(cases) / (cpu_seconds() - start)
    took = sorted(milliseconds for _, milliseconds in results)
    pairs = list(zip(cases, results, strict=True))
    bad = [f"    {case[0]}: {verdict}" for case, (verdict, _) in pairs if verdict.reward != case[2]]
    median, p95 = statistics.median(took), took[int(0.95 * len(took))]
    line = f"{len(cases):8d}{len(cases) - len(bad):8d}{median:12.0f}{p95:8.0f}{rate:15.1f}"
    return "\n".join([line, *bad])


def main(argv=None):
    names = [cases.__name__ for cases in SETS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="calls at a time")
    parser.add_argument("--only", default=",".join(names), help="sets, joined by commas")
    args = parser.parse_args(argv)
    print(f"{'set':24s}{'n':>8s}{'as due':>8s}{'median ms':>12s}{'p95':>8s}{'a core, 1/s':>15s}")
    for cases in SETS:
        if cases.__name__ in args.only.split(","):
            try:
                print(f"{cases.__name__:24s}{measure(list(cases()), args.threads)}", flush=True)
            except FileNotFoundError as error:
                print(f"{cases.__name__:24s} skipped: no {error.filename}")


if __name__ == "__main__":
    main()
