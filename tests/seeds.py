"""Do the claims hold in every seed? Trains both methods over seeds, prints README's tables.

    python tests/seeds.py                 # seeds 0 to 4: ten runs, one after another
    python tests/seeds.py --table         # only print the tables of tests/results/seeds.json

A run that has its report is kept, one that was killed is resumed. No run is left out. Options that
it does not know are score.py's.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "seeds.json"
METHODS = ("score", "multi_turn")


def train(method: str, seed: int, folder: Path, options: list[str]) -> dict:
    """Run the README's command, or go on with it; return its report, wall time and peak memory."""
    words = ["--resume", str(folder)]
    if not folder.exists():
        words = ["--run", str(folder), "--seed", str(seed), "--method", method, *options]
    record = folder.parent / f"{folder.name}.json"
    if not record.exists():
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, str(ROOT / "score.py"), *words])
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{method}, seed {seed}: {' '.join(words)} failed")
        report = json.loads((folder / "report.json").read_text())
        del report["transcripts"]
        cost = {
            "wall_seconds": None if words[0] == "--resume" else round(time.monotonic() - start, 1),
            "peak_mib": round(usage.ru_maxrss / 1024),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        }
        record.write_text(json.dumps(report | cost))
    return json.loads(record.read_text())


def per_cent(runs: list[dict], phase: str, key: str, sampled: bool = False) -> list[float]:
    found = [run["phases"][phase] for run in runs]
    return [100 * (metrics["sampled"] if sampled else metrics)[key] for metrics in found]


def mean_row(title: str, runs: list[dict], phase: str, sampled: bool = False) -> str:
    """Return a table row of means over seeds, with the standard error of the mean."""
    cells = []
    for key in ("acc_t1", "acc_t2", "delta", "delta_i_to_c", "delta_c_to_i"):
        x, sign = per_cent(runs, phase, key, sampled), "+" if key == "delta" else ""
        mean = sum(x) / len(x)
        error = (sum((v - mean) ** 2 for v in x) / (len(x) - 1) / len(x)) ** 0.5
        cells.append(f"{mean:{sign}.1f} ± {error:.1f}")
    return f"| {title} | " + " | ".join(cells) + " |"


def seed_row(score: dict, multi_turn: dict) -> str:
    """Return a table row of one seed: t1 / t2 of each phase, and both methods' delta."""

    def pair(run, phase):
        m = run["phases"][phase]
        return f"{100 * m['acc_t1']:.1f} / {100 * m['acc_t2']:.1f}"

    m, control = score["phases"]["score"], multi_turn["phases"]["multi_turn"]
    low, high = (100 * x for x in m["delta_interval"])
    return (
        f"| {score['seed']} | {pair(score, 'base')} | {pair(score, 'stage1')} | "
        f"{pair(score, 'score')} | {100 * m['delta']:+.1f} [{low:+.1f}, {high:+.1f}] | "
        f"{100 * m['delta_c_to_i']:.1f} | {pair(multi_turn, 'multi_turn')} | "
        f"{100 * control['delta']:+.1f} |"
    )


def tables(runs: list[dict]) -> str:
    """Return README's tables: means, seeds, the cost of the first command, and the claims."""
    score, multi_turn = ([r for r in runs if r["method"] == method] for method in METHODS)
    seconds = sorted(r["wall_seconds"] for r in score if r["wall_seconds"]) or [float("nan")]

    def mean_rows(sampled):
        return [
            "| | Acc@t1 | Acc@t2 | Δ(t1,t2) | Δ i→c | Δ c→i |",
            "|---|---|---|---|---|---|",
            mean_row("base", score, "base", sampled),
            mean_row("Stage I", score, "stage1", sampled),
            mean_row("**SCoRe**", score, "score", sampled),
            mean_row("multi-turn RL", multi_turn, "multi_turn", sampled),
            "",
        ]

    lines = [
        *mean_rows(sampled=False),
        "The same, sampled at temperature 1, as in training:",
        "",
        *mean_rows(sampled=True),
        "Greedy, seed by seed:",
        "",
        "| seed | base t1 / t2 | Stage I t1 / t2 | SCoRe t1 / t2 | SCoRe Δ [95 %] | SCoRe Δ c→i "
        "| multi-turn t1 / t2 | multi-turn Δ |",
        "|---|---|---|---|---|---|---|---|",
        *(seed_row(a, b) for a, b in zip(score, multi_turn, strict=True)),
        "",
        f"`python score.py` took {seconds[len(seconds) // 2]:.0f} s ({seconds[0]:.0f} to "
        f"{seconds[-1]:.0f}) and at most {max(r['peak_mib'] for r in score)} MiB "
        f"({runs[0]['machine']}, {runs[0]['threads']} threads; commit {runs[0]['commit']}).",
        "",
        "| asked of every seed | seed by seed | holds in all |",
        "|---|---|---|",
        *(
            f"| {words} | "
            + ", ".join(f"{x:.1f}" for x in values)
            + f" | {'yes' if holds else 'NO'} |"
            for words, values, holds in claims(runs)
        ),
    ]
    return "\n".join(lines)


def claims(runs: list[dict]) -> list[tuple[str, list[float], bool]]:
    """Return each claim on every seed: its words, the values in points, and whether all hold."""
    score, multi_turn = ([r for r in runs if r["method"] == method] for method in METHODS)

    def difference(a, b):
        return [x - y for x, y in zip(a, b, strict=True)]

    base1, stage1 = (per_cent(score, phase, "acc_t1") for phase in ("base", "stage1"))
    delta = per_cent(score, "score", "delta")
    control = per_cent(multi_turn, "multi_turn", "delta")
    seconds = [r["wall_seconds"] for r in score if r["wall_seconds"]]
    values = [
        ("base Acc@t1, 35 to 65", base1, lambda x: 35 <= x <= 65),
        ("base Δ, at most +2", per_cent(score, "base", "delta"), lambda x: x <= 2),
        ("Stage I moves Acc@t1 by at most 6", difference(stage1, base1), lambda x: abs(x) <= 6),
        ("SCoRe Acc@t2, at least 85", per_cent(score, "score", "acc_t2"), lambda x: x >= 85),
        ("SCoRe Δ, at least +25", delta, lambda x: x >= 25),
        ("SCoRe Δ c→i, at most 3", per_cent(score, "score", "delta_c_to_i"), lambda x: x <= 3),
        ("SCoRe Δ above multi-turn RL's by", difference(delta, control), lambda x: x > 0),
        ("seconds, at most 180", seconds, lambda x: x <= 180),
        ("peak MiB, at most 1,536", [r["peak_mib"] for r in score], lambda x: x <= 1536),
    ]
    return [(words, x, all(map(holds, x))) for words, x, holds in values]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "seeds", help="their folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="train nothing, print --out's tables")
    args, options = parser.parse_known_args(argv)
    if not args.table:
        args.runs.mkdir(parents=True, exist_ok=True)
        runs = [
            train(method, seed, args.runs / f"{method}-seed{seed}", options)
            for seed in args.seeds
            for method in METHODS
        ]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(runs, indent=1) + "\n")
    if not args.out.is_file():
        sys.exit(f"no results at {args.out}: run without --table first")
    runs = json.loads(args.out.read_text())
    settings = [{k: v for k, v in r["config"].items() if k not in ("seed", "method")} for r in runs]
    if any(
        (r["commit"], s) != (runs[0]["commit"], settings[0])
        for r, s in zip(runs, settings, strict=True)
    ):
        sys.exit(f"runs of different commits or settings: remove the old ones from {args.runs}")
    print(tables(runs))
    return 0 if all(holds for *_, holds in claims(runs)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
