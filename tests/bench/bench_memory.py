"""How much memory does one training step take, against what it cannot do without?

    python tests/bench/bench_memory.py           # 14 GiB, some minutes; --quick: a small model

A model of Qwen2.5-0.5B's shape with random weights, vocabulary 151,936, float32, AdamW; rows of
random tokens and rewards stand for samples. Peak resident memory (that of the interpreter and torch
taken off) is set against weights + optimizer + reference + one chunk of distributions [rows, chunk,
V], and against the same with the gradient. "whole" keeps all distributions: chunk 0 and no blocks
computed again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import score
from model import GPT, GPTConfig
from rollout import make_rows, signs
from scale import steps, train
from scale.memory import prepare
from tests.bench.timing import about, write

ROWS, MICRO, CHUNK, TOKENS = 4, 2, 16, 256
VOCABULARY = {896: 151_936, 64: 5_000}  # by width: as Qwen2.5-0.5B, and a quick look
WAYS = {"chunks": (CHUNK, 1), "whole": (0, 0)}


def table(found: dict) -> str:
    """Return the results as a Markdown table."""
    titles = {
        "chunks": f"`--chunk {CHUNK} --recompute 1`",
        "whole": "`--chunk 0 --recompute 0`",
    }
    lines = [
        "| | peak, GiB | over weights + optimizer + reference + one chunk | with the gradient, too "
        "| seconds a step |",
        "|---|---|---|---|---|",
    ]
    for name, m in found["runs"].items():
        lines.append(f"| {titles[name]} | {m['peak'] / 2**30:.2f} | {m['ratio']:.2f} | "
                     f"{m['ratio_with_gradient']:.2f} | {m['seconds']:.0f} |")  # fmt: skip
    where = f"(commit {found['commit']}, {found['threads']} threads, float32)"
    return "\n".join([*lines, "", where])


def resident(name: str) -> int:
    """Return this process's resident memory in bytes, VmRSS now or VmHWM at most (Linux)."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


def measure(width: int, chunk: int, recompute: int) -> dict:
    """Return what one step of Stage II takes, in bytes and seconds."""
    start = resident("VmRSS")
    large, V = width == 896, VOCABULARY[width]
    config = GPTConfig(
        V, n_layer=24 if large else 2, n_head=14 if large else 4, n_kv_head=2, d_model=width,
        d_ff=4864 if large else 2 * width, max_positions=2048, rope_theta=1e6, qkv_bias=True,
        tied_head=True,
    )  # fmt: skip
    c = train.Config(batch=ROWS, group=2, micro_batch=MICRO, chunk=chunk, recompute=recompute)
    policy = prepare(GPT(config), recompute=bool(recompute))
    weights = {name: x.clone() for name, x in policy.state_dict().items()}
    base = steps.frozen(policy, weights, c)
    run = score.Run(c, signs(c), [], Path(), policy, base, score.adamw(policy))
    steps.GAP["float32"] = torch.inf  # nothing was sampled
    ids = torch.randint(0, V, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    prompts, *attempts = ([row[a:b] for row in ids] for a, b in ((0, 64), (64, 128), (128, TOKENS)))
    r = make_rows(prompts, attempts, [5], "cpu")
    reward_KB = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(1, ROWS // 2)
    for _ in range(2):  # in the first the optimizer's state comes into being
        began = time.perf_counter()
        steps.rl_update(run, r, reward_KB, score.stage2(reward_KB, c))
        seconds = time.perf_counter() - began
    size = 4 * sum(w.numel() for w in policy.parameters())
    least = 4 * size + 4 * MICRO * (chunk or TOKENS) * V
    peak = resident("VmHWM") - start
    return dict(
        peak=peak, weights=size, seconds=seconds, ratio=peak / least,
        ratio_with_gradient=peak / (least + size),
    )  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a model of width 64")
    parser.add_argument("--one", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(*args.one)))
        return 0
    width = 64 if args.quick else 896
    sizes = dict(vocabulary=VOCABULARY[width], width=width, rows=ROWS, tokens=TOKENS)
    found = about() | sizes | dict(micro_batch=MICRO, runs={})
    # so that what torch frees goes back to the system rather than into the heap's gaps
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    for name, way in WAYS.items():
        one = [sys.executable, __file__, "--one", *map(str, (width, *way))]
        done = subprocess.run(one, stdout=subprocess.PIPE, text=True, env=env, check=True)
        found["runs"][name] = m = json.loads(done.stdout)
        print(f"{name}: peak {m['peak'] / 2**30:.2f} GiB, {m['ratio']:.2f} x (weights + optimizer "
              f"+ reference + chunk); {m['seconds']:.1f} s a step", flush=True)  # fmt: skip
    write(found, "memory.json", part=args.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
