"""What else has been tried? The paper's baselines and ablations, each a small change of score.py.

A method is a list of phases. A phase of reinforcement has a stage, which says who is paid and who
is held; a phase of imitation chooses second attempts and raises their likelihood. All take as many
steps, samples and updates as SCoRe has in both stages.

    python -m study.train --method star     # as score.py, with the settings below
    python -m study.train --offline 1       # SCoRe, but the base writes Stage II's first attempts

Source: arXiv 2409.12917v2, sections 4 to 6, and table 4. Dimension key: as in score.py.
"""

import copy
import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import score
from model import GPT, load
from rollout import Rollout, Task, grade, log_probs, make_rows, rollout, summary, token_terms
from score import Phase, Run, advantage, sft_update, shaped_reward, stage1, stage2

# --- settings -------------------------------------------------------------------------------------

METHODS = (
    "base", "score", "no_bonus", "no_stage1", "multi_turn", "single_turn", "star", "star_plus",
    "pair_sft", "pair_sft_plus", "star_stage2", "three_turn",
)  # fmt: skip


@dataclass(frozen=True)
class Config(score.Config):
    """score.py's settings, and those of the variants."""

    # the variant
    method: str = "score"  # what follows the base: study/README.md has the names
    base: str = ""  # folder of a run whose base is taken, instead of training one
    base_attempts: int = 2  # attempts that the base's documents have, at most
    kl: str = "exact"  # or k1: the KL is estimated from the tokens that came
    gamma: float = 0.0  # share of attempt 2's return that attempt 1 earns in Stage II
    leak: int = 0  # 1: attempt 1 earns the progress bonus in Stage II, too
    offline: float = 0.0  # share of Stage II's problems whose attempt 1 the base writes
    rounds: int = 1  # how often the two stages alternate, sharing their steps
    adaptive_beta2: int = 0  # 1: balance beta2's KL with attempt 2's reward
    iterations: int = 3  # how often STaR samples anew from what it has become
    pool: int = 0  # problems to train on, the same at all steps; 0: always fresh

    limits: ClassVar = score.Config.limits | dict(
        base_attempts=(2, 10), gamma=(0, 1), leak=(0, 1), offline=(0, 1), rounds=(1, 1000),
        adaptive_beta2=(0, 1), iterations=(1, 1000),
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        for name, accepted in (("method", METHODS), ("kl", ("exact", "k1"))):
            if (value := getattr(self, name)) not in accepted:
                raise ValueError(f"--{name} must be one of {', '.join(accepted)}, got {value!r}")
        if 0 < self.pool < self.batch // self.group:
            raise ValueError(f"--pool must be 0 or at least --batch / --group, got {self.pool}")


# --- stages: who is paid, who is held -------------------------------------------------------------


def single_turn(reward_KB, c):
    """Return the advantages and KL weights of eq. 1: attempt 1 alone is paid, 2 only sampled."""
    reward1_B, reward2_B = reward_KB
    return (advantage(reward1_B, c.group), torch.zeros_like(reward2_B)), (c.beta1, 0.0)


def mistaken(reward_KB, c):
    """Return those of Stage II, but attempt 1 earns gamma times attempt 2's return, or the bonus:
    where r1 then weighs less than 0 in it, it pays to answer wrongly first."""
    reward1_B, reward2_B = reward_KB
    return2_B = shaped_reward(reward1_B, reward2_B, c.alpha)
    return1_B = reward1_B + c.gamma * return2_B + c.leak * c.alpha * (reward2_B - reward1_B)
    return (advantage(return1_B, c.group), advantage(return2_B, c.group)), (c.beta1, c.beta1)


def third_paid(reward_KB, c):
    """Return those of Stage I (b) of three attempts: eq. 3 once more, attempts 1 and 2 held."""
    nothing_B, held = torch.zeros_like(reward_KB[0]), c.beta1 + c.beta2
    return (nothing_B, nothing_B, advantage(reward_KB[2], c.group)), (held, held, c.beta1)


def three_paid(reward_KB, c):
    """Return those of Stage II of three attempts: each paid for progress over the one before."""
    later = [shaped_reward(*reward_KB[k : k + 2], c.alpha) for k in (0, 1)]
    return [advantage(return_B, c.group) for return_B in (reward_KB[0], *later)], 3 * (c.beta1,)


# --- models that are not trained ------------------------------------------------------------------


the_base = attrgetter("base")  # of a run


def before(run: Run) -> GPT:
    """Return the frozen policy as the phase before has left it; its file is read once a phase."""
    name = run.phases[run.phase - 1].name
    if getattr(run, "left", (None,))[0] != name:
        run.left = name, left_by(run, name)
    return run.left[1]


def left_by(run: Run, name: str) -> GPT:
    """Return the frozen policy that a phase has left."""
    model = copy.deepcopy(run.base)
    model.load_state_dict(load(run.folder / f"{name}.pt")["model"])
    return model


# --- sampled rows ---------------------------------------------------------------------------------


def collect(run: Run, author: GPT, K: int = 2, offline: float = 0.0):
    """Return what `score.collect` does, but of a share of the problems, the first, the base writes
    attempt 1: see `offline_rollout`."""
    c, task = run.config, run.task
    drawn = task.draw(c.batch // c.group, "train", run.rng)
    noise_KBN = torch.tensor(run.rng.random((K, c.batch, task.max_new)), device=c.device)
    prompts, n = [task.encode(problem.prompt) for problem in drawn], round(offline * len(drawn))
    r = offline_rollout(author, run.base, task, prompts, noise_KBN, c.temperature, n)
    problems = [problem for problem in drawn for _ in range(c.group)]
    return r, problems, grade(r, problems, task)


def offline_rollout(policy: GPT, base: GPT, task: Task, prompts, noise_KBN, temperature, n: int):
    """Return attempts in each row, as `rollout` does, but of the first n problems `base` writes
    attempt 1 of 2: it is context there, of turn 0, so that no gradient and no KL touches it."""
    G, parts = noise_KBN.shape[1] // len(prompts), []
    if n:
        firsts = rollout(base, task, prompts[:n], noise_KBN[:1, : n * G], temperature).attempts[0]
        rows = [prompt for prompt in prompts[:n] for _ in range(G)]
        contexts = [x + y1 + task.instruction for x, y1 in zip(rows, firsts, strict=True)]
        r = rollout(policy, task, contexts, noise_KBN[1:, : n * G], temperature)
        parts.append(Rollout(r.ids_BT, 2 * r.turn_BS, r.logp_BS, [firsts, *r.attempts]))
    if n < len(prompts):
        parts.append(rollout(policy, task, prompts[n:], noise_KBN[:, n * G :], temperature))
    return join(parts, noise_KBN.device)


def join(parts: list[Rollout], device) -> Rollout:
    """Return the rows of all parts, in order."""
    columns = zip(*((r.ids_BT, r.turn_BS, r.logp_BS) for r in parts), strict=True)
    padded = (pad_sequence([row for x in column for row in x], True) for column in columns)
    attempts = [sum(columns, []) for columns in zip(*(r.attempts for r in parts), strict=True)]
    return Rollout(*(x.to(device) for x in padded), attempts)


# --- steps of reinforcement: of pieces, which scale/steps.py has others for -----------------------


def token_log_probs(model: GPT, r: Rollout, temperature: float) -> torch.Tensor:
    """Return the log-probability [B, S] of the tokens that came."""
    logp_BSV = log_probs(model(r.ids_BT[:, :-1]), temperature)
    return logp_BSV.gather(-1, r.ids_BT[:, 1:, None])[..., 0]


def k1_terms(policy: GPT, base: GPT, r: Rollout, temperature: float):
    """Return what `rollout.token_terms` does, but each KL is estimated by the token that came.

    Its value is log(policy / base). Its gradient is that value times the gradient of log p: the
    value's own gradient would be 0 on average. Source: k1 of Schulman, joschu.net/blog/kl-approx.
    """
    logp_BS = token_log_probs(policy, r, temperature)
    with torch.no_grad():
        k1_BS = logp_BS - token_log_probs(base, r, temperature)
    return logp_BS, k1_BS * (1 + logp_BS - logp_BS.detach())


def rl_update(run: Run, r: Rollout, reward_KB, paid_and_held, base: GPT) -> dict:
    """Take score.py's step on sampled rows, with the KL to `base` that the settings name."""
    terms = k1_terms if run.config.kl == "k1" else token_terms
    logp_BS, kl_BS = terms(run.policy, base, r, run.config.temperature)
    return score.rl_update(run, r, reward_KB, logp_BS, kl_BS, paid_and_held)


def rl_step(
    run, stage, K=2, paid=None, held_to=the_base, offline=0.0, collect=collect, update=rl_update
) -> dict:
    """Take score.py's step with K attempts, of which the first `paid` (None: all) make the reward
    that weights are selected by, where the policy wrote them. held_to: of a run, the model that the
    KL is to. offline: the share of the problems whose attempt 1 the base writes."""
    r, _, reward_KB = collect(run, run.policy, K, offline)
    log = update(run, r, reward_KB, stage(reward_KB, run.config), held_to(run))
    own_KB = torch.stack([(r.turn_BS == k).any(dim=1) for k in range(1, K + 1)])
    mean_K = reward_KB.where(own_KB, torch.nan)[:paid].nanmean(dim=1).nan_to_num(0.0)
    log |= dict(reward=sum(mean_K.tolist()))
    return {key: x for key, x in log.items() if x == x}  # without own attempts no entropy


def balanced_step(run: Run, stage, **pieces) -> dict:
    """Take a step of Stage I with a beta2 that goes a tenth of the way to r2 / KL1 each time, in
    bounds of a tenth and ten times its start. It is kept with the optimizer's settings.

    The paper mentions a beta2 that balances attempt 1's KL with attempt 2's objective; how is ours.
    The balance need not be stable: where KL1 falls faster than 1 / beta2, beta2 runs to its bound.
    """
    settings, start = run.optimizer.param_groups[0], run.config.beta2
    beta2 = settings.get("beta2", start)
    log = rl_step(run, lambda reward_KB, c: stage(reward_KB, replace(c, beta2=beta2)), **pieces)
    target = min(max(log["acc_t2"] / max(log["kl1"], 1e-9), start / 10), start * 10)
    settings["beta2"] = beta2**0.9 * target**0.1
    return log | dict(beta2=beta2)


# --- steps of imitation ---------------------------------------------------------------------------


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
    """Load another run's base, or take score.py's step on fresh documents, in which a later attempt
    may be the revision: behind copies of the draft, which are context and not learned."""
    c, p1 = run.config, run.task.instruction
    if c.base:
        run.policy.load_state_dict(load(Path(c.base) / "base.pt")["model"])
        return {}
    clean = run.step < c.clean * c.sft_steps
    prompts, (drafts, *revisions) = run.task.documents(c.sft_batch, run.rng, clean)
    copies = [(draft + p1) * (b % (c.base_attempts - 1)) for b, draft in enumerate(drafts)]
    seconds = [[x + ids for x, ids in zip(copies, column, strict=True)] for column in revisions]
    r = make_rows(prompts, [drafts, *seconds], p1, c.device)
    copied_B1 = torch.tensor([[len(ids)] for ids in copies], device=c.device)
    second_BS = r.turn_BS == 2
    revised_BS = second_BS & (second_BS.cumsum(dim=1) > copied_B1)
    return update(run, r, (r.turn_BS == 1) | revised_BS, 1.0)


# --- the base, and methods: lists of phases -------------------------------------------------------


def schedule(c: Config) -> list[Phase]:
    """Return the phases of a run, the base first; the last is named after the method."""

    def phase(name, steps, step, **more):
        return Phase(name, steps, partial(step, **more), c.lr, c.warmup)

    def plain(reward_KB, c):
        return paid(reward_KB, replace(c, alpha=0.0))

    one, two, both, last = c.stage1_steps, c.stage2_steps, c.stage1_steps + c.stage2_steps, c.method
    step2 = partial(rl_step, offline=c.offline)
    paid = mistaken if c.gamma or c.leak else stage2
    first = phase("stage1", one, balanced_step if c.adaptive_beta2 else rl_step, stage=stage1)
    plus = last.endswith("_plus") or last == "star_stage2"
    star = dict(author=before, choose=partial(star_examples, plus=plus))
    pair = dict(author=the_base, choose=partial(pair_examples, plus=plus))
    phases = {
        "base": [],
        "score": in_rounds(first, phase(last, two, step2, stage=paid), c.rounds),
        "no_bonus": in_rounds(first, phase(last, two, step2, stage=plain), c.rounds),
        "no_stage1": [phase(last, both, step2, stage=paid)],
        "multi_turn": [phase(last, both, step2, stage=plain)],
        "single_turn": [phase(last, both, rl_step, stage=single_turn, paid=1)],
        "star": split(phase(last, both, imitation_step, **star), c.iterations),
        "pair_sft": [phase(last, both, imitation_step, **pair)],
        "star_stage2": [first, *split(phase(last, two, imitation_step, **star), c.iterations)],
        "three_turn": [  # of the paper's ICLR version, appendix: Stage I in two halves
            first._replace(steps=one // 2),
            phase("stage1b", one - one // 2, rl_step, stage=third_paid, K=3, held_to=before),
            phase(last, two, rl_step, stage=three_paid, K=3),
        ],
    }[last.removesuffix("_plus")]
    steps = 1 if c.base else c.sft_steps
    base = Phase("base", steps, base_step, c.sft_lr, 100, decays=True)
    return [base, *(x for x in phases if x.steps)]


def in_rounds(first: Phase, last: Phase, n: int) -> list[Phase]:
    """Return both stages in turns, n parts of each."""
    return [x for pair in zip(split(first, n), split(last, n), strict=True) for x in pair]


def split(phase: Phase, n: int) -> list[Phase]:
    """Return a phase in n parts, which share out its steps; the last has its name, the first its
    warm-up."""
    ends = [phase.steps * i // n for i in range(n + 1)]
    parts = [phase._replace(name=f"{phase.name}-{i + 1}", steps=ends[i + 1] - ends[i],
                            warmup=0 if i else phase.warmup) for i in range(n)]  # fmt: skip
    return [*parts[:-1], parts[-1]._replace(name=phase.name)]


def new_run(c: Config, folder: Path) -> Run:
    """Return a run at its first step; nothing is written. ValueError if --base names a run that was
    given another base than this one would train."""
    if c.base and not folder.exists():  # later it needs the other run no more
        theirs = json.loads((Path(c.base) / "config.json").read_text()).get("config", {})
        theirs, ours = dict(base_attempts=2) | theirs, asdict(c)
        names = [*list(ours)[: list(ours).index("stage1_steps")], "base_attempts"]
        if other := [name for name in names if theirs.get(name) != ours[name]]:
            raise ValueError(f"--base {c.base} has other settings: {', '.join(other)}")
        load(Path(c.base) / "base.pt")
    run = score.new_run(c, folder)
    run.phases = schedule(c)
    if c.pool:
        draw, pool = run.task.draw, run.task.draw(c.pool, "train", np.random.default_rng(c.seed))

        def draw_from_pool(n, split, rng):
            if split != "train":
                return draw(n, split, rng)
            return [pool[i] for i in rng.choice(c.pool, n, replace=False)]

        run.task = run.task._replace(draw=draw_from_pool)
    return run
