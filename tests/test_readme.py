"""What the documents say is so: their commands run, their figures come from the file they name."""

import json
import re
import shlex
import subprocess
import sys

import bench_memory
import bench_rollout
import bench_train
import bench_verify
import pytest
import seeds
import speed
import test_data
from test_run import options
from test_score import TINY
from truth import ROOT

import figures
import run as runs
import study

TESTED_WITH = (ROOT / "tests/requirements.txt").read_text().split()
README, NOTES, STUDY, SCALE = (
    (ROOT / f"{name}.md").read_text() for name in ("README", "NOTES", "STUDY", "SCALE")
)
RESULTS = ROOT / "tests/results/study"
MODULES = (
    "algebra.py", "latex.py", "sandbox.py", "countdown.py", "verify.py", "model.py", "chat.py",
    "rollout.py", "parallel.py", "run.py", "score.py", "eval.py", "study.py", "figures.py",
)  # fmt: skip


def commands(text, indent=""):
    """Return the commands, without their comments, of lines that start with python or pip."""
    lines = re.findall(rf"^{indent}((?:python|pip|torchrun) .*)$", text, re.MULTILINE)
    return [" ".join(shlex.split(line.replace("\\", ""), comments=True)) for line in lines]


def fenced(text):
    return "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


KNOWN = commands(fenced(README + NOTES + STUDY + SCALE))


def execute(command, folder):
    """Run a documented command in an empty folder, training commands at a tiny size."""
    for part in command.split(" && "):
        words = part.split()
        if words[0] == "pip":
            if words[2] == "-r":
                assert (ROOT / words[3]).is_file()
            else:  # an optional package, of the version that is tested with
                assert words[1] == "install" and words[2] in TESTED_WITH
            continue
        if words[:3] == ["python", "-m", "pytest"]:
            continue  # this is it
        if words[0] == "torchrun":
            words[:1] = ["python", "-m", "torch.distributed.run"]
            words[words.index("score.py")] = str(ROOT / "score.py")
            words += options(**TINY)
        assert words[0] == "python"
        status = 0
        if "--checkpoint" in words:
            words += test_data.words(test_data.SMALL)
        elif words[1] == "score.py" and "--resume" not in words and "--help" not in words:
            words += options(**TINY)
        if "--study" in words:
            words += ["--seeds", "0", "--only", "score", *options(**TINY)]
        if words[1] == "figures.py":  # what only a part of the runs is from has another name
            words[2] = words[2].replace("quick", "quick-part")
        if words[1] == "tests/seeds.py" and "--table" not in words:
            words += ["--seeds", "0", "1", "--runs", "runs/seeds", "--out", "seeds.json"]
            words += options(**TINY)
            status = 1  # the claims do not hold at a tiny size, and that is what it says
        if words[1] == "tests/bench_verify.py":
            if not bench_verify.SHARED.exists():
                continue
            words += ["--only", "prose", "--out", "verify.json"]
        if "--table" in words:  # it says by its status whether all claims hold
            found = seeds.claims(json.loads(seeds.RESULTS.read_text()))
            status = 0 if all(holds for *_, holds in found) else 1
        if words[1] == "tests/bench_memory.py":
            words += ["--width", "16", "--tokens", "16", "--out", "memory.json"]
        if words[1] == "tests/bench_rollout.py":
            words += ["--sizes", "toy", "--batches", "4", "--rounds", "1", "--no-compile"]
            words += ["--out", "rollout.json"]
        if words[1] == "tests/bench_train.py":
            words += ["--rounds", "1", "--batch", "8", "--rows", "4", "--size", "toy"]
            words += ["--no-compile", "--out", "train.json"]
        if words[1] == "tests/bench_cost.py":
            words += ["--only", "batch", "--points", "1", "--out", "cost.json"]
        if "--compile" in words:
            words.remove("--compile")  # which takes minutes; in test_model.py and test_run.py
        if words[1] != "-m":
            words[1] = str(ROOT / words[1])
        words[0] = sys.executable
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == status, (command, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a reader, who has a checkpoint and files of problems."""
    folder = tmp_path_factory.mktemp("reader")
    test_data.make_checkpoint(folder / "Qwen2.5-0.5B-Instruct")
    test_data.write_rows(folder)
    return folder


def test_the_readmes_commands_run_in_the_order_of_the_page(folder):
    found = commands(fenced(README))
    assert found[0] == "pip install -r requirements.txt && python score.py"
    assert "pip install -r tests/requirements.txt && python -m pytest" in found
    for command in dict.fromkeys(found + commands(fenced(NOTES + STUDY + SCALE))):
        execute(command, folder)


@pytest.mark.parametrize("module", MODULES)
def test_the_modules_commands_run(module, folder):
    """Those that the README does not have already, in the folder where its commands ran."""
    text = (ROOT / module).read_text().split('"""')[1]
    lines = re.findall(r"^    (python .*)$", text, re.MULTILINE)
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[1] == "-c":
            subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words != ["python", "score.py"] and " ".join(words) not in KNOWN:
            execute(" ".join(words), folder)


def test_the_readmes_tables_are_those_of_the_results_file():
    results = json.loads(seeds.RESULTS.read_text())
    assert seeds.tables(results) in NOTES


def test_the_studys_tables_are_those_of_its_results():
    """All tables of the study and some of further ones, word for word; README has the first."""
    parts = {
        "study": None, "countdown": ("Methods, greedy", "Claims"), "pool": ("Methods, greedy",),
        "three": ("Methods, greedy", "Three attempts, greedy"),
    }  # fmt: skip
    for name, titles in parts.items():
        found = json.loads((RESULTS / f"{name}.json").read_text())
        tables = figures.sections(found)
        assert all(tables[title] in STUDY for title in titles or tables), name
        assert figures.about(found) in STUDY.replace("\n", " "), name
        if name == "study":
            assert tables["Methods, greedy"] in README
    found = json.loads((RESULTS / "tune.json").read_text())
    assert figures.tuning(found) in STUDY and figures.about(found) in STUDY.replace("\n", " ")


def test_further_studies_are_of_five_seeds_and_their_own_settings():
    for name, method, option in (
        ("pool", "multi_turn", {"pool": 256}), ("three", "three_turn", {"base_attempts": 3}),
    ):  # fmt: skip
        found = json.loads((RESULTS / f"{name}.json").read_text())
        assert {(r["name"], r["seed"]) for r in found} == {
            (x, seed) for x in ("base", "score", method) for seed in range(5)
        }
        for r in found:
            given = option | dict(method="base" if r["name"] == "base" else r["name"])
            assert runs.Config(**r["config"]) == runs.Config(seed=r["seed"], **given)
    rates = {r["config"]["lr"] for r in json.loads((RESULTS / "tune.json").read_text())}
    assert rates == set(study.RATES)


def test_the_study_has_every_method_of_five_seeds_and_the_figures_are_there():
    found = json.loads((RESULTS / "study.json").read_text())
    names = ["base", *study.VARIANTS]
    assert sorted((r["name"], r["seed"]) for r in found) == sorted(
        (name, seed) for name in names for seed in range(5)
    )
    for r in found:
        given = {"method": "base"} if r["name"] == "base" else study.VARIANTS[r["name"]].options
        assert runs.Config(**r["config"]) == runs.Config(seed=r["seed"], **given)
        assert (r["split"], r["n"], r["threads"]) == ("test", 2000, 1)
    for name in figures.PLOTS:
        assert (RESULTS / f"{name}.svg").is_file()
        assert f"](tests/results/study/{name}.png)" in STUDY and (RESULTS / f"{name}.png").is_file()
    countdown = json.loads((RESULTS / "countdown.json").read_text())
    assert {(r["name"], r["seed"]) for r in countdown} == {
        (name, seed) for name in ("base", "score", "multi_turn") for seed in range(5)
    }
    deltas = [r["phases"]["score"]["delta"] for r in countdown if r["name"] == "score"]
    assert min(deltas) > 0  # as STUDY.md says


def test_the_verifiers_table_is_that_of_its_results_file_and_says_what_is_claimed():
    results = json.loads(bench_verify.RESULTS.read_text())
    assert bench_verify.table(results) in NOTES
    found = results["sets"]
    assert list(found) == list(bench_verify.SETS)
    ours, theirs = found["pairs"]
    assert ours["as_due"] / ours["n"] >= 0.97 and ours["accepted_wrongly"] == 0
    assert ours["median_ms"] <= theirs["median_ms"]
    for name, most in (("gsm8k", 0), ("humaneval", 0), ("humaneval_none", 0), ("mbpp", 4)):
        assert found[name][0]["n"] - found[name][0]["as_due"] <= most
    for name in ("humaneval", "mbpp"):
        assert found[name][0]["per_second_a_core"] >= 8


def test_the_memory_table_is_that_of_its_results_file_and_below_what_is_asked():
    found = json.loads(bench_memory.RESULTS.read_text())
    assert bench_memory.table(found) in SCALE
    assert found["runs"]["chunks"]["ratio"] < 1.3 and found["vocabulary"] == 151_936


def test_the_table_of_speeds_is_that_of_its_results_files():
    paths = bench_rollout.RESULTS, bench_train.RESULTS, seeds.RESULTS
    rollout, train, default = (json.loads(path.read_text()) for path in paths)
    assert speed.tables(rollout, train, default) in README
    for size, found in rollout["sizes"].items():  # all of it, and nothing left out
        *_, batches, rounds = bench_rollout.SIZES[size]
        assert [int(B) for B in found["turns"]] == list(batches)
        assert {len(xs) for turns in found["turns"].values() for xs in turns.values()} == {rounds}
    assert {len(xs) for xs in train["toy"]["seconds"].values()} == {15}
    assert (ROOT / "tests/results/cost.png").is_file()


def test_every_claim_holds_in_every_seed():
    found = seeds.claims(json.loads(seeds.RESULTS.read_text()))
    assert len(found) == 9 and all(holds for *_, holds in found)


def test_the_results_file_holds_ten_runs_of_one_commit_and_of_the_default_settings():
    """Seeds 0 to 4 of both methods, none left out, on 2,000 test problems."""
    results = json.loads(seeds.RESULTS.read_text())
    found = [(r["seed"], r["method"]) for r in results]
    assert found == [(seed, method) for seed in range(5) for method in seeds.METHODS]
    assert len({r["commit"] for r in results}) == 1
    assert all((r["split"], r["n"]) == ("test", 2000) for r in results)
    for r in results:
        assert runs.Config(**r["config"]) == runs.Config(seed=r["seed"], method=r["method"])


def test_every_equation_and_test_that_the_readme_names_exists():
    rows = re.findall(r"^\| [^|]+ \| `(\w+)\.py: (\w+)` \| `(test_\w+)` \|$", README, re.MULTILINE)
    assert len(rows) >= 10
    for module, function, test in rows:
        source = (ROOT / f"{module}.py").read_text()
        assert re.search(rf"^ *(def|class) {function}\b", source, re.MULTILINE), function
        tests = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
        assert sum(f"\ndef {test}(" in text for text in tests) == 1, test


def test_requirements_are_exact_and_the_owners_four():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in lines] == ["torch", "numpy", "tiktoken", "sympy"]
    assert all(re.fullmatch(r"\w+==[\d.]+", line) for line in lines)


def test_imports_go_one_way():
    order = [name.removesuffix(".py") for name in MODULES]
    for i, name in enumerate(order):
        text = (ROOT / f"{name}.py").read_text()
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
        assert not imported & set(order[i:]), name


def test_ruff_is_clean():
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *words, str(ROOT)],
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stdout
