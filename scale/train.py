"""How is an open checkpoint trained on files of problems, in one process or in many?

As by score.py, with the same equations, phases and folder, but by steps in parts (scale/steps.py).
A preset has the paper's settings for a data set; other options override it. Without one a toy is
trained. speed.jsonl says what the steps took; a run that is resumed adds to it.

    python -m scale.train --preset math --checkpoint FOLDER --train train.jsonl --test test.jsonl
    python -m scale.train --resume runs/math
    python -m scale.train --export runs/math NEW     # the last weights, as an open checkpoint
    torchrun --nproc-per-node 2 -m -- scale.train --run runs/two
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch

import score
import verify
from eval import evaluate, printable
from model import hold, load
from rollout import texts
from scale import pretrained, problems, processes
from scale.memory import prepare
from scale.steps import DTYPES, frozen, in_parts
from study import methods
from tasks import files

# arXiv 2409.12917v2, table 5; the paper gives steps in all, their split is open: here halves. It
# says nothing of groups, lengths, warm-up and precision.
BOTH = (
    "--alpha 10 --beta1 0.01 --temperature 1 --sft-steps 0 --sft-lr 1e-5 --sft-batch 64 "
    "--sft-warmup 10 --dtype bfloat16 --micro-batch 8 --sample-batch 512 --chunk 128 --recompute 1 "
)
PRESETS = {
    "math": "--run runs/math --lr 5e-6 --stage1-steps 1500 --stage2-steps 1500 --batch 512 "
    "--beta2 0.1 --max-new 1024 " + BOTH,
    "mbpp": "--run runs/mbpp --lr 1e-5 --stage1-steps 750 --stage2-steps 750 --batch 128 "
    "--beta2 0.25 --max-new 512 " + BOTH,
}
MOVED = "--checkpoint", "--train", "--test"  # may be elsewhere when a run goes on
DEV = ("dev_acc_t1", "dev_acc_t2", "dev_delta", "dev_delta_i_to_c", "dev_delta_c_to_i")
TASKS = {"math": "math", "mbpp": "code"}
MIB = 2**20 if sys.platform == "darwin" else 2**10  # in units of the system's resident memory


@dataclass(frozen=True)
class Config(methods.Config):
    """The settings of study/methods.py, and those of large runs."""

    # an open checkpoint, and files of problems
    preset: str = ""  # math or mbpp: the paper's settings, and problems from files
    checkpoint: str = ""  # folder of the open checkpoint that is the base
    train: str = ""  # file of problems to train on; a tenth of them is split dev
    test: str = ""  # file of problems to report on
    digest: str = ""  # of both files: filled in, and held to
    max_new: int = 0  # most tokens of an attempt
    # memory, precision, speed: of each process
    dtype: str = "float32"  # of matrix products, or bfloat16; weights stay float32
    micro_batch: int = 0  # rows in one backward pass; 0: all
    sample_batch: int = 0  # rows sampled at a time, whole groups; 0: all
    chunk: int = 0  # positions whose distributions are in memory at a time; 0: all
    recompute: int = 0  # 1: blocks are computed again in the backward pass
    # the course of the run
    sft_warmup: int = 100  # steps of warm-up of the base
    save_every: int = 20  # steps between checkpoints
    eval_every: int = 0  # steps between evaluations on --eval-n problems of split dev; 0: none
    tensorboard: int = 0  # 1: write what is logged for TensorBoard, too

    limits: ClassVar = methods.Config.limits | dict(recompute=(0, 1), save_every=(1, 10**9),
        tensorboard=(0, 1), sft_steps=(0, 10**9))  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        for name, accepted in ("preset", ["", *PRESETS]), ("dtype", [*DTYPES]), ("base", [""]):
            if (value := getattr(self, name)) not in accepted:
                raise ValueError(f"--{name} must be one of {accepted}, got {value!r}")
        for name in ("checkpoint", "train", "test", "max_new"):
            if bool(value := getattr(self, name)) != bool(self.preset):
                option = f"--{name}".replace("_", "-")
                raise ValueError(f"{option} and --preset need each other, got {value!r}")
        if self.sample_batch % self.group:
            raise ValueError(f"--sample-batch must be a multiple of --group: {self.sample_batch}")
        for name in ("checkpoint", "train", "test") if self.preset else ():
            object.__setattr__(self, name, str(Path(getattr(self, name)).resolve()))
        if self.preset and not self.digest:
            object.__setattr__(self, "digest", " ".join(problems.digests(self).values()))


def new_run(c: Config, folder: Path) -> score.Run:
    """Return a run at its first step; if it is to be shared out, on the CPU."""
    n = processes.world_size()
    for option, rows, each in (("--batch", c.batch, c.group), ("--sft-batch", c.sft_batch, 1)):
        if rows % (each * n):
            raise ValueError(f"{option} must be a multiple of {each} times {n} processes: {rows}")
    if c.preset and c.digest != " ".join(problems.digests(c).values()):
        raise ValueError(f"{c.train} or {c.test} is not what the run began with")
    run = methods.new_run(c, folder)
    if c.preset:
        run.task = problems.task(replace(c, task=TASKS[c.preset]))
        run.policy = pretrained.load(c.checkpoint)
    run.policy.to(c.device if n == 1 else "cpu")
    weights = {name: x.clone() for name, x in run.policy.state_dict().items()}
    run.base = frozen(run.policy, weights, c)
    for gpt in (run.policy, run.base):
        prepare(gpt, DTYPES[c.dtype], bool(c.recompute))
    run.phases = [in_parts(phase) for phase in run.phases]
    run.phases[0] = run.phases[0]._replace(warmup=c.sft_warmup)
    run.optimizer = score.adamw(run.policy)
    return run


def drive(run: score.Run) -> None:
    """Train to the end; log, show and save as `score.drive` does, and tell what the steps took."""
    with contextlib.nullcontext() if processes.rank() else hold(run.folder / "lock"):
        take_steps(run)


def take_steps(run: score.Run) -> None:
    """Do what `drive` does, in a folder that no other process writes to."""
    c, main, log, board = run.config, processes.rank() == 0, run.folder / "log.jsonl", None
    done, start = sum(x.steps for x in run.phases[: run.phase]) + run.step, time.monotonic()
    if not hasattr(c, "tensorboard"):
        raise ValueError(f"{run.folder} goes on with: python score.py --resume {run.folder}")
    if main and log.exists():  # what was logged after the last checkpoint comes again
        os.truncate(log, sum(map(len, log.read_text().splitlines(keepends=True)[:done])))
    if main and c.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=done + 1)
    if not done and not run.phases[0].steps:  # an open checkpoint is its own base
        save_phase(run)
    for n, row in enumerate(score.train(run), start=done + 1):
        seconds, start = time.monotonic() - start, time.monotonic()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
        peak = torch.cuda.max_memory_allocated() / 2**20 or resident
        took = dict(phase=row["phase"], step=row["step"], seconds=seconds, peak_mib=peak)
        if c.eval_every and n % c.eval_every == 0:
            row, start = row | look(run, main), time.monotonic()
        took |= {f"{key}_per_s": row[key] / seconds for key in ("tokens", "episodes") if key in row}
        if main:
            for path, content in ((log, row), (run.folder / "speed.jsonl", took)):
                with open(path, "a") as file:
                    print(json.dumps(content), file=file)
            numbers = {key: x for key, x in (row | took).items() if not isinstance(x, str)}
            for name, x in numbers.items() if board else ():
                board.add_scalar(name, x, n)
            names = ("loss", "acc_t1", "acc_t2", "changed", "kl1", "kl2", "seconds", *DEV)
            shown = "  ".join(f"{key} {x:.3f}" for key, x in numbers.items() if key in names)
            print(f"{row['phase']:>10} {row['step']:>5}  {shown}", flush=True)
        if ended := run.step == run.phases[run.phase].steps:
            save_phase(run)
        if ended or run.step % c.save_every == 0:
            processes.save(score.state_of(run), run.folder / "checkpoint.pt")
    processes.save(score.state_of(run), run.folder / "checkpoint.pt")
    if board:
        board.close()


def look(run: score.Run, main: bool) -> dict:
    """Show a conversation of the last batch; return the five metrics on split dev, greedy."""
    model = frozen(run.policy, processes.gathered(run.policy.state_dict()), run.config)
    if main and hasattr(run, "sample"):
        problem, r, rewards = run.sample
        print("   problem ", printable(problem.prompt))
        for k, reward in enumerate(rewards, start=1):
            print(f" attempt {k}  {printable(texts(r, k, run.task)[0])}   reward {reward}")
    drawn = run.task.draw(run.config.eval_n, "dev", np.random.default_rng(0))
    found = evaluate(model, run.task, drawn, 0.0, run.config.batch)
    return {key: found[key.removeprefix("dev_")] for key in DEV}


def save_phase(run: score.Run) -> None:
    """Write the weights that a phase ends with."""
    path = run.folder / f"{run.phases[run.phase].name}.pt"
    processes.save(dict(model=run.policy.state_dict()), path)


def opened(folder: Path, test: str, others: list[str], argv: list[str]) -> score.Run:
    """Return an open checkpoint as a run with a base alone, for eval.py. The file tells the preset,
    others override it. ValueError if a report of another command than argv is at its `path`."""
    if test is None:
        raise ValueError(f"{' '.join(others)} is not for a run; a checkpoint wants --test, too")
    path = Path(f"report-{folder.resolve().name}.json")

    def same(words):
        return re.sub(r"--show[ =]\d+", "", " ".join(words or []))

    for x in filter(Path.exists, (path.with_suffix(".jsonl"), path)):
        if not path.exists() or same(pretrained.read_json(path).get("command")) != same(argv):
            raise ValueError(f"{x} is not of this command: move it away, or stand elsewhere")
    kind = "math" if files.read(Path(test))[0][0].verifier is verify.math else "mbpp"
    given = [f"--preset={kind}", f"--checkpoint={folder}", f"--train={test}", f"--test={test}"]
    c = SimpleNamespace(**vars(parse([*given, *others])[1]) | dict(train="", task=TASKS[kind]))
    base, task = [score.Phase("base", 0, None, 0.0, 0.0, 0)], problems.task(c)
    policy = pretrained.load(folder).requires_grad_(False).to(c.device)
    run = score.Run(c, task, base, folder, prepare(policy, DTYPES[c.dtype]), policy, None, phase=1)
    run.path = path
    return run


def export(argv: list[str]) -> None:
    """Write a run's phase, by default the last finished one, as an open checkpoint."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--export", nargs=2, metavar=("RUN", "NEW"))
    parser.add_argument("--phase")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args(argv)
    run = score.open_run(Path(args.export[0]))
    names = [x.name for x in run.phases if (run.folder / f"{x.name}.pt").is_file()]
    if not names or args.phase not in (None, *names):
        raise ValueError(f"{run.folder} has finished {names}: cannot export {args.phase or 'any'}")
    run.policy.load_state_dict(load(run.folder / f"{args.phase or names[-1]}.pt")["model"])
    source = getattr(run.config, "checkpoint", "") or None
    pretrained.save(run.policy.to(DTYPES[args.dtype]), args.export[1], source)


def move(folder: Path, given: dict[str, str]) -> None:
    """Tell a run where its checkpoint and files are now; ValueError if the files, or the sizes of
    the checkpoint, are not those that it began with."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run: no {path}")
    about = json.loads(path.read_text())
    about["config"] |= given
    c = Config(**about["config"])  # with whole paths
    run = new_run(c, folder)
    if (folder / "checkpoint.pt").exists():
        run.policy.load_state_dict(load(folder / "checkpoint.pt")["policy"])
    path.with_suffix(".part").write_text(json.dumps(about | {"config": asdict(c)}, indent=2) + "\n")
    path.with_suffix(".part").replace(path)


def parse(argv: list[str]):
    """Return what `score.parse` does, a preset's options first."""
    names = {x.partition("=")[0] for x in argv if x.startswith("--")}
    if "--resume" in names and len(names) > 1 and names <= {"--resume", *MOVED}:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        for name in ("--resume", *MOVED):
            parser.add_argument(name)
        given = {name: x for name, x in vars(parser.parse_args(argv)).items() if x}
        folder = Path(given.pop("resume"))
        move(folder, given)
        return folder, None
    if len(names) > 1 and "--resume" in names:
        raise ValueError("--resume takes all settings from the run, whose rate ends at 0: to train "
                         "longer, --export RUN NEW, and train from --checkpoint NEW")  # fmt: skip
    preset = re.search(r"--preset[ =](\w+)", " ".join(argv))
    folder, c = score.parse([*PRESETS.get(preset and preset[1], "").split(), *argv], Config)
    given = [] if c is None else [x[2:] for x in sorted(names) if x[2:] in methods.SOME]
    if idle := [x for x in given if x not in methods.METHODS[c.method]]:
        raise ValueError(f"--method {c.method} does not use --{idle[0]}")
    return folder, c


def main(argv: list[str]) -> int:
    """Train, then evaluate; return the exit status."""
    run = None
    with processes.together():
        other = processes.rank()
        try:
            if "--export" in argv:
                export(argv)
                return 0
            folder, c = processes.on_main(parse, argv)
            if c is not None:
                processes.on_main(score.create, c, folder)
            run = processes.shard(score.open_run(folder))
            drive(run)
        except KeyboardInterrupt:
            more = f"; go on with: python -m scale.train --resume {folder}" if run else ""
            print(f"\nstopped{more}")
            return 130
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            time.sleep(3 * other)  # what all have to say, the first says, and ends all
            print(f"scale.train: error: {str(error).splitlines()[0]}", file=sys.stderr)
            return 2
    if other:
        os._exit(0)  # at the interpreter's own end, torch's threads abort now and then
    torch.cuda.empty_cache()  # the evaluation needs the memory
    return subprocess.run([sys.executable, score.ROOT / "eval.py", str(folder)]).returncode


if __name__ == "__main__":
    sys.exit(importlib.import_module("scale.train").main(sys.argv[1:]))
