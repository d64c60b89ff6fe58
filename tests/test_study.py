"""The study: who is compared with whom, what is measured, what survives a kill, what is claimed."""

import copy
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
from test_run import options
from test_score import TINY
from truth import ROOT

import chat
import figures
import rollout
import run as runs
import score
import study
import verify

SMALL = TINY | dict(eval_n=40, stage1_steps=11, stage2_steps=10)
COMMAND = [sys.executable, str(ROOT / "eval.py"), "--study", *options(**SMALL)]
SOME = ["--seeds", "0", "1", "--only", "score", "three_turn"]


def results(folder):
    return json.loads(
        (folder / "runs/study-addition/study-part-results/study-part.json").read_text()
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    done = subprocess.run([*COMMAND, *SOME], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_study_ends_with_tables_figures_and_one_json(finished):
    folder, text = finished
    out = folder / "runs/study-addition/study-part-results"
    names = {path.name for path in out.iterdir()}
    assert names == {"study-part.json", "study-part.md"} | {
        f"{plot}.{kind}" for plot in figures.PLOTS for kind in ("png", "svg")
    }
    assert (out / "study-part.md").read_text() in text and "6/6" in text and "left" in text
    found = results(folder)
    assert [(r["name"], r["seed"]) for r in found] == [("base", 0), ("base", 1)] + [
        (name, seed) for seed in (0, 1) for name in ("score", "three_turn")
    ]
    for r in found:
        assert r["n"] == 40 and r["split"] == "test" and r["threads"] == 1
        assert r["wall_seconds"] > 0 and "commit" in r
        assert ("attempts" in r) == (r["name"] != "three_turn")  # measured in the main table only


def test_runs_of_a_seed_share_their_base_and_their_budget(finished):
    folder, _ = finished
    steps = {}
    for seed in (0, 1):
        base = runs.load(folder / f"runs/study-addition/base-seed{seed}/base.pt")["model"]
        for name in ("score", "three_turn"):
            path = folder / f"runs/study-addition/{name}-seed{seed}"
            mine = runs.load(path / "base.pt")["model"]
            assert all(torch.equal(base[key], mine[key]) for key in base)
            rows = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
            steps[name] = len(rows)
    assert set(steps.values()) == {21}
    for variant in study.VARIANTS.values():  # what differs is in sight: nothing but these options
        c = runs.Config(**variant.options)
        assert sum(phase.steps for phase in runs.schedule(c)[1:]) == 100
        same = ("batch", "group", "temperature", "digits", "sft_steps", "beta1", "beta2")
        assert all(getattr(c, name) == getattr(runs.Config(), name) for name in same)


def test_the_same_command_again_trains_nothing(finished):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.pt")}
    subprocess.run([*COMMAND, *SOME], cwd=folder, check=True, capture_output=True)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.pt")}


def without_clock(found):
    if isinstance(found, dict):
        clock = ("seconds", "wall_seconds")
        return {key: without_clock(x) for key, x in found.items() if key not in clock}
    return [without_clock(x) for x in found] if isinstance(found, list) else found


def test_a_killed_study_goes_on_and_loses_no_finished_run(finished, tmp_path):
    """The whole process group is killed as soon as a run after the bases is finished, and again
    later; the end is that of the study that was left alone."""
    for finish in (3, 4):
        process = subprocess.Popen([*COMMAND, *SOME, "--workers", "2"], cwd=tmp_path,
                                   stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        ready = []
        while len(ready) < finish and process.poll() is None:
            ready = list(tmp_path.glob("runs/study-addition/*/study-test-40.json"))
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kept = {path: path.stat().st_mtime_ns for path in ready}
    subprocess.run([*COMMAND, *SOME], cwd=tmp_path, check=True, capture_output=True)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert without_clock(results(tmp_path)) == without_clock(results(finished[0]))


def test_a_folder_of_other_settings_is_refused(finished):
    folder, _ = finished
    done = subprocess.run([*COMMAND, *SOME, "--lr", "0.1"], cwd=folder, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 2 and "see " in done.stderr
    assert "other settings" in (folder / "runs/study-addition/base-seed0.txt").read_text()
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--workers", "0"], "--workers"), (["--alpha", "-1"], "--alpha"), (["--only", "x"], "'x'"),
     (["--eval-n", "3"], "--eval-n"), (["--seed", "5"], "--seed is"), (["--base=x"], "--base is"),
     (["--method", "star"], "--method is"), (["--resume", "x"], "--resume is")],
)  # fmt: skip
def test_bad_options_are_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    try:
        status = study.main([*options(**SMALL), *words])
    except SystemExit as exit:  # argparse leaves so
        status = exit.code
    text = capsys.readouterr().err
    assert status == 2 and said in text and "Traceback" not in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [None, "", "[1, 2"])
def test_what_is_no_study_is_one_line(tmp_path, capsys, text):
    path = tmp_path / "study.json"
    if text is not None:
        path.write_text(text)
    assert figures.main([str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert figures.main([]) == 2 and "usage" in capsys.readouterr().err


def test_a_seed_or_a_method_given_twice_counts_once():
    found = study.jobs(("star", "score", "star"), (0, 1, 0), ROOT / "x")
    assert [(job.name, job.config.seed) for job in found] == [
        ("base", 0), ("base", 1), ("score", 0), ("star", 0), ("score", 1), ("star", 1)
    ]  # fmt: skip


def test_a_damaged_result_is_measured_again_and_a_run_is_worked_on_by_one(
    finished, tmp_path, monkeypatch
):
    folder = tmp_path / "base-seed0"
    shutil.copytree(finished[0] / "runs/study-addition/base-seed0", folder)
    job = study.Job("base", runs.read_about(folder)[0], folder, None)
    path = folder / "study-test-40.json"
    whole = json.loads(path.read_text())
    path.write_text(path.read_text()[:100])
    started, restore = [], study.restore
    monkeypatch.setattr(study, "restore", lambda path: started.append(path) or restore(path))
    lock = open(tmp_path / "base-seed0.lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # as another process that works on the run
    worker = threading.Thread(target=study.work, args=(job, 40, "test"))
    worker.start()
    worker.join(1.0)
    assert worker.is_alive() and not started and study.read(path) is None
    lock.close()
    worker.join()
    assert without_clock(study.read(path)) == without_clock(whole)


def test_without_matplotlib_the_tables_are_there_and_the_error_names_it(finished, tmp_path):
    path = tmp_path / "study.json"
    path.write_text(json.dumps(results(finished[0])))
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, str(ROOT / "figures.py"), str(path)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2 and "pip install matplotlib==" in done.stderr
    assert "| **SCoRe** |" in (tmp_path / "study.md").read_text()


# --- what is measured -----------------------------------------------------------------------------

PROBLEMS = [verify.Problem("1+1=", "2"), verify.Problem("2+3=", "5")]


def words(r, turn):
    return rollout.texts(r, turn, chat.format_of("addition"))


def spoken(firsts, seconds=None, cut=False):
    rows = [("1+1=", a, b) for a, b in zip(firsts, seconds or firsts, strict=True)]
    r = rollout.read_documents(rows, "cpu")
    r.truncated_BK[:] = cut
    return r


def test_the_next_attempt_begins_where_the_last_one_ended():
    said = [p.prompt for p in study.after(PROBLEMS, spoken(["7", "05"]))]
    assert said == ["1+1=7<|end|><|revise|>", "2+3=05<|end|><|revise|>"]
    r = spoken(["7", "05"], cut=True)
    r.ids_BT[r.ids_BT == 12] = 3
    assert study.after(PROBLEMS, r)[1].prompt == "2+3=053<|revise|>"


def test_votes_go_to_the_commonest_answer_and_ties_to_the_first(monkeypatch):
    """Of problem 1 (gold 2) and problem 2 (gold 5): 4 first attempts each, 2 corrected ones."""
    parallel = ["3", "2", "2", "2"] + ["5", "4", "4", "4"]
    corrected = ["2", "3"] + ["4", "5"]

    def draw(model, c, problems, temperature, seed, attempts=1):
        assert temperature == 0.7 and [p.gold for p in problems][0] == "2"
        return spoken(parallel) if attempts == 1 else spoken(["1"] * 4, corrected)

    monkeypatch.setattr(study, "say", draw)
    assert study.votes(None, None, PROBLEMS, most=4) == {
        "budget": [2, 4], "parallel": [0.5, 0.5], "sequential": [0.5, 0.5]
    }  # fmt: skip
    monkeypatch.setattr(study, "say", lambda *words, **more: spoken(["2"] * 8, cut=True))
    assert study.votes(None, None, PROBLEMS, most=4)["parallel"] == [0.0, 0.0]
    monkeypatch.setattr(study, "say", draw)
    parallel[1:3], corrected[2] = ["3", "2"], "5"
    assert study.votes(None, None, PROBLEMS, most=4)["parallel"] == [0.5, 0.0]
    assert study.votes(None, None, PROBLEMS, most=4)["sequential"] == [1.0, 1.0]


@pytest.fixture(scope="module")
def models():
    c = runs.Config(**SMALL | dict(digits=3))
    made = [
        runs.new_run(runs.Config(**SMALL | dict(digits=3, seed=s)), ROOT).policy for s in (0, 1)
    ]
    for model in made:
        with torch.no_grad():
            model.head.weight[0] += 0.3 * model.norm.weight  # answers of several lengths
    return c, made


def test_attempts_in_sight_of_the_last_one_are_second_attempts(models, monkeypatch):
    """Replayed one problem and one attempt at a time: each prompt is problem, last attempt,
    instruction; with all attempts in sight the first two are the same."""
    c, (model, _) = models
    problems = verify.problems(5, "test", np.random.default_rng(0), 3)
    seen = []
    monkeypatch.setattr(study, "right", lambda r, now: seen.append((r, now)) or [np.zeros(5)] * 4)
    found = study.many_attempts(model, c, problems, n=4)
    assert len(found["whole"]) == len(found["last"]) == 4
    whole, *single = [r for r, _ in seen]
    assert words(whole, 1) == words(single[0], 1)
    assert words(whole, 2) == words(single[1], 1)
    for before, (r, now) in zip(seen[1:], seen[2:], strict=False):
        for b, problem in enumerate(now):
            said = words(before[0], 1)[b]
            end = "" if before[0].truncated_BK[b, 0] else chat.END
            assert problem.prompt == problems[b].prompt + said + end + chat.REVISE
        assert r.truncated_BK.shape == (5, 1)


def test_repairs_are_of_the_authors_first_attempts(models, monkeypatch):
    c, (model, author) = models
    problems = verify.problems(6, "test", np.random.default_rng(0), 3)
    drawn, real = [], study.say

    def draw(who, *words, **more):
        drawn.append((who, real(who, *words, **more)))
        return drawn[-1][1]

    monkeypatch.setattr(study, "say", draw)
    verdicts = iter([[np.array([True, True, False, False, False, False])],
                     [np.array([True, False, True, False, False, False])]])  # fmt: skip
    monkeypatch.setattr(study, "right", lambda r, now: next(verdicts))
    found = study.repairs(model, author, c, problems, 0.5)
    assert found["repair_rate"] == 0.25 and found["spoil_rate"] == 0.5
    assert [who for who, _ in drawn] == [author, model]
    first, second = drawn[0][1], drawn[1][1]
    for b, problem in enumerate(problems):
        end = "" if first.truncated_BK[b, 0] else chat.END
        text = problem.prompt + words(first, 1)[b] + end + chat.REVISE
        ids = chat.encode(chat.toy_encoding(), text)
        assert second.ids_BT[b, : len(ids)].tolist() == ids


def test_a_fresh_draw_does_not_depend_on_the_first(models, monkeypatch):
    c, (model, _) = models
    seeds, real, problems = [], study.say, PROBLEMS
    answers = iter([spoken(["2", "4"]), spoken(["3", "5"])])
    monkeypatch.setattr(study, "say", lambda *w, **m: seeds.append((w[3:], m)) or next(answers))
    found = study.resampled(model, c, problems)
    assert seeds == [((1.0, 0), {}), ((1.0, 1), {})]
    assert (found["acc_t1"], found["acc_t2"], found["repair_rate"]) == (0.5, 0.5, 1.0)
    assert real(model, c, problems, 1.0, 0).truncated_BK.shape == (2, 1)


def test_problems_are_counted_by_carry_chain_and_attempt(models, monkeypatch):
    """5+5 carries once; 12+34 never: the first is right at attempt 2 alone, the second at both."""
    problems = [verify.Problem("05+05=", "10"), verify.Problem("12+34=", "46")]
    monkeypatch.setattr(study, "say", lambda *w, **m: spoken(["0", "46"], ["10", "46"]))
    assert study.by_carry(None, models[0], problems) == {"0": [1, 1, 1], "1": [1, 0, 1]}
    monkeypatch.undo()
    assert set(study.by_length(models[1][0], models[0], 10)) == {"1", "2", "3", "4", "5"}


def test_edits_are_between_the_two_attempts(monkeypatch):
    monkeypatch.setattr(
        study, "say", lambda *w, **m: spoken(["12", "12", "12"], ["12", "13", "45"])
    )
    counts = study.edits(None, runs.Config(), [None] * 3, 0.5)
    assert {i: n for i, n in enumerate(counts) if n} == {0: 1, 5: 1, 10: 1}  # 0, 1/4, 2/4


def test_a_curve_is_of_means_of_steps_after_the_base(tmp_path):
    rows = [dict(phase="base", step=1, loss=1.0)] + [
        dict(
            phase="stage1" if i < 3 else "score",
            step=i,
            acc_t1=i / 10,
            acc_t2=i / 5,
            changed=1 - i / 10,
        )
        for i in range(5)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert study.curve(tmp_path, mean_of=2) == [
        dict(step=2, phase="stage1", acc_t1=0.05, acc_t2=0.1, changed=0.95),
        dict(step=4, phase="score", acc_t1=0.25, acc_t2=0.5, changed=0.75),
        dict(step=5, phase="score", acc_t1=0.4, acc_t2=0.8, changed=0.6),
    ]


def test_what_is_watched_is_the_bases_and_the_own_attempts(finished, tmp_path, monkeypatch):
    folder, asked = finished[0] / "runs/study-addition", []
    config, _ = runs.read_about(folder / "score-seed0")
    run = runs.create(config, tmp_path / "run", folder / "base-seed0")

    def repairs(model, author, c, problems, temperature):
        asked.append((model is run.policy, author is run.base, author is run.policy, temperature))
        return {"repair_rate": len(asked)}

    monkeypatch.setattr(study, "repairs", repairs)
    study.watch(run, config, 8, tmp_path / "watched.json")
    seen = json.loads((tmp_path / "watched.json").read_text())
    assert asked[:4] == [(True, True, False, 0), (True, True, False, 1.0),
                         (True, False, True, 0), (True, False, True, 1.0)]  # fmt: skip
    assert seen[0] == dict(step=0, fixed_greedy=1, fixed_sampled=2, own_greedy=3, own_sampled=4)


def test_repairs_of_the_base_are_the_models_of_the_bases_attempts(finished, monkeypatch):
    """Measured of a run whose model repairs nothing that its base would: authors in their order."""
    folder = finished[0] / "runs/study-addition/score-seed0"
    config, _ = runs.read_about(folder)
    weights = {name: runs.load(folder / f"{name}.pt")["model"]["head.weight"]
               for name in ("base", "score")}  # fmt: skip
    seen = []
    monkeypatch.setattr(study, "repairs", lambda model, author, *_: seen.append((model, author)))
    study.measure(study.Job("score", config, folder, None), 40, "test")
    ((model, author),) = seen
    assert torch.equal(model.head.weight, weights["score"])
    assert torch.equal(author.head.weight, weights["base"])
    assert not torch.equal(weights["base"], weights["score"])


def test_the_watched_run_is_the_unwatched_one(finished, tmp_path):
    """Pausing to measure changes nothing, and what was measured is kept at each pause."""
    folder = finished[0] / "runs/study-addition"
    config, _ = runs.read_about(folder / "score-seed0")
    plain = runs.create(config, tmp_path / "plain", folder / "base-seed0")
    assert score.train(plain, threading.Event())
    log = (tmp_path / "plain/log.jsonl").read_text()
    assert log == (folder / "score-seed0/log.jsonl").read_text()
    watched = json.loads((folder / "score-seed0/watched.json").read_text())
    assert [row["step"] for row in watched] == [0, 10, 20, 21]
    assert set(watched[0]) == {"step", "fixed_greedy", "own_greedy", "fixed_sampled", "own_sampled"}


# --- what is claimed ------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "n", "p"), [(2.776, 5, 0.05), (4.604, 5, 0.01), (2.262, 10, 0.05)])
def test_p_values_are_those_of_the_tables_of_students_t(t, n, p):
    noise = np.linspace(-1, 1, n)
    shift = t * noise.std(ddof=1) / n**0.5
    assert figures.paired_t(list(noise + shift), [0.0] * n) == pytest.approx(p, rel=1e-3)
    assert figures.paired_t([0.0] * n, list(noise + shift)) == pytest.approx(p, rel=1e-3)


def invented(**changes):
    """Return runs of three seeds in which every claim holds, but for changes of (t1, t2)."""
    pairs = dict(base=(50, 50), score=(60, 95), multi_turn=(80, 85), pair_sft=(52, 60),
                 no_bonus=(60, 80)) | changes  # fmt: skip
    found = []
    for i, (name, (t1, t2)) in enumerate(pairs.items()):
        for seed in range(3):
            noise = 0.001 * seed * (i % 2)
            m = dict(acc_t1=t1 / 100, acc_t2=t2 / 100 + noise, repair_rate=0.5, spoil_rate=0.1)
            m |= dict(delta=m["acc_t2"] - m["acc_t1"], delta_i_to_c=0.4, delta_c_to_i=0.1)
            found.append({
                "name": name, "seed": seed, "phases": {name: m | {"sampled": m}},
                "curve": [{"changed": 0.4 + noise}, {"changed": 0.2}], "resampled": m,
                "votes": {"parallel": [0.5, 0.6], "sequential": [0.5, 0.7 + noise]},
                "attempts": {"last": [0.6] + [0.95] * 9, "whole": [0.6] + [0.95] * 9},
                "watched": [dict(step=0, fixed_sampled=0.1, own_sampled=0.1 + noise),
                            dict(step=9, fixed_sampled=0.3 + noise, own_sampled=0.05)],
                "repairs_of_base": m, "config": {"lr": 1.0},
            })  # fmt: skip
    return found


def verdicts(found):
    return [holds for *_, holds in figures.claims(figures.grouped(found))]


def test_claims_are_told_true_from_false():
    assert verdicts(invented()) == ["yes"] * 11
    for changes, expected in (
        (dict(multi_turn=(90, 96)), {0}),
        (dict(pair_sft=(40, 94)), {1, 3}),
        (dict(no_bonus=(40, 95)), {4}),
        (dict(multi_turn=(10, 90)), {1, 2}),
    ):
        found = verdicts(invented(**changes))
        assert {i for i, holds in enumerate(found) if holds == "no"} == expected
        assert found.count("yes") == 11 - len(expected)
    for i, change in (
        (5, {"curve": [{"changed": 0.2}, {"changed": 0.4}]}),
        (6, {"votes": {"parallel": [0.7], "sequential": [0.6]}}),
        (7, {"attempts": {"last": [0.6] + [0.95] * 8 + [0.5], "whole": [0.95] * 10}}),
        (8, {"attempts": {"whole": [0.6] + [0.95] * 8 + [0.5], "last": [0.95] * 10}}),
    ):
        found = verdicts([run | change for run in invented()])
        assert [j for j, holds in enumerate(found) if holds == "no"] == [i]
    found = invented()
    for run in found:
        run["watched"].reverse()
        run["watched"][0]["step"] = 0
    assert verdicts(found)[-2:] == ["no", "no"]
    found[-1]["watched"] = found[-1]["watched"][1:]
    late = copy.deepcopy(invented())
    for run in late:
        del run["watched"][0]
    assert len(verdicts(late)) == 9  # no start, no claim on how it went


def test_a_difference_within_the_noise_is_not_shown():
    found = figures.claim("a", [50.0, 60, 70], [55.0, 50, 60])
    assert found[2] == "not shown" and ", p 0." in found[1]
    assert figures.claim("a", [2.0, 2.1, 2.2], [1.0, 1.1, 1.3])[2] == "yes"
    assert figures.claim("a", [2.0, 2.1, 2.2], [1.0, 1.1, 1.3], level=1e-9)[2] == "not shown"
    assert figures.claim("a", [1.0, 1.0], [1.0, 1.0])[2] == "no"
    assert figures.claim("a", [1.0], [0.0]) == ("a", "1.0 against 0.0", "not shown")
    for tries, expected in (([0.9, 0.95, 0.96], "not shown"), ([0.5, 0.51, 0.52], "no")):
        found = [run for run in invented() if run["name"] == "score"]
        for run, last in zip(found, tries, strict=True):
            run["attempts"] = dict(last=[0.6] + [0.95] * 8 + [last], whole=[0.95] * 10)
        assert [verdict for *_, verdict in figures.claims(figures.grouped(found))][1] == expected


def test_of_one_seed_nothing_is_tested():
    one = [run for run in invented() if run["seed"] == 0]
    assert "(p" not in figures.compared(figures.grouped(one), ["base", "score", "multi_turn"])
    assert all(x != x for x in figures.holm([0.1, float("nan")]))


def test_stage_1_alone_is_scores_run_before_stage_2():
    found = [run for run in invented() if run["name"] in ("base", "score")]
    for run in found[3:]:
        early = dict(run["phases"]["score"], acc_t2=0.7)
        run["phases"] = {"base": None, "stage1": early | {"sampled": early}, **run["phases"]}
    rows = cut(figures.sections(found)["Methods, greedy"])
    assert [row[0] for row in rows[2:]] == ["base", "SCoRe's Stage I alone", "**SCoRe**"]
    assert rows[3][1:3] == ["60.0 ± 0.0", "70.0 ± 0.0"] and rows[4][2] == "95.1 ± 0.1"


def cut(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_corrected_p_values_stand_in_the_tables():
    """Two methods, differences from SCoRe's 95 / 35 of known t: 4.303 (p 0.05), 9.925 (p 0.01)."""
    found = [run for run in invented() if run["name"] in ("base", "score")]
    for name, t in (("multi_turn", 4.303), ("pair_sft", 9.925)):
        for run in [run for run in invented() if run["name"] == "score"]:
            noise = (run["seed"] - 1) * 0.01
            value = 0.95 + 0.001 * run["seed"] - t * 0.01 / 3**0.5 + noise
            m = dict(run["phases"]["score"], acc_t2=value)
            found.append(run | {"name": name, "phases": {name: m}})
    rows = cut(figures.compared(figures.grouped(found), ["score", "multi_turn", "pair_sft"]))
    assert [row[6] for row in rows[3:]] == ["-2.5 (p 0.050)", "-5.7 (p 0.020)"]


def test_other_tables_by_hand():
    found = [run for run in invented() if run["name"] in ("base", "score")]
    rows = cut(figures.rerolled(figures.grouped(found)))
    assert rows[3] == ["SCoRe", "60.0 ± 0.0", "95.1 ± 0.1", "+35.1 ± 0.1", "50.0 ± 0.0",
                       "95.1 ± 0.1", "+35.1 ± 0.1", "50.0 ± 0.0"]  # fmt: skip
    for run in found:
        run["repairs_of_base"] = dict(repair_rate=0.2, spoil_rate=0.3)
    rows = cut(figures.shifted(figures.grouped(found)))
    assert rows[3] == ["SCoRe", "20.0 ± 0.0", "50.0 ± 0.0", "30.0 ± 0.0", "10.0 ± 0.0"]
    three = [run | {"three": {phase: [0.1 + i, 0.2 + i, 0.3 + i] for i, phase in
                              enumerate(("base", "stage1", "stage1b", "three_turn"))}}
             for run in found]  # fmt: skip
    rows = cut(figures.three_attempts({"three_turn": three}))
    assert rows[4][:4] == ["Stage I (b)", "210.0 ± 0.0", "220.0 ± 0.0", "230.0 ± 0.0"]
    for i, run in enumerate(found):
        run["config"] = {"lr": 0.1 * (1 + i % 2)}
        run["phases"][run["name"]]["acc_t2"] = 0.5 + 0.1 * (i % 2)
    assert "| 50.0 (" in figures.tuning(found) and "| **60.0 (" in figures.tuning(found)


def test_a_band_is_a_standard_error(monkeypatch):
    drawn = {}
    axis = types.SimpleNamespace(
        plot=lambda x, y, *_, **__: drawn.update(mean=list(y)),
        fill_between=lambda x, low, high, **_: drawn.update(low=list(low), high=list(high)),
    )
    figures.band(axis, [0, 1], [[0.1, 0.2], [0.2, 0.2], [0.3, 0.2]], "red")
    assert drawn["mean"] == pytest.approx([20, 20])
    assert drawn["high"] == pytest.approx([20 + 10 / 3**0.5, 20])
    assert drawn["low"] == pytest.approx([20 - 10 / 3**0.5, 20])


def test_tables_give_means_errors_and_differences_in_points():
    lines = figures.compared(figures.grouped(invented()), ["base", "score", "multi_turn"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()]
    assert rows[3][:4] == ["**SCoRe**", "60.0 ± 0.0", "95.1 ± 0.1", "+35.1 ± 0.1"]
    assert rows[4][6:8] == ["-10.1 (p 0.000)", "-30.1 (p 0.000)"]
    assert rows[3][8] == "60.0 → 64.4, +4.4"
