"""What does a command of a port take? A checkpoint, files of problems, and options of scale.train.

The settings are those of `--preset math`, the paper's for MATH; the options override them.

    python ports/trl_score.py --help
"""

import argparse
from dataclasses import replace
from pathlib import Path

from scale import train


def parser(about: str, names: list[str]) -> argparse.ArgumentParser:
    """Return a parser of --model, --train, --test, --out and the named options of scale.train."""
    made = argparse.ArgumentParser(description=about)
    for name, what in (("model", "folder of the base"), ("train", "file"), ("test", "file")):
        made.add_argument(f"--{name}", required=True, help=what)
    made.add_argument("--out", type=Path, required=True, help="folder, new or begun")
    for name in names:
        made.add_argument(f"--{name}", help="as of scale.train")
    return made


def settings(args: argparse.Namespace, names: list[str]) -> train.Config:
    """Return the settings of a run without the control, of parsed options."""
    given = ((name, getattr(args, name.replace("-", "_"))) for name in names)
    words = [word for name, x in given if x is not None for word in (f"--{name}", x)]
    files = ["--checkpoint", args.model, "--train", args.train, "--test", args.test]
    return replace(train.parse(["--preset", "math", *words, *files])[1], task="math", control=0)
