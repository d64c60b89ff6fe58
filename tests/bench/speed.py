"""How fast is it? The tables of tests/bench/README.md, from the files that the benchmarks wrote.

    python tests/bench/speed.py
    python tests/bench/speed.py --measure              # all of them first: half an hour

A sampler's aim is met if either ratio reaches it, with or without torch.compile.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.timing import RESULTS, spread

AIMS = {("toy", "512"): 2.0, ("toy", "8"): 2.0, "0.5B": 1.0, "0.5B episodes": 1.3, "step": 2.5,
        "decode": 70, "train": 50}  # fmt: skip


def faster(seconds: dict, *names: str) -> list[float]:
    """Return the seconds of the fastest of several, by the median."""
    return min((seconds[name] for name in names), key=median)


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Return how many times as fast ours is, by the medians of seconds."""
    return median(theirs) / median(ours)


def verdict(value: float, aim: float | None, unit: str = "") -> str:
    """Return the aim and whether it is met."""
    return "" if aim is None else f"{aim:g}{unit}: {'met' if value >= aim else 'missed'}"


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def head(*cells: str) -> list[str]:
    return [row("", *cells), "|---" * (len(cells) + 1) + "|"]


def rows(B: str) -> str:
    return "1 row" if B == "1" else f"{B} rows"


def tokens(sizes: dict) -> list[str]:
    """Return the table of tokens a second: like against like, with and without torch.compile."""
    lines = head("ours", "`generate`", "×", "ours, compiled", "`generate`, compiled", "×", "aim")
    for size, found in sizes.items():
        for B, seconds in found["turns"].items():
            pairs = [(seconds["ours"], faster(seconds, "dynamic", "static"))]
            if "ours, compiled" in seconds:
                theirs = faster(seconds, "dynamic, compiled", "static, compiled")
                pairs.append((seconds["ours, compiled"], theirs))
            n, cells = int(B) * found["attempt"], []
            for pair in pairs:
                digits = 0 if n / median(pair[0]) >= 100 else 1
                cells += [spread([n / x for x in xs], digits) for xs in pair]
                cells.append(f"{ratio(*pair):.2f}")
            aim = AIMS.get((size, B), AIMS.get(size))
            best = max(ratio(*pair) for pair in pairs)
            lines.append(row(f"{size}, {rows(B)}", *(cells + [""] * 3)[:6], verdict(best, aim)))
    return lines


def episodes(sizes: dict) -> list[str]:
    """Return the table of episodes a second."""
    lines = head("ours", "`generate`, reading all again", "×", "`generate`, its cache kept", "×",
                 "aim")  # fmt: skip
    for size, found in sizes.items():
        for B, seconds in found["episodes"].items():
            shown = {name: spread([int(B) / x for x in xs], 1) for name, xs in seconds.items()}
            again, kept = (ratio(seconds["ours"], seconds[name]) for name in ("dynamic", "kept"))
            lines.append(row(
                f"{size}, {rows(B)}", shown["ours"], shown["dynamic"], f"{again:.2f}",
                shown["kept"], f"{kept:.2f}", verdict(again, AIMS.get(f"{size} episodes")),
            ))  # fmt: skip
    return lines


def decode(found: dict) -> tuple[list[float], list[float]]:
    """Return the seconds of a token in a batch of 1, and of reading the weights once at the
    bandwidth measured beside it."""
    pairs = zip(found["seconds"]["long"], found["seconds"]["short"], strict=True)
    once = [found["read"] / 1e9 * x for x in found["seconds"]["gigabyte"]]
    return [(long - short) / found["tokens"] for long, short in pairs], once


def steps(train: dict) -> list[str]:
    """Return the table of training steps and of the machine's limits."""
    lines = head("ours", "compared with", "ratio or share", "aim")
    large = train["large"]
    options = ("", ", compiled") if train["compiled"] else ("",)
    for option in options:
        seconds = train["compiled" if option else "toy"]["seconds"]
        value = ratio(seconds["ours"], seconds["TRL"])
        lines.append(row(
            f"SCoRe's step, toy{option}, ms; with TRL's{option}",
            *(spread([1000 * x for x in seconds[name]]) for name in ("ours", "TRL")),
            f"{value:.2f} ×", verdict(value, AIMS["step"], " ×"),
        ))  # fmt: skip
    token, once = decode(train["decode"])
    share = 100 * median(once) / median(token)
    lines.append(row(
        "a token, 0.5B, 1 row, ms; with reading the weights once",
        *(spread([1000 * x for x in xs]) for xs in (token, once)),
        f"{share:.0f} %", verdict(share, AIMS["decode"], " %"),
    ))  # fmt: skip
    flops = [large["flop"] / x / 1e9 for x in large["seconds"]["step"]]
    most = [2 * 2048**3 / x / 1e9 for x in large["seconds"]["multiply"]]
    share = 100 * median(flops) / median(most)
    lines.append(row(
        "training step, 10M, Gflop/s; with a product of matrices", spread(flops), spread(most),
        f"{share:.0f} %", verdict(share, AIMS["train"], " %"),
    ))  # fmt: skip
    return lines


def bounds(sizes: dict, train: dict) -> str:
    """Return what bounds the misses."""
    toy = sizes["toy"]
    kernels, step = toy["kernels"], train["toy"]["kernels"]
    few, many = toy["turns"]["8"], toy["turns"]["512"]
    usual = faster(few, "dynamic", "static")
    fused = faster(few, "dynamic, compiled", "static, compiled")
    most = ratio(many["ours"], faster(many, "dynamic", "static")) / kernels["ours"]
    read, summed = 100 * train["decode"]["kernels"], train["decode"]["seconds"]["weights"]
    return (
        f"What bounds it: matrix products and attention are {100 * kernels['ours']:.0f} % of our "
        f"time (and {100 * kernels['dynamic']:.0f} % of `generate`'s) at 512 rows of the toy; were "
        f"all else free, ours would be {most:.1f} times as fast as `generate`. They are "
        f"{100 * step:.0f} % of our training step by two of torch's threads. "
        "At 8 rows it is the number of small operations: compiled, ours is "
        f"{ratio(few['ours, compiled'], few['ours']):.1f} times as fast, and `generate` "
        f"{ratio(fused, usual):.1f}. Of an attempt at 0.5B they are {read:.0f} %: products of one "
        f"row read memory more slowly than it can be read (summing each of the weights takes "
        f"{1000 * median(summed):.0f} ms)."
    )


def tables() -> str:
    """Return the tables, what bounds the misses, and where all this was measured."""
    from tests.bench import bench_busy  # which itself needs this module

    rollout, train, busy = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("rollout", "train", "busy")
    )
    commits = " and ".join(sorted({rollout["commit"], train["commit"], busy["commit"]}))
    return "\n".join([
        "A step, ms, and the share of the machine's products that it reaches when quiet:", "",
        bench_busy.table(busy), "",
        "Tokens a second:", "", *tokens(rollout["sizes"]), "",
        "Episodes a second (two attempts, 4 of each problem; not compiled):", "",
        *episodes(rollout["sizes"]), "", "Steps and limits:", "", *steps(train), "",
        bounds(rollout["sizes"], train), "",
        f"(Commit {commits}; {rollout['machine']}, {rollout['threads']} threads, torch "
        f"{rollout['torch']}, float32.)",
    ])  # fmt: skip


if __name__ == "__main__":
    for name in ("busy", "train", "rollout", "cost") if "--measure" in sys.argv else ():
        words = [sys.executable, Path(__file__).parent / f"bench_{name}.py"]
        subprocess.run(words + ["--quick"] * ("--quick" in sys.argv), check=True)
    print(tables())
