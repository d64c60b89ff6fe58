"""The table of speeds in README.md, from the files that the benchmarks wrote.

python tests/speed.py
"""

import json
import statistics
import sys

from bench_rollout import GROUP
from bench_rollout import RESULTS as ROLLOUT
from bench_train import RESULTS as TRAIN
from seeds import RESULTS as SEEDS

median = statistics.median
AIMS = {("toy", "512"): 5.0, ("toy", "8"): 2.0, "0.5B": 1.0, "0.5B episodes": 1.3, "step": 3.0,
        "decode": 0.7, "train": 0.5, "score.py": 120}  # fmt: skip


def spread(values: list[float], digits: int = 0) -> str:
    """Return the median and, in brackets, the least and the most."""
    middle, low, high = (f"{f(values):,.{digits}f}" for f in (median, min, max))
    return f"{middle} ({low} to {high})"


def faster(seconds: dict, *names: str) -> list[float]:
    """Return the seconds of the fastest of several, by the median; none if none was measured."""
    return min((seconds[name] for name in names if name in seconds), key=median, default=[])


def times(ours: list[float], theirs: list[float]) -> str:
    """Return how many times as fast ours is, by the medians; nothing if one was not measured."""
    return f"{median(theirs) / median(ours):.2f}" if ours and theirs else ""


def verdict(value: float, aim: float | None, unit: str = " ×") -> str:
    """Return the aim, and whether it is met."""
    if aim is None:
        return ""
    shown = f"{100 * aim:.0f} %" if unit == " %" else f"{aim:g}{unit}"
    return f"{shown}: {'met' if value >= aim else 'missed'}"


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def rows(B: str) -> str:
    return "1 row" if B == "1" else f"{B} rows"


def sampling(size: str, found: dict) -> list[str]:
    """Return the rows of one size of model: tokens a second, then episodes a second."""
    lines = []
    for B, seconds in found["turns"].items():
        tokens = int(B) * found["attempt"]
        ours, fused = seconds["ours"], seconds.get("ours, compiled", [])
        theirs = faster(seconds, "dynamic", "static")
        both = faster(seconds, "dynamic, compiled", "static, compiled")
        best = median(theirs) / min(median(x) for x in (ours, fused) if x)
        lines.append(row(
            f"{size}, {rows(B)}, tokens/s",
            *(spread([tokens / x for x in xs]) if xs else "" for xs in (ours, fused, theirs, both)),
            times(ours, theirs), times(fused, theirs), times(fused, both),
            verdict(best, AIMS.get((size, B), AIMS.get(size))),
        ))  # fmt: skip
    for B, seconds in found["episodes"].items():
        ours, theirs = ([int(B) / x for x in seconds[name]] for name in ("ours", "dynamic"))
        ratio = median(ours) / median(theirs)
        lines.append(row(
            f"{size}, {rows(B)}, episodes/s", spread(ours, 1), "", spread(theirs, 1), "",
            f"{ratio:.2f}", "", "", verdict(ratio, AIMS.get(f"{size} episodes")),
        ))  # fmt: skip
    return lines


def decode(found: dict) -> tuple[float, float, float]:
    """Return the seconds of a token in a batch of 1, what reading the weights once takes at the
    measured bandwidth, and what summing each weight took."""
    seconds = {name: median(x) for name, x in found["seconds"].items()}
    token = (seconds["long"] - seconds["short"]) / found["tokens"]
    return token, found["read"] / 1e9 * seconds["gigabyte"], seconds["weights"]


def table(rollout: dict, train: dict, seeds: list[dict]) -> str:
    """Return the table, what bounds the misses, and where it was measured."""
    lines = [
        row("", "ours", "ours, `--compile`", "theirs", "theirs, compiled", "×", "`--compile` ×",
            "both compiled ×", "aim"),
        "|---" * 9 + "|",
    ]  # fmt: skip
    for size, found in rollout["sizes"].items():
        lines += sampling(size, found)
    toy, large = train["toy"]["seconds"], train["large"]
    ms = {name: [1000 * x for x in xs] for name, xs in toy.items()}
    best = median(toy["TRL"]) / median(toy["compiled"])
    lines.append(row(
        "toy, SCoRe step, ms, TRL", spread(ms["ours"]), spread(ms["compiled"]), spread(ms["TRL"]),
        "", times(toy["ours"], toy["TRL"]), times(toy["compiled"], toy["TRL"]), "",
        verdict(best, AIMS["step"]),
    ))  # fmt: skip
    token, once, summed = decode(train["decode"])
    lines.append(row(
        "0.5B, 1 row, ms a token, weights read once", f"{1000 * token:.0f}", "",
        f"{1000 * once:.0f}", "", f"{100 * once / token:.0f} %", "", "",
        verdict(once / token, AIMS["decode"], " %"),
    ))  # fmt: skip
    flops = [large["flop"] / x / 1e9 for x in large["seconds"]["step"]]
    most = [2 * 2048**3 / x / 1e9 for x in large["seconds"]["multiply"]]
    share = median(flops) / median(most)
    lines.append(row(
        "10M, training step, Gflop/s, product of matrices", spread(flops), "", spread(most), "",
        f"{100 * share:.0f} %", "", "", verdict(share, AIMS["train"], " %"),
    ))  # fmt: skip
    whole = [r["wall_seconds"] for r in seeds if r["method"] == "score"]
    aim = "met" if median(whole) <= AIMS["score.py"] else "missed"
    first = "`python score.py`, s, seeds 0 to 4"
    lines.append(row(first, spread(whole), *[""] * 6, f"{AIMS['score.py']}: {aim}"))
    kernels = rollout["sizes"]["toy"]["kernels"]["512"], train["toy"]["kernels"]
    bound = [1 / kernels[0], median(toy["TRL"]) / (kernels[1] * median(toy["ours"]))]
    commits = sorted({rollout["commit"], train["commit"]})
    return "\n".join([
        *lines, "",
        f"(Commit {', '.join(commits)}, `python score.py` {seeds[0]['commit']}; "
        f"{rollout['machine']}, {rollout['threads']} threads, torch {rollout['torch']}, float32.) "
        f"Matrix products and attention take {100 * kernels[0]:.0f} % of the time of `generate` "
        f"at 512 rows of the toy: were all else free, a sampler on them would be "
        f"{bound[0]:.1f} times as fast. Of our training step they take {100 * kernels[1]:.0f} %: "
        f"it would be {bound[1]:.1f} times as fast as TRL's. Of decoding at 0.5B they take "
        f"{100 * train['decode']['kernels']:.0f} %: the product of one row reads slower than the "
        f"memory could. (Summing the weights one by one takes {1000 * summed:.0f} ms.) An episode is two attempts, {GROUP} of each problem.",
    ])  # fmt: skip


def main() -> int:
    print(table(*(json.loads(path.read_text()) for path in (ROLLOUT, TRAIN, SEEDS))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
