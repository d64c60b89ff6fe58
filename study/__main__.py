"""What do all methods show, side by side? The paper's study on the toy: train, measure, collect.

Every run of a seed starts from the same base and has the same budget: as many steps, samples and
updates as SCoRe has in both stages. How runs are done, kept and resumed: study/measure.py.

    python -m study                # all methods and variants, five seeds
    python -m study --tune         # what other learning rates would have given each method
    python -m study --task addition --only score multi_turn
    python -m study --table study/results/study.json
"""

import sys
from pathlib import Path

from score import parse
from study import tables
from study.measure import command, jobs, run_all
from study.methods import Config
from study.tables import VARIANTS

NAMES, RATES = list(VARIANTS)[1:], (7.5e-4, 1.5e-3, 3e-3)  # the study uses the middle one for all
KINDS = {  # methods, seeds, split, learning rates
    "study": (NAMES, (0, 1, 2, 3, 4), "test", ()),
    "tune": (tables.names_of("main")[1:], (120,), "dev", RATES),
}


def rows(names, rates) -> dict[str, tuple[str, dict]]:
    """Return a seed's runs, by the folder's name: name and settings, each once, SCoRe's always."""
    found = {}
    for name in dict.fromkeys(("score", *names)):
        own = dict(method="score") | (VARIANTS[name].options or dict(method=name))
        found |= {f"{name}-lr{rate:g}": (name, own | dict(lr=rate)) for rate in rates}
        found |= {} if rates else {name: (name, own)}
    return found


def collect(args, words: list[str]) -> tuple[Path, list[dict]]:
    """Train and measure what is asked for; return it, and the file that it is for."""
    kind = "tune" if args.tune else "study"
    c, (names, seeds, split, rates) = parse(words, Config)[1], KINDS[kind]
    runs = args.runs or Path("runs") / f"study-{c.task}"
    levels = [("", {}, rows(args.only or names, rates))]
    waves = jobs(c, levels, args.seeds or seeds, runs, split)
    kind += "-part" if args.only or args.seeds else ""
    return runs / f"{kind}-results" / f"{kind}.json", run_all(waves, args.workers)


def main(argv: list[str]) -> int:
    """Do the study, or go on with it; return the exit status."""
    own = {
        "--tune": dict(action="store_true", help="three learning rates, split dev"),
        "--only": dict(nargs="+", choices=NAMES, help="some methods, and SCoRe"),
    }
    return command(argv, "study", own, collect, tables.text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
