"""The tables of speeds in README.md, from the files that the benchmarks wrote.

python tests/speed.py
"""

import json
import statistics
import sys

from bench_rollout import GROUP
from bench_rollout import RESULTS as ROLLOUT
from bench_train import RESULTS as TRAIN
from bench_train import decode
from seeds import RESULTS as SEEDS

median = statistics.median
AIMS = {("toy", "512"): 5.0, ("toy", "8"): 2.0, "0.5B": 1.0, "0.5B episodes": 1.3, "step": 3.0,
        "decode": 70, "train": 50, "score.py": 120}  # fmt: skip


def spread(values: list[float], digits: int = 0) -> str:
    """Return the median and, in brackets, the least and the most."""
    middle, low, high = (f"{f(values):,.{digits}f}" for f in (median, min, max))
    return f"{middle} ({low} to {high})"


def faster(seconds: dict, *names: str) -> list[float]:
    """Return the seconds of the fastest of several, by the median."""
    return min((seconds[name] for name in names), key=median)


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Return how many times as fast ours is, by the medians of seconds."""
    return median(theirs) / median(ours)


def verdict(value: float, aim: float | None, told: str = "{:g}") -> str:
    """Return the aim, as it is told, and whether it is met."""
    return "" if aim is None else f"{told.format(aim)}: {'met' if value >= aim else 'missed'}"


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def head(*cells: str) -> list[str]:
    return [row("", *cells), "|---" * (len(cells) + 1) + "|"]


def rows(B: str) -> str:
    return "1 row" if B == "1" else f"{B} rows"


def tokens(sizes: dict) -> list[str]:
    """Return the table of tokens a second: like against like, with and without torch.compile."""
    lines = head("ours", "`generate`", "×", "ours, `--compile`", "`generate`, compiled", "×", "aim")
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
            lines.append(row(
                f"{size}, {rows(B)}", *(cells + [""] * 3)[:6],
                verdict(max(ratio(*pair) for pair in pairs), aim),
            ))  # fmt: skip
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


def steps(train: dict, seeds: list[dict]) -> list[str]:
    """Return the table of training steps, of the machine's limits, and of a whole run."""
    lines = head("ours", "compared with", "ratio or share", "aim")
    toy, large = train["toy"]["seconds"], train["large"]
    for name, option in (("ours", ""), ("compiled", ", `--compile`")):
        cells = (spread([1000 * x for x in toy[key]]) for key in (name, "TRL"))
        value = ratio(toy[name], toy["TRL"])
        aim = verdict(value, None if option else AIMS["step"], "{:g} ×")
        name = f"SCoRe's step, toy{option}, ms; with TRL's"
        lines.append(row(name, *cells, f"{value:.2f} ×", aim))
    for name, option in (("", ""), (", compiled", ", `--compile`")):
        token, once = decode(train["decode"], name)
        share = median(once) / median(token)
        lines.append(row(
            f"a token, 0.5B, 1 row{option}, ms; with reading the weights once",
            *(spread([1000 * x for x in xs]) for xs in (token, once)),
            f"{100 * share:.0f} %", verdict(100 * share, AIMS["decode"], "{:g} %"),
        ))  # fmt: skip
    flops = [large["flop"] / x / 1e9 for x in large["seconds"]["step"]]
    most = [2 * 2048**3 / x / 1e9 for x in large["seconds"]["multiply"]]
    share = median(flops) / median(most)
    lines.append(row(
        "training step, 10M, Gflop/s; with a product of matrices", spread(flops), spread(most),
        f"{100 * share:.0f} %", verdict(100 * share, AIMS["train"], "{:g} %"),
    ))  # fmt: skip
    whole = [r["wall_seconds"] for r in seeds if r["method"] == "score"]
    met = "met" if median(whole) <= AIMS["score.py"] else "missed"
    name = f"`python score.py`, s, {len(whole)} seeds"
    lines.append(row(name, spread(whole), "", "", f"at most {AIMS['score.py']}: {met}"))
    return lines


def bounds(sizes: dict, train: dict) -> str:
    """Return what bounds the misses."""
    toy, ours = sizes["toy"], train["toy"]["seconds"]["ours"]
    kernels, step = toy["kernels"], train["toy"]["kernels"]
    few, many = toy["turns"]["8"], toy["turns"]["512"]
    usual = faster(few, "dynamic", "static")
    fused = faster(few, "dynamic, compiled", "static, compiled")
    most = ratio(many["ours"], faster(many, "dynamic", "static")) / kernels["ours"]
    ahead = ratio(ours, train["toy"]["seconds"]["TRL"]) / step
    read, summed = 100 * train["decode"]["kernels"], train["decode"]["seconds"]["weights"]
    return (
        f"What bounds it: matrix products and attention are {100 * kernels['ours']:.0f} % of our "
        f"time (and {100 * kernels['dynamic']:.0f} % of `generate`'s) at 512 rows of the toy; were "
        f"all else free, ours would be {most:.1f} times as fast as `generate`. They are "
        f"{100 * step:.0f} % of our training step, which would be {ahead:.1f} times as fast as "
        f"TRL's. At 8 rows it is the number of small operations: fused by `--compile`, ours is "
        f"{ratio(few['ours, compiled'], few['ours']):.1f} times as fast, and `generate` "
        f"{ratio(fused, usual):.1f}. Of an attempt at 0.5B they are {read:.0f} %: products of one "
        f"row read memory more slowly than it can be read (summing each of the weights takes "
        f"{1000 * median(summed):.0f} ms); `--compile` makes each a loop that multiplies and sums."
    )


def tables(rollout: dict, train: dict, seeds: list[dict]) -> str:
    """Return the tables, what bounds the misses, and where all this was measured."""
    sizes = rollout["sizes"]
    commits = " and ".join(sorted({rollout["commit"], train["commit"]}))
    return "\n".join([
        "Tokens a second:", "", *tokens(sizes), "",
        f"Episodes a second (two attempts, {GROUP} of each problem; not compiled):", "",
        *episodes(sizes), "", "Steps, limits and the whole:", "", *steps(train, seeds), "",
        bounds(sizes, train), "",
        f"(Commit {commits}, `python score.py` {seeds[0]['commit']}; {rollout['machine']}, "
        f"{rollout['threads']} threads, torch {rollout['torch']}, float32.)",
    ])  # fmt: skip


def main() -> int:
    print(tables(*(json.loads(path.read_text()) for path in (ROLLOUT, TRAIN, SEEDS))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
