"""How much memory does one training step take, against what it cannot do without?

    python tests/bench_memory.py            # 12 GiB; --width 64 for a quick look

A model of Qwen2.5-0.5B's shape with random weights, vocabulary 151,936, float32, AdamW; rows of
random tokens and rewards stand for samples. Peak resident memory (that of the interpreter and torch
taken off) is set against weights + optimiser + reference + one chunk of laws [rows, chunk, V], and
against the same with the gradient. "whole" keeps all laws: chunk 0 and no blocks computed again.
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
from truth import ROOT

sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import rollout
import run as runs
import score

RESULTS = ROOT / "tests/results/memory.json"
V, ROWS, MICRO, CHUNK = 151_936, 4, 2, 16


def table(found: dict) -> str:
    """Return the results as a Markdown table."""
    titles = {"chunks": f"`--chunk {CHUNK} --recompute`", "whole": "`--chunk 0`, no `--recompute`"}
    lines = [
        "| | peak, GiB | over weights + optimiser + reference + one chunk | with the gradient, too "
        "| seconds a step |",
        "|---|---|---|---|---|",
    ]
    for name, m in found["runs"].items():
        lines.append(f"| {titles[name]} | {gib(m['peak']):.2f} | {m['ratio']:.2f} | "
                     f"{m['ratio_with_gradient']:.2f} | {m['seconds']:.0f} |")  # fmt: skip
    about = f"(commit {found['commit']}, {found['threads']} threads, float32)"
    return "\n".join([*lines, "", about])


def gib(x: float) -> float:
    return round(x / 2**30, 3)


def resident(name: str) -> int:
    """Return this process's resident memory in bytes, VmRSS now or VmHWM at most (Linux)."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


def measure(width: int, tokens: int, chunk: int, recompute: bool) -> dict:
    """Return what one step of Stage II takes, in bytes and seconds."""
    start = resident("VmRSS")
    config = model.GPTConfig(
        V, n_layer=24 if width == 896 else 2, n_head=14 if width == 896 else 4, n_kv_head=2,
        d_model=width, d_ff=4864 if width == 896 else 2 * width, max_positions=2048,
        rope_theta=1e6, qkv_bias=True, tied_head=True,
    )  # fmt: skip
    c = runs.Config(batch=ROWS, group=2, micro_batch=MICRO, chunk=chunk, recompute=recompute)
    policy = model.GPT(config)
    policy.recompute = policy.lean = recompute
    optimizer = runs.new_optimizer(policy)
    run = runs.Run(
        c, Path(), policy, runs.frozen(policy, c), None, optimizer, None, None, None,
        runs.Progress(),
    )  # fmt: skip
    ids = torch.randint(0, V, (ROWS, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    quarter = tokens // 4
    r = rollout.lay_out(
        [row[:quarter] for row in ids],
        [[row[quarter : 2 * quarter] for row in ids], [row[2 * quarter :] for row in ids]],
        [5], "cpu",
    )  # fmt: skip
    rewards = [torch.tensor([0.0, 1.0] * (ROWS // 2)), torch.tensor([1.0, 0.0] * (ROWS // 2))]
    score.collect = lambda *_, **__: (r, [], rewards, 0.0)
    phase = runs.Phase("score", "stage2", 1, 10.0)
    score.rl_step(run, phase)  # the optimiser's state comes into being
    began = time.monotonic()
    score.rl_step(run, phase)
    seconds, weights = time.monotonic() - began, 4 * sum(w.numel() for w in policy.parameters())
    laws = 4 * MICRO * (chunk or tokens) * V
    return dict(
        peak=resident("VmHWM") - start, weights=weights, optimiser=2 * weights, reference=weights,
        gradient=weights, chunk=laws, seconds=seconds,
    )  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.width, args.tokens, args.one[0], bool(args.one[1]))))
        return 0
    found = dict(
        commit=runs.commit(), torch=torch.__version__, threads=torch.get_num_threads(),
        vocabulary=V, width=args.width, rows=ROWS, micro_batch=MICRO, tokens=args.tokens, runs={},
    )  # fmt: skip
    # so that what torch frees goes back to the system rather than into the heap's gaps
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    for name, one in (("chunks", [str(CHUNK), "1"]), ("whole", ["0", "0"])):
        words = [sys.executable, __file__, "--one", *one, "--width", str(args.width)]
        words += ["--tokens", str(args.tokens)]
        done = subprocess.run(words, capture_output=True, text=True, env=env)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        found["runs"][name] = m = json.loads(done.stdout)
        least = m["weights"] + m["optimiser"] + m["reference"] + m["chunk"]
        m["ratio"] = m["peak"] / least
        m["ratio_with_gradient"] = m["peak"] / (least + m["gradient"])
        print(
            f"{name:>7}: peak {gib(m['peak'])} GiB, {m['ratio']:.2f} x (weights + optimiser + "
            f"reference + chunk) = {gib(least)} GiB, {m['ratio_with_gradient']:.2f} x with the "
            f"gradient; {m['seconds']:.1f} s a step"
        )
    runs.write_json(found, args.out, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
