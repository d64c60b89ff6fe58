"""A run can be killed, stopped, resumed and mistyped, and loses nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields

import pytest
import torch
from test_score import TINY
from truth import ROOT

import model
import run as runs
import score

CONFIG = runs.Config(**TINY | dict(save_every=2, adaptive_beta2=True, offline=0.5))
STEPS = 4 + 3 + 3


class StopAfter(threading.Event):
    """Asks to stop, or dies without a word, after a number of steps."""

    def __init__(self, steps, die=False):
        super().__init__()
        self.left, self.die = steps, die  # the loop asks once a step

    def is_set(self):
        self.left -= 1
        if self.left < 0 and self.die:
            raise ZeroDivisionError
        return self.left < 0


def finish(folder):
    assert score.train(runs.restore(folder), threading.Event())


def outcome(folder, config=CONFIG):
    """Return all that a run leaves, but for its seconds."""
    files = {"log": (folder / "log.jsonl").read_bytes()}
    for name in (*(phase.name for phase in runs.schedule(config)), "checkpoint"):
        content = runs.load(folder / f"{name}.pt")
        content.get("progress", content).pop("seconds")
        files[name] = flatten(content)
    return files


def flatten(x):
    if isinstance(x, torch.Tensor):
        return (x.dtype, x.tolist())
    if isinstance(x, dict):
        return {key: flatten(value) for key, value in x.items()}
    return [flatten(value) for value in x] if isinstance(x, list) else x


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert score.train(runs.create(CONFIG, folder), threading.Event())
    return outcome(folder)


@pytest.mark.parametrize("die", [False, True], ids=["stopped", "killed"])
@pytest.mark.parametrize("steps", range(STEPS))
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, uninterrupted, steps, die):
    """Stopped after each possible number of steps, with and without saving, then continued."""
    run, folder = runs.create(CONFIG, tmp_path / "run"), tmp_path / "run"
    if die:
        with pytest.raises(ZeroDivisionError):
            score.train(run, StopAfter(steps, die))
    else:
        assert not score.train(run, StopAfter(steps))
    torch.manual_seed(steps)
    finish(folder)
    assert outcome(folder) == uninterrupted


def test_a_run_stopped_at_every_step_is_still_the_same(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    runs.create(CONFIG, folder)
    stops = 0
    while not score.train(runs.restore(folder), StopAfter(0)):
        stops += 1
    assert stops == STEPS
    assert outcome(folder) == uninterrupted


@pytest.mark.parametrize("method", ["star", "pair_sft_plus", "star_stage2", "three_turn"])
def test_other_methods_resume_bit_for_bit_too(tmp_path, method):
    """Stopped and killed in turns after every step or two, then compared."""
    config = runs.Config(**TINY | dict(save_every=2), method=method)
    assert score.train(runs.create(config, tmp_path / "whole"), threading.Event())
    runs.create(config, tmp_path / "run")
    for i in range(50):
        try:
            if score.train(runs.restore(tmp_path / "run"), StopAfter(i % 3, die=i % 3 > 0)):
                break
        except ZeroDivisionError:
            pass
    whole, cut = (outcome(tmp_path / name, config) for name in ("whole", "run"))
    assert whole == cut and i > 4


def test_a_compiled_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Policy, base and Stage I's weights go through the compiler, here one that errs by 1 %, before
    and after; the check of the sampler, in float64, does not."""
    seen = set()

    def compiled(f):
        def call(gpt, *words):
            seen.add((gpt.norm.weight.dtype, gpt.norm.weight.requires_grad))
            return 1.01 * f(gpt, *words)

        return call

    monkeypatch.setattr(model, "compiled", compiled)
    monkeypatch.setenv("CXX", sys.executable)
    config = runs.Config(**TINY | dict(save_every=2), method="three_turn", compile=True)
    assert score.train(runs.create(config, tmp_path / "whole"), threading.Event())
    runs.create(config, tmp_path / "run")
    assert runs.restore(tmp_path / "run").policy.compiled
    while not score.train(runs.restore(tmp_path / "run"), StopAfter(0)):
        pass
    assert outcome(tmp_path / "whole", config) == outcome(tmp_path / "run", config)
    assert seen == {(torch.float32, True), (torch.float32, False)}  # what is trained, and is not
    plain = runs.Config(**TINY | dict(save_every=2), method="three_turn")
    assert score.train(runs.create(plain, tmp_path / "plain"), threading.Event())
    assert outcome(tmp_path / "plain", plain) != outcome(tmp_path / "whole", plain)


def test_the_uninterrupted_log_has_a_line_a_step_and_no_clock(uninterrupted):
    rows = [json.loads(line) for line in uninterrupted["log"].splitlines()]
    order = [(row["phase"], row["step"]) for row in rows]
    assert order == [("base", i) for i in (1, 2, 3, 4)] + [
        (phase, i) for phase in ("stage1", "score") for i in (1, 2, 3)
    ]


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path, monkeypatch):
    """The machine fails while a checkpoint is written: the previous one is still there."""
    path = tmp_path / "x.pt"
    runs.save({"step": 1}, path)

    def fail(content, file):
        file.write(b"half a checkpoint")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        runs.save({"step": 2}, path)
    assert runs.load(path) == {"step": 1}


def refused(capsys, argv, *words):
    """Assert that a command line ends with status 2 and one line that holds the words."""
    try:
        status = score.main(argv)
    except SystemExit as exit:  # argparse leaves so
        status = exit.code
    out, error = capsys.readouterr()
    assert status == 2, out
    assert error.startswith("score.py: error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--colour", "red"], ["--colour"]),
        (["--steps"], ["--steps"]),
        (["--seed", "one"], ["--seed", "one"]),
        (["--seed", "-1"], ["--seed", "-1", "between 0 and"]),
        (["--digits", "1", "--split-seed", "341"], ["of 1 digits", "'test'"]),
        (["--digits", "0"], ["--digits", "0", "between 1 and 9"]),
        (["--digits", "10"], ["--digits", "10", "between 1 and 9"]),
        (["--batch", "0"], ["--batch", "0"]),
        (["--batch", "10", "--group", "4"], ["--batch", "multiple of --group 4", "10"]),
        (["--micro-batch", "6"], ["--micro-batch", "multiple of --group 4", "6"]),
        (["--group", "1"], ["--group", "between 2 and"]),
        (["--d-model", "33"], ["d_model", "33"]),
        (["--n-kv-head", "3"], ["n_head", "n_kv_head = 3"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--lr", "inf"], ["--lr", "inf"]),
        (["--temperature", "0"], ["--temperature", "0"]),
        (["--kl", "k3"], ["--kl", "k3", "exact", "k1"]),
        (["--method", "magic"], ["--method", "magic", "multi_turn"]),
        (["--copy", "0.9", "--right-revision", "0.2"], ["--copy", "add up"]),
        (["--rounds", "9999"], ["--rounds", "9999"]),
        (["--max-new", "8"], ["--max-new", "at least 9", "8"]),
        (["--device", "gpu"], ["--device", "gpu", "cpu, cuda or cuda:N"]),
        (["--device", "cuda:99"], ["--device", "cuda:99", "CUDA devices"]),
        (["--stage1-steps", "0"], ["--stage1-steps", "between 1 and"]),
    ],
)  # fmt: skip
def test_impossible_settings_are_one_line_and_leave_nothing(tmp_path, capsys, options, words):
    refused(capsys, ["--run", str(tmp_path / "run"), *options], *words)
    assert not list(tmp_path.iterdir())


def test_an_existing_run_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    refused(capsys, ["--run", str(tmp_path / "run")], "exists", "--resume")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    refused(capsys, ["--run", str(tmp_path / "file" / "run")], "file")


@pytest.mark.parametrize("other", [["--seed", "3"], ["--seed=3"], ["--no-qkv-bias"], ["--run=x"]])
def test_resume_takes_no_other_option(tmp_path, capsys, other):
    refused(capsys, [f"--resume={tmp_path}", *other], "--resume")


def test_a_run_whose_creation_was_killed_can_be_created_again(tmp_path, monkeypatch):
    def fail(run):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_checkpoint", fail)
        with pytest.raises(ZeroDivisionError):
            runs.create(CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    runs.create(CONFIG, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_run_records_what_it_was_started_with(tmp_path):
    runs.create(CONFIG, tmp_path / "run")
    config, about = runs.read_about(tmp_path / "run")
    assert config == CONFIG
    assert about["threads"] == torch.get_num_threads() and about["torch"] == torch.__version__


@pytest.mark.parametrize("damage", ["absent", "no checkpoint", "cut", "flipped", "empty", "text",
                                    "other size", "other content", "bad config", "bad value",
                                    "short log"])  # fmt: skip
def test_a_missing_or_damaged_run_is_one_line_and_left_as_it_is(tmp_path, capsys, damage):
    folder = tmp_path / "run"
    runs.create(CONFIG, folder)
    path = folder / "checkpoint.pt"
    content = path.read_bytes()
    if damage == "absent":
        folder = tmp_path / "nowhere"
    elif damage == "no checkpoint":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":  # one byte of a weight: the zip's checksum tells
        weight = runs.load(path)["policy"]["blocks.0.mlp.down.weight"].numpy().tobytes()
        where = content.index(weight) + 5
        path.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "other size":
        about = json.loads((folder / "config.json").read_text())
        about["config"]["d_model"] = 16
        (folder / "config.json").write_text(json.dumps(about))
    elif damage == "other content":
        runs.save({"policy": {}}, path)
    elif damage == "bad config":
        (folder / "config.json").write_text('{"config": {"seed": 0, "colour": "red"}}')
    elif damage == "bad value":
        about = json.loads((folder / "config.json").read_text())
        about["config"]["seed"] = 0.5
        (folder / "config.json").write_text(json.dumps(about))
    else:
        assert not score.train(runs.restore(folder), StopAfter(2))
        (folder / "log.jsonl").write_bytes((folder / "log.jsonl").read_bytes()[:50])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    refused(capsys, ["--resume", str(folder)], str(folder))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def options(**settings):
    return [
        word
        for name, value in settings.items()
        for word in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)]))
    ]


def test_every_setting_is_an_option_and_means_what_it_says():
    changed = dict(TINY, lr=0.5, kl="k1", qkv_bias=True, method="multi_turn")
    config, *_ = runs.parse(options(**changed))
    for f in fields(runs.Config):
        assert getattr(config, f.name) == changed.get(f.name, f.default), f.name
    default, folder, base = runs.parse([])
    assert default == runs.Config() and str(folder) == "runs/score-seed0" and base is None


def test_help_names_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        runs.parse(["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for f in fields(runs.Config):
        assert f"--{f.name.replace('_', '-')}" in text
        assert f"(default: {f.default}" in text
        if f.metadata["high"] is not None:
            assert f"(default: {f.default}; {f.metadata['low']:.10g} to" in text


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_command_resumes_to_the_same_log(tmp_path, signal_number):
    """The real commands, end to end: interrupted, resumed; and uninterrupted beside it."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "score.py")]
    longer = options(**TINY | dict(sft_steps=200, save_every=10**6))
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = subprocess.Popen([*command, "--run", str(stopped), *longer], env=env,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    with process:
        for line in process.stdout:
            if " 20/200" in line:
                break
        process.send_signal(signal_number)
        rest = process.stdout.read()
    assert process.returncode == 130
    assert f"python score.py --resume {stopped}" in rest
    subprocess.run([*command, "--resume", str(stopped)], env=env, check=True, capture_output=True)
    subprocess.run([*command, "--run", str(whole), *longer], env=env, check=True,
                   capture_output=True)  # fmt: skip
    assert (stopped / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    reports = [json.loads((f / "report.json").read_text())["phases"] for f in (stopped, whole)]
    for report in reports:
        for phase in report.values():
            del phase["seconds"]
    assert reports[0] == reports[1]


def test_a_finished_run_resumes_to_its_table(tmp_path):
    score.train(runs.create(CONFIG, tmp_path / "run"), threading.Event())
    before, start = (tmp_path / "run" / "log.jsonl").read_bytes(), time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "score.py"), "--resume", str(tmp_path / "run")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "| SCoRe |" in done.stdout and time.monotonic() - start < 60
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def test_tensorboard_is_shown_every_step_once(tmp_path):
    """Also those that a run takes again after it was stopped; and without it an error says how."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    c = runs.Config(**TINY, tensorboard=True)
    run = runs.create(c, tmp_path / "run")
    with pytest.raises(ZeroDivisionError):  # after two steps of Stage I, which are not saved
        score.train(run, StopAfter(6, die=True))
    run.board.flush()
    assert score.train(runs.restore(tmp_path / "run"), threading.Event())
    shown = EventAccumulator(str(tmp_path / "run/tensorboard"))
    shown.Reload()
    log = [json.loads(x) for x in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [e.step for e in shown.Scalars("grad_norm")] == list(range(1, len(log) + 1))
    for name in ("acc_t2", "kl1", "entropy2"):
        steps = [(i, row[name]) for i, row in enumerate(log, 1) if name in row]
        found = [(e.step, pytest.approx(e.value)) for e in shown.Scalars(name)]
        assert steps == found and len(found) == 6
    assert {"seconds", "peak_mib", "episodes_per_s"} <= set(shown.Tags()["scalars"])


def test_tensorboard_that_is_not_installed_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    argv = ["--run", str(tmp_path / "run"), "--tensorboard", *options(**TINY)]
    assert score.main(argv) == 2 and not (tmp_path / "run").exists()
    assert "pip install tensorboard==" in capsys.readouterr().err


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="a.pt.part cannot be written: .enforce fail"):
        runs.save({}, tmp_path / "a.pt")


def test_a_missing_compiler_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    argv = ["--run", str(tmp_path / "run"), "--compile", *options(**TINY)]
    assert score.main(argv) == 2
    assert "there is no no-such-compiler" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_several_processes_do_not_compile(monkeypatch):
    monkeypatch.setattr(runs, "processes", lambda: (1, 2))
    with pytest.raises(ValueError, match="--compile is for one process: .* got 2"):
        runs.new_run(runs.Config(**TINY, compile=True), None)
