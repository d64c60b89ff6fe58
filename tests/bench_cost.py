"""How do time and memory of a step grow with batch, length, width and group?

    python tests/bench_cost.py              # some minutes; then tests/results/cost.png

A step is SCoRe's Stage II on a toy-sized model with random weights: two attempts of a fixed length
are sampled, scored by policy and base, and one update is taken. One quantity is varied at a time.
Each point is measured in a process of its own: the median of five steps after two, apart for
sampling and learning, and the process's peak resident memory, that of the interpreter and torch
taken off.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench_memory import resident
from truth import ROOT

sys.path.insert(0, str(ROOT))

import rollout
import run as runs
import score
from model import GPT, GPTConfig

RESULTS = ROOT / "tests/results/cost.json"
POINTS = {  # what is varied: where, and what is not as in USUAL
    "batch": ((32, 64, 128, 256, 512, 1024), {}),
    "length": ((8, 16, 32, 64, 128, 256), dict(batch=32)),
    "width": ((32, 64, 128, 256, 512), dict(batch=64)),
    "group": ((2, 4, 8, 16, 32, 64), dict(prompt=64)),
}
USUAL = dict(batch=256, length=9, width=48, group=4, prompt=16)
TITLES = dict(
    batch="rollouts a step", length="tokens of an attempt", width="width of the model",
    group="rollouts of a problem",
)  # fmt: skip
STEPS, WARM = 5, 2
MIB = (125, 250, 500)  # ticks of the figure


def measure(batch: int, length: int, width: int, group: int, prompt: int) -> dict:
    """Return seconds of sampling and of learning, medians, and the peak of memory in bytes."""
    start = resident("VmRSS")
    instruction, most = [13], prompt + 2 * length + 1
    config = GPTConfig(14, 3, 4, 4, width, 2 * width, most, qkv_bias=True)
    c = runs.Config(batch=batch, group=group)
    policy = GPT(config)
    run = runs.Run(
        c, Path(), policy, runs.frozen(policy, c), None, runs.new_optimizer(policy), None, None,
        torch.Generator().manual_seed(0), runs.Progress(),
    )  # fmt: skip
    prompts = torch.randint(12, (batch // group, prompt), generator=run.sampler).tolist()
    rewards = [torch.tensor([0.0, 1.0] * (batch // 2)), torch.tensor([1.0, 0.0] * (batch // 2))]
    seconds = dict(sampling=[], learning=[])

    def collect(*_, **__):
        began = time.perf_counter()
        r = rollout.rollout(
            policy, prompts, instruction, max_new=length, end_id=-1, generator=run.sampler,
            compact=True, group=group,
        )  # fmt: skip
        seconds["sampling"].append(time.perf_counter() - began)
        return r, [], rewards, 0.0

    score.collect = collect
    for _ in range(WARM + STEPS):
        began = time.perf_counter()
        score.rl_step(run, runs.Phase("score", "stage2", 1, 10.0))
        whole = time.perf_counter() - began
        seconds["learning"].append(whole - seconds["sampling"][-1])
    medians = {name: statistics.median(found[WARM:]) for name, found in seconds.items()}
    return medians | dict(peak=resident("VmHWM") - start)


def draw(found: dict, path: Path) -> None:
    """Draw time and memory against each quantity, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(POINTS), figsize=(11, 5), sharex="col", sharey="row")
    for column, (name, points) in enumerate(found["points"].items()):
        x = [int(value) for value in points]
        time_axis, memory_axis = axes[:, column]
        for part, style in (("sampling", "o-"), ("learning", "s--")):
            ms = [1000 * point[part] for point in points.values()]
            time_axis.plot(x, ms, style, label=part, markersize=4)
        memory_axis.plot(x, [point["peak"] / 2**20 for point in points.values()], "k^-",
                         markersize=4)  # fmt: skip
        for axis in axes[:, column]:
            axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.3)
        memory_axis.set_xticks(x, [str(value) for value in x])
        memory_axis.set_yticks(MIB, [str(value) for value in MIB])
        memory_axis.minorticks_off()
        memory_axis.set_xlabel(TITLES[name])
    axes[0, 0].set_ylabel("ms a step")
    axes[1, 0].set_ylabel("peak, MiB")
    axes[0, 0].legend()
    figure.tight_layout()
    for suffix in (".svg", ".png"):
        figure.savefig(
            path.with_suffix(suffix), metadata={"Date": None} if suffix == ".svg" else {}
        )
    plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=POINTS, default=list(POINTS), help="(all)")
    parser.add_argument("--points", type=int, help="so many of each, the smallest (all)")
    whole = RESULTS if not argv else Path(RESULTS.name)
    parser.add_argument("--out", type=Path, default=whole, help="default of a part: cost.json")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(**args.one)))
        return 0
    found = dict(
        commit=runs.commit(), torch=torch.__version__, threads=torch.get_num_threads(),
        machine=f"{platform.system()} {platform.machine()}", usual=USUAL, points={},
    )  # fmt: skip
    for name in args.only:
        values, instead = POINTS[name]
        found["points"][name] = {}
        for value in values[: args.points]:
            one = json.dumps(USUAL | instead | {name: value})
            words = [sys.executable, __file__, "--one", one]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            found["points"][name][value] = m = json.loads(done.stdout)
            print(f"{name} {value:>4}: sampling {1000 * m['sampling']:.0f} ms, learning "
                  f"{1000 * m['learning']:.0f} ms, {m['peak'] >> 20} MiB", flush=True)  # fmt: skip
    runs.write_json(found, args.out, indent=2)
    draw(found, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
