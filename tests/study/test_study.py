"""The study: who is compared, what is measured, what survives a kill, and what README says."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import rollout
import score
import verify
from study import __main__ as study
from study import figures, measure, methods, tables
from tests.study.test_methods import TINY, made, same, weights

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "study/results"
README = (ROOT / "study/README.md").read_text()
SMALL = TINY | dict(eval_n=8, stage1_steps=11, stage2_steps=10)


def options(**settings):
    return [word for key, x in settings.items() for word in (f"--{key.replace('_', '-')}", str(x))]


def collected(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a quick study that was killed on the way, and what it then said: its
    workers have ended with it, and no finished run was touched."""
    runs = tmp_path_factory.mktemp("study") / "runs"
    words = [sys.executable, "-m", "study", "--quick", "--runs", str(runs), *options(**SMALL)]
    more = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen([*words, "--workers", "2"], **more) as process:
        for line in process.stdout:
            if " 3/10 " in line:
                break
        process.kill()
        process.communicate(timeout=60)  # all that could write have ended
    kept = {path: path.stat().st_mtime_ns for path in runs.glob("*/measured.json")}
    assert 3 <= len(kept) < 10
    done = subprocess.run([*words, "--workers", "2"], **more)
    assert done.returncode == 0, done.stdout
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    return runs, done.stdout


def test_a_study_ends_with_one_json_tables_and_figures(finished):
    runs, said = finished
    folder = runs / "quick-results"
    names = {"quick.json", "quick.md", *(f"{name}.png" for name in figures.FIGURES)}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "quick.md").read_text() in said and "10/10" in said
    found = json.loads((folder / "quick.json").read_text())
    assert [(run["name"], run["seed"]) for run in found] == [("base", 0), ("base", 1)] + [
        (name, seed) for seed in (0, 1) for name in study.KINDS["quick"][0]
    ]
    for run in found:
        assert (run["n"], run["split"], run["threads"]) == (8, "test", 1) and run["commit"]
        if run["name"] in ("score", "pair_sft"):
            assert [row["step"] for row in run["watched"]][:2] == [0, 10]
            assert run["watched"][-1]["step"] == 21 == run["curve"][-1]["step"]


def test_runs_of_a_seed_share_their_base_and_a_kill_left_no_trace(finished, tmp_path):
    runs, _ = finished
    for seed in (0, 1):
        for name in study.KINDS["quick"][0]:
            mine = weights(runs / f"{name}-seed{seed}/base.pt")
            assert same(mine, weights(runs / f"base-seed{seed}/base.pt"))
    c = replace(methods.Config(**SMALL), seed=1, base=str(runs / "base-seed1"), method="pair_sft")
    job = measure.Job("pair_sft", c, tmp_path / "run", 8, "test", "unknown")
    before = json.loads((runs / "pair_sft-seed1/measured.json").read_text())
    found = json.loads(json.dumps(measure.work(job)))
    for key in before.keys() - {"wall_seconds", "commit"}:
        assert found[key] == before[key], key
    with pytest.raises(ValueError, match="other settings"):
        measure.work(job._replace(config=replace(c, lr=0.1)))


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--workers", "0"], "max_workers"), (["--alpha", "-1"], "--alpha"), (["--only", "x"], "'x'"),
     (["--seed", "5"], "--seed is"), (["--base=x"], "--base is"), (["--task", "y"], "--task"),
     (["--table", "no.json"], "no.json"), (["--table", __file__], "char")],
)  # fmt: skip
def test_bad_options_are_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    try:
        status = study.main(words)
    except SystemExit as exit:  # argparse leaves so
        status = exit.code
    text = capsys.readouterr().err
    assert status == 2 and said in text.splitlines()[-1] and not list(tmp_path.glob("*.md"))


def test_jobs_are_done_once_and_differ_in_nothing_but_their_row(tmp_path):
    c = methods.Config(**SMALL)
    bases, rest = study.jobs(c, ("star", "score", "star"), (0, 1, 0), "test", (None,), tmp_path)
    assert [job.config.seed for job in bases] == [0, 1]
    found = [(job.name, job.config.seed, job.config.method) for job in rest]
    assert found == [(x, seed, x) for seed in (0, 1) for x in ("score", "star")]
    _, rest = study.jobs(c, study.NAMES, (3,), *study.KINDS["tune"][2:], tmp_path)
    assert len(rest) == len({job.folder for job in rest}) == 3 * 19
    for job in rest:
        own = tables.VARIANTS[job.name].options or dict(method=job.name)
        mine = dict(seed=3, base=str(tmp_path / "base-seed3"), lr=job.config.lr)
        assert job.config == replace(c, **own | mine) and job.config.lr in study.RATES


# --- what is measured -----------------------------------------------------------------------------

PROBLEMS = [verify.Problem("1+1=", "2"), verify.Problem("2+3=", "5")]
TASK = rollout.addition(methods.Config(**SMALL))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return two models that answer at several lengths."""
    runs = [made(tmp_path_factory.mktemp("run") / "x", size=3, seed=s) for s in (0, 1)]
    for run in runs:
        with torch.no_grad():
            run.policy.head.weight[0] += 0.3 * run.policy.norm.weight
    return runs[0], runs[1].policy


def test_attempts_in_sight_of_the_last_one_are_second_attempts(models, monkeypatch):
    """Replayed one problem and one attempt at a time: each begins behind problem, last attempt and
    instruction; with all attempts in sight the first two are the same."""
    run, _ = models
    problems, seen, real = verify.problems(5, "test", np.random.default_rng(0), 3), [], measure.say
    monkeypatch.setattr(measure, "say", lambda *x, **y: seen.append(real(*x, **y)) or seen[-1])
    found = measure.many_attempts(run.policy, run.task, problems, K=4)
    whole, *single = [r for r, _ in seen]
    assert (
        [len(found[x]) for x in ("whole", "last")] == [4, 4] == [len(single), len(whole.attempts)]
    )
    assert [whole.attempts[i] for i in (0, 1)] == [r.attempts[0] for r in single[:2]]
    for before, now in zip(single, single[1:], strict=False):
        for b, problem in enumerate(problems):
            ids = run.task.encode(problem.prompt) + before.attempts[0][b] + [13]
            assert now.ids_BT[b, : len(ids)].tolist() == ids


def test_repairs_are_of_the_authors_first_attempts_and_a_fresh_draw_of_none(models, monkeypatch):
    run, author = models
    problems, said = verify.problems(6, "test", np.random.default_rng(0), 3), []
    verdicts = iter([[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0]] * 2)

    def say(model, task, problems, temperature, seed, real=measure.say, **more):
        r = real(model, task, problems, temperature, seed, **more)[0]
        said.append((model, seed, temperature, r))
        return r, np.array([next(verdicts)], dtype=bool)

    monkeypatch.setattr(measure, "say", say)
    found = measure.repairs(run.policy, author, run.task, problems, 0.5)
    assert (found["repair_rate"], found["spoil_rate"]) == (0.25, 0.5)
    (who1, _, _, first), (who2, _, _, second) = said
    assert who1 is author and who2 is run.policy
    for b, problem in enumerate(problems):
        ids = run.task.encode(problem.prompt) + first.attempts[0][b] + [13]
        assert second.ids_BT[b, : len(ids)].tolist() == ids
    found = measure.resampled(run.policy, run.task, problems, 0.5)
    assert (found["acc_t1"], found["repair_rate"]) == (2 / 6, 0.25)
    assert [(x[0] is run.policy, *x[1:3]) for x in said[2:]] == [(True, 0, 0.5), (True, 1, 0.5)]
    assert said[2][3].attempts != said[3][3].attempts and len(said[3][3].attempts) == 1


def test_a_curve_is_of_means_of_steps():
    rows = [dict(phase="ab"[i > 2], acc_t1=i / 10, acc_t2=i / 5, changed=1 - i / 10)
            for i in range(5)]  # fmt: skip
    assert measure.curve(rows, mean_of=2) == [
        dict(step=2, phase="a", acc_t1=0.05, acc_t2=0.1, changed=0.95),
        dict(step=4, phase="b", acc_t1=0.25, acc_t2=0.5, changed=0.75),
        dict(step=5, phase="b", acc_t1=0.4, acc_t2=0.8, changed=0.6),
    ]


def test_the_shift_is_between_the_bases_and_the_policys_own_attempts(models, monkeypatch):
    run, author = models
    monkeypatch.setattr(run, "base", author)
    monkeypatch.setattr(measure, "repairs", lambda model, author, *x: {
        "repair_rate": (model is run.policy, author is run.base, x[-1])})  # fmt: skip
    found = measure.shift(run, 5)
    assert found == dict(fixed_sampled=(True, True, 1.0), own_sampled=(True, False, 1.0))


# --- what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "n", "p"), [(2.776, 5, 0.05), (4.604, 5, 0.01), (2.262, 10, 0.05)])
def test_p_values_are_those_of_the_tables_of_students_t(t, n, p):
    noise = np.linspace(-1, 1, n)
    shift = t * noise.std(ddof=1) / n**0.5
    assert tables.paired_t(list(noise + shift), [0.0] * n) == pytest.approx(p, rel=1e-3)
    assert tables.paired_t([0.0] * n, list(noise + shift)) == pytest.approx(p, rel=1e-3)


def run_of(name, seed, t1, t2, **more):
    m = dict(acc_t1=t1, acc_t2=t2, delta=t2 - t1, delta_i_to_c=0.4, delta_c_to_i=0.1)
    m |= dict(repair_rate=0.5, spoil_rate=None, delta_interval=[0.1, 0.2])
    return dict(name=name, seed=seed, phases={name: m | {"sampled": m}}, config={"lr": 1.0}) | more


def cut(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_tables_give_means_errors_and_differences_with_corrected_p_values():
    """Two methods whose differences from SCoRe have a known t: 4.303 (p 0.05), 9.925 (p 0.01)."""
    runs = []
    for seed in (2, 0, 1):
        base, noise = 0.95 + 0.001 * seed, (seed - 1) * 0.01
        runs.append(run_of("score", seed, 0.6, base))
        for name, t in (("multi_turn", 4.303), ("pair_sft", 9.925)):
            runs.append(run_of(name, seed, 0.6, base - t * 0.01 / 3**0.5 + noise))
    group = tables.grouped(runs)
    assert [run["seed"] for run in group["score"]] == [0, 1, 2]
    rows = cut(tables.compared(group, ["base", "score", "multi_turn", "pair_sft"]))
    assert rows[2][:4] == ["**SCoRe**", "60.0 ± 0.0", "95.1 ± 0.1", "+35.1 ± 0.1"]
    assert rows[2][6:] == ["", "", "60.0 → 64.4, +4.4"]
    assert [row[6] for row in rows[3:]] == ["-2.5 (p 0.050)", "-5.7 (p 0.020)"]
    one = tables.grouped([run for run in runs if run["seed"] == 0])
    assert "(p" not in tables.compared(one, ["score", "multi_turn", "pair_sft"])


def test_stage_1_alone_is_scores_run_before_stage_2():
    run = run_of("score", 0, 0.6, 0.95)
    early = run_of("stage1", 0, 0.5, 0.7)["phases"]
    found = tables.sections([run | {"phases": early | run["phases"]}])["Methods, greedy"]
    rows = cut(found)[2:]
    assert [row[:3] for row in rows] == [
        ["SCoRe's Stage I alone", "50.0 ± nan", "70.0 ± nan"],
        ["**SCoRe**", "60.0 ± nan", "95.0 ± nan"],
    ]  # fmt: skip


def test_other_tables_by_hand():
    fixed, fresh = dict(repair_rate=0.2, spoil_rate=0.3), dict(repair_rate=0.7, spoil_rate=0.8)
    runs = [run_of("score", seed, 0.6, 0.95, repairs_of_base=fixed, resampled=fresh)
            for seed in (0, 1)]  # fmt: skip
    assert cut(tables.repairs(dict(score=runs)))[2] == ["SCoRe", "20.0 ± 0.0", "50.0 ± 0.0",
        "70.0 ± 0.0", "30.0 ± 0.0", "nan ± nan", "80.0 ± 0.0"]  # fmt: skip
    three = {x: [0.1 + i, 0.2 + i, 0.3 + i] for i, x in
             enumerate(("base", "stage1", "stage1b", "three_turn"))}  # fmt: skip
    rows = cut(tables.three_attempts(dict(three_turn=[run | dict(three=three) for run in runs])))
    assert rows[4][:4] == ["Stage I (b)", "210.0 ± 0.0", "220.0 ± 0.0", "230.0 ± 0.0"]
    control = [run_of("multi_turn", seed, 0.5, 0.55 + seed / 10) for seed in (0, 1)]
    group = dict(base=runs, stage1=runs, score=runs, multi_turn=control)
    assert cut(tables.by_seed(group))[3] == [
        "1", *3 * ["60.0 / 95.0"], "50.0 / 65.0", "+35.0 [+10.0, +20.0]", "+15.0"
    ]  # fmt: skip
    tuned = [run_of("score", 0, 0.1, t2, config={"lr": lr}) for lr, t2 in ((0.1, 0.5), (0.2, 0.6))]
    assert cut(tables.tuning(tuned))[2] == ["SCoRe", "50.0 (+40.0)", "**60.0 (+50.0)**"]


def test_without_matplotlib_the_error_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ValueError, match="pip install matplotlib=="):
        figures.draw([run_of("score", 0, 0.6, 0.9, attempts={})], tmp_path)


# --- the documents --------------------------------------------------------------------------------

FILES = ("study", "three", "pool", "countdown", "tune", "seeds")


def test_all_tables_are_those_of_the_results():
    """Beside each file stand all of its tables; README has some, and no other."""
    known = set()
    for name in FILES:
        text = tables.text(collected(name))
        assert (RESULTS / f"{name}.md").read_text() == text, name
        known |= {text.split("\n")[0], *tables.sections(collected(name)).values()}
    found = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    assert len(found) >= 7 and {x.strip() for x in found[1:]} <= known
    assert set(re.findall(r"^\d+ runs, .*$", README, re.MULTILINE)) <= known
    for name in figures.FIGURES:
        assert f"(results/{name}.png)" in README and (RESULTS / f"{name}.png").is_file()
    assert "182b68f" in README and len(README.splitlines()) <= 250


def test_the_numbers_in_readmes_text_are_those_of_the_results():
    group = tables.grouped(collected("study"))

    def mean(name, get):
        return f"{100 * np.mean([get(run) for run in group[name]]):.1f}"

    text = " ".join(README.split())
    for words, numbers in (
        ("tenth is right in {} %, its second in {} %",
         [mean("score", lambda run, i=i: run["attempts"]["last"][i]) for i in (9, 1)]),
        ("falls from {} to {} %",
         [mean("multi_turn", lambda run, i=i: run["curve"][i]["changed"]) for i in (0, -1)]),
        ("SCoRe ends at {} and {} %", [f"{np.mean(tables.values(group['score'], key, True)):.1f}"
                                       for key in ("acc_t1", "acc_t2")]),
    ):  # fmt: skip
        assert words.format(*numbers) in text, (words, numbers)
    group = tables.grouped(collected("pool"))
    overfit = [mean("multi_turn", get) for get in (
        lambda run: run["curve"][-1]["acc_t1"],
        lambda run: run["phases"]["multi_turn"]["sampled"]["acc_t1"])]  # fmt: skip
    assert "right in {} % of its last training samples and {} %".format(*overfit) in text


def test_the_results_have_every_method_of_five_seeds_and_its_own_settings():
    """None left out; but for the row's own settings, all runs of a file have the same."""
    study_names = [("base", x) for x in range(5)] + [(n, x) for n in study.NAMES for x in range(5)]
    for name, names in (
        ("study", study_names),
        *((x, [(n, s) for n in ("base", "score", y) for s in range(5)]) for x, y in
          (("three", "three_turn"), ("pool", "multi_turn"), ("countdown", "multi_turn"))),
    ):  # fmt: skip
        runs = collected(name)
        assert sorted((run["name"], run["seed"]) for run in runs) == sorted(names)
        usual = next(run["config"] for run in runs if run["name"] == "score")
        for run in runs:
            assert (run["split"], run["n"], run["threads"]) == ("test", 2000, 1)
            own = tables.VARIANTS[run["name"]].options or dict(method=run["name"])
            other = {key for key, x in run["config"].items() if usual.get(key, x) != x}
            assert other <= {"seed", *own} and run["config"] | own == run["config"]
    assert usual["task"] == "countdown" and collected("pool")[0]["config"]["pool"] == 256
    assert {run["config"]["base_attempts"] for run in collected("three")} == {3}
    assert {run["config"]["lr"] for run in collected("tune")} == set(study.RATES)


def test_what_was_asked_of_every_seed_holds():
    group = tables.grouped(collected("seeds"))
    assert [run["seed"] for run in group["score"]] == list(range(5))

    def of(name, key):
        return np.array(tables.values(group[name], key))

    t1, delta = of("base", "acc_t1"), of("score", "delta")
    assert (35 <= t1).all() and (t1 <= 65).all() and (of("base", "delta") <= 2).all()
    assert (abs(of("stage1", "acc_t1") - t1) <= 6).all() and (of("score", "acc_t2") >= 85).all()
    assert (delta >= 25).all() and (delta > of("multi_turn", "delta")).all()
    assert (of("score", "delta_c_to_i") <= 3).all()


def test_the_rows_of_the_study_are_settings_of_equal_budget():
    for name in study.NAMES:
        c = methods.Config(**tables.VARIANTS[name].options or dict(method=name))
        assert sum(phase.steps for phase in methods.schedule(c)[1:]) == 100
        assert score.Config(**{key: getattr(c, key) for key in ("beta1", "beta2", "lr", "batch")})
