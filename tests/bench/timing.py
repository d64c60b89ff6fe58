"""How are two programs timed so that they can be compared? In turns, in one process.

Each round runs every one of them once, so that whatever slows the machine slows all; what is told
is the median of the rounds with the least and the most.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests/results"
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
KERNELS = (
    "aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise", ATTENTION,
    ATTENTION + "_backward",
)  # fmt: skip


def in_turns(works: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each work in each round, after one round that is not told."""
    seconds = {name: [] for name in works}
    for i in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: list[float], digits: int = 0) -> str:
    """Return the median and, in brackets, the least and the most."""
    middle, low, high = (f"{f(values):,.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} ({low} to {high})"


def in_kernels(work: Callable, pairs: int) -> float:
    """Return the share of a work's time that matrix products and attention take: their seconds, as
    the profiler counts them, of the seconds without a profiler; the median of so many pairs."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines
    shares = []
    for _ in range(pairs):
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        with torch.profiler.profile() as profiler:
            work()
        own = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
        shares.append(sum(own.get(name, 0.0) for name in KERNELS) / 1e6 / seconds)
    return statistics.median(shares)


def about() -> dict:
    """Return the commit, with "+" if files differ from it, and where this is measured."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout

    others = ".", ":!tests/results"  # which what was measured just before has changed
    changed = "+" if git("status", "--porcelain", "--untracked-files=no", "--", *others) else ""
    return dict(
        commit=git("rev-parse", "--short", "HEAD").strip() + changed, torch=torch.__version__,
        threads=torch.get_num_threads(), machine=f"{platform.system()} {platform.machine()}",
    )  # fmt: skip


def write(found: dict, name: str, part: bool) -> Path:
    """Write results as JSON to tests/results, or those of a part to this folder; return where."""
    path = Path(name) if part else RESULTS / name
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(f"wrote {path}")
    return path
