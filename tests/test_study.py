"""The study: who is compared with whom, what is measured, what survives a kill, what is claimed."""

import collections
import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from test_run import options
from test_score import TINY
from truth import ROOT

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
    return json.loads((folder / "runs/study-addition/study-results/study.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    done = subprocess.run([*COMMAND, *SOME], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_study_ends_with_tables_figures_and_one_json(finished):
    folder, text = finished
    out = folder / "runs/study-addition/study-results"
    names = {path.name for path in out.iterdir()}
    assert names == {"study.json", "study.md"} | {
        f"{plot}.{kind}" for plot in figures.PLOTS for kind in ("png", "svg")
    }
    assert (out / "study.md").read_text() in text and "6/6" in text and "left" in text
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


@pytest.mark.parametrize("words", [["--workers", "0"], ["--alpha", "-1"], ["--only", "magic"]])
def test_bad_options_are_one_line(tmp_path, words):
    done = subprocess.run([*COMMAND, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and words[1] in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


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
    return rollout.texts(r, turn, rollout.toy_encoding())


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
            end = "" if before[0].truncated_BK[b, 0] else rollout.END
            assert problem.prompt == problems[b].prompt + said + end + rollout.REVISE
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
        end = "" if first.truncated_BK[b, 0] else rollout.END
        text = problem.prompt + words(first, 1)[b] + end + rollout.REVISE
        ids = rollout.encode(rollout.toy_encoding(), text)
        assert second.ids_BT[b, : len(ids)].tolist() == ids


def test_a_fresh_draw_does_not_depend_on_the_first(models, monkeypatch):
    c, (model, _) = models
    seeds, real = [], study.say
    monkeypatch.setattr(study, "say", lambda *w, **m: seeds.append((w[3:], m)) or real(*w, **m))
    problems = verify.problems(30, "test", np.random.default_rng(0), 3)
    found = study.resampled(model, c, problems)
    assert seeds == [((1.0, 0), {}), ((1.0, 1), {})] and found["n"] == 30


def test_problems_by_carry_and_length_are_all_counted(models):
    c, (model, _) = models
    problems = verify.problems(50, "test", np.random.default_rng(0), 3)
    found = study.by_carry(model, c, problems)
    assert sum(counts[0] for counts in found.values()) == 50
    assert set(found) <= {"0", "1", "2", "3"}
    assert set(study.by_length(model, c, 10)) == {"1", "2", "3", "4", "5"}


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
    for name, (t1, t2) in pairs.items():
        for seed in range(3):
            m = dict(acc_t1=t1 / 100, acc_t2=(t2 + 0.1 * seed) / 100)
            m |= dict(delta=m["acc_t2"] - m["acc_t1"], delta_i_to_c=0.4, delta_c_to_i=0.1)
            found.append({
                "name": name, "seed": seed, "phases": {name: m | {"sampled": m}},
                "curve": [{"changed": 0.4}, {"changed": 0.2}],
                "votes": {"parallel": [0.5, 0.6], "sequential": [0.5, 0.7]},
                "attempts": {"last": [0.6] + [0.95] * 9},
                "watched": [dict(fixed_sampled=0.1, own_sampled=0.1),
                            dict(fixed_sampled=0.3, own_sampled=0.05)],
            })  # fmt: skip
    return found


def verdicts(found):
    return [holds for *_, holds in figures.claims(figures.grouped(found))]


def test_claims_are_told_true_from_false():
    assert verdicts(invented()) == [True] * 10
    fails = collections.Counter()
    for changes in (dict(multi_turn=(90, 96)), dict(pair_sft=(40, 94)), dict(no_bonus=(40, 95)),
                    dict(multi_turn=(10, 90))):  # fmt: skip
        fails[tuple(i for i, holds in enumerate(verdicts(invented(**changes))) if not holds)] += 1
    assert fails == {(0,): 1, (1, 3): 1, (4,): 1, (1, 2): 1}
    for i, (key, value) in enumerate((
        ("curve", [{"changed": 0.2}, {"changed": 0.4}]),
        ("votes", {"parallel": [0.7], "sequential": [0.6]}),
        ("attempts", {"last": [0.6, 0.95, 0.9] + [0.95] * 7}),
    ), 5):  # fmt: skip
        found = [run | {key: value} for run in invented()]
        assert [j for j, holds in enumerate(verdicts(found)) if not holds] == [i]
    found = copy.deepcopy(invented())
    for run in found:
        run["watched"].reverse()
    assert verdicts(found) == [True] * 8 + [False] * 2


def test_tables_give_means_errors_and_differences_in_points():
    lines = figures.compared(figures.grouped(invented()), ["base", "score", "multi_turn"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()]
    assert rows[3][:4] == ["**SCoRe**", "60.0 ± 0.0", "95.1 ± 0.1", "+35.1 ± 0.1"]
    assert rows[4][6:8] == ["-10.0 (p 0.000)", "-30.0 (p 0.000)"]
    assert rows[3][8] == "60.0 → 64.4, +4.4"
