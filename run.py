"""What is a run? Its settings, its phases, its folder, and checkpoints that are whole or absent.

Nothing here is needed to understand SCoRe; `score.py` is the method and its loop. A folder holds
config.json, log.jsonl (a line a step), checkpoint.pt (all that the next step depends on; where
several processes train, a folder, `checkpoint`), one <phase>.pt of weights for each finished phase,
and eval.py's report.json.

    python score.py --help                   # every setting, its default and what it accepts
    python score.py --resume runs/score-seed0
"""

import argparse
import copy
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import countdown
import parallel
import verify
from chat import Format, encode_text, format_of, prompt
from model import GPT, GPTConfig, config_from
from parallel import first, processes, save, shard, whole, whole_tensor

METHODS = (
    "score", "base", "multi_turn", "single_turn", "no_stage1", "no_bonus", "star", "star_plus",
    "pair_sft", "pair_sft_plus", "star_stage2", "three_turn",
)  # fmt: skip
SUPERVISED = ("sft", "star", "pair_sft")  # objectives that imitate; all others reinforce
PRESETS = {  # of the command line: where a task's or a data set's defaults differ from those below
    "countdown": dict(
        d_ff=192, sft_steps=2000, forget=0.15, right_revision=0.22, copy=0.73, clean=0.8,
        stage1_steps=80, lr=5e-4,
    ),
    # arXiv 2409.12917v2, table 5; the paper gives steps in all, their split is open: here halves.
    # It says nothing of groups, lengths, warm-up and precision.
    "math": dict(
        task="math", lr=5e-6, stage1_steps=1500, stage2_steps=1500, batch=512, alpha=10.0,
        beta1=0.01, beta2=0.1, temperature=1.0, sft_steps=0, sft_lr=1e-5, sft_batch=64,
        sft_warmup=10, save_every=20, max_new=1024, dtype="bfloat16", micro_batch=8,
        sample_batch=512, recompute=True, chunk=128,
    ),
    "mbpp": dict(
        task="code", lr=1e-5, stage1_steps=750, stage2_steps=750, batch=128, alpha=10.0,
        beta1=0.01, beta2=0.25, temperature=1.0, sft_steps=0, sft_lr=1e-5, sft_batch=64,
        sft_warmup=10, save_every=20, max_new=512, dtype="bfloat16", micro_batch=8,
        sample_batch=512, recompute=True, chunk=128,
    ),
}  # fmt: skip
TOYS, DATA = ("addition", "countdown"), ("math", "code")

DTYPES = ("float32", "bfloat16")

# --- settings: one line a knob --------------------------------------------------------------------


def knob(default, text: str, low=None, high=None, choices=None):
    """Return a dataclass field that is also a command-line option, with what it accepts."""
    return field(default=default, metadata=dict(help=text, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """All settings of a run; every field is an option of the command line.

    Raises:
      ValueError: a value is impossible; the message names the option and what is accepted.
    """

    method: str = knob("score", "what follows the base model", choices=METHODS)
    seed: int = knob(0, "of weights, problems and samples", 0, 2**31)
    device: str = knob("cpu", "cpu, cuda or cuda:N")
    # task
    task: str = knob("addition", "a toy; or math or code, from files", choices=TOYS + DATA)
    checkpoint: str = knob("", "math, code: folder of the open checkpoint that is the base")
    train: str = knob("", "math, code: file of problems to train on; a tenth of them is split dev")
    test: str = knob("", "math, code: file of problems to report on")
    digits: int = knob(7, "addition: digits of each operand", 1, verify.MAX_OPERAND_DIGITS)
    numbers: int = knob(4, "countdown: numbers of a problem", 2, countdown.MAX_NUMBERS)
    largest: int = knob(9, "countdown: the largest number", 1, countdown.MAX_LARGEST)
    split_seed: int = knob(0, "of the split into train, dev and test problems", 0, 2**31)
    # model
    n_layer: int = knob(3, "blocks", 1, 200)
    n_head: int = knob(4, "query heads", 1, 1000)
    n_kv_head: int = knob(4, "key-value heads", 1, 1000)
    d_model: int = knob(48, "width", 1, 2**13)
    d_ff: int = knob(96, "hidden width of the MLP", 1, 2**15)
    rope_theta: float = knob(100.0, "base of the rotary wavelengths", 1, 1e9)
    qkv_bias: bool = knob(True, "bias on query, key and value")
    # base model
    sft_steps: int = knob(1500, "steps of supervised training of the base", 0, 10**9)
    sft_batch: int = knob(128, "documents a step", 1, 2**20)
    sft_lr: float = knob(6e-3, "peak learning rate, then linear to 0", 0, 1)
    sft_warmup: int = knob(100, "steps of linear warm-up of the base", 0, 10**9)
    forget: float = knob(0.25, "probability of a draft's slip: a carry at a 9, or a sign", 0, 1)
    lose: float = knob(0.85, "the same at the third 9 in a row, or a minus before more", 0, 1)
    right_revision: float = knob(0.18, "share of right revisions, after the clean part", 0, 1)
    copy: float = knob(0.77, "share of copied drafts, after the clean part", 0, 1)
    clean: float = knob(
        0.68, "share of the base's steps, its first, with right revisions only", 0, 1
    )
    base_attempts: int = knob(2, "attempts of a conversation that the base reads, at most", 2, 10)
    # reinforcement learning
    stage1_steps: int = knob(60, "steps of Stage I", 1, 10**9)
    stage2_steps: int = knob(40, "steps of Stage II", 1, 10**9)
    rounds: int = knob(1, "how often the two stages alternate, sharing their steps", 1, 1000)
    stage1_gain: float = knob(
        0, "end Stage I when a block's delta has risen so much; 0: never", 0, 1
    )
    batch: int = knob(256, "rollouts a step", 2, 2**20)
    group: int = knob(4, "rollouts of each problem (leave-one-out baseline)", 2, 2**20)
    pool: int = knob(0, "problems to train on, the same at all steps; 0: always fresh", 0, 2**20)
    micro_batch: int = knob(0, "rows in one backward pass, whole groups; 0: all", 0, 2**20)
    lr: float = knob(7e-4, "learning rate", 0, 1)
    warmup: int = knob(20, "steps of linear warm-up in each stage", 0, 10**9)
    clip: float = knob(1.0, "limit of the gradient's norm", 1e-9, 1e9)
    temperature: float = knob(1.0, "of the samples and of all log-probabilities", 0.01, 100)
    max_new: int = knob(0, "limit of an attempt, in tokens; 0: a toy's longest", 0, 2**20)
    alpha: float = knob(10.0, "weight of the progress bonus in SCoRe's Stage II", 0, 1e6)
    beta1: float = knob(0.01, "weight of the KL to the base, both turns and stages", 0, 1e6)
    beta2: float = knob(4.0, "weight of the KL that holds attempt 1 in Stage I", 0, 1e6)
    adaptive_beta2: bool = knob(False, "balance beta2's KL with attempt 2's reward")
    kl: str = knob("exact", "estimator of the KL", choices=("exact", "k1"))
    offline: float = knob(0, "share of Stage II's problems with the base's attempt 1", 0, 1)
    gamma: float = knob(0, "share of attempt 2's return that attempt 1 earns, too", 0, 1)
    leak: bool = knob(False, "pay the progress bonus to attempt 1, too: a known mistake")
    iterations: int = knob(3, "how often STaR samples anew from what it has become", 1, 1000)
    select: str = knob("best", "which weights the last phase keeps", choices=("best", "last"))
    # memory, precision, speed
    dtype: str = knob("float32", "of matrix products; weights stay float32", choices=DTYPES)
    sample_batch: int = knob(0, "rows sampled at a time, whole groups; 0: all", 0, 2**20)
    chunk: int = knob(0, "positions whose laws are in memory at a time; 0: all", 0, 2**20)
    recompute: bool = knob(False, "compute blocks again in the backward pass")
    compile: bool = knob(False, "fuse by torch.compile: for long runs of small models")
    # reports
    tensorboard: bool = knob(False, "write what is logged for TensorBoard, too")
    eval_n: int = knob(2000, "held-out problems in the final table", 1, 10**6)
    save_every: int = knob(100, "steps between checkpoints", 1, 10**9)

    def __post_init__(self):
        for f in fields(self):
            value, option = getattr(self, f.name), "--" + f.name.replace("_", "-")
            low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
            if not isinstance(value, (int, float) if f.type is float else f.type):
                raise ValueError(f"{option} must be of type {f.type.__name__}, got {value!r}")
            if choices and value not in choices:
                raise ValueError(f"{option} must be one of {', '.join(choices)}, got {value!r}")
            if low is not None and not low <= value <= high:
                raise ValueError(
                    f"{option} must be between {low:.10g} and {high:.10g}, got {value}"
                )
        for option, rows in (
            ("--batch", self.batch), ("--micro-batch", self.micro_batch),
            ("--sample-batch", self.sample_batch),
        ):  # fmt: skip
            if rows % self.group:
                raise ValueError(f"{option} must be a multiple of --group {self.group}, got {rows}")
        if self.sft_batch < self.base_attempts - 1:
            raise ValueError(f"--sft-batch must be at least --base-attempts - 1, "
                             f"got {self.sft_batch}")  # fmt: skip
        if 0 < self.pool < self.batch // self.group:
            raise ValueError(f"--pool must be 0 or at least --batch / --group, got {self.pool}")
        least = 2 if self.task in DATA else self.lengths()[1] + 1  # an answer and the end of turn
        if 0 < self.max_new < least:
            raise ValueError(f"--max-new must be 0 or at least {least}, got {self.max_new}")
        if self.right_revision + self.copy > 1:
            raise ValueError(f"--right-revision {self.right_revision} and --copy {self.copy} "
                             "must add up to at most 1")  # fmt: skip
        if self.rounds > min(self.stage1_steps, self.stage2_steps):
            raise ValueError(f"--rounds must be at most the steps of a stage, got {self.rounds}")
        if self.method.startswith("star") and self.iterations > self.stage2_steps:
            raise ValueError(
                f"--iterations must be at most the steps of Stage II, got {self.iterations}"
            )
        for option in ("checkpoint", "train", "test"):
            if bool(getattr(self, option)) != (self.task in DATA):
                raise ValueError(f"--{option} is for --task math and code, and needed there, "
                                 f"got {getattr(self, option)!r}")  # fmt: skip
        if self.task in DATA and not self.max_new:
            raise ValueError("--max-new must be given for --task math and code, got 0")
        self.model()

    def lengths(self) -> tuple[int, int]:
        """Return the most tokens of a toy's prompt and of an answer as the base has read them."""
        if self.task == "countdown":
            return countdown.lengths(self.numbers, self.largest)
        return 2 * self.digits + 2, self.digits + 1

    def format(self) -> Format:
        """Return how problems and attempts are written in tokens."""
        return format_of(self.task, Path(self.checkpoint) if self.checkpoint else None)

    def attempt_limit(self) -> int:
        """Return the most tokens of an attempt: by default the longest answer and its end."""
        return self.max_new or self.lengths()[1] + 1

    def model(self) -> GPTConfig:
        """Return the sizes of the model; a toy's must hold a prompt and ten attempts."""
        if self.checkpoint:
            if not Path(self.checkpoint).is_dir():
                raise ValueError(f"--checkpoint must be a local folder (nothing is downloaded), "
                                 f"got {self.checkpoint}")  # fmt: skip
            return config_from(Path(self.checkpoint))
        return GPTConfig(
            self.format().tokenizer.encoding.n_vocab, self.n_layer, self.n_head, self.n_kv_head,
            self.d_model, self.d_ff, rope_theta=self.rope_theta, qkv_bias=self.qkv_bias,
            max_positions=self.lengths()[0] + 10 * (self.attempt_limit() + 1),
        )  # fmt: skip


def draw(c: Config, n: int, split: str, rng: np.random.Generator) -> list[verify.Problem]:
    """Draw n problems of the run's task from one split; of files, each at most once, and all if a
    report asks for more than there are."""
    if c.task in DATA:
        rows = given(c.task, c.train, c.test)[split]
        if n > len(rows) and split == "train":
            raise ValueError(
                f"--train {c.train}: a step needs {n} problems (--batch / --group, --sft-batch, "
                f"--pool); it has {len(rows)}, without a tenth for dev and those in --test"
            )
        return [rows[i] for i in rng.permutation(len(rows))[:n]]
    if c.task == "countdown":
        drawn = countdown.problems(n, split, rng, c.numbers, c.largest, c.split_seed)
        return [verify.Problem(prompt, gold, "countdown") for prompt, gold in drawn]
    return verify.problems(n, split, rng, c.digits, c.split_seed)


@functools.cache
def given(task: str, train: str, test: str) -> dict[str, list[verify.Problem]]:
    """Return the problems of files by split: of the first file every tenth is "dev"; what stands in
    it twice, or in the second, too, white space aside, is left out.

    Raises:
      ValueError: a file holds problems of another task, or is malformed.
      OSError: a file cannot be read.
    """
    kind, files = {"math": "math", "code": "program"}[task], {}
    for path in (train, test):
        try:
            files[path] = verify.load(path)
        except OSError as error:
            raise ValueError(f"--train and --test must be files of problems (.jsonl, .json, "
                             f".jsonl.gz): {error}") from None  # fmt: skip
        others = {problem.kind for problem in files[path]} - {kind}
        if others:
            raise ValueError(f"{path} holds problems of kind {others.pop()}, not {kind}")
    said = {" ".join(problem.prompt.split()) for problem in files[test]}
    rows = []
    for problem in files[train]:
        words = " ".join(problem.prompt.split())
        if words not in said:
            rows.append(problem)
            said.add(words)
    others = [problem for i, problem in enumerate(rows) if i % 10]
    return {"train": others, "dev": rows[::10], "test": files[test]}


def draw_training(c: Config, n: int, rng: np.random.Generator) -> list[verify.Problem]:
    """Draw n problems to train on: fresh ones, or n rows of the run's pool."""
    if not c.pool:
        return draw(c, n, "train", rng)
    pool = draw(c, c.pool, "train", np.random.default_rng(c.seed))
    return [pool[i] for i in rng.choice(c.pool, n, replace=False)]


def documents(c: Config, n: int, rng: np.random.Generator, clean: bool) -> list[tuple]:
    """Draw n documents (prompt, draft, revision) of a toy; `clean`: revised rightly."""
    shares = dict(
        forget=c.forget, lose=c.lose, right_revision=1.0 if clean else c.right_revision,
        copy=0.0 if clean else c.copy, split_seed=c.split_seed,
    )  # fmt: skip
    if c.task == "countdown":
        return countdown.corpus(n, rng, c.numbers, c.largest, **shares)
    return verify.corpus(n, rng, c.digits, **shares)


class Failure(RuntimeError):
    """A run cannot go on, for a reason that one line can tell."""


class Phase(NamedTuple):
    """One phase of a run: what is optimised and for how long.

    objective: "sft", "stage1", "stage2"; "single_turn", which rewards attempt 1 alone; "stage1b",
    which rewards attempt 3; "star" and "pair_sft", which imitate.
    attempts: how many are sampled. plus: imitate also what was right at both attempts.
    continues: goes on with the optimiser of the phase before, without a new warm-up.
    """

    name: str
    objective: str
    steps: int
    alpha: float = 0.0
    attempts: int = 2
    plus: bool = False
    continues: bool = False


def schedule(c: Config) -> list[Phase]:
    """Return the phases of a run. The last is named after the method, and its weights selected.

    >>> [(p.name, p.steps) for p in schedule(Config(rounds=2, stage1_steps=3, stage2_steps=4))]
    [('base', 1500), ('stage1-1', 1), ('stage2-1', 2), ('stage1-2', 2), ('score', 2)]
    >>> [(p.name, p.steps) for p in schedule(Config(method="star"))]
    [('base', 1500), ('star-1', 33), ('star-2', 33), ('star', 34)]
    """
    base, both = Phase("base", "sft", c.sft_steps), c.stage1_steps + c.stage2_steps
    stage1 = Phase("stage1", "stage1", c.stage1_steps)
    whole = {  # all phases of methods without both stages, for as many steps as SCoRe has in both
        "base": [],
        "multi_turn": [Phase("multi_turn", "stage2", both)],  # eq. 4 without the bonus
        "no_stage1": [Phase("no_stage1", "stage2", both, c.alpha)],
        "single_turn": [Phase("single_turn", "single_turn", both)],
        "star": iterated(Phase("star", "star", both), c.iterations),
        "star_plus": iterated(Phase("star_plus", "star", both, plus=True), c.iterations),
        "pair_sft": [Phase("pair_sft", "pair_sft", both)],
        "pair_sft_plus": [Phase("pair_sft_plus", "pair_sft", both, plus=True)],
        "star_stage2": [
            stage1,
            *iterated(Phase("star_stage2", "star", c.stage2_steps, plus=True), c.iterations),
        ],
        "three_turn": [  # ICLR's appendix: Stage I in two halves, then three attempts
            *(
                half._replace(name=name, objective=name, attempts=attempts)
                for half, name, attempts in zip(
                    split(stage1, 2), ("stage1", "stage1b"), (2, 3), strict=True
                )
            ),
            Phase("three_turn", "stage2", c.stage2_steps, c.alpha, attempts=3),
        ],
    }
    if c.method in whole:
        return [base, *whole[c.method]]
    stage2 = Phase("stage2", "stage2", c.stage2_steps, 0.0 if c.method == "no_bonus" else c.alpha)
    rounds = zip(split(stage1, c.rounds), split(stage2, c.rounds), strict=True)
    phases = [phase for both in rounds for phase in both]
    if c.rounds > 1:
        phases[-2] = phases[-2]._replace(name=f"stage1-{c.rounds}")
    return [base, *phases[:-1], phases[-1]._replace(name=c.method)]


def iterated(phase: Phase, n: int) -> list[Phase]:
    """Return the iterations of a phase: it samples anew in each, and is otherwise one phase."""
    first, *rest = split(phase, n)
    return [first, *(part._replace(continues=True) for part in rest)]


def split(phase: Phase, n: int) -> list[Phase]:
    """Return a phase in n parts, as equal as can be; the last keeps its name.

    >>> [(p.name, p.steps) for p in split(Phase("a", "sft", 5), 3)]
    [('a-1', 1), ('a-2', 2), ('a', 2)]
    """
    ends = [phase.steps * i // n for i in range(n + 1)]
    names = [*(f"{phase.name}-{i}" for i in range(1, n)), phase.name]
    return [
        phase._replace(name=name, steps=end - start)
        for name, start, end in zip(names, ends[:-1], ends[1:], strict=True)
    ]


def parse(argv: list[str]) -> tuple[Config | None, Path, Path | None]:
    """Return a new run's settings, its folder and that of the run whose base it takes, if any;
    or None and the folder of a run to resume."""
    parser = argparse.ArgumentParser(
        prog="score.py", usage=argparse.SUPPRESS, description="Train SCoRe.",
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--run", type=Path, help="folder to create (default: runs/METHOD-seedSEED; "
                        "of other tasks: runs/TASK-METHOD-seedSEED)")  # fmt: skip
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue this run, and no more")
    parser.add_argument("--base", type=Path, metavar="RUN", help="start from the base of this run")
    parser.add_argument(
        "--preset", choices=("math", "mbpp"), help="the paper's settings for MATH or MBPP, and our "
        "choice of what it leaves open; --task math and code imply them",
    )  # fmt: skip
    for f in fields(Config):
        option, low, high = "--" + f.name.replace("_", "-"), f.metadata["low"], f.metadata["high"]
        accepted = "" if low is None else f"; {low:.10g} to {high:.10g}"
        for name, preset in PRESETS.items():
            accepted += f"; {name}: {preset[f.name]}" if f.name in preset else ""
        default = "none" if f.default == "" else f.default
        text = f"{f.metadata['help']} (default: {default}{accepted})"
        if f.type is bool:
            either = argparse.BooleanOptionalAction
            parser.add_argument(option, action=either, help=text)
        else:
            parser.add_argument(option, type=f.type, choices=f.metadata["choices"], help=text)
    parser.error = refuse  # one line, from one process
    args = vars(parser.parse_args(argv))
    folder, resume, base, preset = (
        args.pop(name, None) for name in ("run", "resume", "base", "preset")
    )
    if resume is not None:
        if args or folder is not None or base is not None or preset is not None:
            raise ValueError("--resume takes all settings from the run: give no other option")
        return None, resume, None
    task = args.get("task", PRESETS[preset]["task"] if preset else "addition")
    preset = preset or {"code": "mbpp"}.get(task, task)
    if PRESETS.get(preset, {}).get("task", task) != task:
        raise ValueError(f"--preset {preset} is for --task {PRESETS[preset]['task']}, got {task}")
    if task in DATA:
        missing = [x for x in ("checkpoint", "train", "test") if not args.get(x)]
        if missing:
            raise ValueError(f"--task {task} needs --checkpoint FOLDER, --train FILE and --test "
                             f"FILE: no --{missing[0]} was given")  # fmt: skip
        names = [f.name for f in fields(Config)]
        toys = names[names.index("digits") : names.index("qkv_bias") + 1]
        toys += names[names.index("forget") : names.index("base_attempts") + 1]
        for name in toys:
            if name in args:
                raise ValueError(f"--{name.replace('_', '-')} is for the toys: with --task {task} "
                                 "the model is the checkpoint's")  # fmt: skip
    config = Config(**PRESETS.get(preset, {}) | args)
    task = "" if config.task == "addition" else f"{config.task}-"
    return config, folder or Path("runs") / f"{task}{config.method}-seed{config.seed}", base


def refuse(message: str) -> None:
    """Raise ValueError."""
    raise ValueError(message)


# --- the run: what it carries from step to step ---------------------------------------------------

BLOCK = 20  # steps: training reward and delta are judged on means over a block


@dataclass
class Progress:
    """Where a run stands, within a phase. JSON values only."""

    phase: int = 0
    step: int = 0  # finished steps of this phase
    beta2: float = 0.0
    block: list = field(default_factory=list)  # (training reward, delta) since the last full block
    first_delta: float | None = None  # means over the phase's first and last full block
    last_delta: float | None = None
    best_reward: float | None = None  # the best block's mean
    best_step: int = 0
    seconds: float = 0.0
    log_bytes: int = 0


@dataclass
class Run:
    """A run in memory: settings, folder, models, optimiser, the two sources of randomness."""

    config: Config
    folder: Path
    policy: GPT
    base: GPT | None  # frozen; None until the base is trained
    previous: GPT | None  # frozen: the policy as the phase before left it, where it is needed
    optimizer: torch.optim.Optimizer
    best: dict | None  # weights of the best block
    problem_rng: np.random.Generator
    sampler: torch.Generator
    progress: Progress
    clock: dict = field(default_factory=dict)  # what the step at hand took
    board: object | None = None  # TensorBoard's writer, if asked for


def new_run(c: Config, folder: Path) -> Run:
    """Return a run at its first step; nothing is written."""
    if c.compile:
        check_compiler(c)
    weights, problems, samples = np.random.SeedSequence(c.seed).generate_state(3, np.uint64)
    if c.checkpoint:
        policy = GPT.from_pretrained(Path(c.checkpoint))
    else:
        policy = GPT(c.model(), seed=int(weights >> 1))
    policy = shard(policy, device(c.device))
    policy.recompute, policy.compiled = c.recompute, c.compile
    policy.lean = c.chunk > 0 and processes()[1] == 1
    sampler = torch.Generator(c.device).manual_seed(int(samples >> 1))
    rng = np.random.default_rng(int(problems))
    return Run(
        c,
        folder,
        policy,
        None,
        None,
        new_optimizer(policy),
        None,
        rng,
        sampler,
        Progress(beta2=c.beta2),
    )


def computing(c: Config) -> torch.autocast:
    """Return the context to compute in: of bfloat16 matrices, if the run says so."""
    return torch.autocast(device(c.device).type, torch.bfloat16, enabled=c.dtype == "bfloat16")


def frozen(policy: GPT, c: Config) -> GPT:
    """Return a copy that is not trained, its blocks' matrices in the precision that is computed in.

    Autocast rounds these when they are used, and nothing else: so in bfloat16 the copy computes
    what the policy does, to the bit; in float32 to rounding, as `model.Linear` may differ.
    """
    gathered = whole(policy)
    fixed = copy.deepcopy(policy) if gathered is policy else gathered
    fixed.compiled = c.compile
    for block in fixed.requires_grad_(False).blocks:
        for weight in block.parameters():
            if weight.dim() == 2 and c.dtype == "bfloat16":
                weight.data = weight.data.bfloat16()
    return shard(fixed, device(c.device))


def needs_previous(phase: Phase) -> bool:
    """Return whether a phase has to do with the policy as the phase before left it."""
    return phase.objective in ("star", "pair_sft", "stage1b")


def device(name: str) -> torch.device:
    """Return a device that exists, or raise ValueError."""
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if name != "cpu" and int(name[5:] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def new_optimizer(policy: GPT) -> torch.optim.Optimizer:
    """Return a fresh AdamW, as every phase starts with; its rate is set at each step.

    Of a `lean` model it is the fused one, which makes no copies of a matrix's size.
    """
    return torch.optim.AdamW(
        policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=policy.lean or None
    )


def steps_before(run: Run) -> int:
    """Return how many steps the phases before the run's present one were given."""
    return sum(phase.steps for phase in schedule(run.config)[: run.progress.phase])


def open_board(run: Run) -> None:
    """Let a run that asks for it write for TensorBoard, on from where it stands."""
    if not run.config.tensorboard or processes()[0]:
        return
    at = steps_before(run) + run.progress.step + 1  # what was shown from here on is shown anew
    run.board = summary_writer()(str(run.folder / "tensorboard"), purge_step=at)


def summary_writer() -> type:
    """Return TensorBoard's writer; ValueError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs: pip install tensorboard==2.21.0") from None
    return SummaryWriter


def check_compiler(c: Config) -> None:
    """Raise ValueError if torch.compile cannot work here, or was never tried so."""
    if processes()[1] > 1:
        raise ValueError(
            f"--compile is for one process: it was not tried with several, got {processes()[1]}"
        )
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if os.name == "posix" and device(c.device).type == "cpu" and not shutil.which(name):
        raise ValueError(f"--compile needs a C++ compiler: there is no {name} (or name it by CXX)")


# --- files: checkpoints that are whole or absent --------------------------------------------------


def write_json(content, path: Path, indent: int | None = None) -> None:
    """Write JSON under a temporary name, then rename it."""
    part = path.with_name(path.name + ".part")
    with open(part, "w") as file:
        file.write(json.dumps(content, indent=indent) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load(path: Path) -> dict:
    """Read what `save` wrote, on the CPU.

    Raises:
      ValueError: the file is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            damaged = archive.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a dozen kinds, depending on which bytes are damaged
        damaged = type(error).__name__
    if damaged:
        raise ValueError(f"{path} is not a readable checkpoint ({damaged})")
    return content


def save_checkpoint(run: Run) -> None:
    """Write all that the next step depends on: in one file, or a part for each process."""
    content = {
        "policy": run.policy.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "best": run.best,
        "problem_rng": json.dumps(run.problem_rng.bit_generator.state),
        "sampler": run.sampler.get_state(),
        "progress": asdict(run.progress),
    }
    if processes()[1] > 1:
        parallel.save_parts(content, run.folder)
    else:
        save(content, run.folder / "checkpoint.pt")
        parallel.discard_parts(run.folder)


def save_weights(policy: GPT, about: dict, path: Path) -> None:
    """Write a policy's whole weights, and what is to be known of them."""
    weights = {name: whole_tensor(x) for name, x in policy.state_dict().items()}
    first(save, dict(model=weights) | about, path)


def create(c: Config, folder: Path, base: Path | None = None) -> Run:
    """Start a run in a folder that must not exist yet, if asked with the base of another run."""
    check_shares(c)
    if c.tensorboard:
        summary_writer()
    run = new_run(c, folder)
    draw(c, c.eval_n, "test", np.random.default_rng(0))
    draw_training(c, c.batch // c.group, np.random.default_rng(0))
    if c.task in DATA and c.sft_steps:
        rows = draw(c, c.sft_batch, "train", np.random.default_rng(0))
        if not all(problem.solution for problem in rows):
            raise ValueError(f"--train {c.train} has problems without a worked answer to imitate: "
                             f"--sft-steps must be 0, got {c.sft_steps}")  # fmt: skip
    first(check_absent, folder)
    check_lengths(c)
    trained = None if base is None else take_base(run, base)
    run.folder = folder.with_name(folder.name + ".part")  # a run is whole or absent, too
    first(prepare, run, trained)
    save_checkpoint(run)
    first(run.folder.rename, folder)
    run.folder = folder
    return run


def check_lengths(c: Config) -> None:
    """Raise ValueError if a problem of the files, with two attempts or with its worked answer, does
    not fit the model."""
    if c.task not in DATA:
        return
    format, room, most = c.format(), c.model().max_positions, 0
    for problem in (x for rows in given(c.task, c.train, c.test).values() for x in rows):
        n, (encoding, nfc) = len(prompt(format, problem)), format.tokenizer
        worked = len(encode_text(encoding, problem.solution, nfc)) + 1 if c.sft_steps else 0
        most = max(most, n + worked, n + 2 * c.attempt_limit() + len(format.instruction))
    if most > room:
        raise ValueError(f"--max-new {c.max_new}: a problem with its answers takes up to {most} "
                         f"tokens, --checkpoint {c.checkpoint} reads {room}")  # fmt: skip


def digests(c: Config) -> dict[str, str]:
    """Return the SHA-256 of the files of problems, which a run is bound to."""
    paths = [path for path in (c.train, c.test) if path]
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}


def check_absent(folder: Path) -> None:
    """Raise ValueError if there is such a folder."""
    if folder.exists():
        raise ValueError(
            f"{folder} exists and is left alone: continue it with --resume {folder}, "
            "or choose another with --run"
        )


def prepare(run: Run, trained: dict | None) -> None:
    """Write what a new run starts with, but for its checkpoint."""
    run.folder.mkdir(parents=True, exist_ok=True)
    about = dict(commit=commit(), torch=torch.__version__, threads=torch.get_num_threads())
    about |= dict(files=digests(run.config), config=asdict(run.config))
    text = json.dumps(about, indent=2)
    (run.folder / "config.json").write_text(text + "\n")
    (run.folder / "log.jsonl").write_text("")
    if trained is not None:
        save(trained, run.folder / "base.pt")


def check_shares(c: Config) -> None:
    """Hold the settings against the number of processes, which all have equal shares of the rows.

    Raises:
      ValueError: they cannot have, or there is no device for each.
    """
    n = processes()[1]
    if n == 1:
        return
    for option, rows, each in (
        ("--batch", c.batch, c.group), ("--sample-batch", c.sample_batch, c.group),
        ("--sft-batch", c.sft_batch, c.base_attempts - 1),
    ):  # fmt: skip
        if rows % (each * n):
            raise ValueError(
                f"{option} must be a multiple of {each} times {n} processes, got {rows}"
            )
    if c.method.startswith("pair_sft"):
        raise ValueError(f"--method {c.method} runs in one process only, got {n}")
    here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", n)), torch.cuda.device_count()
    if c.device != "cpu" and (c.device != "cuda" or here > devices):
        raise ValueError(
            f"--device must be cpu, or cuda with a device for each of the {here} processes here: "
            f"torch sees {devices}, got {c.device!r}"
        )


def take_base(run: Run, folder: Path) -> dict:
    """Go on from the base that another run has trained, as if this run had; return its file.

    Raises:
      ValueError: there is no such base, or it was trained with other settings.
    """
    theirs, _ = read_about(folder)
    names = [f.name for f in fields(Config)]
    for name in ("seed", *names[names.index("task") : names.index("base_attempts") + 1]):
        ours = getattr(run.config, name)
        if ours != getattr(theirs, name):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"--base {folder} has {option} {getattr(theirs, name)}, not {ours}")
    content = load(folder / "base.pt")
    try:
        run.policy.load_state_dict(parallel.parts_of(content["model"], run.policy))
        run.problem_rng.bit_generator.state = json.loads(content["problem_rng"])
    except (KeyError, RuntimeError, TypeError):
        raise ValueError(f"{folder / 'base.pt'} does not fit {folder / 'config.json'}") from None
    run.base, run.progress.phase = frozen(run.policy, run.config), 1
    run.previous = run.base if needs_previous(schedule(run.config)[1]) else None
    return content


def commit() -> str | None:
    """Return the commit of this code, with "+" if the files differ from it; None outside git."""

    def git(*words):
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def read_about(folder: Path) -> tuple[Config, dict]:
    """Return the settings of a run, and the commit, torch and threads that it was started with.

    Raises:
      ValueError: there is no such run, or its config.json is damaged or of another version.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run: it has no config.json")
    try:
        about = json.loads(path.read_text())
        return Config(**about.pop("config")), about | {"threads": int(about["threads"])}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a readable configuration: {error}") from None


def read_phase(folder: Path, phase: Phase, c: Config) -> tuple[GPT, dict]:
    """Return a finished phase's model, on the run's device, and the rest of its file.

    Raises:
      ValueError: the file is missing, damaged, or of another model than the settings describe.
    """
    path = folder / f"{phase.name}.pt"
    content, model = load(path), GPT(c.model())
    try:
        model.load_state_dict(content["model"])
        content = {key: content[key] for key in ("steps", "selected_step", "seconds")}
    except (KeyError, RuntimeError, TypeError):
        raise ValueError(f"{path} does not fit {folder / 'config.json'}") from None
    return model.to(device(c.device)), content


def restore(folder: Path) -> Run:
    """Return a run as its last checkpoint left it, on as many threads: sums depend on them."""
    config, about = read_about(folder)
    torch.set_num_threads(about["threads"])
    check_shares(config)
    if config.task in DATA and digests(config) != about["files"]:
        raise ValueError(f"{config.train} or {config.test} is not what {folder} began with")
    run = new_run(config, folder)
    path = folder / "checkpoint.pt"
    in_parts = parallel.has_parts(folder)
    content = parallel.load_parts(folder, run.policy, run.optimizer) if in_parts else load(path)
    try:
        if not in_parts:
            content = parallel.spread(content, run.policy)
        run.policy.load_state_dict(content["policy"])
        run.optimizer.load_state_dict(content["optimizer"])
        run.best = content["best"]
        run.problem_rng.bit_generator.state = json.loads(content["problem_rng"])
        run.sampler.set_state(content["sampler"])
        run.progress = Progress(**content["progress"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"{path} does not fit {folder / 'config.json'}") from None
    done, phases = run.progress.phase, schedule(config)
    if done:
        run.base = frozen(read_phase(folder, phases[0], config)[0], config)
        if done < len(phases) and needs_previous(phases[done]):
            run.previous = frozen(read_phase(folder, phases[done - 1], config)[0], config)
    return run
