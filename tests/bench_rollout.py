"""How fast are attempts sampled, against transformers' `generate` and against the machine?

    python tests/bench_rollout.py           # three quarters of an hour; --sizes toy takes minutes

The same weights and the same work, in one process, in turns: each round measures every sampler
once, and what is told is the median of the rounds with the least and the most. Greedy tokens must
be identical before anything is timed. Attempts have a fixed length, so that all samplers take as
many steps; tokens are drawn at temperature 1. "Compiled" is torch.compile of the model, on both
sides: of `generate` with a dynamic cache for any shape, with a static one for each shape.

An episode is two attempts at a problem, four episodes a problem: ours reads a problem once for the
four and goes on in the first attempt's cache; `generate` is called twice, and reads everything
again for the second ("dynamic"), or goes on in its cache, too ("kept"). Not compiled.

What bounds it: how much of its time each spends in matrix products and attention, with most rows
of the toy.
"""

import argparse
import ctypes
import functools
import os
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
SIZES = {  # sizes of the model; tokens of a problem and of an attempt; batches; rounds
    "toy": (
        GPTConfig(14, 3, 4, 4, 48, 96, 128, rope_theta=100.0, qkv_bias=True),
        16, 9, (1, 8, 64, 512), 15,
    ),
    "10M": (
        GPTConfig(8192, 6, 6, 6, 384, 1024, 512, qkv_bias=True, tied_head=True),
        32, 16, (1, 8, 64, 512), 3,
    ),
    "0.5B": (
        GPTConfig(151_936, 24, 14, 2, 896, 4864, 2048, 1e6, qkv_bias=True, tied_head=True),
        32, 16, (1, 8, 64), 3,
    ),
}  # fmt: skip
GENERATE = ("dynamic", "static", "dynamic, compiled", "static, compiled")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
KERNELS = (
    "aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise", ATTENTION,
    ATTENTION + "_backward",
)  # fmt: skip


def there(model: GPT):
    """Return transformers' model of the same weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(Path(place) / "model")
        return AutoModelForCausalLM.from_pretrained(Path(place) / "model", dtype=torch.float32)


def generate(other, ids_BT, n: int, greedy: bool, static=False, kept=None) -> torch.Tensor:
    """Return n tokens after each row [B, n], by transformers; kept: a cache to go on in."""
    law = dict(do_sample=False) if greedy else dict(do_sample=True, temperature=1.0, top_k=0)
    if static:
        law |= dict(cache_implementation="static")
    if kept is not None:
        law |= dict(past_key_values=kept)
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


def episodes_there(other, ids_PT, n, instruction, keep: bool, greedy: bool) -> torch.Tensor:
    """Return two attempts at each of P problems [P * GROUP, 2 n], by `generate` called twice."""
    from transformers import DynamicCache

    ids_BT = ids_PT.repeat_interleave(GROUP, dim=0)
    order_BC = torch.tensor(instruction).expand(len(ids_BT), -1)
    kept = DynamicCache(config=other.config) if keep else None
    first = generate(other, ids_BT, n, greedy, kept=kept)
    second = generate(other, torch.cat([ids_BT, first, order_BC], 1), n, greedy, kept=kept)
    return torch.cat([first, second], dim=1)


def keep_memory() -> None:
    """Let Linux's C library keep what is freed. Else it goes back to the system and comes again
    page by page, or does not, as the heap happens to lie: up to a third of the time, on any side.
    """
    if sys.platform == "linux":
        for name, most in ((-1, 2**31 - 1), (-3, 2**25)):  # thresholds of trimming and of mapping
            ctypes.CDLL(None).mallopt(name, most)


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


def in_kernels(work: Callable) -> float:
    """Return the share of a work's time that matrix products and attention take: their seconds, as
    the profiler counts them, of the seconds without a profiler, the median of three pairs."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines
    shares = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        with torch.profiler.profile() as profiler:
            work()
        own = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
        shares.append(sum(own.get(name, 0.0) for name in KERNELS) / 1e6 / seconds)
    return statistics.median(shares)


def agree(name: str, found: dict[str, torch.Tensor]) -> None:
    """Raise SystemExit if greedy tokens differ, as the work would not be the same."""
    for other, ids in found.items():
        if not torch.equal(ids, found["ours"]):
            raise SystemExit(f"{name}: greedy tokens of {other} differ from ours")


def samplers(fused: bool, model: GPT, other: dict, ids_BT, n: int) -> dict[str, Callable]:
    """Return what samples n tokens after each row, by name, as functions of `greedy`."""

    def ours(greedy, compiled):
        model.compiled = compiled
        return attempt(model, ids_BT, n, greedy)

    def theirs(greedy, name):
        return generate(other[name], ids_BT, n, greedy, static=name.startswith("static"))

    found = {"ours": functools.partial(ours, compiled=False)}
    if fused:
        found["ours, compiled"] = functools.partial(ours, compiled=True)
    return found | {name: functools.partial(theirs, name=name) for name in other}


def measure(size: str, batches: list[int], rounds: int, fused: bool) -> dict:
    """Return the seconds of each sampler at each batch, and of episodes.

    fused: what torch.compile makes of them, too.
    """
    config, T, n, *_ = SIZES[size]
    model = GPT(config).eval()
    other = {name: there(model) for name in (GENERATE if fused else GENERATE[:2])}
    for name in GENERATE[2:] if fused else ():
        forward, shapes = other[name].forward, name.startswith("dynamic")
        other[name].forward = torch.compile(forward, dynamic=shapes, recompile_limit=64)
    generator = torch.Generator().manual_seed(0)
    found = dict(
        parameters=sum(w.numel() for w in model.parameters()), prompt=T, attempt=n, turns={},
        episodes={},
    )  # fmt: skip
    instruction = torch.randint(config.vocab_size, (INSTRUCTION,), generator=generator).tolist()
    for B in batches:
        ids = torch.randint(config.vocab_size, (B, T), generator=generator)
        one = samplers(fused, model, other, ids, n)
        agree(f"{size}, batch {B}", {name: work(True) for name, work in one.items()})
        works = {name: functools.partial(work, False) for name, work in one.items()}
        found["turns"][B] = in_turns(works, rounds)
        if size == "toy" and B == max(batches):
            found["kernels"] = {name: in_kernels(works[name]) for name in ("ours", "dynamic")}
        show(size, B, "tokens", B * n, found["turns"][B])
        if B < GROUP:
            continue
        model.compiled, work = False, (ids[: B // GROUP], n, instruction)
        two = {
            "ours": functools.partial(episodes, model, *work),
            "dynamic": functools.partial(episodes_there, other["dynamic"], *work, False),
            "kept": functools.partial(episodes_there, other["dynamic"], *work, True),
        }
        agree(f"{size}, {B} episodes", {name: work(True) for name, work in two.items()})
        works = {name: functools.partial(work, greedy=False) for name, work in two.items()}
        found["episodes"][B] = in_turns(works, rounds)
        show(size, B, "episodes", B, found["episodes"][B])
    return found


def show(size: str, B: int, unit: str, n: int, seconds: dict[str, list[float]]) -> None:
    """Print how many a second, and how many times as fast ours is."""
    print(f"{size}, batch {B}, {unit} a second:")
    usual = statistics.median(seconds["ours"])
    for name, found in seconds.items():
        middle, low, high = (f(found) for f in (statistics.median, max, min))
        told = f"{n / middle:>10,.1f} ({n / low:,.1f} to {n / high:,.1f})"
        print(f"  {name:<18} {told:<34} ours is {middle / usual:.2f} times as fast", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES, help="(all)")
    parser.add_argument("--batches", nargs="+", type=int, help=f"rows: less than {GROUP} or "
                        "multiples of it (1 8 64 512; of 0.5B to 64)")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="how often each is timed (15; larger sizes, 3)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    whole = RESULTS if not argv else Path(RESULTS.name)
    parser.add_argument("--out", type=Path, default=whole, help="default of a part: rollout.json")
    args = parser.parse_args(argv)
    if any(B < 1 or B > GROUP and B % GROUP for B in args.batches or ()):
        parser.error(f"--batches must be at least 1 and, above {GROUP}, multiples of it, "
                     f"got {args.batches}")  # fmt: skip
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    keep_memory()
    found = dict(
        commit=runs.commit(), torch=torch.__version__, threads=torch.get_num_threads(),
        machine=f"{platform.system()} {platform.machine()}", sizes={},
    )  # fmt: skip
    for size in args.sizes:
        *_, batches, rounds = SIZES[size]
        found["sizes"][size] = measure(
            size, args.batches or batches, args.rounds or rounds, not args.no_compile
        )
    runs.write_json(found, args.out, indent=2)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
