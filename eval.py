"""Did the second attempt help? The paper's five metrics, with intervals, on held-out problems.

Acc@t1 and Acc@t2 are the shares of problems right at each attempt; delta(t1,t2) is their
difference; delta i->c and delta c->i are the shares of *all* problems that went from wrong to right
and from right to wrong, so that delta = i->c - c->i exactly (arXiv 2409.12917v2, section 3).
Rates among the wrong or right first attempts alone are called repair rate and spoil rate here.

    python eval.py runs/score-seed0              # again, from the run's weights: same report.json
    python eval.py runs/score-seed0 --split dev  # on the problems that settings are chosen on
    python eval.py runs/score-seed0 --export mine   # the last weights, for transformers and vLLM
    python eval.py --study --quick               # methods side by side, trained and measured

Decoding is greedy, and once more at the training temperature to see what the rewards saw.
Dimension key: N problems.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import verify
from model import GPT
from rollout import grade, texts
from run import Config, Failure, commit, draw, read_about, read_phase, schedule, write_json
from score import all_judged, sample

# --- intervals ------------------------------------------------------------------------------------


def wilson(k: int, n: int) -> list[float]:
    """Return the 95 % Wilson score interval of a share k / n, as [low, high] within [0, 1].

    Source: Wilson 1927; with no trial at all it is [0, 1].

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
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / n, [2.5, 97.5])
    return [float(low), float(high)]


# --- metrics --------------------------------------------------------------------------------------


def metrics(right1_N: np.ndarray, right2_N: np.ndarray) -> dict:
    """Return the five metrics and the two conditional rates, as shares, with intervals.

    Args:
      right1_N, right2_N: bool, was attempt 1 or 2 right.

    >>> m = metrics(np.array([True, True, False, False]), np.array([True, False, True, True]))
    >>> m["acc_t1"], m["acc_t2"], m["delta"], m["delta_i_to_c"], m["delta_c_to_i"]
    (0.5, 0.75, 0.25, 0.5, 0.25)
    """
    n = len(right1_N)
    right1, right2 = int(right1_N.sum()), int(right2_N.sum())
    gained, lost = int((~right1_N & right2_N).sum()), int((right1_N & ~right2_N).sum())
    values = {}
    for name, k, of in (
        ("acc_t1", right1, n),
        ("acc_t2", right2, n),
        ("delta_i_to_c", gained, n),
        ("delta_c_to_i", lost, n),
        ("repair_rate", gained, n - right1),
        ("spoil_rate", lost, right1),
    ):
        values[name] = k / of if of else None
        values[name + "_interval"] = wilson(k, of)
    values["delta"] = (gained - lost) / n
    values["delta_interval"] = paired_bootstrap(gained, lost, n)
    return values | {"n": n}


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: the fewest insertions, deletions and replacements.

    >>> edit_distance("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def edit_ratio(a: str, b: str) -> float:
    """Return the edit distance over the total length of both, in [0, 1]; 0 for two empty texts.

    Source: arXiv 2409.12917v2, section 4 (edit distance ratio).
    """
    return edit_distance(a, b) / max(1, len(a) + len(b))


def evaluate(model: GPT, c: Config, problems: list[verify.Problem], temperature: float) -> dict:
    """Answer each problem twice; return metrics, behaviour, and under "rows" what was said.

    Problems without a verdict on both attempts are left out, and counted under "unjudged".

    Greedy at temperature 0; above, sampled from a generator of its own, always the same.
    """
    generator = torch.Generator(c.device).manual_seed(0)
    r = sample(model, c, problems, generator, temperature)
    reward1_N, reward2_N = grade(r, problems, c.format())
    keep_N = all_judged(reward1_N + reward2_N, 1)
    r, judged = r.rows(keep_N), [problems[i] for i in keep_N.nonzero()[:, 0].tolist()]
    right1_N, right2_N = (x[keep_N].cpu().numpy() == 1 for x in (reward1_N, reward2_N))
    first, second = (texts(r, turn, c.format()) for turn in (1, 2))
    changed_N = np.array([a != b for a, b in zip(first, second, strict=True)])
    ratios = [edit_ratio(a, b) for a, b in zip(first, second, strict=True)]
    wrong = int((~right1_N).sum())
    return metrics(right1_N, right2_N) | {
        "changed": float(changed_N.mean()),
        "changed_if_wrong": float(changed_N[~right1_N].mean()) if wrong else None,
        "edit_ratio": float(np.mean(ratios)),
        "unjudged": len(problems) - len(judged),
        "truncated_t1": float(r.truncated_BK[:, 0].float().mean()),
        "truncated_t2": float(r.truncated_BK[:, 1].float().mean()),
        "rows": list(zip(judged, first, second, right1_N.tolist(), right2_N.tolist(), strict=True)),
    }


def diagnose(phases: dict) -> list[str]:
    """Return sentences on what makes a run not worth reading, if anything does.

    Args:
      phases: the report's phases in order, the base first.
    """
    notes = []
    base, last = phases["base"], list(phases.values())[-1]
    cut = last["truncated_t1"]
    if cut > 0.1:
        notes.append(
            f"Of the first attempts {100 * cut:.0f} % were cut at the limit, and so are not right: "
            "raise --max-new, or train the base to end its answers."
        )
    if last["n"] < 50:
        return [*notes, f"{last['n']} problems are too few to say more."]
    repair = base["sampled"]["repair_rate"]
    if repair is not None and repair < 0.04:
        notes.append(
            f"The base repairs {100 * repair:.1f} % of its wrong first attempts when sampled; "
            "below about 4 % reinforcement learning finds too little to amplify."
        )
    changed = last["changed_if_wrong"]
    if len(phases) > 1 and changed is not None and changed < 0.05:
        notes.append(
            f"Collapsed: of the wrong first attempts only {100 * changed:.1f} % are changed; the "
            "second attempt copies the first."
        )
    return notes


# --- the report -----------------------------------------------------------------------------------

COLUMNS = (
    ("Acc@t1", "acc_t1"),
    ("Acc@t2", "acc_t2"),
    ("Δ(t1,t2)", "delta"),
    ("Δ i→c", "delta_i_to_c"),
    ("Δ c→i", "delta_c_to_i"),
)


def table(phases: dict) -> str:
    """Return the metrics of each phase as a Markdown table, in per cent, with 95 % intervals."""
    lines = ["| |" + "".join(f" {title} |" for title, _ in COLUMNS), "|---" * 6 + "|"]
    for name, m in phases.items():
        cells = []
        for _, key in COLUMNS:
            low, high = m[key + "_interval"]
            sign = "+" if key == "delta" else ""
            numbers = [f"{100 * x:{sign}.1f}" for x in (m[key], low, high)]
            cells.append(" {} [{}, {}] |".format(*numbers))
        lines.append(f"| {TITLES.get(name, name)} |" + "".join(cells))
    return "\n".join(lines)


TITLES = {"base": "base", "stage1": "Stage I", "score": "SCoRe", "multi_turn": "multi-turn RL"}


def transcripts(rows: list) -> list[dict]:
    """Return the first repair, kept answer and failure, where there is one."""
    kinds = {
        "repaired": lambda right1, right2: not right1 and right2,
        "kept": lambda right1, right2: right1 and right2,
        "failed": lambda right1, right2: not right2,
    }
    found = []
    for kind, is_one in kinds.items():
        for problem, first, second, right1, right2 in rows:
            if is_one(right1, right2):
                found.append(dict(kind=kind, prompt=problem.prompt, attempt1=first,
                                  attempt2=second, gold=problem.gold))  # fmt: skip
                break
    return found


def report(folder: Path, split: str, n: int) -> dict:
    """Evaluate every finished phase of a run on n problems of a split; return the report.

    Raises:
      ValueError: there is no run, no finished phase, or a damaged checkpoint.
    """
    c, about = read_about(folder)
    problems = draw(c, n, split, np.random.default_rng(0))
    phases, rows = {}, []
    for phase in schedule(c):
        if phases and not (folder / f"{phase.name}.pt").exists():
            break  # an unfinished run: report what is there
        model, phase_about = read_phase(folder, phase, c)
        greedy = evaluate(model, c, problems, temperature=0)
        sampled = evaluate(model, c, problems, temperature=c.temperature)
        rows = greedy.pop("rows")
        del sampled["rows"]
        phases[phase.name] = greedy | {
            "seed": c.seed,
            "sampled": sampled,
            **phase_about,
        }
    return {
        "method": c.method,
        "seed": c.seed,
        "n": len(problems),
        "split": split,
        "seconds": sum(m["seconds"] for m in phases.values()),
        "commit": about["commit"],
        "evaluation_commit": commit(),
        "threads": about["threads"],
        "config": asdict(c),
        "phases": phases,
        "diagnosis": diagnose(phases),
        "transcripts": transcripts(rows),
    }


def printable(text: str, most: int = 600) -> str:
    """Return a model's text as a terminal may have it: no control characters, and not too long.

    >>> printable("7\\x1b[2J"), printable("12345", most=3)
    ('7?[2J', '123 ..')
    """
    shown = "".join(x if x.isprintable() or x == "\n" else "?" for x in text[:most])
    return shown + (" .." if len(text) > most else "")


def show(r: dict) -> None:
    """Print a report."""
    unjudged = max((m["unjudged"] for m in r["phases"].values()), default=0)
    without = f", up to {unjudged} without a verdict" if unjudged else ""
    print(f"\n{r['n']:,} held-out problems ({r['split']}){without}, greedy, seed {r['seed']}; "
          "per cent [95 % interval]\n")  # fmt: skip
    print(table(r["phases"]))
    for t in r["transcripts"]:
        prompt, gold, first, second = (
            printable(t[key]) for key in ("prompt", "gold", "attempt1", "attempt2")
        )
        print(f"\n{t['kind']:>9}  {prompt}   gold {gold}\n attempt 1  {first}"
              f"\n attempt 2  {second}")  # fmt: skip
    for note in r["diagnosis"]:
        print(f"\nDIAGNOSIS  {note}")


def export(folder: Path, new: Path) -> None:
    """Write the weights of a run's last finished phase as an open checkpoint, with the tokenizer of
    the one that it started from, if any."""
    c, _ = read_about(folder)
    phases = [phase for phase in schedule(c) if (folder / f"{phase.name}.pt").exists()]
    if not phases:
        raise ValueError(f"{folder} has no finished phase to export")
    read_phase(folder, phases[-1], c)[0].save_pretrained(new, source=c.checkpoint or None)
    print(f"{new}: weights of {phases[-1].name}")


def main(argv: list[str]) -> int:
    """Evaluate a run, print the report, write it into the run's folder. Return the exit status."""
    if argv[:1] == ["--study"]:
        study = Path(__file__).with_name("study.py")
        return subprocess.run([sys.executable, study, *argv[1:]]).returncode
    parser = argparse.ArgumentParser(
        prog="eval.py", usage=argparse.SUPPRESS, allow_abbrev=False,
        description="Evaluate a run from its weights; or all methods: see --study --help.",
    )  # fmt: skip
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="which problems")
    parser.add_argument("--n", type=int, help="how many problems (default: the run's --eval-n)")
    parser.add_argument("--export", type=Path, metavar="NEW", help="write the last weights to a "
                        "new folder, as transformers and vLLM read them, and no more")  # fmt: skip
    args = parser.parse_args(argv)
    start = time.monotonic()
    try:
        if args.export is not None:
            export(args.run, args.export)
            return 0
        default = read_about(args.run)[0].eval_n
        n = default if args.n is None else args.n
        if n < 1:
            raise ValueError(f"--n must be at least 1, got {n}")
        r = report(args.run, args.split, n)
        usual = (args.split, n) == ("test", default)
        path = args.run / ("report.json" if usual else f"report-{args.split}-{n}.json")
        write_json(r, path, indent=2)
    except KeyboardInterrupt:
        print("eval.py: stopped, nothing written", file=sys.stderr)
        return 130
    except (ValueError, OSError, Failure) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2
    show(r)
    print(f"\n{r['seconds']:.0f} s of training, {time.monotonic() - start:.0f} s of evaluation; "
          f"everything is in {args.run}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
