"""A run can be killed, stopped, resumed and mistyped, and loses nothing."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
import torch

import eval as evaluation
import score
from tests.test_score import TINY
from tests.truth import ROOT

CONFIG = replace(TINY, sft_steps=5, stage1_steps=3, stage2_steps=7)
STEPS, FILES = 25, ("base", "multi_turn", "stage1", "score")


def options(**settings):
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items())
    return list(itertools.chain(*pairs))


# --- the real commands ----------------------------------------------------------------------------

LONGER = options(**asdict(replace(CONFIG, sft_steps=40, stage1_steps=80, stage2_steps=20)))
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return a folder with the five files and a run that they made, and what this printed."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ("verify", "model", "rollout", "score", "eval"):
        shutil.copy(ROOT / f"{name}.py", folder)
    command = [sys.executable, "score.py", "--run", "run", *LONGER]
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_five_files_alone_train_and_evaluate(alone):
    folder, printed = alone
    report = json.loads((folder / "run" / "report.json").read_text())
    assert list(report["phases"]) == list(FILES)
    assert "| SCoRe |" in printed and "100%" in printed
    assert sorted(x.name for x in folder.iterdir() if x.name != "__pycache__") == [
        "eval.py", "model.py", "rollout.py", "run", "score.py", "verify.py"
    ]  # fmt: skip


def test_a_run_that_was_killed_and_resumed_is_the_one_that_was_left_alone(alone, tmp_path):
    """In Stage I, between two checkpoints or while one is written, as it comes."""
    command, run = [sys.executable, alone[0] / "score.py"], tmp_path / "run"
    start = [*command, "--run", run, *LONGER]
    with subprocess.Popen(start, env=ENV, stdout=subprocess.PIPE, text=True) as job:
        next(line for line in job.stdout if "stage1    20 " in line)
        job.kill()
    assert job.returncode == -signal.SIGKILL
    done = subprocess.run([*command, "--resume", run], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = alone[0] / "run"
    for name in ("log.jsonl", "report.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert outcome(run) == outcome(whole)


# --- stopping and resuming ------------------------------------------------------------------------


def flatten(x):
    """Return tensors as lists, so that two outcomes compare to the bit."""
    if isinstance(x, torch.Tensor):
        return (x.dtype, x.tolist())
    if isinstance(x, dict):
        return {key: flatten(value) for key, value in x.items()}
    return [flatten(value) for value in x] if isinstance(x, list | tuple) else x


def outcome(folder):
    """Return all that a run leaves."""
    kept = {name: flatten(score.load(folder / f"{name}.pt")) for name in (*FILES, "checkpoint")}
    return kept | {"log": (folder / "log.jsonl").read_bytes()}


def go_on(folder, steps, monkeypatch):
    """Go on with a run until Ctrl-C comes after a number of steps; return the exit status."""
    taken = score.train

    def interrupted(run):
        for i, row in enumerate(taken(run)):
            yield row
            if i + 1 == steps:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(score, "train", interrupted)
        patch.setattr(evaluation, "main", lambda argv: 0)
        return score.main(["--resume", str(folder)])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Checkpoints come after every other step of a phase."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "BLOCK", 2)
        score.drive(score.open_run(score.create(CONFIG, folder)))
    return outcome(folder)


def test_a_run_has_one_writer_and_a_lock_left_behind_does_not_count(tmp_path, capsys):
    """The other process is one that waits with the lock in its hand, and then is killed."""
    folder = score.create(CONFIG, tmp_path / "run")
    wait = f"import model, pathlib; f = model.hold(pathlib.Path({str(folder / 'lock')!r})); input()"
    words = [sys.executable, "-c", wait]
    pipes = dict(stdin=subprocess.PIPE, cwd=ROOT, env=ENV)
    with subprocess.Popen(words, **pipes) as other:
        while not (folder / "lock").exists() or not (folder / "lock").read_text():
            assert other.poll() is None
        assert score.main(["--resume", str(folder)]) == 2
        assert f"{folder} is in use: process {other.pid} trains it" in capsys.readouterr().err
        assert not (folder / "log.jsonl").exists()
        other.kill()
    score.drive(score.open_run(folder))
    assert score.open_run(folder).phase == 4


@pytest.mark.parametrize("done", [0, 8])
def test_progress_is_named_as_wide_in_each_line_and_never_rounds_to_60_seconds(
    tmp_path, monkeypatch, capsys, done
):
    """The clock goes on by half a second less than a minute a step; of 25 steps the last 20 are
    taken to work on twice their rows. What is left is judged by the steps since it was resumed.
    And what is rounded to zero has no sign."""
    taken, seconds = score.train, itertools.count(0, 59.5)
    monkeypatch.setattr(score, "train", lambda run: (x | dict(kl1=-1e-5) for x in taken(run)))
    monkeypatch.setattr(score.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(score, "BLOCK", 1)
    run = score.open_run(score.create(CONFIG, tmp_path / "run"))
    assert len(list(itertools.islice(score.train(run), done))) == done
    score.drive(run)
    names, *lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in (names, *lines)}) == 1 and "-" not in "".join(lines)
    assert names.split()[:4] == ["samples:", "step", "loss", "acc_t1"]
    work = [CONFIG.sft_batch] * 5 + [2 * CONFIG.batch] * 20
    steps = range(done + 1, 26)
    expected = [int(59.5 * (n - done) * sum(work[n:]) / sum(work[done:n])) for n in steps]
    shown = [line.split()[-2:] for line in lines]
    assert [int(m[:-1]) * 60 + int(s[:-1]) for m, s in shown] == expected
    assert all(int(s[:-1]) < 60 for _, s in shown)
    shares = [line.split()[-3] for line in lines]
    assert shares == [f"{sum(work[:n]) / sum(work):.0%}" for n in steps]


@pytest.mark.parametrize("steps", [3, 5])
def test_a_run_stopped_again_and_again_is_bit_for_bit_the_same(
    tmp_path, monkeypatch, capsys, uninterrupted, steps
):
    """After 3 or 5 steps more, until its end: of these, those since the checkpoint come again.
    What stands in the global generator, or at the end of the log, does not matter."""
    monkeypatch.setattr(score, "BLOCK", 2)
    folder, goes = score.create(CONFIG, tmp_path / "run"), 1
    while go_on(folder, steps, monkeypatch) == 130:
        assert f"python score.py --resume {folder}" in capsys.readouterr().out
        torch.manual_seed(goes)
        with open(folder / "log.jsonl", "a") as log:
            log.write('{"phase": "base", "st')
        goes += 1
    assert goes > STEPS // steps and outcome(folder) == uninterrupted
    assert go_on(folder, 1, monkeypatch) == 0  # nothing is left to do
    assert outcome(folder) == uninterrupted


def test_the_log_has_a_line_a_step_and_no_clock(uninterrupted):
    rows = [json.loads(line) for line in uninterrupted["log"].splitlines()]
    steps = [(x, i + 1) for x, n in zip(FILES, (5, 10, 3, 7), strict=True) for i in range(n)]
    assert [(x["phase"], x["step"]) for x in rows] == steps
    assert all(set(x) == {"phase", "step", "loss", "grad_norm"} for x in rows[:5])
    assert all(abs(x["acc_t1"] * 12 - round(x["acc_t1"] * 12)) < 1e-5 for x in rows[5:])


def test_a_run_keeps_its_settings_and_goes_on_with_as_many_threads(tmp_path):
    score.parse(["--threads", "3"], score.Config)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    folder = score.create(CONFIG, tmp_path / "a" / "run")
    about = json.loads((folder / "config.json").read_text())
    assert about == dict(module="score", threads=1, config=asdict(CONFIG))
    (folder / "config.json").write_text(json.dumps(about | {"threads": 2}))
    try:
        run = score.open_run(folder)
        assert run.config == CONFIG and run.policy.threads == 2 and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


# --- what is refused ------------------------------------------------------------------------------


def refused(capsys, argv, *words):
    """Assert that a command ends with status 2 and a last line that holds the words, before which
    there is at most one of usage; that it prints nothing, and leaves all files as they are."""
    try:
        status = score.main([str(x) for x in argv])
    except SystemExit as exit:  # argparse leaves so
        status = exit.code
    out, error = capsys.readouterr()
    *usage, line = error.splitlines()
    assert status == 2 and not out
    assert line.startswith("score.py: error: ") and len(usage) <= 1
    for word in words:
        assert word in line, line


IMPOSSIBLE = dict(
    task=["magic", "../score", ""], size=["3", "10", "101"], seed=["-1", "1000000001"],
    control=["-1", "2"], device=["gpu", "cuda:0"], n_layer=["0", "201"], d_model=["7", "9000"],
    d_ff=["0", "40000"], sft_steps=["-1", "0"], sft_batch=["0", "2000000"], sft_lr=["-1", "1.1"],
    slip=["-0.1", "1.1"], slip_hard=["-0.1", "1.1"], checks=["-0.1", "1.1"],
    right_revisions=["-0.1", "1.1"], careless=["-0.1", "1.1"], stage1_steps=["-1"],
    stage2_steps=["-1"], batch=["0", "2", "13"], group=["1", "0", "5", "2000000"],
    lr=["-1", "1.1"], warmup=["-1"], temperature=["0", "0.001", "101"], alpha=["-1", "1000000001"],
    beta1=["-1"], beta2=["-1"], eval_n=["0", "2000000"],
)  # fmt: skip


@pytest.mark.parametrize("field", fields(score.Config), ids=lambda f: f.name)
def test_an_impossible_value_is_one_line_that_names_the_setting(
    tmp_path, capsys, monkeypatch, field
):
    """And nothing is left of the run."""
    monkeypatch.setattr(sys, "argv", ["score.py"])
    monkeypatch.setattr(score, "drive", None)
    option, bad = f"--{field.name.replace('_', '-')}", IMPOSSIBLE[field.name]
    if field.type is not str:
        bad = [*bad, "many", "0.5" if field.type is int else "nan", "inf"]
    for value in bad:
        given = asdict(CONFIG) | {field.name: value}
        refused(capsys, ["--run", tmp_path / "run", *options(**given)], option, value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--colour", "red"], ["--colour"]), (["--steps"], ["--steps"]), (["--seed"], ["--seed"]),
        (["--see", "1"], ["--see"]), (["--resume", "nowhere"], ["nowhere is not a run: no such"]),
        (["--resume", "taken"], ["taken is not a run: no taken/config.json"]),
        (["--stage1-steps=0", "--beta2=3"], ["--beta2 3.0 changes nothing"]),
        (["--stage2-steps=0", "--alpha", "1"], ["--alpha 1.0 changes nothing"]),
        (["--resume=x", "--seed", "3"], ["--resume", "no other option"]),
        (["--resume=x", "--run=y"], ["--resume", "no other option"]),
        (["--run", "taken"], ["taken exists", "--resume"]), (["--run", "file/run"], ["file/run"]),
        (["--run", "file"], ["file exists"]),
        (["--d-model", "18"], ["d_model must be a multiple of 8", "18"]),
        (["--careless", "1"], ["--right-revisions plus --careless must be", "1.01"]),
        (["--resume=x", "--no-control"], ["--resume", "no other option"]),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_changes_nothing(
    tmp_path, capsys, monkeypatch, argv, words
):
    """A folder that exists is left alone, also where it is empty or no run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["score.py"])
    monkeypatch.setattr(score, "drive", None)
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("mine")
    refused(capsys, argv, *words)
    assert {x.name for x in tmp_path.rglob("*")} == {"taken", "file"}


def changed(folder, name, **about):
    path = folder / "config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {name: known[name] | about if about else "magic"}))


DAMAGE = {
    "cut": lambda f, kept: (f / "checkpoint.pt").write_bytes(kept[: len(kept) // 2]),
    "empty": lambda f, kept: (f / "checkpoint.pt").write_bytes(b""),
    "other content": lambda f, kept: score.save({"policy": {}}, f / "checkpoint.pt"),
    "other size": lambda f, kept: changed(f, "config", d_model=16),
    "unknown setting": lambda f, kept: changed(f, "config", colour="red"),
    "impossible setting": lambda f, kept: changed(f, "config", group=1),
    "half a seed": lambda f, kept: changed(f, "config", seed=0.5),
    "unknown module": lambda f, kept: changed(f, "module"),
    "no text": lambda f, kept: (f / "config.json").write_text("{"),
    "no settings": lambda f, kept: (f / "config.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_one_line_that_names_it_and_left_as_it_is(tmp_path, capsys, damage):
    folder = score.create(CONFIG, tmp_path / "run")
    score.save(score.state_of(score.open_run(folder)), folder / "checkpoint.pt")
    DAMAGE[damage](folder, (folder / "checkpoint.pt").read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused(capsys, ["--resume", folder], str(folder))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("place", ["parse", "create", "drive"])
def test_a_run_that_is_stopped_says_how_to_go_on_if_it_has_begun(
    tmp_path, monkeypatch, capsys, place
):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(score, place, stopped)
    folder = tmp_path / "run"
    assert score.main(["--run", str(folder), *options(**asdict(CONFIG))]) == 130
    how = f"; go on with: python score.py --resume {folder}" if place == "drive" else ""
    assert capsys.readouterr().out.splitlines()[-1] == "stopped" + how
    assert folder.exists() == bool(how)


def test_an_error_in_a_run_is_one_line(tmp_path, capsys, monkeypatch):
    def fail(run):
        raise RuntimeError("the verifier has failed\nand this is how")

    monkeypatch.setattr(score, "drive", fail)
    assert score.main(["--run", str(tmp_path / "run"), *options(**asdict(CONFIG))]) == 2
    assert capsys.readouterr().err == "score.py: error: the verifier has failed\n"


# --- the command line -----------------------------------------------------------------------------


def test_every_setting_is_an_option_and_a_new_run_is_named_after_those_given():
    folder, config = score.parse(options(**asdict(TINY)), score.Config)
    assert config == TINY
    folder, config = score.parse(["--alpha", "0", "--seed", "3", "--lr=1e-3"], score.Config)
    assert config == score.Config(alpha=0.0, seed=3, lr=1e-3)
    assert str(folder) == "runs/score-alpha0.0-lr0.001-seed3"
    assert str(score.parse([], score.Config)[0]) == "runs/score-seed0"
    assert str(score.parse(["--run", "x/y", "--size", "2"], score.Config)[0]) == "x/y"
    assert score.parse(["--resume", "x"], score.Config)[1] is None
    folder, config = score.parse(["--no-control"], score.Config)
    assert str(folder) == "runs/score-control0-seed0" and config == score.Config(control=0)


def test_help_is_short_and_names_every_setting_with_its_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as exit:
        score.parse(["--help"], score.Config)
    lines = capsys.readouterr().out.splitlines()
    assert exit.value.code == 0 and len(lines) <= 90 and max(map(len, lines)) <= 100
    about = {words[0]: words[1:] for words in map(str.split, lines) if words}
    for f in fields(score.Config):
        default, *meaning = about[f"--{f.name.replace('_', '-')}"]
        assert f.type(default.replace("_", "")) == f.default or default.strip('"') == f.default
        assert meaning
    assert {"--run", "--resume", "--no-control"} <= set(about)
