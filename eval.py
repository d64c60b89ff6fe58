"""Did the second attempt help? The paper's five metrics, with intervals, on held-out problems.

Acc@t1 and Acc@t2 are the shares of problems right at each attempt; delta(t1,t2) is their
difference; delta i->c and delta c->i are the shares of *all* problems that go from wrong to right
and from right to wrong, so that delta = i->c - c->i exactly (arXiv 2409.12917v2, section 3).
Rates among the wrong or the right first attempts alone are called repair rate and spoil rate here.

    python eval.py runs/score-seed0              # again, from the run's weights: same report.json
    python eval.py runs/score-seed0 --split dev  # on the problems that settings are chosen on
    python eval.py runs/score-seed0 --show 5     # five transcripts of each kind; all in a .jsonl
    python eval.py FOLDER --test test.jsonl      # an open checkpoint (scale/README.md)

Decoding is greedy, and once more at the training temperature to see what the rewards saw.
Dimension key: N problems, M tokens of an attempt at most.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from model import GPT, load
from rollout import Task, grade, rollout, texts, truncated
from score import Run, open_run

# --- intervals ------------------------------------------------------------------------------------


def wilson(k: int, n: int) -> list[float]:
    """Return the 95 % Wilson score interval of a share k / n, as [low, high] within [0, 1].

    >>> [round(x, 4) for x in wilson(5, 10)]
    [0.2366, 0.7634]
    """
    if n == 0:
        return [0.0, 1.0]
    z2, p = 1.959963984540054**2, k / n
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = (z2 * (p * (1 - p) / n + z2 / (4 * n * n))) ** 0.5 / (1 + z2 / n)
    return [min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))]


def paired_bootstrap(gained: int, lost: int, n: int) -> list[float]:
    """Return the 95 % bootstrap interval of (gained - lost) / n over problems, as [low, high].

    Resampling problems, each with both of its attempts, is drawing how many of n fall into gained,
    lost and unchanged: 10,000 multinomial draws from a fixed seed.
    """
    shares = np.array([gained, lost, n - gained - lost]) / n
    draws = np.random.default_rng(0).multinomial(n, shares, size=10_000)
    return np.percentile((draws[:, 0] - draws[:, 1]) / n, [2.5, 97.5]).tolist()


# --- metrics --------------------------------------------------------------------------------------


def metrics(right1_N: np.ndarray, right2_N: np.ndarray) -> dict:
    """Return the five metrics and the two conditional rates, as shares, with intervals.

    >>> m = metrics(np.array([True, True, False, False]), np.array([True, False, True, True]))
    >>> m["acc_t1"], m["acc_t2"], m["delta"], m["delta_i_to_c"], m["delta_c_to_i"]
    (0.5, 0.75, 0.25, 0.5, 0.25)
    """
    n, right1, right2 = len(right1_N), int(right1_N.sum()), int(right2_N.sum())
    if n == 0:
        raise ValueError("no problem has a verdict on both attempts: there is nothing to measure")
    gained, lost = int((~right1_N & right2_N).sum()), int((right1_N & ~right2_N).sum())
    values = dict(n=n, delta=(gained - lost) / n, delta_interval=paired_bootstrap(gained, lost, n))
    for name, k, of in (
        ("acc_t1", right1, n), ("acc_t2", right2, n), ("delta_i_to_c", gained, n),
        ("delta_c_to_i", lost, n), ("repair_rate", gained, n - right1), ("spoil_rate", lost, right1)
    ):  # fmt: skip
        values[name] = k / of if of else None
        values[name + "_interval"] = wilson(k, of)
    return values


def evaluate(model: GPT, task: Task, problems: list, temperature: float, at_once: int) -> dict:
    """Answer each problem twice, `at_once` rows at a time, with random numbers that are always the
    same; return metrics, behaviour, and under "rows" what was said.

    Problems without a verdict on both attempts are left out, and counted under "unjudged".
    """
    noise_2NM = np.random.default_rng(1).random((2, len(problems), task.max_new))
    rewards, pairs, cut = [], [], []
    for start in range(0, len(problems), at_once):
        part = slice(start, start + at_once)
        prompts = [task.encode(problem.prompt) for problem in problems[part]]
        noise = torch.tensor(noise_2NM[:, part], device=model.cos.device)
        r = rollout(model, task, prompts, noise, temperature)
        rewards.append(grade(r, problems[part], task).cpu().numpy())
        pairs += zip(texts(r, 1, task), texts(r, 2, task), strict=True)
        cut += zip(truncated(r, 1, task), truncated(r, 2, task), strict=True)
    reward_2N = np.concatenate(rewards, axis=1)
    judged_N, wrong_N = np.isfinite(reward_2N).all(axis=0), reward_2N[0] == 0
    changed_N = np.array([a != b for a, b in pairs])
    changed_if_wrong = changed_N[judged_N & wrong_N]
    rows = [dict(kind=KINDS.get(tuple(r), "unjudged"), prompt=x.prompt, gold=x.gold,
                 attempt1=pair[0], attempt2=pair[1], rewards=[y if y == y else None for y in r])
            for x, pair, r in zip(problems, pairs, reward_2N.T.tolist(), strict=True)]  # fmt: skip
    return metrics(*(reward_2N[:, judged_N] == 1)) | {
        "changed": float(changed_N.mean()),
        "changed_if_wrong": float(changed_if_wrong.mean()) if len(changed_if_wrong) else None,
        "unjudged": int((~judged_N).sum()),
        **{f"truncated_t{k}": x for k, x in enumerate(np.mean(cut, axis=0).tolist(), start=1)},
        "rows": rows,
    }


def diagnose(phases: dict) -> list[str]:
    """Return sentences: how often the base repairs and spoils, and what makes a run doubtful."""
    last, notes = list(phases.values())[-1], []
    changed, base = last["changed_if_wrong"], phases.get("base", last)["sampled"]
    if None not in (base["repair_rate"], base["spoil_rate"]):
        rates = ("{:.1%} [{:.1%}, {:.1%}]".format(base[f"{x}_rate"], *base[f"{x}_rate_interval"])
                 for x in ("repair", "spoil"))  # fmt: skip
        notes.append("Sampled, the base repairs {} of its wrong first attempts and spoils {} of "
                     "its right ones. On the signs, if a base spoils little, multi-turn RL copies "
                     "at 0.5 % repairs or fewer, corrects from 3 %, SCoRe from 0.1 % (see study/)."
                     .format(*rates))  # fmt: skip
    if last["truncated_t1"] > 0.1:
        notes.append(f"{last['truncated_t1']:.0%} of the first attempts were cut at the limit, and "
                     "so are not right: train the base to end its answers.")  # fmt: skip
    if last["n"] >= 50 and len(phases) > 1 and changed is not None and changed < 0.05:
        notes.append(f"Collapsed: of the wrong first attempts only {changed:.1%} are changed; the "
                     "second attempt copies the first.")  # fmt: skip
    return notes


# --- the report -----------------------------------------------------------------------------------

COLUMNS = dict(acc_t1="Acc@t1", acc_t2="Acc@t2", delta="Δ(t1,t2)", delta_i_to_c="Δ i→c",
               delta_c_to_i="Δ c→i")  # fmt: skip
TITLES = dict(stage1="Stage I", score="SCoRe", multi_turn="multi-turn RL", no_stage1="w/o Stage I",
              no_bonus="w/o bonus", no_stage1_no_bonus="w/o Stage I and bonus")  # fmt: skip
KINDS = {(0, 1): "repaired", (1, 0): "spoiled", (1, 1): "kept", (0, 0): "failed"}


def report(run: Run, split: str, n: int) -> tuple[dict, list[dict]]:
    """Evaluate a run's finished phases on n problems of a split; return report and answers."""
    problems, phases, rows = run.task.draw(n, split, np.random.default_rng(0)), {}, []
    ended = [phase for phase in run.phases[run.phase :][:1] if phase.steps == run.step]
    for phase in run.phases[: run.phase] + ended:
        if run.optimizer:  # else it is an open checkpoint
            run.policy.load_state_dict(load(run.folder / f"{phase.name}.pt")["model"])
        greedy, sampled = (evaluate(run.policy, run.task, problems, temperature, run.config.batch)
                           for temperature in (0.0, run.config.temperature))  # fmt: skip
        rows += [dict(phase=phase.name, **x) for x in greedy.pop("rows")]
        del sampled["rows"]
        phases[phase.name] = greedy | {"sampled": sampled}
    if not phases:
        raise ValueError(f"{run.folder} has no finished phase: go on with score.py --resume")
    r = dict(seed=run.config.seed, split=split, n=len(problems), phases=phases)
    return r | dict(diagnosis=diagnose(phases), examples=examples(rows)), rows


def examples(rows: list[dict], most: int = 1) -> list[dict]:
    """Return the first answers that the last phase repaired, spoiled, kept, failed, so many each;
    before them, if there is such, a mistake that the control copied and the last phase repaired."""
    control, found = [x for x in rows if x["phase"] == "multi_turn"], {}
    last = [x for x in rows if x["phase"] == rows[-1]["phase"]]
    for theirs, ours in zip(control, last, strict=False):  # the same problem; perhaps no control
        copied = theirs["attempt1"] == theirs["attempt2"]
        if copied and (theirs["kind"], ours["kind"]) == ("failed", "repaired"):
            found = {"copied": [theirs | {"kind": "copied"}], "repaired": [ours]}
            break
    for row in last:
        same = found.setdefault(row["kind"], [])
        same += [row] if len(same) < most and row not in same else []
    return sum(found.values(), [])


def table(phases: dict) -> str:
    """Return the metrics of each phase as a Markdown table, in per cent, with 95 % intervals."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * 6 + "|"]
    for name, m in phases.items():
        cells = []
        for key in COLUMNS:
            x, low, high = (100 * value for value in (m[key], *m[key + "_interval"]))
            sign = "+" if key == "delta" else ""
            cells.append(f"{x:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]")
        lines.append(f"| {TITLES.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def printable(text: str, most: int = 120) -> str:
    """Return a model's text in one line of a terminal: no control characters, and not too long.

    >>> printable("7\\x1b[2J\\n8"), printable("12345", most=3)
    ('7?[2J⏎8', '123 ..')
    """
    shown = "".join(x if x.isprintable() else "⏎" if x == "\n" else "?" for x in text[:most])
    return shown + (" .." if len(text) > most else "")


def show(r: dict) -> None:
    """Print a report."""
    unjudged = max((m["unjudged"] for m in r["phases"].values()), default=0)
    without = f", up to {unjudged} without a verdict" if unjudged else ""
    print(f"\n{r['n']:,} held-out problems ({r['split']}){without}, greedy, seed {r['seed']}; "
          f"per cent [95 % interval]\n\n{table(r['phases'])}")  # fmt: skip
    for x in r["examples"]:
        x = {key: printable(str(text)) for key, text in x.items()}
        x["by"] = TITLES.get(x["phase"], x["phase"])
        x["gap"] = "  " if len(x["prompt"] + x["gold"]) < 60 else "\n      "
        print("\n{kind:>9}  {prompt}{gap} gold {gold}   ({by})\n attempt 1  {attempt1}\n "
              "attempt 2  {attempt2}".format_map(x))  # fmt: skip
    for note in r["diagnosis"]:
        print(f"\nDIAGNOSIS  {note}")


def main(argv: list[str]) -> int:
    """Evaluate a run, print the report, write it into the run's folder. Return the exit status."""
    parser = argparse.ArgumentParser(description="Evaluate a run from its weights.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="which problems")
    parser.add_argument("--n", type=int, help="how many problems (default: the run's --eval-n)")
    parser.add_argument("--show", type=int, default=0, help="how many transcripts of each kind")
    parser.add_argument("--test", metavar="FILE", help="problems for an open checkpoint, as RUN")
    args, others = parser.parse_known_args(argv)
    try:
        door = importlib.import_module("scale.train").opened if args.test or others else None
        run = door(args.run, args.test, others, argv) if door else open_run(args.run)
        n = run.config.eval_n if args.n is None else args.n
        if n < 1 or args.show < 0:
            raise ValueError(f"--n must be from 1, --show from 0, got {n} and {args.show}")
        more = "" if (args.split, n) == ("test", run.config.eval_n) else f"-{args.split}-{n}"
        path = getattr(run, "path", args.run / f"report{more}.json")
        r, rows = report(run, args.split, n)
        r |= {"command": argv} if args.test else {}
        for kind in (".json", ".jsonl") if args.show else (".json",):
            lines = [json.dumps(r, indent=2)] if kind == ".json" else map(json.dumps, rows)
            path.with_suffix(".part").write_text("\n".join(lines) + "\n")
            path.with_suffix(".part").replace(path.with_suffix(kind))
    except (KeyboardInterrupt, ValueError, OSError, RuntimeError, KeyError, ImportError) as error:
        print("eval.py: error:", str(error).partition("\n")[0] or "stopped", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    show(r | dict(examples=examples(rows, args.show or 1)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
