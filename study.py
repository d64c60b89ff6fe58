"""What do all methods show, side by side? The paper's study on the toy: train, measure, collect.

Every run of a seed starts from the same base and has the same budget: as many steps, samples and
updates as SCoRe has in both stages. Runs are trained and measured one process each, on one thread,
so that figures do not depend on the number of cores; a finished run is kept, a killed one resumed.

    python eval.py --study              # all methods and variants, five seeds: --help says how long
    python eval.py --study --quick      # two seeds, four methods
    python eval.py --study --tune       # what other learning rates would have given each method

`figures.py` makes tables, tests and figures of what is collected here.
Dimension key: N problems.
"""

import argparse
import collections
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import verify
from chat import END, REVISE, Format, format_of
from eval import edit_ratio, metrics, report
from model import GPT
from rollout import Rollout, grade, texts
from run import (
    TOYS,
    Config,
    create,
    draw,
    parse,
    read_about,
    read_phase,
    restore,
    schedule,
    write_json,
)
from score import sample, train

# --- what is compared -----------------------------------------------------------------------------


class Variant(NamedTuple):
    """A row of the study: its title, the table that it belongs to, its settings."""

    title: str
    part: str
    options: dict


VARIANTS = {
    "score": Variant("SCoRe", "main", {}),
    "multi_turn": Variant("multi-turn RL", "main", dict(method="multi_turn")),
    "single_turn": Variant("single-turn RL", "main", dict(method="single_turn")),
    "star": Variant("STaR", "main", dict(method="star")),
    "star_plus": Variant("STaR, with right → right", "main", dict(method="star_plus")),
    "pair_sft": Variant("Pair-SFT", "main", dict(method="pair_sft")),
    "pair_sft_plus": Variant("Pair-SFT, with right → right", "main", dict(method="pair_sft_plus")),
    "no_stage1": Variant("w/o Stage I", "ablation", dict(method="no_stage1")),
    "no_bonus": Variant("w/o reward shaping (α = 0)", "ablation", dict(method="no_bonus")),
    "star_stage2": Variant("w/ STaR in Stage II", "ablation", dict(method="star_stage2")),
    "offline": Variant("w/o on-policy first attempts", "ablation", dict(offline=1.0)),
    "alpha1": Variant("α = 1", "more", dict(alpha=1.0)),
    "alpha3": Variant("α = 3", "more", dict(alpha=3.0)),
    "alpha30": Variant("α = 30", "more", dict(alpha=30.0)),
    "leak": Variant("bonus on both turns", "more", dict(leak=True)),
    "gamma": Variant("γ = 0.8", "more", dict(gamma=0.8)),
    "gamma_multi_turn": Variant(
        "multi-turn RL, α = 1, γ = 0.8", "more", dict(method="no_stage1", alpha=1.0, gamma=0.8)
    ),
    "kl_k1": Variant("KL from samples (k1)", "more", dict(kl="k1")),
    "three_turn": Variant("three attempts", "more", dict(method="three_turn")),
}
QUICK = ("score", "multi_turn", "star_plus", "pair_sft")
RATES = (3.5e-4, 7e-4, 1.4e-3)  # the study uses the middle one for all methods
TUNED = ("score", "multi_turn", "single_turn", "star", "star_plus", "pair_sft", "pair_sft_plus")
WATCHED, WATCH = ("score", "pair_sft"), 10  # measured on the way, every so many steps


class Job(NamedTuple):
    """One run of the study. base: the folder of the run that it takes its base from, if any."""

    name: str
    config: Config
    folder: Path
    base: Path | None


def jobs(names, seeds, runs: Path, rates=(None,), **options) -> list[Job]:
    """Return the runs of a study, bases first."""
    found, seeds = [], dict.fromkeys(seeds)  # each once: a copy is no further evidence
    for seed in seeds:
        config = Config(method="base", seed=seed, **options)
        found.append(Job("base", config, runs / f"base-seed{seed}", None))
    for seed in seeds:
        for name in dict.fromkeys(("score", *names)):
            for rate in rates:
                given = options | VARIANTS[name].options | ({} if rate is None else {"lr": rate})
                end = "" if rate is None else f"-lr{rate:g}"
                folder = runs / f"{name}{end}-seed{seed}"
                base = runs / f"base-seed{seed}"
                found.append(Job(name, Config(seed=seed, **given), folder, base))
    return found


# --- what is measured -----------------------------------------------------------------------------


def toy(problems: list[verify.Problem]) -> Format:
    """Return how problems of a toy are written."""
    return format_of("countdown" if problems[0].kind == "countdown" else "addition")


def after(problems: list[verify.Problem], r: Rollout) -> list[verify.Problem]:
    """Return problems whose prompt has gone on to where the next attempt begins: `x1 y1 p1`.

    Through text and back, which is exact here: the toys' tokens are single characters.
    """
    said = zip(
        texts(r, 1, toy(problems)),
        r.truncated_BK[:, 0].tolist(),
        problems,
        strict=True,
    )
    return [
        p._replace(prompt=p.prompt + text + ("" if cut else END) + REVISE) for text, cut, p in said
    ]


def right(r: Rollout, problems) -> list[np.ndarray]:
    """Return which attempts are right: bool [N] for each turn."""
    return [(reward_N == 1).cpu().numpy() for reward_N in grade(r, problems, toy(problems))]


def say(model: GPT, c: Config, problems, temperature: float, seed: int, attempts=1) -> Rollout:
    """Sample attempts from a generator of their own."""
    generator = torch.Generator(c.device).manual_seed(seed)
    return sample(model, c, problems, generator, temperature, attempts=attempts)


def resampled(model: GPT, c: Config, problems) -> dict:
    """Return the metrics of a "second attempt" that is a first one drawn afresh: re-rolling."""
    first, second = (say(model, c, problems, c.temperature, seed) for seed in (0, 1))
    return metrics(right(first, problems)[0], right(second, problems)[0])


def repairs(model: GPT, author: GPT, c: Config, problems, temperature: float) -> dict:
    """Return the shares of the author's first attempts that the model repairs and spoils, of all
    wrong and all right ones."""
    first = say(author, c, problems, temperature, 0)
    right1_N = right(first, problems)[0]
    later = after(problems, first)
    right2_N = right(say(model, c, later, temperature, 2), later)[0]
    m = metrics(right1_N, right2_N)
    return {key: m[key] for key in ("repair_rate", "spoil_rate", "acc_t1", "acc_t2")}


def many_attempts(model: GPT, c: Config, problems, n: int = 10) -> dict:
    """Return the accuracy at attempts 1 to n, greedy.

    whole: the conversation grows, all attempts in sight. last: problem and last attempt alone, the
    layout that was trained, so that each attempt is a second one.
    """
    whole = [float(x.mean()) for x in right(say(model, c, problems, 0, 0, n), problems)]
    last, now = [], problems
    for _ in range(n):
        r = say(model, c, now, 0, 0)
        last.append(float(right(r, now)[0].mean()))
        now = after(problems, r)
    return dict(whole=whole, last=last)


def three_attempts(model: GPT, c: Config, problems) -> list[float]:
    """Return the accuracy at each of three attempts in one conversation, greedy."""
    return [float(x.mean()) for x in right(say(model, c, problems, 0, 0, 3), problems)]


def votes(model: GPT, c: Config, problems, most: int = 32, temperature: float = 0.7) -> dict:
    """Return the accuracy of majority votes at budgets of 2, 4, .. answers a problem.

    parallel: so many first attempts vote. sequential: half as many, each corrected once, and the
    corrected ones vote. Votes are for texts (in countdown 3+8 is not 8+3); all that were cut are
    one candidate, which is not right. Ties go to the answer that came first.
    Source: arXiv 2409.12917v2, section 6.2 (2K parallel samples, or K with one correction each).
    """
    rows = [problem for problem in problems for _ in range(most)]
    half = [problem for problem in problems for _ in range(most // 2)]
    parallel = ended(say(model, c, rows, temperature, 3), 1, rows)
    sequential = ended(say(model, c, half, temperature, 4, attempts=2), 2, half)
    found = dict(budget=[2**i for i in range(1, most.bit_length())], parallel=[], sequential=[])
    for budget in found["budget"]:
        for kind, answers, have, use in (
            ("parallel", parallel, most, budget),
            ("sequential", sequential, most // 2, budget // 2),
        ):
            chosen = [
                collections.Counter(answers[i * have : i * have + use]).most_common(1)[0][0]
                for i in range(len(problems))
            ]
            judged = [
                text is not None and verify.judge(problem, text).reward
                for problem, text in zip(problems, chosen, strict=True)
            ]
            found[kind].append(sum(judged) / len(judged))
    return found


def ended(r: Rollout, turn: int, problems) -> list[str | None]:
    """Return each row's attempt as text, None where it was cut."""
    rows = zip(texts(r, turn, toy(problems)), r.truncated_BK[:, turn - 1].tolist(),
               strict=True)  # fmt: skip
    return [None if cut else text for text, cut in rows]


def carry_chain(a: int, b: int) -> int:
    """Return how many columns in a row a carry runs through, at most.

    >>> carry_chain(95, 7), carry_chain(12, 34), carry_chain(5055, 5056)
    (2, 0, 2)
    """
    longest = run = carry = 0
    while a or b:
        carry = (a % 10 + b % 10 + carry) // 10
        run = (run + 1) * carry
        longest = max(longest, run)
        a, b = a // 10, b // 10
    return longest


def by_carry(model: GPT, c: Config, problems) -> dict:
    """Return, by the longest carry chain, how many problems there are and how many are right at
    each attempt, greedy."""
    rows = zip(problems, *right(say(model, c, problems, 0, 0, 2), problems), strict=True)
    found = {}
    for problem, right1, right2 in rows:
        a, b = problem.prompt.removesuffix("=").split("+")
        counts = found.setdefault(carry_chain(int(a), int(b)), [0, 0, 0])
        counts[:] = [x + int(y) for x, y in zip(counts, (True, right1, right2), strict=True)]
    return {str(chain): found[chain] for chain in sorted(found)}


def by_length(model: GPT, c: Config, n: int) -> dict:
    """Return accuracy at both attempts, greedy, with operands of other lengths than trained."""
    found = {}
    for digits in range(max(1, c.digits - 2), min(verify.MAX_OPERAND_DIGITS, c.digits + 2) + 1):
        other = Config(**asdict(c) | {"digits": digits})
        problems = draw(other, n, "test", np.random.default_rng(1))
        both = right(say(model, other, problems, 0, 0, 2), problems)
        found[str(digits)] = [float(x.mean()) for x in both]
    return found


def edits(model: GPT, c: Config, problems, temperature: float) -> list[int]:
    """Return counts of the edit distance ratio of both attempts, in 20 bins from 0 to 1."""
    r = say(model, c, problems, temperature, 0, attempts=2)
    first, second = (texts(r, turn, c.format()) for turn in (1, 2))
    ratios = [edit_ratio(a, b) for a, b in zip(first, second, strict=True)]
    return np.histogram(ratios, bins=20, range=(0, 1))[0].tolist()


def curve(folder: Path, mean_of: int = 5) -> list[dict]:
    """Return the training samples' accuracies and share of changed answers, by means of steps."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["phase"] != "base"]
    found = []
    for i in range(0, len(rows), mean_of):
        block = rows[i : i + mean_of]
        point = {"step": i + len(block), "phase": block[-1]["phase"]}
        for key in ("acc_t1", "acc_t2", "changed"):
            point[key] = round(sum(row[key] for row in block) / len(block), 4)
        found.append(point)
    return found


class Pause(threading.Event):
    """Asks a run to stop after a number of steps; the loop asks once a step."""

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


def watch(run, c: Config, n: int, path: Path) -> None:
    """Train a run to its end; every WATCH steps, note how well it repairs the base's first attempts
    and its own. The weights are those in training, whichever the run keeps in the end."""
    problems = draw(c, n, "test", np.random.default_rng(2))
    seen = read(path) or []

    def note():
        before = sum(phase.steps for phase in schedule(c)[1 : run.progress.phase])
        step = before + run.progress.step
        if step not in [row["step"] for row in seen]:
            row = {"step": step}
            for name, author in (("fixed", run.base), ("own", run.policy)):
                for law, t in (("greedy", 0), ("sampled", c.temperature)):
                    found = repairs(run.policy, author, c, problems, t)
                    row[f"{name}_{law}"] = found["repair_rate"]
            seen.append(row)
            write_json(seen, path)

    note()
    while not train(run, Pause(WATCH)):
        note()
    note()


def measure(job: Job, n: int, split: str) -> dict:
    """Return all that the study keeps of a finished run; of a run of the main table, how it behaves
    beyond two greedy attempts, too."""
    c, folder, phases = job.config, job.folder, schedule(job.config)
    found = report(folder, split, n)
    del found["transcripts"], found["diagnosis"]
    found |= {"name": job.name, "curve": curve(folder)}
    problems = draw(c, n, split, np.random.default_rng(0))
    if job.name == "three_turn":
        models = {phase.name: read_phase(folder, phase, c)[0] for phase in phases}
        found["three"] = {name: three_attempts(m, c, problems) for name, m in models.items()}
    if split != "test" or (job.name != "base" and VARIANTS[job.name].part != "main"):
        return found
    model, base = (read_phase(folder, phase, c)[0] for phase in (phases[-1], phases[0]))
    few = problems[: n // 4]
    found |= {
        "resampled": resampled(model, c, problems),
        "repairs_of_base": repairs(model, base, c, problems, c.temperature),
        "edits": {law: edits(model, c, problems, t) for law, t in (("greedy", 0), ("t1", 1.0))},
        "attempts": many_attempts(model, c, few),
        "votes": votes(model, c, few),
    }
    if c.task == "addition":
        found |= dict(
            by_carry=by_carry(model, c, problems), by_length=by_length(model, c, len(few))
        )
    watched = read(folder / "watched.json")
    if watched is not None:
        found["watched"] = watched
    return found


# --- running it all -------------------------------------------------------------------------------


def read(path: Path):
    """Return what `write_json` wrote; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def work(job: Job, n: int, split: str) -> None:
    """Train a run, or what is left of it, and measure it; nothing if that is done already.

    Raises:
      ValueError: the folder holds a run of other settings.
    """
    with open(job.folder.with_name(job.folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the job of a study that was killed may still be at it
        path = job.folder / f"study-{split}-{n}.json"
        if read(path) is not None and read_about(job.folder)[0] == job.config:
            return
        start = time.monotonic()
        new = not job.folder.exists()
        run = create(job.config, job.folder, job.base) if new else restore(job.folder)
        if run.config != job.config:
            raise ValueError(
                f"{job.folder} is a run of other settings: remove it, or name other --runs"
            )
        if job.name in WATCHED and split == "test":
            watch(run, job.config, n // 4, job.folder / "watched.json")
        else:
            train(run, threading.Event())
        content = measure(job, n, split)
        content["wall_seconds"] = round(time.monotonic() - start, 1) if new else None
        write_json(content, path)


def start(job: Job, n: int, split: str) -> None:
    """Have a job done by a process of its own; what it prints goes to a file beside its folder.

    Raises:
      RuntimeError: it failed.
    """
    task = dict(name=job.name, config=asdict(job.config), folder=str(job.folder),
                base=job.base and str(job.base), n=n, split=split)  # fmt: skip
    words = [sys.executable, __file__, "--job", json.dumps(task)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    path = job.folder.with_name(job.folder.name + ".txt")
    with open(path, "a") as out:
        status = subprocess.run(words, env=env, stdout=out, stderr=out).returncode
    if status:
        raise RuntimeError(f"{job.folder} failed with status {status}; see {path}")


def run_all(todo: list[Job], n: int, split: str, workers: int) -> list[dict]:
    """Do all jobs, those of a base after the base; return what was measured, in the jobs' order."""
    pool, running, queued, found = ThreadPoolExecutor(workers), {}, list(todo), {}
    try:
        while queued or running:
            ready = [job for job in queued if job.base is None or job.base in found]
            for job in ready[: workers - len(running)]:
                running[pool.submit(start, job, n, split)] = job
                queued.remove(job)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                future.result()
                found[job.folder] = read(job.folder / f"study-{split}-{n}.json")
                show(job, found, todo, workers)
    finally:
        pool.shutdown(cancel_futures=True)
    return [found[job.folder] for job in todo]


def show(job: Job, found: dict[Path, dict], todo: list[Job], workers: int) -> None:
    """Print one line: what was finished, its result, the time left at the pace so far."""
    last = list(found[job.folder]["phases"].values())[-1]
    cost = {other.folder: 3 if other.base is None else 1 for other in todo}  # a base takes longer
    timed = [folder for folder, run in found.items() if run["wall_seconds"]]
    pace = sum(found[f]["wall_seconds"] for f in timed) / max(1, sum(cost[f] for f in timed))
    left = pace * sum(x for folder, x in cost.items() if folder not in found) / workers
    print(f"{len(found):>4}/{len(todo)}  {job.folder.name:<28} t1 {100 * last['acc_t1']:5.1f} %  "
          f"t2 {100 * last['acc_t2']:5.1f} %  delta {100 * last['delta']:+6.1f}   "
          f"{left // 60:3.0f}m{left % 60:02.0f}s left", flush=True)  # fmt: skip


# --- command line ---------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Do the study, or go on with it; write its JSON, tables and figures. Return the status."""
    parser = argparse.ArgumentParser(
        prog="eval.py --study", usage=argparse.SUPPRESS, allow_abbrev=False,
        description="Train and compare all methods; a good hour on 2 cores. A finished run is "
        "kept, a killed one resumed. Further options are score.py's, for all runs.",
    )  # fmt: skip
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="two seeds, four methods: 10 minutes")
    kind.add_argument(
        "--tune", action="store_true", help="three learning rates a method, dev split"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2 3 4; to tune 120")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=VARIANTS,
        metavar="NAME",
        help="some methods, of: " + ", ".join(VARIANTS),
    )
    parser.add_argument("--runs", type=Path, help="folder of all runs (default: runs/study-TASK)")
    parser.add_argument("--out", type=Path, help="folder of results (default: in that of the runs)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args(argv)
    try:
        if args.job:
            task = json.loads(args.job)
            folder, base = Path(task["folder"]), task["base"] and Path(task["base"])
            job = Job(task["name"], Config(**task["config"]), folder, base)
            torch.set_num_threads(1)
            work(job, task["n"], task["split"])
            return 0
        if args.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {args.workers}")
        name = "tune" if args.tune else "quick" if args.quick else "study"
        names = args.only or {"tune": TUNED, "quick": QUICK, "study": tuple(VARIANTS)}[name]
        seeds = args.seeds or {"tune": (120,), "quick": (0, 1)}.get(name, (0, 1, 2, 3, 4))
        for option in ("--resume", "--run", "--base", "--seed", "--method"):
            if any(word.split("=")[0] == option for word in rest):
                raise ValueError(f"{option} is not for a study, which sets it: see --help")
        given = asdict(parse(rest)[0])
        if given["task"] not in TOYS:
            raise ValueError(f"--task must be one of {', '.join(TOYS)} in a study, "
                             f"got {given['task']}")  # fmt: skip
        if given["eval_n"] < 4:
            raise ValueError(f"--eval-n must be at least 4 in a study, got {given['eval_n']}")
        args.runs = args.runs or Path("runs") / f"study-{given['task']}"
        options = {key: x for key, x in given.items() if x != getattr(Config(), key)}
        split, n = ("dev" if args.tune else "test"), given["eval_n"]
        todo = jobs(names, seeds, args.runs, RATES if args.tune else (None,), **options)
        args.runs.mkdir(parents=True, exist_ok=True)
        name += "-part" if args.only or args.seeds else ""
        out = args.out or args.runs / f"{name}-results"
        out.mkdir(parents=True, exist_ok=True)
        found = run_all(todo, n, split, args.workers)
        write_json(found, out / f"{name}.json")
    except KeyboardInterrupt:
        print("stopped; finished runs are kept: the same command goes on", file=sys.stderr)
        return 130
    except (RuntimeError, ValueError, OSError) as error:
        print(f"eval.py --study: error: {error}", file=sys.stderr)
        return 2
    figures = Path(__file__).with_name("figures.py")
    return subprocess.run([sys.executable, figures, out / f"{name}.json"]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
