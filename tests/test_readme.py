"""Is what the READMEs say so? Commands run, links lead somewhere, tables are those of the files."""

import concurrent.futures
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rollout
import score
import verify
from ports import engines, one_row
from scale import train
from study import tables
from tests.bench import bench_busy, bench_memory, bench_rollout, bench_verify, speed
from tests.scale import tiny
from tests.scale.test_problems import GSM8K, MBPP
from tests.truth import ROOT

ROOMS = ("tasks", "scale", "study", "ports")
PAGES = {name: ROOT / name / "README.md" for name in (".", *ROOMS, "tests/bench")}
CORE = ("verify", "model", "rollout", "score", "eval")
README = PAGES["."].read_text()
TINY = dict(
    n_layer=1, d_model=8, d_ff=8, sft_steps=2, sft_batch=4, stage1_steps=2, stage2_steps=2,
    batch=8, group=2, eval_n=8,
)  # fmt: skip
PRESET = " --batch 8 --group 2 --stage1-steps 1 --stage2-steps 1 --max-new 4 --eval-n 4"
SMALLER = {  # more options of programs that are not made small by their settings
    "study": ["--seeds", "0", "--only", "score"], "study.map": ["--seeds", "0", "--task", "signs"],
    "tests/bench/bench_memory.py": ["--quick"],
    "tests/bench/speed.py": ["--quick"],
    "tests/bench/bench_verify.py": ["--only", "prose"],
}  # fmt: skip
FILES = {"train.jsonl": GSM8K, "test.jsonl": GSM8K[:4], "mbpp.jsonl": MBPP}


def found(path):
    return json.loads((ROOT / path).read_text())


def seeds() -> str:
    """Return README's table: means over seeds of what the first command trains."""
    group = tables.grouped(found("study/results/study.json"))
    means = tables.means(group, ["base", "multi_turn", "stage1", "score"])
    return tables.markdown(tables.METRICS, means)


TABLES = {
    "study: seeds": seeds, "tests/bench/speed.py": speed.tables,
    "ports/one_row.py": lambda: one_row.table("stage2"), "ports/engines.py": engines.table,
    "tests/bench/bench_memory.py": lambda: bench_memory.table(found("tests/results/memory.json")),
}  # fmt: skip


# --- commands -------------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """Return the words of each command in the page's fenced sh blocks, without comments; of a
    module those in its docstring."""
    text = page.read_text()
    if page.suffix == ".py":
        lines = re.findall(r"^    ((?:python|torchrun) .*)$", text.split('"""')[1], re.M)
    else:
        blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
        lines = "".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split(" && ")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


class AtOnce:
    """A pool of processes that is none: the study's jobs are done in this one."""

    def __init__(self, *_):
        pass

    def submit(self, work, *given):
        done = concurrent.futures.Future()
        done.set_result(work(*given))
        return done

    def shutdown(self, **_):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the empty folder of a reader of the pages."""
    return tmp_path_factory.mktemp("reader")


@pytest.fixture
def reader(monkeypatch):
    """Return a function to stand in a folder, with a checkpoint and files of problems, where all
    settings that are not given are tiny."""
    find_task, run_process, threads = score.find_task, subprocess.run, torch.get_num_threads()

    def tiny_task(name):
        task, settings = find_task(name)
        return task, settings | TINY

    def run(words, **more):
        if words[:2] == [sys.executable, ROOT / "eval.py"]:
            return SimpleNamespace(returncode=execute(["python", "eval.py", str(words[2])]))
        return run_process(words, **more)

    def stand(folder):
        if not (folder / "study").exists():
            for name in ("Qwen2.5-0.5B-Instruct", "FOLDER"):
                tiny.checkpoint(folder / name)
            for name, rows in FILES.items():
                (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
            shutil.copytree(ROOT / "study/results", folder / "study/results")
            (folder / "ports").mkdir()
        monkeypatch.chdir(folder)

    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(score, "find_task", tiny_task)
    monkeypatch.setattr(rollout, "find_task", tiny_task)  # of score.py as a main program
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", AtOnce)
    presets = {name: options + PRESET for name, options in train.PRESETS.items()}
    monkeypatch.setattr(train, "PRESETS", presets)
    yield stand
    torch.set_num_threads(threads)


def execute(words: list[str]) -> int:
    """Run a Python command as a main program of this process; return its exit status."""
    _, program, *argv = words
    if program in ("-m", "-c"):
        program, *argv = argv
    sys.argv = [program, *argv, *SMALLER.get(program, [])]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if words[1] == "-c":
                exec(program, {"__name__": "__main__"})
            elif words[1] == "-m":
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / program), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def follow(words: list[str]) -> None:
    """Run a command of a document."""
    if words[0] == "torchrun":  # in one process; "--", as it would take --run for its own
        assert words[:5] == ["torchrun", "--nproc-per-node", "2", "-m", "--"], words
        words = ["python", "-m", *words[5:]]
    if words[:2] == ["pip", "install"]:
        pinned = (ROOT / "tests/requirements.txt").read_text().split()
        assert all(x in pinned or (ROOT / x).is_file() for x in words[2:] if x != "-r"), words
    elif words[1] == "tests/bench/bench_verify.py" and not bench_verify.SHARED.exists():
        pass  # its rows are not in this repository
    elif words[:3] != ["python", "-m", "pytest"]:  # which is this
        assert words[0] == "python" and execute(words) == 0, words


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_run_in_their_order(name, reader, folder):
    reader(folder)
    for words in commands(PAGES[name]):
        follow(words)


def test_the_commands_of_the_modules_run(reader, tmp_path):
    """Of core, tasks, scale and study, in this order; those of ports and benchmarks are above."""
    modules = [ROOT / f"{name}.py" for name in CORE]
    modules += [path for room in ROOMS[:3] for path in sorted((ROOT / room).glob("[a-z]*.py"))]
    found = {shlex.join(words): words for module in modules for words in commands(module)}
    assert len(found) >= len(modules)
    reader(tmp_path)
    for words in found.values():
        follow(words)


# --- the pages ------------------------------------------------------------------------------------


def test_links_and_figures_lead_to_files():
    for page in PAGES.values():
        for link in re.findall(r"\]\(([^)#]*?)(?:#[^)]*)?\)", page.read_text()):
            if link and not link.startswith("https://"):
                assert (page.parent / link).exists(), (page, link)


def test_the_first_screens_have_the_command_the_result_and_what_to_read():
    """All within 90 lines, the files with their true numbers of lines."""
    top = "\n".join(README.splitlines()[:90])
    assert commands(PAGES["."])[:2] == [
        ["pip", "install", "-r", "requirements.txt"], ["python", "score.py"],
    ]  # fmt: skip
    assert top.index("```sh") < top.index("| Acc@t1 |") < top.index("](verify.py)")
    told = re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \| (\d+) \|", top, re.M)
    true = [(name, str(len((ROOT / f"{name}.py").read_text().splitlines()))) for name in CORE]
    assert told == true
    assert re.findall(r"^\| \[(\w+)/\]\(\1/README.md\) \|", top, re.M) == list(ROOMS)


def test_each_row_of_the_readmes_table_names_functions_and_tests_that_exist():
    part = README.split("## Equation, function, test")[1].split("\n## ")[0]
    _, *rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| ([^|]+) \|$", part, re.M)
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(rows) >= 8
    for places, shown in rows:
        for module, names in re.findall(r"(\w+)\.py: ([\w`, ]+)", places):
            source = (ROOT / f"{module}.py").read_text()
            for name in re.findall(r"\w+", names):
                assert re.search(rf"^ *(?:def|class) {name}\b", source, re.M), name
        assert re.findall(r"test_\w+", shown), shown
        for test in re.findall(r"test_\w+", shown):
            assert f"\ndef {test}(" in tests, test


def test_tables_are_those_of_the_results_that_the_markers_name():
    for page in PAGES.values():
        for name, shown in re.findall(r"<!-- (.+?) -->\n(.*?)<!-- end -->", page.read_text(), re.S):
            assert shown.strip() == TABLES[name]().strip(), (page, name)


def test_the_transcript_is_a_mistake_copied_and_one_of_the_same_problem_repaired():
    line = r"^ +\w+  ([\d ]+=\d+)   gold (\S+) .*\n +attempt 1  (.+)\n +attempt 2  (.+)$"
    rows = re.findall(line, README, re.M)
    (prompt, gold, *copied), (again, gold2, *repaired) = rows
    assert (prompt, gold) == (again, gold2) and copied[0] == copied[1]
    numbers, target = prompt.split(" =")
    assert re.sub("[+-]", " ", gold).split() == numbers.split()
    assert sum(map(int, re.findall(r"[+-]\d", gold))) == int(target)
    rewards = [verify.signs(x, gold).reward for x in copied + repaired]
    assert rewards == [0, 0, 0, 1]


def test_the_model_has_as_many_parameters_as_told(tmp_path):
    n = sum(x.numel() for x in score.new_run(score.Config(), tmp_path).policy.parameters())
    assert f"{n:,}\nparameters" in README


def test_the_benchmarks_are_whole_and_as_good_as_asked():
    """No row, size, batch or round is left out."""
    sizes = found("tests/results/rollout.json")["sizes"]
    for size, (*_, batches, rounds) in bench_rollout.SIZES.items():
        assert list(sizes[size]["turns"]) == list(map(str, batches))
        assert {len(x) for part in sizes[size]["turns"].values() for x in part.values()} == {rounds}
    train = found("tests/results/train.json")
    parts = [x for part in ("toy", "compiled") for x in train[part]["seconds"].values()]
    assert {len(x) for x in parts} == {15}
    busy = found("tests/results/busy.json")["seconds"]
    assert list(busy) == [str(x) for x in bench_busy.LOADS]
    for seconds in busy.values():
        assert list(seconds) == list(bench_busy.TIMES)
        assert {len(x) for y in seconds.values() for x in y.values()} == {bench_busy.ROUNDS}
    assert found("tests/results/memory.json")["runs"]["chunks"]["ratio"] < 1.3
    verifiers = found("tests/results/verify.json")
    lines = bench_verify.table(verifiers).replace("| `program` ", "").splitlines()
    told = re.findall(r"^\| .* %\) \| .*$", PAGES["tasks"].read_text(), re.M)
    assert told == [line for line in lines if "%)" in line]
    sets = verifiers["sets"]
    ours, theirs = sets["pairs"]
    assert list(sets) == list(bench_verify.SETS)
    assert ours["as_due"] >= 0.97 * ours["n"] and ours["accepted_wrongly"] == 0
    assert ours["median_ms"] <= theirs["median_ms"]
    for name, most in (("gsm8k", 0), ("humaneval", 0), ("humaneval_none", 0), ("mbpp", 4)):
        assert sets[name][0]["n"] - sets[name][0]["as_due"] <= most
    assert min(sets[name][0]["per_second_a_core"] for name in ("humaneval", "mbpp")) >= 8


def test_requirements_are_exact():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in lines] == ["torch", "numpy", "tiktoken", "sympy"]
    assert all(re.fullmatch(r"\w+==[\d.]+", line) for line in lines)


def test_ruff_is_clean():
    for words in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *words, str(ROOT)], check=True)
