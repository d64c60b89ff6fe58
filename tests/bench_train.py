"""How long does a training step take, against TRL and against the machine?

    python tests/bench_train.py             # some minutes

The toy's whole step (256 rollouts of two attempts, four of each problem; graded, scored by policy
and base, one update) in turns with the same step in TRL, `tests/port_trl.py`: the same weights at
first, those of a base that has learned how long an answer is; problems of the same kind; one
process. Stage II with the KL from samples on both sides ("k1"; TRL's own has no other), and besides
ours with the exact KL, as it is by default, and compiled (TRL's own option is not tried); and the
share of our step's time that matrix products and attention take.

Then the machine's limits, each in turns with what it bounds. What a model of 10M weights makes of
the cores' arithmetic: a step of Stage II on 32 given rows of 128 tokens, its products counted,
beside products of matrices of 2,048. What decoding one row at Qwen2.5-0.5B's shape makes of the
memory: the time of a token, compiled and not, beside summing 1 GB, and each of the weights once.
"""

import argparse
import copy
import functools
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bench_rollout import SIZES, attempt, in_kernels, in_turns, keep_memory
from transformers import TrainerCallback
from truth import ROOT

sys.path.insert(0, str(ROOT))

import port_trl

import rollout
import run as runs
import score
import verify
from model import GPT

RESULTS = ROOT / "tests/results/train.json"
PHASE = runs.Phase("score", "stage2", 1, 10.0)


class Ours(TrainerCallback):
    """Takes our steps before each step of TRL, and keeps their seconds."""

    def __init__(self, steps):
        self.steps, self.seconds = steps, {name: [] for name in steps}

    def on_step_begin(self, *_, **__):
        for name, step in self.steps.items():
            start = time.perf_counter()
            with torch.enable_grad():
                step()
            self.seconds[name].append(time.perf_counter() - start)


def make_run(policy: GPT, c: runs.Config) -> runs.Run:
    """Return a run in Stage II whose base is the policy's copy; nothing is written."""
    base = runs.frozen(policy, c)
    policy.compiled = c.compile
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    optimizer = runs.new_optimizer(policy)
    for part in optimizer.param_groups:
        part["lr"] = c.lr
    return runs.Run(c, Path(), policy, base, None, optimizer, None, rng, generator, runs.Progress())


def against_trl(rounds: int, batch: int, fused: bool) -> dict:
    """Return the seconds of our steps and of TRL's, in turns, and our step's share in kernels."""
    c = runs.Config(batch=batch)
    found = {"ours": replace(c, kl="k1"), "exact": c}
    if fused:
        found["compiled"] = replace(c, kl="k1", compile=True)
    with tempfile.TemporaryDirectory() as place:
        first = make_run(GPT(c.model()), replace(c, sft_steps=200))
        for _ in range(200):
            score.sft_step(first)
        first.policy.save_pretrained(Path(place) / "base")
        made = [make_run(copy.deepcopy(first.policy), each) for each in found.values()]
        steps = {
            name: functools.partial(score.rl_step, run, PHASE)
            for name, run in zip(found, made, strict=True)
        }
        rng = np.random.default_rng(0)
        problems = verify.problems(batch // c.group * (rounds + 2), "train", rng, c.digits)
        trainer = port_trl.make_trainer(
            Path(place) / "base", problems, batch, c.group, c.attempt_limit(), rounds + 2,
            kl="folded", alpha=c.alpha, beta1=c.beta1, lr=c.lr, out=Path(place) / "out",
        )  # fmt: skip
        ours = Ours(steps)
        trainer.callback_handler.callbacks.insert(0, ours)  # before TRL's clock starts
        trainer.train()
    seconds = ours.seconds | {"TRL": trainer.clock.seconds}
    about = dict(kernels=in_kernels(steps["ours"]))
    # without what compilers and caches take at first
    return about | dict(seconds={name: times[2:] for name, times in seconds.items()})


def against_machine(rounds: int, rows: int) -> dict:
    """Return the seconds of a step on given rows at the 10M size, and what it multiplies (flop)."""
    tokens = 128
    policy = GPT(SIZES["10M"][0])
    run = make_run(policy, runs.Config(batch=rows, group=4))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(policy.config.vocab_size, (rows, tokens), generator=generator).tolist()
    r = rollout.lay_out(
        [x[:32] for x in ids], [[x[32:79] for x in ids], [x[80:] for x in ids]], [5], "cpu"
    )
    rewards = [torch.tensor([0.0, 1.0] * (rows // 2)), torch.tensor([1.0, 0.0] * (rows // 2))]
    score.collect = lambda *_, **__: (r, [], rewards, 0.0)
    square = torch.ones(2048, 2048)
    works = {"multiply": lambda: square @ square, "step": lambda: score.rl_step(run, PHASE)}
    # two flop a weight and token forward, four backward, two in the base (which torch's counter of
    # flop leaves out, as it does not know oneDNN's products); attention not counted
    matrices = sum(w.numel() for w in policy.parameters() if w.dim() == 2)
    return dict(
        seconds=in_turns(works, rounds), flop=8 * matrices * rows * (r.ids_BT.shape[1] - 1),
        parameters=sum(w.numel() for w in policy.parameters()),
    )  # fmt: skip


def decoding(rounds: int, size: str, fused: bool) -> dict:
    """Return the seconds of attempts in a batch of 1, and of reading memory and weights once."""
    config, T, n, *_ = SIZES[size]
    model, large = GPT(config).eval(), torch.ones(250_000_000)
    ids_1T = torch.randint(config.vocab_size, (1, T), generator=torch.Generator().manual_seed(0))
    matrices = [w.detach() for w in model.parameters()]

    def write(n, compiled=False):
        model.compiled = compiled
        attempt(model, ids_1T, n, greedy=False)

    works = {
        "long": lambda: write(n + 1), "short": lambda: write(1),
        "gigabyte": large.sum, "weights": lambda: [w.sum() for w in matrices],
    }  # fmt: skip
    if fused:
        works["long, compiled"] = lambda: write(n + 1, compiled=True)
        works["short, compiled"] = lambda: write(1, compiled=True)
    return dict(
        seconds=in_turns(works, rounds), tokens=n, read=4 * sum(w.numel() for w in matrices),
        kernels=in_kernels(works["long"]),
    )  # fmt: skip


def decode(found: dict, option: str) -> tuple[list[float], list[float]]:
    """Return the seconds of a token in a batch of 1 (option: "" or ", compiled"), and of reading
    the weights once at the bandwidth measured beside it."""
    seconds = found["seconds"]
    pairs = zip(seconds["long" + option], seconds["short" + option], strict=True)
    once = [found["read"] / 1e9 * x for x in seconds["gigabyte"]]
    return [(long - short) / found["tokens"] for long, short in pairs], once


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each is timed (15)")
    parser.add_argument("--batch", type=int, default=256, help="rollouts of the toy's step (256)")
    parser.add_argument("--rows", type=int, default=32, help="of the 10M model's step (32)")
    parser.add_argument("--size", choices=SIZES, default="0.5B", help="that decodes a row (0.5B)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    whole = RESULTS if not argv else Path(RESULTS.name)
    parser.add_argument("--out", type=Path, default=whole, help="default of a part: train.json")
    args = parser.parse_args(argv)
    for option, rows in (("--batch", args.batch), ("--rows", args.rows)):
        if rows < 4 or rows % 4:
            parser.error(f"{option} must be a multiple of 4, got {rows}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    keep_memory()
    found = dict(
        commit=runs.commit(), torch=torch.__version__, threads=torch.get_num_threads(),
        machine=f"{platform.system()} {platform.machine()}", rounds=args.rounds, batch=args.batch,
        toy=against_trl(args.rounds, args.batch, not args.no_compile),
        large=against_machine(-(-args.rounds // 3), args.rows),
        decode=decoding(args.rounds, args.size, not args.no_compile),
    )  # fmt: skip
    runs.write_json(found, args.out, indent=2)
    for name, seconds in found["toy"]["seconds"].items():
        print(f"{name:>9}: {1000 * statistics.median(seconds):6.0f} ms a step "
              f"({1000 * min(seconds):.0f} to {1000 * max(seconds):.0f})")  # fmt: skip
    median = {name: statistics.median(x) for name, x in found["large"]["seconds"].items()}
    done, most = found["large"]["flop"] / median["step"], 2 * 2048**3 / median["multiply"]
    print(f"10M: {done / 1e9:.0f} of {most / 1e9:.0f} Gflop/s, {100 * done / most:.0f} %")
    summed = found["decode"]["seconds"]["weights"]
    for option in ("", ", compiled")[: 2 - args.no_compile]:
        token, once, each = (
            1000 * statistics.median(x) for x in (*decode(found["decode"], option), summed)
        )
        print(f"{args.size}{option}: {token:.1f} ms a token; weights once, {once:.1f} ms at the "
              f"bandwidth of 1 GB, {each:.1f} ms summed")  # fmt: skip
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
