"""The program is small, flat and one-way, and what the core offers the core itself needs."""

import ast
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import score
from tests.test_score import TINY
from tests.truth import ROOT

CORE = ("verify", "model", "rollout", "score", "eval")  # each may import those before it
ROOMS = {"tasks", "scale", "study", "ports"}
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text()) for name in CORE}
DOORS = {  # names that no core file uses, and who does
    ("verify", "math"): "users and tasks/: the verdict on an answer in LaTeX",
    ("verify", "program"): "users and tasks/: the verdict on a program",
    ("verify", "load"): "users and scale/: the problems in a file",
    ("score", "new_run"): "the module that a run's config.json names has one",
}


def lines(path):
    return len(path.read_text().splitlines())


def modules():
    """Return all Python files but the tests."""
    rooms = (path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return [*ROOT.glob("*.py"), *rooms]


def test_the_top_level_is_the_core_its_tests_and_four_rooms():
    files = {"README.md", "LICENSE", "requirements.txt", "pyproject.toml"}
    expected = files | {f"{name}.py" for name in CORE} | ROOMS | {"tests"}
    passing = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - passing
    assert found == expected


def test_files_are_short():
    assert sum(lines(ROOT / f"{name}.py") for name in CORE) <= 1500
    assert {str(x): lines(x) for x in modules() if lines(x) > 450} == {}
    assert sum(lines(x) for x in modules() if "ports" not in x.parts) <= 5800
    assert lines(ROOT / "README.md") <= 230


def test_functions_of_the_core_are_short_and_take_few_parameters():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                a = node.args
                n = len([*a.posonlyargs, *a.args, *a.kwonlyargs])
                assert n <= 9 and node.end_lineno - node.lineno < 60, (name, node.name)


def test_settings_are_few():
    assert len(fields(score.Config)) <= 30


def imported(tree):
    """Return the modules that are imported when a file is."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("place", range(5), ids=CORE)
def test_core_files_import_one_way_and_no_room(place):
    known = {*sys.stdlib_module_names, "torch", "numpy", "tiktoken", *CORE[:place]}
    assert {name.split(".")[0] for name in imported(TREES[CORE[place]])} <= known


def used(name, module):
    """Return whether a name that a core file defines is used by a core file, elsewhere than in its
    own definition."""
    for file, tree in TREES.items():
        own = {id(x) for node in tree.body if file == module and getattr(node, "name", "") == name
               for x in ast.walk(node)}  # fmt: skip
        here = file == module or any(
            isinstance(node, ast.ImportFrom) and node.module == module
            and name in [alias.name for alias in node.names] for node in ast.walk(tree)
        )  # fmt: skip
        for node in ast.walk(tree):
            if id(node) in own:
                continue
            if isinstance(node, ast.Name) and node.id == name and here:
                return True
            if isinstance(node, ast.Attribute) and node.attr == name:
                if isinstance(node.value, ast.Name) and node.value.id == module:
                    return True
    return False


def test_every_name_of_the_core_is_used_by_the_core_or_is_a_door():
    """What a room alone needs belongs into the room; and what is listed as a door is one."""
    names = {
        (module, node.name)
        for module, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert {(module, name) for module, name in names if not used(name, module)} == set(DOORS)


def test_the_way_of_a_token_id_to_the_gradient_is_short(tmp_path, monkeypatch):
    """Of `python score.py`, at Stage I, once its run is set up: our functions that are called up to
    the first backward pass, with `main`. What is inside the model, behind `hidden` and `forward`,
    sees states and no ids, and is another way."""
    way = {"score.py main": None}  # in the order of their first calls

    class Arrived(Exception):
        pass

    def backward(loss):
        raise Arrived

    def called(frame, event, arg):
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname
        inside = path.name == "model.py" and name not in ("GPT.hidden", "GPT.forward")
        if event == "call" and path.parent == ROOT and not inside:
            if not name.endswith(("comp>", "<genexpr>")):
                way[f"{path.name} {name}"] = None

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    run = score.new_run(TINY, tmp_path)
    run.phase = 2
    sys.setprofile(called)
    try:
        with pytest.raises(Arrived):
            score.drive(run)
    finally:
        sys.setprofile(None)
    assert "score.py optimizer_step" in way
    assert len(way) <= 30 and len({name.split()[0] for name in way}) <= 4, "\n".join(way)
