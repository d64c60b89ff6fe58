"""How long does a training step take, against TRL and against the machine?

    python tests/bench/bench_train.py                  # some minutes

The toy's whole step of Stage II (256 rollouts of two attempts, four of each problem; graded, scored
by policy and base, one update) in turns with the same step in TRL, ports/trl_port.py: the same
weights at first, those of a base that has learned how long an answer is, and problems of the same
kind, the KL from samples on both sides, as TRL has no other. Our two threads share the rows, as
`python score.py` has them do; TRL's share each operation. Then both compiled: our blocks, with
torch's threads, and TRL's model, by its own setting, which its sampling passes by.

Then the machine's limits, each in turns with what it bounds. What a model of 10M weights makes of
the cores' arithmetic: an update of Stage II on 32 given rows of 128 tokens, its products counted,
beside products of matrices of 2,048. What decoding one row at Qwen2.5-0.5B's shape makes of the
memory: the time of a token, beside summing 1 GB, and each of the weights once.
"""

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[2]))

import score
from model import GPT
from ports.tensors import k1_terms
from ports.trl_port import make_trainer
from rollout import make_rows, token_terms
from scale import pretrained, small
from scale.memory import prepare
from tests.bench import speed
from tests.bench.bench_rollout import INSTRUCTION, SIZES, attempt
from tests.bench.timing import about, in_kernels, in_turns, write

TOKENS = 128  # of a row of the 10M model


class Ours(TrainerCallback):
    """Takes our steps before each step of TRL, and keeps their seconds."""

    def __init__(self, steps):
        self.steps, self.seconds = steps, {name: [] for name in steps}

    def on_step_begin(self, *_, **__):
        threads = torch.get_num_threads()
        for name, (own, steps) in self.steps.items():
            torch.set_num_threads(own)
            start = time.perf_counter()
            with torch.enable_grad():
                next(steps)
            self.seconds[name].append(time.perf_counter() - start)
        torch.set_num_threads(threads)


def k1_step(run: score.Run) -> dict:
    """Take a step of Stage II, with the KL that TRL has, too."""
    r, _, reward_KB = score.collect(run, run.policy, K=2)
    terms = k1_terms(run.policy, run.base, r, run.config.temperature)
    return score.rl_update(run, r, reward_KB, *terms, score.stage2(reward_KB, run.config))


def against_trl(batch: int, rounds: int, quick: bool, compiled: bool = False) -> dict:
    """Return the seconds of our steps and of TRL's, in turns, and our step's share in kernels."""
    cores = torch.get_num_threads()
    sft_steps, rl = 2 if quick else 200, dict(control=0, stage1_steps=0, stage2_steps=10**6)
    c = score.Config(batch=batch, sft_steps=sft_steps, **rl)
    with tempfile.TemporaryDirectory() as place:
        run = score.new_run(c, Path(place))
        run.phases[1] = run.phases[1]._replace(step=k1_step)
        for _, _ in zip(range(sft_steps + 1), score.train(run), strict=False):
            pass  # the base, and one step of Stage II, which takes the base as the reference
        pretrained.save(run.base, Path(place) / "base")
        if compiled:
            prepare(run.policy, compile=True)
            prepare(run.base, compile=True)
        else:
            small.share(run)
            torch.set_num_threads(cores)
        steps = {"ours": (cores if compiled else 1, score.train(run))}
        n = batch // c.group * (rounds + 2)
        problems = run.task.draw(n, "train", np.random.default_rng(0))
        given = run.task, problems, c, score.stage2, rounds + 2
        trainer = make_trainer(Path(place) / "base", *given, out=Path(place) / "out",
                               torch_compile=compiled)  # fmt: skip
        ours = Ours(steps)
        trainer.callback_handler.callbacks.insert(0, ours)  # before TRL's clock starts
        trainer.train()
    seconds = ours.seconds | {"TRL": trainer.clock.seconds}
    run.policy.threads = run.base.threads = 1  # the profiler sees this thread alone
    about = dict(kernels=in_kernels(lambda: next(steps["ours"][1]), 1 if quick else 3))
    # without what compilers and caches take at first
    return about | dict(seconds={name: times[2:] for name, times in seconds.items()})


def against_machine(size: str, rows: int, rounds: int) -> dict:
    """Return the seconds of an update on given rows, and the operations in its products (flop)."""
    config = SIZES[size][0]
    policy = prepare(GPT(config))
    run = score.Run(score.Config(), None, [], Path(), policy, None, score.adamw(policy))
    base = copy.deepcopy(policy).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (rows, TOKENS), generator=generator).tolist()
    attempts = [x[32:79] for x in ids], [x[84:] for x in ids]
    r = make_rows([x[:32] for x in ids], attempts, INSTRUCTION, "cpu")
    reward_KB = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(1, rows // 2)

    def update():
        logp_BS, kl_BS = token_terms(policy, base, r, 1.0)
        loss_B = score.loss(logp_BS, kl_BS, r.turn_BS, *score.stage2(reward_KB, run.config))
        score.optimizer_step(run, loss_B.mean())

    square = torch.ones(2048, 2048)
    # two flop a weight and token forward, four backward, two in the base (which torch's counter of
    # flop leaves out, as it does not know oneDNN's products); attention not counted
    matrices = sum(w.numel() for w in policy.parameters() if w.dim() == 2)
    return dict(
        seconds=in_turns({"multiply": lambda: square @ square, "step": update}, rounds),
        flop=8 * matrices * rows * (r.ids_BT.shape[1] - 1),
        parameters=sum(w.numel() for w in policy.parameters()),
    )  # fmt: skip


def decoding(size: str, rounds: int, quick: bool) -> dict:
    """Return the seconds of attempts in a batch of 1, and of reading memory and weights once."""
    config, T, n, *_ = SIZES[size]
    model, large = prepare(GPT(config)), torch.ones(250_000_000)
    matrices = [w.detach() for w in model.parameters()]
    ids_1T = torch.randint(config.vocab_size, (1, T), generator=torch.Generator().manual_seed(0))
    works = {
        "gigabyte": large.sum, "weights": lambda: [w.sum() for w in matrices],
        "long": lambda: attempt(model, ids_1T, n + 1, 1.0),
        "short": lambda: attempt(model, ids_1T, 1, 1.0),
    }  # fmt: skip
    return dict(
        seconds=in_turns(works, rounds), tokens=n, read=4 * sum(w.numel() for w in matrices),
        kernels=in_kernels(works["long"], 1 if quick else 3),
    )  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the toy's size, once, not compiled")
    quick = parser.parse_args(argv).quick
    small.keep_memory()
    found = about() | dict(
        toy=against_trl(8 if quick else 256, 1 if quick else 15, quick),
        compiled=None if quick else against_trl(256, 15, quick, compiled=True),
        large=against_machine("toy" if quick else "10M", 32, 1 if quick else 5),
        decode=decoding("toy" if quick else "0.5B", 1 if quick else 15, quick),
    )  # fmt: skip
    print("\n".join(speed.steps(found)))
    write(found, "train.json", part=quick)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
