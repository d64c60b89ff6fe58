"""How long does a step take on a quiet machine, and beside one or two busy programs?

    python tests/bench/bench_busy.py                   # some minutes

The toy's steps, of the base (256 documents) and of Stage II (512 rollouts), and an update of a
model of 10M weights on 8 given rows of 128 tokens: with one thread, with two of torch, which share
each operation, and with two that share the rows (scale/small.py). Each is a process of its own;
they take turns, so that one works at a time, and the others wait without computing. A busy program
is a Python loop. The machine's limit, products of matrices of 2,048 by two threads, is measured in
turns with them. No model is prepared as for `scale.train`, and of the long rows of the large one
fewer are a part than scale/small.py would make of them.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import score
from model import GPT
from rollout import make_rows, token_terms
from scale import small
from tests.bench.bench_rollout import INSTRUCTION, SIZES
from tests.bench.timing import about, spread, write

MODES = {"one thread": 1, "two of torch": 2, "two share rows": 2}
LOADS, ROUNDS = (0, 1, 2), 5
TIMES = {"base": 10, "Stage II": 4, "sampling": 4, "10M": 1, "products": 8}  # a turn's


def works(mode: str, quick: bool) -> dict:
    """Return what is timed, by its name, with as many threads as a mode has."""
    torch.set_num_threads(MODES[mode])
    run = score.new_run(score.Config(sft_batch=8, batch=8) if quick else score.Config(), Path())
    policy = GPT(SIZES["toy" if quick else "10M"][0], seed=1)
    base = GPT(policy.config).requires_grad_(False)
    large = score.Run(run.config, None, [], Path(), policy, base, score.adamw(policy))
    if mode == "two share rows":
        small.SMALL = 2**30  # 10M, too
        for one in (run, large):
            torch.set_num_threads(2)
            small.share(one)
    run.optimizer.param_groups[0]["lr"] = 5e-3
    for step in range(2 if quick else 150):  # it learns how long an answer is
        run.rng = np.random.default_rng(step)
        score.sft_step(run)
    run.base.load_state_dict(run.policy.state_dict())
    run.optimizer.param_groups[0]["lr"] = 1e-6
    ids = np.random.default_rng(0).integers(10, size=(4 if quick else 8, 128)).tolist()
    r = make_rows([x[:32] for x in ids], [[x[32:79] for x in ids], [x[84:] for x in ids]],
                  INSTRUCTION, "cpu")  # fmt: skip
    reward_KB = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(1, len(ids) // 2)

    def update():
        small.ROWS, usual = len(ids) // 2, small.ROWS
        terms = token_terms(policy, base, r, 1.0)
        loss_B = score.loss(*terms, r.turn_BS, *score.stage2(reward_KB, run.config))
        score.optimizer_step(large, loss_B.mean())
        small.ROWS = usual

    square = torch.ones(2048, 2048)
    return {
        "base": lambda: score.sft_step(run), "Stage II": lambda: score.rl_step(run, score.stage2),
        "sampling": lambda: score.collect(run, run.policy, 2), "10M": update,
        "products": lambda: square @ square,
    }  # fmt: skip


def serve(mode: str, quick: bool) -> None:
    """Answer each name that is read by the seconds of that work."""
    do = works(mode, quick)
    print("ready", flush=True)
    for line in sys.stdin:
        n, start = 1 if quick else TIMES[line.strip()], time.perf_counter()
        for _ in range(n):
            do[line.strip()]()
        print((time.perf_counter() - start) / n, flush=True)


def flop() -> dict:
    """Return the operations in each work's products, as if all tokens went through all layers: two
    a weight and token forward, four backward; attention is not counted. A row of the toy has 18
    tokens that are read; of these a problem's six are read once for its four rows when they are
    sampled. 10M's head is its embedding."""
    c = score.Config()
    toy, large = (
        sum(w.numel() for name, w in model.named_parameters() if w.dim() == 2 and name not in rest)
        for model, rest in ((score.new_run(c, Path()).policy, ["embed.weight"]),
                            (GPT(SIZES["10M"][0]), []))
    )  # fmt: skip
    reading = c.batch // c.group * 6 + c.batch * 12
    return {
        "base": 6 * toy * c.sft_batch * 18, "sampling": 2 * toy * reading,
        "Stage II": 2 * toy * reading + 8 * toy * c.batch * 18, "10M": 8 * large * 8 * 127,
        "products": 2 * 2048**3,
    }  # fmt: skip


def measure(quick: bool) -> dict:
    """Return seconds by load, work and mode."""
    words = [sys.executable, __file__, *["--quick"] * quick, "--serve"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    children = {mode: subprocess.Popen([*words, mode], **pipes) for mode in MODES}
    busy, found = [], {}
    try:
        for child in children.values():
            child.stdout.readline()
        for load in LOADS:
            busy += [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                     for _ in range(load - len(busy))]  # fmt: skip
            found[load] = {name: {mode: [] for mode in MODES} for name in TIMES}
            for turn in range(1 if quick else ROUNDS):
                for name, seconds in found[load].items():
                    for mode, child in children.items():
                        print(name, file=child.stdin, flush=True)
                        seconds[mode].append(float(child.stdout.readline()))
                print(f"{load} busy, round {turn + 1}", flush=True)
    finally:
        for process in (*busy, *children.values()):
            process.kill()
            process.wait()
    return found


def table(found: dict) -> str:
    """Return milliseconds a step by load, and the share of the machine's products when quiet."""
    lines = ["| ms | " + " | ".join(MODES) + " | share of the limit |", "|---" * 5 + "|"]
    seconds, flop = found["seconds"], found["flop"]
    limit = flop["products"] / median(seconds["0"]["products"]["two of torch"])
    for name in [x for x in TIMES if x != "products"]:
        shares = (flop[name] / median(seconds["0"][name][mode]) / limit for mode in MODES)
        share = ", ".join(f"{x:.0%}" for x in shares)
        for load in seconds:
            cells = [spread([1000 * x for x in seconds[load][name][mode]]) for mode in MODES]
            where = f"{name}, beside {load} busy" if load != "0" else f"{name}, quiet"
            lines.append("| " + " | ".join([where, *cells, share if load == "0" else ""]) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rows, once")
    parser.add_argument("--serve", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.serve, args.quick)
        return 0
    found = about() | dict(flop=flop(), seconds=measure(args.quick))
    found = json.loads(json.dumps(found))
    print(table(found))
    write(found, "busy.json", part=args.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
