"""How fast are attempts sampled, against transformers' `generate` and against the machine?

    python tests/bench_rollout.py           # a quarter of an hour; --sizes toy for a quick look

The same weights and the same work, in one process, in turns: each round measures every sampler
once, and what is told is the median of the rounds with the least and the most. Greedy tokens must
be identical before anything is timed. Attempts have a fixed length, so that all samplers take as
many steps. An episode is two attempts at a problem, four episodes a problem: ours reads a problem
once for the four and goes on in the first attempt's cache; `generate` is called twice, and reads
everything again for the second. The machine's own limits are measured in the same rounds: the
memory's bandwidth by summing 1 GB, the cores' arithmetic by multiplying matrices of 2,048.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from truth import ROOT

sys.path.insert(0, str(ROOT))

import rollout
import run as runs
from model import GPT, Cache, GPTConfig

RESULTS = ROOT / "tests/results/rollout.json"
GROUP, INSTRUCTION = 4, 5  # rows of a problem; tokens of the instruction
SIZES = {  # sizes of the model; tokens of a problem and of an attempt; batches
    "toy": (
        GPTConfig(14, 3, 4, 4, 48, 96, 128, rope_theta=100.0, qkv_bias=True),
        16, 9, (1, 8, 64, 512),
    ),
    "10M": (
        GPTConfig(8192, 6, 6, 6, 384, 1024, 512, qkv_bias=True, tied_head=True),
        64, 32, (1, 8, 64, 512),
    ),
    "0.5B": (
        GPTConfig(151_936, 24, 14, 2, 896, 4864, 2048, 1e6, qkv_bias=True, tied_head=True),
        128, 16, (1, 8, 64),
    ),
}  # fmt: skip
TITLES = {"ours": "ours", "dynamic": "`generate`, dynamic cache", "static": "static cache"}


def there(model: GPT):
    """Return transformers' model of the same weights."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(Path(place) / "model")
        return AutoModelForCausalLM.from_pretrained(Path(place) / "model", dtype=torch.float32)


def generate(other, ids_BT, n: int, greedy: bool, static: bool) -> torch.Tensor:
    """Return n tokens after each row [B, n], by transformers."""
    law = dict(do_sample=False) if greedy else dict(do_sample=True, temperature=1.0, top_k=0)
    if static:
        law |= dict(cache_implementation="static")
    found = other.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=n, eos_token_id=None,
        pad_token_id=0, **law,
    )  # fmt: skip
    return found[:, ids_BT.shape[1] :]


@torch.no_grad()
def attempt(model: GPT, ids_BT, n: int, greedy: bool) -> torch.Tensor:
    """Return n tokens after each row [B, n], by our sampler."""
    B, T = ids_BT.shape
    cache = Cache(model, B, T + n)
    state_BD = rollout.read(model, cache, ids_BT, torch.full((B,), T))
    return rollout.sample_turn(
        model, cache, state_BD, max_new=n, end_id=-1, generator=None,
        temperature=0.0 if greedy else 1.0,
    ).ids_BN  # fmt: skip


def episodes(model: GPT, ids_PT, n: int, instruction: list[int], greedy: bool) -> torch.Tensor:
    """Return two attempts at each of P problems [P * GROUP, 2 n], by `rollout`."""
    r = rollout.rollout(
        model, ids_PT.tolist(), instruction, max_new=n, end_id=-1, generator=None, group=GROUP,
        temperature=0.0 if greedy else 1.0, compact=True,
    )  # fmt: skip
    return torch.cat([torch.tensor(rollout.written(r, turn)) for turn in (1, 2)], dim=1)


def episodes_there(other, ids_PT, n: int, instruction: list[int], greedy: bool) -> torch.Tensor:
    """Return two attempts at each of P problems [P * GROUP, 2 n], by `generate` called twice."""
    ids_BT = ids_PT.repeat_interleave(GROUP, dim=0)
    order_BC = torch.tensor(instruction).expand(len(ids_BT), -1)
    first = generate(other, ids_BT, n, greedy, static=False)
    second = generate(other, torch.cat([ids_BT, first, order_BC], 1), n, greedy, static=False)
    return torch.cat([first, second], dim=1)


def in_turns(works: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each work took in each round, after one round that is not told."""
    seconds = {name: [] for name in works}
    for i in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def limits() -> dict[str, Callable]:
    """Return works that the machine's bandwidth and arithmetic bound: 1 GB, 2 * 2048 ** 3 flop."""
    large, square = torch.ones(250_000_000), torch.ones(2048, 2048)
    return {"stream": large.sum, "multiply": lambda: square @ square}


def agree(name: str, found: dict[str, torch.Tensor]) -> None:
    """Raise SystemExit if greedy tokens differ, as the work would not be the same."""
    for other, ids in found.items():
        if not torch.equal(ids, found["ours"]):
            raise SystemExit(f"{name}: greedy tokens of {other} differ from ours")


def measure(size: str, batches: list[int], rounds: int) -> dict:
    """Return the seconds of each sampler at each batch, and of episodes and of the limits."""
    config, T, n, _ = SIZES[size]
    model = GPT(config).eval()
    other = there(model)
    generator = torch.Generator().manual_seed(0)
    found = dict(
        parameters=sum(w.numel() for w in model.parameters()), prompt=T, attempt=n, turns={},
        episodes={}, limits=in_turns(limits(), rounds),
        read=4 * sum(w.numel() for w in model.parameters() if w is not model.embed.weight
                     or config.tied_head),
    )  # fmt: skip
    instruction = torch.randint(config.vocab_size, (INSTRUCTION,), generator=generator).tolist()
    for B in batches:
        ids = torch.randint(config.vocab_size, (B, T), generator=generator)
        ways = {"dynamic": False, "static": True}
        one = {"ours": lambda greedy: attempt(model, ids, n, greedy)} | {
            name: lambda greedy, static=static: generate(other, ids, n, greedy, static)
            for name, static in ways.items()
        }
        agree(f"{size}, batch {B}", {name: work(True) for name, work in one.items()})
        sampled = {name: lambda work=work: work(False) for name, work in one.items()}
        # what is not of a step: reading the prompt, and one sampled token
        sampled["first"] = lambda: attempt(model, ids, 1, False)
        found["turns"][B] = in_turns(sampled, rounds)
        show(size, B, "tokens", B * n, found["turns"][B])
        if B < GROUP:
            continue
        problems = ids[: B // GROUP]
        two = {
            "ours": lambda greedy: episodes(model, problems, n, instruction, greedy),
            "dynamic": lambda greedy: episodes_there(other, problems, n, instruction, greedy),
        }
        agree(f"{size}, {B} episodes", {name: work(True) for name, work in two.items()})
        works = {name: lambda work=work: work(False) for name, work in two.items()}
        found["episodes"][B] = in_turns(works, rounds)
        show(size, B, "episodes", B, found["episodes"][B])
    return found


def show(size: str, B: int, unit: str, n: int, seconds: dict[str, list[float]]) -> None:
    """Print one line: how many a second, and how many times as many as the others."""
    rates = {name: n / statistics.median(found) for name, found in seconds.items()}
    words = ", ".join(
        f"{name} {rate:,.0f} ({rates['ours'] / rate:.2f} x)"
        for name, rate in rates.items() if name != "first"
    )  # fmt: skip
    print(f"{size:>5}, batch {B:>3}: {unit} a second: {words}", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    found = dict(
        commit=runs.commit(), torch=torch.__version__, threads=torch.get_num_threads(),
        machine=f"{platform.system()} {platform.machine()}", rounds=args.rounds,
    )  # fmt: skip
    found["sizes"] = {
        size: measure(size, args.batches or SIZES[size][3], args.rounds) for size in args.sizes
    }
    runs.write_json(found, args.out, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
