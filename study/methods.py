"""What else has been tried? The paper's baselines and ablations, each a small change of score.py.

A method is a list of phases. A phase of reinforcement has a stage, which says who is paid and who
is held; a phase of imitation chooses second attempts and raises their likelihood. All take as many
steps, samples and updates as SCoRe has in both stages.

    python -m study.methods --method star     # as score.py, with the settings below
    python -m study.methods --offline 1       # SCoRe, but the base writes Stage II's first attempts

Source: arXiv 2409.12917v2, sections 4 to 6, and table 4. Dimension key: as in score.py.
"""

import copy
import json
import sys
from dataclasses import dataclass, fields
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

import score
from model import GPT, load
from rollout import Rollout, Task, find_task, grade, make_rows, rollout, summary, token_terms
from score import Phase, Run, advantage, loss, multi_turn, sft_update, stage1, stage2

METHODS = {  # what each uses of SOME, the settings that not all methods use
    "base": "", "score": "alpha beta1 beta2 leak offline", "no_bonus": "beta1 beta2 offline",
    "no_stage1": "alpha beta1 leak offline", "multi_turn": "beta1 offline", "single_turn": "beta1",
    "star": "iterations", "star_plus": "iterations", "pair_sft": "", "pair_sft_plus": "",
    "star_stage2": "beta1 beta2 iterations",
}  # fmt: skip
SOME = "alpha", "beta1", "beta2", "control", "iterations", "leak", "offline"


@dataclass(frozen=True)
class Config(score.Config):
    """score.py's settings, and those of the variants."""

    # the variant
    method: str = "score"  # what follows the base: study/README.md has the names
    base: str = ""  # folder of a run whose base is taken, instead of training one
    leak: int = 0  # 1: attempt 1 earns the progress bonus in Stage II, too
    offline: float = 0.0  # share of Stage II's problems whose attempt 1 the base writes
    iterations: int = 3  # how often STaR samples anew from what it has become

    limits: ClassVar = score.Config.limits | dict(leak=(0, 1), offline=(0, 1), iterations=(1, 1000))

    def __post_init__(self):
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {self.method!r}")


class Asked(Config):
    """What a command may ask for: what its method does not use must be the default."""

    def __post_init__(self):
        super().__post_init__()
        used, defaults = METHODS[self.method], find_task(self.task)[1]
        for name in (x for x in SOME if x not in used or (x == "beta2" and not self.stage1_steps)):
            if (value := getattr(self, name)) != defaults.get(name, getattr(Config, name)):
                steps = f"{self.stage1_steps} + {self.stage2_steps} steps"
                raise ValueError(f"{self.method} of {steps} does not use --{name}, got {value}")


def single_turn(reward_KB, c):
    """Return the advantages and KL weights of eq. 1: attempt 1 alone is paid, 2 only sampled."""
    reward1_B, reward2_B = reward_KB
    return (advantage(reward1_B, c.group), torch.zeros_like(reward2_B)), (c.beta1, 0.0)


def mistaken(reward_KB, c):
    """Return those of Stage II, but attempt 1 earns the bonus, too: r1 then weighs 1 - alpha in its
    return, and where that is below 0, it pays to answer wrongly first."""
    (_, advantage2_B), weight_K = stage2(reward_KB, c)
    return1_B = reward_KB[0] + c.alpha * (reward_KB[1] - reward_KB[0])
    return (advantage(return1_B, c.group), advantage2_B), weight_K


def collect(run: Run, author: GPT, offline: float = 0.0):
    """Return what `score.collect` does, but of a share of the problems, the first, the base writes
    attempt 1: see `offline_rollout`."""
    c, task = run.config, run.task
    drawn = task.draw(c.batch // c.group, "train", run.rng)
    noise_2BN = torch.tensor(run.rng.random((2, c.batch, task.max_new)), device=c.device)
    prompts, n = [task.encode(problem.prompt) for problem in drawn], round(offline * len(drawn))
    r = offline_rollout(author, run.base, task, prompts, noise_2BN, c.temperature, n)
    problems = [problem for problem in drawn for _ in range(c.group)]
    return r, problems, grade(r, problems, task)


def offline_rollout(policy: GPT, base: GPT, task: Task, prompts, noise_2BN, temperature, n: int):
    """Return two attempts in each row, as `rollout` does, but of the first n problems `base` writes
    attempt 1: it is context there, of turn 0, so that no gradient and no KL touches it."""
    G, parts = noise_2BN.shape[1] // len(prompts), []
    if n:
        firsts = rollout(base, task, prompts[:n], noise_2BN[:1, : n * G], temperature).attempts[0]
        rows = [prompt for prompt in prompts[:n] for _ in range(G)]
        contexts = [x + y1 + task.instruction for x, y1 in zip(rows, firsts, strict=True)]
        r = rollout(policy, task, contexts, noise_2BN[1:, : n * G], temperature)
        parts.append(Rollout(r.ids_BT, 2 * r.turn_BS, r.logp_BS, [firsts, *r.attempts]))
    if n < len(prompts):
        parts.append(rollout(policy, task, prompts[n:], noise_2BN[:, n * G :], temperature))
    return join(parts, noise_2BN.device)


def join(parts: list[Rollout], device) -> Rollout:
    """Return the rows of all parts, in order."""
    columns = zip(*((r.ids_BT, r.turn_BS, r.logp_BS) for r in parts), strict=True)
    padded = (pad_sequence([row for x in column for row in x], True) for column in columns)
    attempts = [sum(columns, []) for columns in zip(*(r.attempts for r in parts), strict=True)]
    return Rollout(*(x.to(device) for x in padded), attempts)


KINDS = [f"{what}_{first}" for what in ("changed", "copied") for first in ("wrong", "right")]
KEYS = ("groups", *KINDS, *(f"{kind}_n" for kind in KINDS), "norm1", "norm2")
EACH = 10  # steps from one look at the gradients to the next


def paid_for(r: Rollout, reward_KB, advantage_B, G: int) -> dict:
    """Return the share of groups with a repair, a row that went from wrong to right; and of rows
    that changed or copied a wrong or right attempt 1 their share, and what they add to the mean of
    attempt 2's advantage."""
    changed_B = reward_KB.new_tensor([a != b for a, b in zip(*r.attempts, strict=True)])
    repaired_B = (reward_KB[0] == 0) & (reward_KB[1] == 1)
    found = dict(groups=repaired_B.view(-1, G).any(dim=1).float().mean().item())
    for kind in KINDS:
        what, first = kind.split("_")
        rows_B = (changed_B == (what == "changed")) & (reward_KB[0] == (first == "right"))
        found |= {f"{kind}_n": rows_B.float().mean().item()}
        found[kind] = (advantage_B * rows_B).mean().item()
    return found


def norms(run: Run, r: Rollout, terms, paid_and_held) -> dict:
    """Return the norm of the gradient of each attempt's terms, pay and KL, without the other's."""
    found = {}
    for k in (1, 2):
        loss_B = loss(*terms, r.turn_BS * (r.turn_BS == k), *paid_and_held)
        gradient = torch.autograd.grad(loss_B.mean(), [*run.policy.parameters()], retain_graph=True)
        found[f"norm{k}"] = torch.stack([x.norm() for x in gradient]).norm().item()
    return found


def seen(run: Run, r: Rollout, reward_KB, terms, paid_and_held) -> dict:
    """Return what is seen of a step on sampled rows, every tenth time of the gradients, too."""
    found = {} if (run.step + 1) % EACH else norms(run, r, terms, paid_and_held)
    return found | paid_for(r, reward_KB, paid_and_held[0][1], run.config.group)


def rl_update(run: Run, r: Rollout, reward_KB, paid_and_held) -> dict:
    """Take score.py's step on sampled rows; what is logged tells its reasons, too."""
    terms = token_terms(run.policy, run.base, r, run.config.temperature)
    reasons = seen(run, r, reward_KB, terms, paid_and_held)
    return score.rl_update(run, r, reward_KB, *terms, paid_and_held) | reasons


def rl_step(run: Run, stage, offline=0.0, collect=collect, update=rl_update) -> dict:
    """Take score.py's step. offline: the share of the problems whose attempt 1 the base writes."""
    r, _, reward_KB = collect(run, run.policy, offline)
    log = update(run, r, reward_KB, stage(reward_KB, run.config))
    return {key: x for key, x in log.items() if x == x}  # nan: the mean of nothing


the_base = attrgetter("base")  # of a run: who writes the samples


def before(run: Run) -> GPT:
    """Return the frozen policy as the phase before has left it; its file is read once a phase."""
    name = run.phases[run.phase - 1].name
    if getattr(run, "left", (None,))[0] != name:
        model = copy.deepcopy(run.base)
        model.load_state_dict(load(run.folder / f"{name}.pt")["model"])
        run.left = name, model
    return run.left[1]


def imitation_step(run, author, choose, collect=collect, update=sft_update) -> dict:
    """Imitate second attempts that are chosen from an author's samples; return what is logged.

    author: of a run, the model that samples. choose: `(run, r, problems, reward_KB) -> (rows,
    mask_BS)`: of sampled rows, the rows to learn from and the tokens to learn.
    """
    r, problems, reward_KB = collect(run, author(run))
    rows, mask_BS = choose(run, r, problems, reward_KB)
    log = summary(r, reward_KB, run.task) | dict(examples=mask_BS.any(dim=1).float().mean().item())
    if not mask_BS.any():
        return log | dict(loss=0.0, grad_norm=0.0)
    return log | update(run, rows, mask_BS, run.config.temperature)


def star_examples(run: Run, r: Rollout, problems, reward_KB, plus: bool):
    """Choose the rows that went from wrong to right, D_STaR; with `plus`, D+_STaR, from right to
    right, too. Source: arXiv 2409.12917v2, section 4."""
    chosen_B = (reward_KB[1] == 1) & ((reward_KB[0] == 0) | plus)
    return r, (r.turn_BS == 2) & chosen_B[:, None]


def pair_examples(run: Run, r: Rollout, problems, reward_KB, plus: bool):
    """Choose the rows whose first attempt is wrong, D_SFT, with `plus`, D+_SFT, all, each with a
    right answer drawn from all attempts at its problem, if there is one. Source: v1, section 4."""
    G, seconds, chosen = run.config.group, [], []
    for b in range(len(problems)):
        group = range(b - b % G, b - b % G + G)
        right = [r.attempts[k][i] for k in (0, 1) for i in group if reward_KB[k, i] == 1]
        chosen.append(bool(right) and (plus or bool(reward_KB[0, b] == 0)))
        seconds.append(right[run.rng.integers(len(right))] if chosen[b] else r.attempts[1][b])
    prompts, device = [run.task.encode(problem.prompt) for problem in problems], r.ids_BT.device
    rows = make_rows(prompts, [r.attempts[0], seconds], run.task.instruction, device)
    return rows, (rows.turn_BS == 2) & torch.tensor(chosen, device=device)[:, None]


def base_step(run: Run, update=sft_update) -> dict:
    """Load another run's base, or take score.py's step on documents; return what is logged."""
    c = run.config
    if c.base:
        run.policy.load_state_dict(load(Path(c.base) / "base.pt")["model"])
        return {}
    r = make_rows(*run.task.documents(c.sft_batch, run.rng), run.task.instruction, c.device)
    return update(run, r, r.turn_BS > 0, 1.0)


def schedule(c: Config) -> list[Phase]:
    """Return the phases of a run, the base first; the last is named after the method."""
    one, two, both, last = c.stage1_steps, c.stage2_steps, c.stage1_steps + c.stage2_steps, c.method
    rl, plus = partial(rl_step, offline=c.offline), last.endswith("_plus") or last == "star_stage2"
    paid, unpaid = (partial(rl, stage=x) for x in (mistaken if c.leak else stage2, multi_turn))
    star = partial(imitation_step, author=before, choose=partial(star_examples, plus=plus))
    pair = partial(imitation_step, author=the_base, choose=partial(pair_examples, plus=plus))
    first = "stage1", one, partial(rl_step, stage=stage1)
    parts = {
        "base": [],
        "score": [first, (last, two, paid)],
        "no_bonus": [first, (last, two, unpaid)],
        "no_stage1": [(last, both, paid)],
        "multi_turn": [(last, both, unpaid)],
        "single_turn": [(last, both, partial(rl_step, stage=single_turn))],
        "star": split((last, both, star), c.iterations),
        "pair_sft": [(last, both, pair)],
        "star_stage2": [first, *split((last, two, star), c.iterations)],
    }[last.removesuffix("_plus")]
    steps = 1 if c.base else c.sft_steps
    return [Phase("base", steps, base_step, c.sft_lr, 0.0, warmup=100), *score.method(c, *parts)]


def split(part: tuple, n: int) -> list[tuple]:
    """Return a part of a method in n, which share out its steps; the last has its name."""
    name, steps, step = part
    ends = [steps * i // n for i in range(n + 1)]
    names = [f"{name}-{i}" for i in range(1, n)] + [name]
    return [(x, ends[i + 1] - ends[i], step) for i, x in enumerate(names)]


def new_run(c: Config, folder: Path) -> Run:
    """Return a run at its first step; nothing is written. ValueError if --base names a run that was
    given another base than this one would train."""
    if c.base and not folder.exists():  # later it needs the other run no more
        theirs = json.loads((Path(c.base) / "config.json").read_text()).get("config", {})
        names = [f.name for f in fields(score.Config)]
        names = {*names[: names.index("stage1_steps")]} - {"control", "eval_n"}
        if other := sorted(x for x in names if theirs.get(x) != getattr(c, x)):
            raise ValueError(f"--base {c.base} has other settings: {', '.join(other)}")
        load(Path(c.base) / "base.pt")
    run = score.new_run(c, folder)
    run.phases = schedule(c)
    return run


if __name__ == "__main__":
    sys.exit(score.main(sys.argv[1:], Asked))
