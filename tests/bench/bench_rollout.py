"""How fast are attempts sampled, against transformers' `generate`?

    python tests/bench/bench_rollout.py                # a quarter of an hour
    python tests/bench/bench_rollout.py --sizes toy    # some minutes; writes ./rollout.json

The same weights and the same work. Greedy tokens must be identical before anything is timed; then
tokens are drawn at temperature 1. Attempts have a fixed length, so that all take as many steps.
Of the toy, our threads share the rows, as `python score.py` has them do; all else has torch's.
"Compiled" is torch.compile, of our blocks and of `generate`'s model: with a dynamic cache for any
shape, with a static one for each shape; of the toy alone.

An episode is two attempts at a problem, four episodes a problem: ours reads a problem once for the
four and goes on in the first attempt's cache; `generate` is called twice, and reads everything
again for the second ("dynamic"), or goes on in its cache, too ("kept"). Not compiled.

Dimension key: B rows, P problems, T tokens of a problem.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from model import GPT, Cache, GPTConfig
from rollout import read, rollout, sample_turn
from scale import pretrained, small
from scale.memory import prepare
from tests.bench import speed
from tests.bench.timing import about, in_kernels, in_turns, write

GROUP, INSTRUCTION = 4, [1, 2, 3, 4, 5]  # rows of a problem; ids
SIZES = {  # sizes of the model; tokens of a problem and of an attempt; batches; rounds
    "toy": (
        GPTConfig(14, 3, 4, 4, 48, 96, 128, rope_theta=100.0, qkv_bias=True),
        16, 9, (8, 512), 15,
    ),
    "10M": (
        GPTConfig(8192, 6, 6, 6, 384, 1024, 512, qkv_bias=True, tied_head=True),
        32, 16, (8, 64), 3,
    ),
    "0.5B": (
        GPTConfig(151_936, 24, 14, 2, 896, 4864, 2048, 1e6, qkv_bias=True, tied_head=True),
        32, 16, (1, 8), 3,
    ),
}  # fmt: skip


@torch.no_grad()
def attempt(model: GPT, ids_BT, n: int, temperature: float) -> torch.Tensor:
    """Return n tokens after each row [B, n], by our sampler."""
    B, T = ids_BT.shape
    cache = Cache(model, B, T + n)
    state_BD = read(model, cache, ids_BT.tolist())
    noise_BN = torch.rand(B, n, dtype=torch.float64)
    return torch.tensor(sample_turn(model, cache, state_BD, noise_BN, -1, temperature)[0])


def episodes(model: GPT, ids_PT, n: int, temperature: float) -> torch.Tensor:
    """Return two attempts at each of P problems [P * GROUP, 2 n], by `rollout`."""
    task = SimpleNamespace(instruction=INSTRUCTION, end_id=-1)
    noise_KBN = torch.rand(2, len(ids_PT) * GROUP, n, dtype=torch.float64)
    r = rollout(model, task, ids_PT.tolist(), noise_KBN, temperature)
    return torch.cat([torch.tensor(ids) for ids in r.attempts], dim=1)


def shared(model: GPT):
    """Share a model's rows among as many threads as torch has; return `partial`, of what is done
    with one thread of torch then."""
    threads = torch.get_num_threads()
    small.share(SimpleNamespace(config=SimpleNamespace(device="cpu"), policy=model, base=model))
    torch.set_num_threads(threads)

    def done(work, *given):
        torch.set_num_threads(1)
        found = work(*given)
        torch.set_num_threads(threads)
        return found

    return partial(partial, done)


def there(model: GPT, shapes=None):
    """Return transformers' model of the same weights; compiled for "dynamic" or "static" shapes."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        pretrained.save(model, Path(place) / "model")
        other = AutoModelForCausalLM.from_pretrained(Path(place) / "model", dtype=torch.float32)
    if shapes:
        dynamic = shapes == "dynamic"
        other.forward = torch.compile(other.forward, dynamic=dynamic, recompile_limit=64)
    return other


def generate(other, ids_BT, n: int, temperature: float, **cache) -> torch.Tensor:
    """Return n tokens after each row [B, n], by transformers; cache: which, or one to go on in."""
    draw = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else {}
    found = other.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=n, eos_token_id=None,
        pad_token_id=0, **dict(do_sample=False) | draw | cache,
    )  # fmt: skip
    return found[:, ids_BT.shape[1] :]


def episodes_there(other, ids_PT, n: int, temperature: float, keep: bool) -> torch.Tensor:
    """Return two attempts at each of P problems [P * GROUP, 2 n], by `generate` called twice."""
    from transformers import DynamicCache

    ids_BT = ids_PT.repeat_interleave(GROUP, dim=0)
    instruction_BC = torch.tensor(INSTRUCTION).expand(len(ids_BT), -1)
    cache = dict(past_key_values=DynamicCache(config=other.config)) if keep else {}
    first = generate(other, ids_BT, n, temperature, **cache)
    ids_BT = torch.cat([ids_BT, first, instruction_BC], dim=1)
    return torch.cat([first, generate(other, ids_BT, n, temperature, **cache)], dim=1)


def compare(works: dict, rounds: int, *given) -> dict[str, list[float]]:
    """Return the seconds of each work, called with `given` and a temperature; SystemExit if greedy
    tokens differ, as the work would not be the same."""
    greedy = {name: work(*given, 0.0) for name, work in works.items()}
    for name, ids in greedy.items():
        if not torch.equal(ids, greedy["ours"]):
            raise SystemExit(f"greedy tokens of {name} differ from ours")
    return in_turns({name: partial(work, *given, 1.0) for name, work in works.items()}, rounds)


def measure(size: str, quick: bool) -> dict:
    """Return the seconds of each sampler at each batch, and of episodes."""
    config, T, n, batches, rounds = SIZES[size]
    model, other = prepare(GPT(config)), there(GPT(config))
    usual = shared(model) if size == "toy" else partial  # as `python score.py` has it
    turns = {
        "ours": usual(attempt, model), "dynamic": partial(generate, other),
        "static": partial(generate, other, cache_implementation="static"),
    }  # fmt: skip
    both = {
        "ours": usual(episodes, model), "dynamic": partial(episodes_there, other, keep=False),
        "kept": partial(episodes_there, other, keep=True),
    }  # fmt: skip
    if quick:
        batches, rounds = (4,), 1
    elif size == "toy":
        static = partial(generate, cache_implementation="static")
        turns["ours, compiled"] = partial(attempt, prepare(GPT(config), compile=True))
        turns["dynamic, compiled"] = partial(generate, there(model, "dynamic"))
        turns["static, compiled"] = partial(static, there(model, "static"))
    found = dict(
        parameters=sum(w.numel() for w in model.parameters()), prompt=T, attempt=n, turns={},
        episodes={}, kernels={},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for B in batches:
        ids_BT = torch.randint(config.vocab_size, (B, T), generator=generator)
        found["turns"][str(B)] = compare(turns, rounds, ids_BT, n)
        if B >= GROUP:
            found["episodes"][str(B)] = compare(both, rounds, ids_BT[: B // GROUP], n)
    if size == "toy":  # with most rows
        pairs, model.threads = 1 if quick else 3, 1  # the profiler sees this thread alone
        for name in ("ours", "dynamic"):
            found["kernels"][name] = in_kernels(partial(turns[name], ids_BT, n, 1.0), pairs)
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES, help="(all)")
    parser.add_argument("--quick", action="store_true", help="the first size, four rows, once")
    args = parser.parse_args(argv)
    small.keep_memory()
    found = about() | dict(sizes={})
    for size in args.sizes[: 1 if args.quick else None]:
        found["sizes"][size] = part = measure(size, args.quick)
        print("\n".join(speed.tokens({size: part}) + speed.episodes({size: part})), flush=True)
    write(found, "rollout.json", part=bool(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
