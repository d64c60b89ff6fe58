"""What does each engine hold on a GPU at three sizes? GiB at least, as a Markdown table.

Weights are counted in models of the published shapes, on the meta device; `scale.processes.needs`
has the formulas, and each engine's rule says what is split, whole or absent. Activations, buffers
and fragments come on top. 32 rows of 2,400 tokens at a time; bfloat16, but TRL's port float32.

    python ports/engines.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import GPT, GPTConfig
from scale.memory import prepare
from scale.processes import needs
from study.tables import markdown

ROWS, TOKENS, GPUS = 32, 2400, 8
QWEN = dict(max_positions=TOKENS, rope_theta=1e6, qkv_bias=True)
SIZES = {  # as published: Qwen2.5-0.5B, Qwen2.5-7B, Llama 3.1 70B
    "0.5B": GPTConfig(151_936, 24, 14, 2, 896, 4864, tied_head=True, **QWEN),
    "7B": GPTConfig(152_064, 28, 28, 4, 3584, 18_944, **QWEN),
    "70B": GPTConfig(128_256, 80, 64, 8, 8192, 28_672, TOKENS, 5e5),
}
TITLES = "| GiB on each of 8 GPUs | 0.5B | 7B | 70B | 7B: part + base + copy + cache |"


def held(config: GPTConfig) -> dict[str, dict[str, float]]:
    """Return by engine what each of 8 GPUs holds at least, in GiB, by what for."""
    with torch.device("meta"):
        policy, float32, bfloat16 = GPT(config), GPT(config), GPT(config)
    rounded = prepare(bfloat16.requires_grad_(False), torch.bfloat16)
    alone, split = (needs(policy, rounded, n, ROWS, TOKENS) for n in (1, GPUS))
    whole = needs(policy, float32, 1, ROWS, TOKENS)
    cache, copy = whole["cache"] / 2, whole["base"] / 2  # in bfloat16, of vLLM all of it
    return {
        "ours, one process": alone | dict(cache=cache),  # nothing is gathered
        "ours, torchrun": split,
        "TRL": whole | dict(copy=0.0),  # the policy itself samples
        "verl": split | dict(base=0.0, copy=copy, cache=cache),  # its base is on the host
        "verl, vLLM over 8": split | dict(base=0.0, copy=copy / GPUS, cache=cache / GPUS),
    }


def table() -> str:
    """Return a row for each engine, in all and of what."""
    found, rows = [held(config) for config in SIZES.values()], []
    for engine in found[0]:
        sums = [f"{sum(x[engine].values()):,.1f}" for x in found]
        parts = " + ".join(f"{x:.1f}" for x in found[1][engine].values())
        rows.append([engine, *sums, parts])
    return markdown(TITLES, rows)


if __name__ == "__main__":
    print(table())
