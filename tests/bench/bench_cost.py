"""How do time and memory of a step grow with batch, length, width and group?

    python tests/bench/bench_cost.py                   # some minutes; then tests/results/cost.png

A step is SCoRe's Stage II on a toy-sized model with random weights: two attempts of a fixed length
are sampled, scored by policy and base, and one update is taken. One quantity is varied at a time.
Each point is measured in a process of its own: the median of five steps after two, apart for
sampling and learning, and the process's peak resident memory, that of the interpreter and torch
taken off.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import score
from model import GPT, GPTConfig
from rollout import rollout, signs, token_terms
from tests.bench.bench_memory import resident
from tests.bench.timing import about, write

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
    c = score.Config(batch=batch, group=group)
    own = dict(end_id=-1, instruction=[13])  # which never ends: attempts have the full length
    task = signs(c)._replace(**own)
    config = GPTConfig(14, 3, 4, 4, width, 2 * width, prompt + 2 * length + 1, qkv_bias=True)
    policy, base = GPT(config), GPT(config).requires_grad_(False)
    run = score.Run(c, task, [], Path(), policy, base, score.adamw(policy))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(12, (batch // group, prompt), generator=generator).tolist()
    reward_KB = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(1, batch // 2)
    seconds = dict(sampling=[], learning=[])
    for _ in range(WARM + STEPS):
        began = time.perf_counter()
        noise_KBN = torch.rand(2, batch, length, dtype=torch.float64, generator=generator)
        r = rollout(policy, task, prompts, noise_KBN, c.temperature)
        sampled = time.perf_counter()
        terms = token_terms(run.policy, base, r, c.temperature)
        score.rl_update(run, r, reward_KB, *terms, score.stage2(reward_KB, c))
        seconds["sampling"].append(sampled - began)
        seconds["learning"].append(time.perf_counter() - sampled)
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
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one point")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(**args.one)))
        return 0
    found = about() | dict(usual=USUAL, points={})
    for name, (values, instead) in ({"batch": ((32,), {})} if args.quick else POINTS).items():
        found["points"][name] = {}
        for value in values:
            one = json.dumps(USUAL | instead | {name: value})
            words = [sys.executable, __file__, "--one", one]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            found["points"][name][value] = m = json.loads(done.stdout)
            print(f"{name} {value:>4}: sampling {1000 * m['sampling']:.0f} ms, learning "
                  f"{1000 * m['learning']:.0f} ms, {m['peak'] >> 20} MiB", flush=True)  # fmt: skip
    draw(found, write(found, "cost.json", part=args.quick).with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
