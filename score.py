"""How does a model learn to correct itself? SCoRe: two stages of two-turn REINFORCE.

Kumar et al., Training Language Models to Self-Correct via Reinforcement Learning,
arXiv 2409.12917v2, ICLR 2025. One policy answers a problem twice; a verifier says 0 or 1 to each.

  Stage I   max E[ r2 - beta1 KL2 - (beta1 + beta2) KL1 ]                  eq. 3
  Stage II  max E[ r1 + r2 + alpha (r2 - r1) - beta1 (KL1 + KL2) ]         eqs. 4 and 5

ri is the reward of attempt i, and KLi its divergence from the attempt that the *base* would have
written: the model before Stage I, frozen, and the same in both stages. Each attempt is credited
with its own terms alone (gamma = 0): neither reward nor bonus nor KL of attempt 2 reaches the
tokens of attempt 1. A stage is a function that says who is paid, by the advantage of each attempt,
and who is held to the base, by the weight of its KL. README.md lists what the paper leaves open.

    python score.py                           # base; multi-turn RL; SCoRe; a table
    python score.py --resume runs/score-seed0

Dimension key: B rows (rollouts), P problems, G rows of each, side by side; K attempts; S scored
positions; V vocabulary. Log-probabilities and KLs are in nats.
"""

import argparse
import importlib
import inspect
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from model import GPT, GPTConfig, hold, load, save
from rollout import Rollout, Task, find_task, grade, make_rows, rollout, summary, token_terms

# --- the equations: pure functions of plain tensors -----------------------------------------------


def shaped_reward(reward1_B, reward2_B, alpha: float):
    """Return attempt 2's reward with the progress bonus, r2 + alpha (r2 - r1).

    Source: arXiv 2409.12917v2, eq. 5. With gamma = 0 it trains attempt 2 alone, which cannot change
    r1: -alpha r1 changes no expected gradient, and the bonus is a weight of 1 + alpha on r2.

    >>> shaped_reward(torch.tensor([0., 0., 1., 1.]), torch.tensor([0., 1., 0., 1.]), 10.0)
    tensor([  0.,  11., -10.,   1.])
    """
    return reward2_B + alpha * (reward2_B - reward1_B)


def advantage(return_B, G: int):
    """Return each row's return less its baseline, the mean over the other rows of its problem. The
    G >= 2 rows of a problem stand side by side; if one has no verdict (nan), all get 0.

    Source: RLOO, Ahmadian et al., arXiv 2402.14740, eq. 6.

    >>> advantage(torch.tensor([1., 0., 0., 1., torch.nan, 1.]), 3)
    tensor([ 1.0000, -0.5000, -0.5000,  0.0000,  0.0000,  0.0000])
    """
    group_PG = return_B.view(-1, G)
    others_PG = (group_PG.sum(dim=1, keepdim=True) - group_PG) / (G - 1)
    return (group_PG - others_PG).nan_to_num(0.0).view(-1)


def stage1(reward_KB, c):
    """Return Stage I's advantage of each attempt [B] and weight of its KL: attempt 2 is paid,
    attempt 1 is only held to the base.

    Source: eq. 3, with the beta1 KL that it "omits for clarity" on both turns.
    """
    reward1_B, reward2_B = reward_KB
    nothing_B = torch.zeros_like(reward1_B)
    return (nothing_B, advantage(reward2_B, c.group)), (c.beta1 + c.beta2, c.beta1)


def stage2(reward_KB, c):
    """Return the same of Stage II: both attempts are paid, the second with the progress bonus.

    Source: eq. 4 with r2 replaced by eq. 5; gamma = 0 (appendix A.2), so that the bonus does not
    reach attempt 1: there r1 would weigh 1 - alpha, and it would pay to answer wrongly first.
    """
    reward1_B, reward2_B = reward_KB
    return2_B = shaped_reward(reward1_B, reward2_B, c.alpha)
    return (advantage(reward1_B, c.group), advantage(return2_B, c.group)), (c.beta1, c.beta1)


def multi_turn(reward_KB, c):
    """Return the same of the control, multi-turn RL: both attempts are paid, without a bonus."""
    return stage2(reward_KB, replace(c, alpha=0.0))


def loss(logp_BS, kl_BS, turn_BS, advantage_KB, weight_K):
    """Return each row's loss. Its gradient is what counts: rewards do not appear in its value.

    An attempt's has the gradient of - advantage * log p + weight * KL, summed over its tokens and
    divided by no length; the advantage is held constant. A token also decides where its attempt
    goes: so its log p is charged with the KL of the *later* tokens of the attempt, too. Without
    that term the gradient is not that of the KL of whole attempts.

    Source: REINFORCE (Williams 1992) of eqs. 3 and 4; D_KL as in eqs. 2 to 4.

    logp_BS, kl_BS: of `token_terms`. turn_BS: 1, 2, .. of an attempt's tokens, its end of turn
    included; 0 of context. advantage_KB, weight_K: of a stage.
    """
    zero_BS = logp_BS - logp_BS.detach()  # its gradient is that of log p
    loss_B = 0.0
    for k, (advantage_B, weight) in enumerate(zip(advantage_KB, weight_K, strict=True), start=1):
        mask_BS = turn_BS == k
        cost_BS = weight * kl_BS * mask_BS
        later_BS = (cost_BS.flip(1).cumsum(1).flip(1) - cost_BS).detach()
        credit_BS = (advantage_B[:, None] - later_BS) * mask_BS
        loss_B = loss_B + (cost_BS - zero_BS * credit_BS).sum(dim=1)
    return loss_B


# --- one step -------------------------------------------------------------------------------------


def collect(run: "Run", author: GPT, K: int):
    """Let `author` make K attempts at fresh problems; return rows, problems, rewards [K, B]."""
    c, task = run.config, run.task
    drawn = task.draw(c.batch // c.group, "train", run.rng)
    noise_KBN = torch.tensor(run.rng.random((K, c.batch, task.max_new)), device=c.device)
    r = rollout(author, task, [task.encode(x.prompt) for x in drawn], noise_KBN, c.temperature)
    problems = [problem for problem in drawn for _ in range(c.group)]
    return r, problems, grade(r, problems, task)


def rl_step(run: "Run", stage: Callable) -> dict:
    """Sample two attempts at fresh problems and take one step of a stage; return what is logged."""
    r, _, reward_KB = collect(run, run.policy, K=2)
    logp_BS, kl_BS = token_terms(run.policy, run.base, r, run.config.temperature)
    return rl_update(run, r, reward_KB, logp_BS, kl_BS, stage(reward_KB, run.config))


def rl_update(run: "Run", r: Rollout, reward_KB, logp_BS, kl_BS, paid_and_held) -> dict:
    """Take one step on sampled rows and return what is logged, or raise RuntimeError."""
    if reward_KB.isnan().any(dim=0).all():
        raise RuntimeError("no row of the batch has both verdicts: the verifier has failed")
    gap = ((logp_BS.detach() - r.logp_BS) * (r.turn_BS > 0)).abs().max().item()
    if not gap < 1e-3:  # also if it is not a number
        raise RuntimeError(f"sampler and trainer disagree by {gap:.1e} nats about a token")
    loss_B = loss(logp_BS, kl_BS, r.turn_BS, *paid_and_held)
    grad_norm = optimizer_step(run, loss_B.mean())
    kl1, kl2 = ((kl_BS * (r.turn_BS == k)).sum(dim=1).mean().item() for k in (1, 2))
    return summary(r, reward_KB, run.task) | dict(kl1=kl1, kl2=kl2, gap=gap, grad_norm=grad_norm)


def sft_step(run: "Run") -> dict:
    """Raise the likelihood of fresh documents by one step; return what is logged."""
    c, task = run.config, run.task
    r = make_rows(*task.documents(c.sft_batch, run.rng), task.instruction, c.device)
    return sft_update(run, r, r.turn_BS > 0, 1.0)


def sft_update(run: "Run", r: Rollout, mask_BS, temperature: float) -> dict:
    """Raise the likelihood of the chosen tokens, each counting the same; return what is logged."""
    logits_WV = run.policy(r.ids_BT[:, :-1], wanted_BT=mask_BS) / temperature
    mean = torch.nn.functional.cross_entropy(logits_WV, r.ids_BT[:, 1:][mask_BS])
    return dict(loss=mean.item(), grad_norm=optimizer_step(run, mean))


def optimizer_step(run: "Run", mean: torch.Tensor) -> float:
    """Take the optimizer's step down the gradient, clipped; return the norm that it had."""
    run.optimizer.zero_grad()
    mean.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), 1.0, error_if_nonfinite=True)
    run.optimizer.step()
    return norm.item()


# --- settings and phases --------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All settings of a run. Comments are the help; limits not given are 0 and 1,000,000,000."""

    # the run
    task: str = "signs"  # signs, or a module of tasks/: addition
    size: int = 5  # how many numbers a problem has
    seed: int = 0  # of the weights and of all that training draws
    control: int = 1  # 1: train multi-turn RL, too, from the same base; --no-control: 0
    eval_n: int = 2000  # held-out problems in the table
    device: str = "cpu"  # or cuda
    # the model
    n_layer: int = 2  # blocks, of four heads each
    d_model: int = 64  # width
    d_ff: int = 128  # hidden width of the MLP
    # the base: supervised training on drafts and revisions
    sft_steps: int = 1800  # steps
    sft_batch: int = 256  # documents a step
    sft_lr: float = 6e-3  # learning rate at the start, linear to 0; 100 steps of warm-up
    slip: float = 0.15  # probability of a draft's slip: a sign that is turned
    slip_hard: float = 0.8  # the same of a minus before a number larger than its left neighbour
    checks: float = 0.87  # share of documents that ask to check, with a right revision
    right_revisions: float = 0.01  # of the other documents, the share with a right revision
    careless: float = 0.0  # and with a careless one; the rest are copies
    # reinforcement learning
    stage1_steps: int = 100  # steps of Stage I; 0: without Stage I
    stage2_steps: int = 30  # steps of Stage II
    batch: int = 512  # rollouts a step
    group: int = 4  # rollouts of each problem: the others are a row's baseline
    lr: float = 1.5e-3  # learning rate that each method starts from, linear to 0 at its end
    warmup: int = 20  # steps of warm-up of the control and of each stage
    temperature: float = 1.0  # of the samples and log-probabilities of reinforcement learning
    alpha: float = 10.0  # weight of the progress bonus in Stage II
    beta1: float = 0.01  # weight of the KL to the base: both attempts, stages and control
    beta2: float = 1.0  # added to beta1 for attempt 1 in Stage I, to hold it

    limits: ClassVar = dict.fromkeys(
        "control slip slip_hard checks right_revisions careless sft_lr lr".split(), (0, 1)) | dict(
        n_layer=(1, 200), d_model=(8, 2**13), temperature=(0.1, 10), sft_steps=(1, 10**9),
        sft_batch=(1, 2**20), group=(2, 2**20), d_ff=(1, 2**15), eval_n=(1, 10**6))  # fmt: skip

    def __post_init__(self):
        for f in fields(self):
            value, (low, high) = getattr(self, f.name), self.limits.get(f.name, (0, 10**9))
            if f.type is not str and not low <= value <= high:
                option = f"--{f.name}".replace("_", "-")
                raise ValueError(f"{option} must be from {low} to {high}, got {value}")
        if self.batch < self.group or self.batch % self.group:
            raise ValueError(f"--batch must be a multiple of --group, {self.group}: {self.batch}")
        if (share := self.right_revisions + self.careless) > 1 + 1e-9:
            raise ValueError(f"--right-revisions plus --careless must be at most 1, got {share}")
        if self.device != "cpu" and (self.device != "cuda" or not torch.cuda.is_available()):
            raise ValueError(f"--device must be cpu, or cuda where there is one: {self.device!r}")


class Phase(NamedTuple):
    """A part of a run, and the name of the file of its weights.

    step: takes one step, and returns what is logged. The learning rate goes linearly from lr to
    final, times a warm-up over the first `warmup` steps. A method ends with the phase whose final
    is 0: what follows begins from the base again.
    """

    name: str
    steps: int
    step: Callable[["Run"], dict]
    lr: float
    final: float
    warmup: int


def method(c: Config, *parts: tuple[str, int, Callable]) -> list[Phase]:
    """Return a method's phases, of (name, steps, step) with steps: the rate falls to 0 over all."""
    total, done, phases = sum(steps for _, steps, _ in parts), 0, []
    for name, steps, step in parts:
        if steps:
            lr, final = (c.lr * (1 - x / total) for x in (done, done + steps))
            phases.append(Phase(name, steps, step, lr, final, c.warmup))
            done += steps
    return phases


def schedule(c: Config) -> list[Phase]:
    """Return a run's phases: the base, the control for as many steps as both stages have, and the
    stages. The last phase's name says what is left out: Stage I, the bonus, both or nothing."""
    both, one, two = (partial(rl_step, stage=x) for x in (multi_turn, stage1, stage2))
    n1, n2 = c.stage1_steps, c.stage2_steps
    base = Phase("base", c.sft_steps, sft_step, c.sft_lr, 0.0, warmup=100)
    control = method(c, ("multi_turn", c.control * (n1 + n2), both))
    name = "_".join(x for x, n in (("no_stage1", n1), ("no_bonus", c.alpha)) if not n) or "score"
    return [base, *control, *method(c, ("stage1", n1, one), (name, n2, two))]


# --- a run: training as a generator ---------------------------------------------------------------

ROOT, BLOCK = Path(__file__).parent, 20  # steps from one checkpoint and line to the next
PARTS = "policy", "base", "optimizer"


@dataclass
class Run:
    """A run in memory: settings, models, optimizer, randomness, and where it is."""

    config: Config
    task: Task
    phases: list[Phase]
    folder: Path
    policy: GPT
    base: GPT  # frozen: the reference of all phases after the first
    optimizer: torch.optim.Optimizer
    rng: np.random.Generator | None = None  # of this step: draws problems and samples
    phase: int = 0
    step: int = 0  # finished steps of this phase


def new_run(c: Config, folder: Path) -> Run:
    """Return a run at its first step; nothing is written."""
    task = find_task(c.task)[0](c)
    sizes = GPTConfig(task.vocab_size, c.n_layer, 4, 4, c.d_model, c.d_ff, task.max_positions,
                      rope_theta=100.0, qkv_bias=True)  # fmt: skip
    policy, base = (GPT(sizes, seed=c.seed).to(c.device) for _ in range(2))
    return Run(c, task, schedule(c), folder, policy, base.requires_grad_(False), adamw(policy))


def adamw(policy: GPT) -> torch.optim.Optimizer:
    """Return a fresh optimizer, as every phase begins with."""
    return torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def train(run: Run) -> Iterator[dict]:
    """Take the steps that are left, phase after phase; yield what is logged of each.

    Whoever iterates may log, save or stop between any two steps: a step's random numbers depend on
    the seed, the phase's name and the step's number alone. What the first phase leaves is the
    reference of all others, Stage II too, and the start of each method.
    """
    for phase in run.phases[run.phase :]:
        while run.step < phase.steps:
            for group in run.optimizer.param_groups:
                rate = phase.lr + (phase.final - phase.lr) * run.step / phase.steps
                group["lr"] = rate * min(1.0, (run.step + 1) / (phase.warmup + 1))
            run.rng = np.random.default_rng((run.config.seed, run.step, *phase.name.encode()))
            row = phase.step(run)
            run.step += 1
            yield dict(phase=phase.name, step=run.step, **row)
        if run.phase == 0:
            run.base.load_state_dict(run.policy.state_dict())
        elif phase.final == 0 and phase is not run.phases[-1]:
            run.policy.load_state_dict(run.base.state_dict())
        run.optimizer, run.phase, run.step = adamw(run.policy), run.phase + 1, 0


# --- a run's folder, and the command line ---------------------------------------------------------


def state_of(run: Run) -> dict:
    """Return all that the next step depends on."""
    return {x: getattr(run, x).state_dict() for x in PARTS} | dict(phase=run.phase, step=run.step)


def create(c: Config, folder: Path) -> Path:
    """Make the folder of a new run, which must not exist, and return it."""
    if folder.exists():
        raise ValueError(f"{folder} exists and is left alone: --resume it, or name another --run")
    module = sys.modules[type(c).__module__]
    module.new_run(c, folder).task.draw(c.eval_n, "test", np.random.default_rng(0))  # may raise
    folder.mkdir(parents=True)
    name = getattr(module.__spec__, "name", Path(module.__file__).stem)  # of a script its file's
    about = dict(module=name, threads=torch.get_num_threads(), config=asdict(c))
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    return folder


def open_run(folder: Path) -> Run:
    """Return the run in a folder as its last checkpoint left it, with as many threads, as rounding
    may depend on them. config.json names the module of its settings: this, or another's."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run: no {path if folder.exists() else 'such folder'}")
    try:
        about = json.loads(path.read_text())
        module = importlib.import_module(about["module"])
        c = module.Config(**about["config"])
        torch.set_num_threads(about["threads"])
        run = module.new_run(c, folder)
        if (ROOT / "scale/small.py").exists():  # the same network, faster
            importlib.import_module("scale.small").share(run)
        if (folder / "checkpoint.pt").exists():
            state = load(folder / "checkpoint.pt")
            run.phase, run.step = state["phase"], state["step"]
            for name in PARTS:
                getattr(run, name).load_state_dict(state[name])
    except (AttributeError, ImportError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} is not a readable run: {error}") from None
    return run


def parse(argv: list[str], settings: type):
    """Return a run's folder, and its settings if it is new; --help is made of their source."""
    source = "".join(inspect.getsource(x) for x in reversed(settings.__mro__[:-1]))
    rows = re.findall(r"^    (?:(\w+): \w+ = (\S+)  )?# (.+)$", source, re.M)
    about = [f"  --{name} {default}".replace("_", "-").ljust(28) + text if name else f"\n{text}:"
             for name, default, text in rows]  # fmt: skip
    parser = argparse.ArgumentParser(
        usage="python score.py [--run NEW | --resume RUN] [--OPTION VALUE ..]",
        epilog="\n".join(about), formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS)  # fmt: skip
    parser.add_argument("--run", type=Path, help="folder to create, by default named in runs/")
    parser.add_argument("--resume", type=Path, help="go on with this run, and no other option")
    parser.add_argument("--threads", type=int, help="how many, kept for the run; default: all")
    parser.add_argument("--no-control", action="store_const", const=0, dest="control")
    for f in fields(settings):
        parser.add_argument(f"--{f.name}".replace("_", "-"), type=f.type, help=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    if "resume" in given and len(given) > 1:
        raise ValueError("--resume takes all settings from the run: give no other option")
    if "resume" in given:
        return given["resume"], None
    torch.set_num_threads(given.pop("threads", torch.get_num_threads()))
    folder, defaults = given.pop("run", None), find_task(given.get("task", settings.task))[1]
    c = settings(**defaults | given)
    idle = {"beta2": c.stage1_steps == 0, "alpha": c.stage2_steps == 0}
    if settings is Config and (name := next((x for x in given if idle.get(x)), "")):
        raise ValueError(f"--{name} {given[name]} changes nothing: its stage has no steps")
    name = "-".join(f"{key}{given[key]}" for key in given if key != "seed").replace("/", "_")
    return folder or Path("runs") / f"score{name and '-' + name}-seed{c.seed}", c


def drive(run: Run) -> None:
    """Train to the end; log, save and show where the run is."""
    names, c = ("loss", "acc_t1", "acc_t2", "changed", "kl1", "kl2"), run.config
    first, *rest = (x.steps for x in run.phases)
    work = [c.sft_batch] * first + [2 * c.batch] * sum(rest)  # a step's cost in rows, about
    done, start = sum(x.steps for x in run.phases[: run.phase]) + run.step, time.monotonic()
    with hold(run.folder / "lock"), open(run.folder / "log.jsonl", "a+") as log:
        print("  samples:  step", *(f"{x:>8}" for x in names), "  done     left")
        log.seek(0)
        log.truncate(sum(map(len, log.readlines()[:done])))  # the rest comes again
        for n, row in enumerate(train(run), start=done + 1):
            print(json.dumps(row), file=log, flush=True)
            if ended := (run.step == run.phases[run.phase].steps):
                save(dict(model=run.policy.state_dict()), run.folder / f"{row['phase']}.pt")
            if ended or run.step % BLOCK == 0:
                save(state_of(run), run.folder / "checkpoint.pt")
                shown = "".join(f"{row[x]:z9.3f}" if x in row else " " * 9 for x in names)
                left = int((time.monotonic() - start) * sum(work[n:]) / sum(work[done:n]))
                print(f"{row['phase']:>10} {row['step']:>5}{shown}{sum(work[:n]) / sum(work):7.0%}"
                      f"{left // 60:4}m {left % 60:02}s", flush=True)  # fmt: skip
        save(state_of(run), run.folder / "checkpoint.pt")


def main(argv: list[str], settings: type = Config) -> int:
    """Train, then evaluate; return the exit status. settings: a class, with `new_run` beside it."""
    run = None
    try:
        folder, c = parse(argv, settings)
        run = open_run(folder if c is None else create(c, folder))
        print(f"{folder}:", ", ".join(f"{x.name} {x.steps} steps" for x in run.phases), flush=True)
        getattr(sys.modules[type(run.config).__module__], "drive", drive)(run)  # or scale's
        return importlib.import_module("eval").main([str(folder)])
    except KeyboardInterrupt:
        print("\nstopped" + (f"; go on with: python score.py --resume {folder}" if run else ""))
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print("score.py: error:", str(error).partition("\n")[0], file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
