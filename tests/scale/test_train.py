"""From an open checkpoint and files of problems to a report, and what a run is held to."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import score
from model import load
from scale import memory, pretrained, train
from tests.scale import tiny, wide
from tests.scale.test_problems import GSM8K, HUMANEVAL, MBPP

SMALL = dict(
    sft_batch=8, sft_lr=1e-2, stage1_steps=1, stage2_steps=1, batch=8, group=2, micro_batch=3,
    sample_batch=4, max_new=24, eval_n=3, chunk=50,
)  # fmt: skip
ROWS = {"math": (GSM8K[:40], GSM8K[40:]), "mbpp": (MBPP, HUMANEVAL)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def options(tmp_path, checkpoint, monkeypatch):
    """Return a function that writes two files of rows into the current folder, and returns a
    command line with changes."""
    monkeypatch.chdir(tmp_path)
    here = SimpleNamespace(run=lambda argv: SimpleNamespace(returncode=evaluation.main(argv[2:])))
    monkeypatch.setattr(train, "subprocess", here)  # evaluates without a second Python

    def write(kind, /, **changes):
        for name, rows in zip(("train", "test"), ROWS[kind], strict=True):
            Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        given = dict(preset=kind, checkpoint=checkpoint, train="train.jsonl", test="test.jsonl")
        given |= SMALL | changes
        return [f"--{key.replace('_', '-')}={x}" for key, x in given.items()]

    return write


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_math_from_checkpoint_to_report_and_export(tmp_path, options, capfd, monkeypatch):
    """Worked answers, Stage I, Stage II, table, in one line; then an open checkpoint again."""
    assert train.main(options("math", dtype="float32", sft_steps=6)) == 0
    out, folder = capfd.readouterr().out, tmp_path / "runs/math"
    assert "| SCoRe |" in out and "3 held-out problems (test)" in out
    log, speed = lines(folder / "log.jsonl"), lines(folder / "speed.jsonl")
    assert [row["phase"] for row in log] == ["base"] * 6 + ["stage1", "score"]
    assert log[5]["loss"] < log[0]["loss"] - 0.1  # it learns to answer
    for row in log[6:]:
        assert row["gap"] < 1e-3 and row["unjudged"] == 0 and 1 < row["entropy2"] < 7
    assert abs(log[6]["kl1"]) < 1e-5  # the policy is still the base
    assert [row["step"] for row in speed] == [row["step"] for row in log]
    assert all(row["tokens_per_s"] > 0 and row["peak_mib"] > 50 for row in speed)
    assert "episodes_per_s" in speed[6]
    report = json.loads((folder / "report.json").read_text())
    assert list(report["phases"]) == ["base", "stage1", "score"]

    monkeypatch.chdir("/")
    assert train.main(["--export", str(folder), str(tmp_path / "open")]) == 0
    again, kept = pretrained.load(tmp_path / "open").state_dict(), load(folder / "score.pt")
    assert all(torch.equal(x, again[name]) for name, x in kept["model"].items())
    assert (tmp_path / "open/tokenizer.json").is_file()
    given = ["--export", str(folder), str(tmp_path / "narrow"), "--dtype", "bfloat16"]
    assert train.main([*given, "--phase", "stage1"]) == 0
    again = pretrained.load(tmp_path / "narrow", torch.bfloat16).state_dict()
    kept = load(folder / "stage1.pt")["model"]
    assert all(torch.equal(x.bfloat16(), again[name]) for name, x in kept.items())
    settings = json.loads((tmp_path / "narrow/config.json").read_text())
    assert settings["dtype"] == "bfloat16"
    given[2] = str(tmp_path / "none")
    assert train.main([*given, "--phase", "stage2"]) == 2
    error = capfd.readouterr().err
    assert "finished ['base', 'stage1', 'score']: cannot export stage2" in error
    for argv in (given[:2], [*given, "--dtype=int8"]):
        with pytest.raises(SystemExit, match="2"):
            train.main(argv)
    assert "invalid choice: 'int8'" in capfd.readouterr().err and not Path(given[2]).exists()


def test_programs_in_bfloat16(tmp_path, options):
    """With the preset's precision; the base computes what the policy does, so that their KL is 0
    until the policy changes."""
    assert train.main(options("mbpp", method="multi_turn", batch=4, eval_n=2)) == 0
    first, _ = lines(tmp_path / "runs/mbpp/log.jsonl")
    assert abs(first["kl1"]) < 1e-6 and abs(first["kl2"]) < 1e-6 < first["gap"] < 0.2
    run = score.open_run(tmp_path / "runs/mbpp")
    narrow = {x for x, weight in run.base.named_parameters() if weight.dtype == torch.bfloat16}
    assert narrow == {x for x, weight in run.base.named_parameters() if "norm" not in x
                      and not x.endswith("bias") and x != "embed.weight"}  # fmt: skip
    assert {weight.dtype for weight in run.policy.parameters()} == {torch.float32}
    assert {type(block) for block in run.policy.blocks} == {memory.RecomputedBlock}
    files = {path: path.read_bytes() for path in run.folder.glob("*.pt")}
    train.drive(run)  # which is finished
    assert files == {path: path.read_bytes() for path in run.folder.glob("*.pt")}
    base, given = load(run.folder / "base.pt")["model"], pretrained.load(run.config.checkpoint)
    assert all(torch.equal(base[name], x) for name, x in given.state_dict().items())


def test_presets_have_the_papers_settings_and_others_override_them(options):
    """arXiv 2409.12917v2, table 5."""
    names = (
        "lr",
        "stage1_steps",
        "stage2_steps",
        "batch",
        "alpha",
        "beta1",
        "beta2",
        "temperature",
    )
    for preset, paper in (
        ("math", (5e-6, 1500, 1500, 512, 10, 0.01, 0.1, 1)),
        ("mbpp", (1e-5, 750, 750, 128, 10, 0.01, 0.25, 1)),
    ):
        given = options(preset)[:4]  # the files
        for argv in (given, [given[0].replace("=", " "), *given[1:]]):
            c = train.parse(" ".join(argv).split())[1]
            assert tuple(getattr(c, name) for name in names) == paper
        assert train.parse([*given, "--lr=0.5"])[1].lr == 0.5


def test_policy_and_base_are_two_models(tmp_path):
    run = train.new_run(train.Config(**wide.SMALL), tmp_path)
    places = [{x.data_ptr() for x in gpt.parameters()} for gpt in (run.policy, run.base)]
    assert not places[0] & places[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(preset="mat"), "--preset must be one of"),
        (dict(preset="", max_new=0), "--checkpoint and --preset need each other"),
        (dict(train=""), "--train and --preset need each other"),
        (dict(max_new=4000), "takes up to"),
        (dict(checkpoint="/nowhere"), "/nowhere/config.json"),
        (dict(test="/nowhere.jsonl"), "/nowhere.jsonl"),
        (dict(sample_batch=3), "--sample-batch must be a multiple of --group: 3"),
        (dict(dtype="float16"), "--dtype must be one of"),
        (dict(base="runs/x"), "--base must be one of"),
    ],
)
def test_what_cannot_start_is_one_line_and_leaves_nothing(
    tmp_path, options, capsys, changes, words
):
    assert train.main(options("math", run=tmp_path / "run", **changes)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_run_is_bound_to_its_files(tmp_path, options, capsys):
    folder, c = train.parse(options("math"))
    score.create(c, folder)
    with open("train.jsonl", "a") as file:
        file.write("\n" + json.dumps(GSM8K[0]))
    assert train.main(["--resume", str(folder)]) == 2
    assert "train.jsonl or" in (error := capsys.readouterr().err) and error.count("\n") == 1


def outcome(folder):
    """Return what a run leaves, but for its times."""
    found = {path.name: load(path) for path in folder.glob("*.pt")}
    return [(folder / "log.jsonl").read_text(), json.dumps(found, default=torch.Tensor.tolist)]


@pytest.mark.parametrize("steps", [7, 10])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, steps):
    """Every other step is saved, and the log is cut back to it."""
    settings = wide.SMALL | wide.PARTS | dict(offline=0.4, sft_steps=6)
    settings |= dict(save_every=2)
    for name in ("whole", "killed"):
        score.create(train.Config(**settings), tmp_path / name)
    train.drive(score.open_run(tmp_path / "whole"))
    run, left = score.open_run(tmp_path / "killed"), iter(range(steps))

    def counted(step, run):
        next(left)
        return step(run)

    run.phases = [x._replace(step=partial(counted, x.step)) for x in run.phases]
    with pytest.raises((StopIteration, RuntimeError)):
        train.drive(run)
    train.drive(score.open_run(tmp_path / "killed"))
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert len(lines(tmp_path / "killed/speed.jsonl")) == {7: 12, 10: 11}[steps]


def test_tensorboard_is_shown_every_step_once(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    c = train.Config(**wide.SMALL | dict(tensorboard=1, sft_steps=4, save_every=3, method="base"))
    run = score.open_run(score.create(c, tmp_path / "run"))
    run.phases[0] = run.phases[0]._replace(steps=3)
    train.drive(run)
    found = events.EventAccumulator(str(tmp_path / "run/tensorboard"))
    found.Reload()
    log = lines(tmp_path / "run/log.jsonl")
    for name in ("loss", "seconds"):
        assert [x.step for x in found.Scalars(name)] == [1, 2, 3]
    shown = [x.value for x in found.Scalars("loss")]
    assert shown == pytest.approx([row["loss"] for row in log])


@pytest.mark.parametrize(("kind", "system"), [("math", "Solve the problem"), ("mbpp", "in Python")])
def test_an_open_checkpoint_is_evaluated_without_a_run(
    tmp_path, options, checkpoint, capsys, monkeypatch, kind, system
):
    """By the prompts of its file's kind, on all its rows, and as pretrained.load gives it; nothing
    is written into its folder, and no report over another's."""
    options(kind)
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    argv = [str(checkpoint), "--test=test.jsonl", "--max-new=24", "--dtype=float32", "--show=2"]
    asked, evaluate = [], evaluation.evaluate

    def seen(model, task, problems, temperature, at_once):
        weights = pretrained.load(checkpoint).state_dict()
        assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
        asked.append((task.decode(task.encode("")), len(problems), temperature))
        return evaluate(model, task, problems, temperature, at_once)

    monkeypatch.setattr(evaluation, "evaluate", seen)
    assert evaluation.main(argv) == 0 == evaluation.main(argv)
    report, n = json.loads(Path("report-model.json").read_text()), len(ROWS[kind][1])
    assert list(report["phases"]) == ["base"] and f"{n} held-out" in capsys.readouterr().out
    assert [x[1:] for x in asked] == [(n, 0.0), (n, 1.0)] * 2
    assert all(system in x[0] for x in asked)
    assert len(lines(Path("report-model.jsonl"))) == n
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == before

    for more in (argv[1:] + ["--n=2"], ["--colour=red"], ["--test=nowhere.jsonl"]):
        assert evaluation.main([str(checkpoint), *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert any(x in error for x in ("report-model.json is not", "--test, too", "is not of"))
    assert json.loads(Path("report-model.json").read_text()) == report
    Path("report-model.json").unlink()
    assert evaluation.main(argv[:2]) == 2
    assert "report-model.jsonl is not of this command" in capsys.readouterr().err
    Path("report-model.jsonl").unlink()
    assert evaluation.main([*argv, "--split=dev"]) == 2
    assert "split dev has no problem" in capsys.readouterr().err
    with open("test.jsonl", "a") as file:
        file.writelines("\n" + json.dumps(rows[0]) for rows in (GSM8K, MBPP))
    assert evaluation.main(argv) == 2
    assert "test.jsonl holds problems of another kind" in capsys.readouterr().err
    assert not list(Path().glob("report*"))


def test_looking_at_split_dev_changes_no_bit_of_the_training(tmp_path, capsys):
    """Every third step, of all phases; what is logged of it is eval.py's, and comes again when a
    run is killed."""
    settings = wide.SMALL | wide.PARTS | dict(eval_n=5)
    for name, every in ("without", 0), ("with", 3):
        score.create(train.Config(**settings, eval_every=every), tmp_path / name)
        train.drive(score.open_run(tmp_path / name))
    printed, log = capsys.readouterr().out, lines(tmp_path / "with/log.jsonl")
    dev = [{key: row.pop(key) for key in train.DEV if key in row} for row in log]
    assert [set(x) for x in dev] == [set(train.DEV) if n % 3 == 0 else set() for n in range(1, 14)]
    assert log == lines(tmp_path / "without/log.jsonl")
    assert outcome(tmp_path / "with")[1] == outcome(tmp_path / "without")[1]
    run = score.open_run(tmp_path / "with")  # ends with step 13
    drawn = run.task.draw(5, "dev", np.random.default_rng(0))
    found = evaluation.evaluate(run.policy, run.task, drawn, 0.0, 12)
    assert train.look(run, False) == {f"dev_{key}": found[key] for key in evaluation.COLUMNS}
    assert printed.count("dev_acc_t2") == 4
    conversation = r"   problem  .+=\d+\n attempt 1  .*   reward \S+\n attempt 2  .*   reward \S+\n"
    assert len(re.findall(conversation, printed)) == 2  # the base has no samples
    (tmp_path / "with/checkpoint.pt").unlink()
    train.drive(score.open_run(tmp_path / "with"))
    assert [{key: row[key] for key in train.DEV if key in row}
            for row in lines(tmp_path / "with/log.jsonl")] == dev  # fmt: skip


def test_a_setting_that_the_method_does_not_use_is_refused():
    """A preset's own are not asked for."""
    for more, named in (("--method=star --beta2=7", "--beta2"), ("--iterations 9", "--iterations")):
        with pytest.raises(ValueError, match=f"does not use {named}"):
            train.parse(more.split())
    assert train.parse(["--method", "pair_sft", "--sft-steps", "3"])[1].beta2 == 1


@pytest.mark.parametrize("more", [["--stage2-steps", "9"], ["--preset=math"], ["--run", "new"]])
def test_a_run_is_not_lengthened_and_the_line_says_what_to_do(tmp_path, capsys, more):
    c = train.Config(**wide.SMALL | dict(sft_steps=1, method="base"))
    folder = score.create(c, tmp_path / "run")
    train.drive(score.open_run(folder))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for argv in (["--resume", str(folder), *more], [*more, f"--resume={folder}"]):
        assert train.main(argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--resume takes all settings from the run" in error
        assert "--export RUN NEW, and train from --checkpoint NEW" in error
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("gone", ["checkpoint", "train", "test"])
def test_a_folder_or_file_that_has_moved_is_named(tmp_path, options, checkpoint, capsys, gone):
    """By eval.py, --resume and --export; --resume takes the new place, if it has the same."""
    shutil.copytree(checkpoint, "model")
    folder, c = train.parse(options("math", checkpoint="model"))
    score.create(c, folder)
    path = folder / "config.json"
    about = json.loads(path.read_text())
    new = about["config"][gone] + "-moved"
    path.write_text(json.dumps(about | {"config": about["config"] | {gone: new}}))
    before = path.read_bytes()
    for work in (
        lambda: evaluation.main([str(folder)]), lambda: train.main(["--resume", str(folder)]),
        lambda: train.main(["--export", str(folder), "new"]),
    ):  # fmt: skip
        assert work() == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and new in error
        assert ("No such file" if gone == "checkpoint" else f"--resume RUN --{gone} FILE") in error
    assert path.read_bytes() == before and not Path("new").exists()
    other = {"checkpoint": "nothing", "train": c.test, "test": c.train}[gone]
    assert train.main(["--resume", str(folder), f"--{gone}", other]) == 2
    assert path.read_bytes() == before
    moved = Path(about["config"][gone]).rename("elsewhere")
    assert train.parse(["--resume", str(folder), f"--{gone}={moved}"]) == (folder, None)
    assert json.loads(path.read_text())["config"][gone] == str(moved.resolve())
    assert score.open_run(folder).phase == 0
