"""The study: who is compared, what is measured, what survives a kill, and what README says."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import score
from study import __main__ as study
from study import map as study_map
from study import measure, methods, tables
from tests import figures
from tests.study.test_methods import TINY, same, weights

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "study/results"
README = (ROOT / "study/README.md").read_text()
SMALL = TINY | dict(eval_n=8, stage1_steps=11, stage2_steps=10)


def options(**settings):
    return [word for key, x in settings.items() for word in (f"--{key.replace('_', '-')}", str(x))]


def collected(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


# --- the command ----------------------------------------------------------------------------------

SOME = ["score", "multi_turn", "star_plus", "pair_sft"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a small study that was killed on the way, and what it then said: its
    workers have ended with it, and no finished run was touched."""
    runs = tmp_path_factory.mktemp("study") / "runs"
    words = [sys.executable, "-m", "study", "--runs", str(runs), "--seeds", "0", "1"]
    words += ["--only", *SOME[1:], *options(**SMALL)]
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


def test_a_study_ends_with_one_json_and_tables(finished):
    runs, said = finished
    folder = runs / "study-part-results"
    names = {"study-part.json", "study-part.md"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "study-part.md").read_text() in said and "10/10" in said
    found = json.loads((folder / "study-part.json").read_text())
    assert [(run["name"], run["seed"]) for run in found] == [("base", 0), ("base", 1)] + [
        (name, seed) for seed in (0, 1) for name in SOME
    ]
    for run in found:
        assert (run["n"], run["split"], run["threads"]) == (8, "test", 1) and run["commit"]
        assert not run["curve"] or run["curve"][-1]["step"] == 21


def test_runs_of_a_seed_share_their_base_and_a_kill_left_no_trace(finished, tmp_path):
    runs, _ = finished
    for seed in (0, 1):
        for name in SOME:
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


def jobs(c, names, seeds, rates, runs):
    return measure.jobs(c, [("", {}, study.rows(names, rates))], seeds, runs, "test")


def test_jobs_are_done_once_and_differ_in_nothing_but_their_row(tmp_path):
    c = methods.Config(**SMALL)
    bases, rest = jobs(c, ("star", "score", "star"), (0, 1, 0), (), tmp_path)
    assert [job.config.seed for job in bases] == [0, 1]
    found = [(job.name, job.config.seed, job.config.method) for job in rest]
    assert found == [(x, seed, x) for seed in (0, 1) for x in ("score", "star")]
    _, rest = jobs(c, study.NAMES, (3,), study.RATES, tmp_path)
    assert len(rest) == len({job.folder for job in rest}) == 3 * len(study.NAMES)
    for job in rest:
        own = tables.VARIANTS[job.name].options or dict(method=job.name)
        mine = dict(seed=3, base=str(tmp_path / "base-seed3"), lr=job.config.lr)
        assert job.config == replace(c, **own | mine) and job.config.lr in study.RATES


# --- what is measured -----------------------------------------------------------------------------


def test_a_curve_is_of_means_of_steps(tmp_path):
    run = score.open_run(score.create(methods.Config(**SMALL), tmp_path / "run"))
    rows = [dict(phase="base", step=1, loss=3.0)]
    rows += [dict(phase="ab"[i > 2], step=i % 3 + 1, x=i / 10) for i in range(5)]
    rows += [dict(phase="c", step=1)]
    (tmp_path / "run/log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [(x["phase"], x["step"], x["x"]) for x in measure.curve(run.folder, ["x"], of=2)]
    assert found == [("a", 2, 0.05), ("a", 3, 0.2), ("b", 5, 0.35)]


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
    found = tables.sections([run | {"phases": early | run["phases"]}])["Methods"]
    rows = cut(found)[2:]
    assert [row[:3] for row in rows] == [
        ["SCoRe's Stage I alone", "50.0 ± nan", "70.0 ± nan"],
        ["**SCoRe**", "60.0 ± nan", "95.0 ± nan"],
    ]  # fmt: skip


def test_other_tables_by_hand():
    runs = [run_of("score", seed, 0.6, 0.95) for seed in (0, 1)]
    control = [run_of("multi_turn", seed, 0.5, 0.55 + seed / 10) for seed in (0, 1)]
    group = dict(base=runs, stage1=runs, score=runs, multi_turn=control)
    assert cut(tables.by_seed(group))[3] == [
        "1", *3 * ["60.0 / 95.0"], "50.0 / 65.0", "+35.0 [+10.0, +20.0]", "+15.0"
    ]  # fmt: skip
    tuned = [run_of("score", 0, 0.1, t2, config={"lr": lr}) for lr, t2 in ((0.1, 0.5), (0.2, 0.6))]
    assert cut(tables.tuning(tuned))[2] == ["SCoRe", "50.0 (+40.0)", "**60.0 (+50.0)**"]


def test_figures_are_drawn_beside_their_data(tmp_path):
    for name in ("study", "map"):
        shutil.copy(RESULTS / f"{name}.json", tmp_path)
        figures.main(tmp_path / f"{name}.json")
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {"curves", "map", "map-spoils", "reasons"}


# --- the documents --------------------------------------------------------------------------------


def test_all_tables_are_those_of_the_results():
    """Beside the file stand all of its tables; README has some, and no other."""
    text = tables.text(collected("study"))
    assert (RESULTS / "study.md").read_text() == text
    drawn = study_map.text(collected("map"))
    assert (RESULTS / "map.md").read_text() == drawn
    known = {text.split("\n")[0], *tables.sections(collected("study")).values()}
    assert (RESULTS / "addition/map.md").read_text() == study_map.text(collected("addition/map"))
    drawn += "\n\n" + (RESULTS / "addition/map.md").read_text()
    known |= {part.strip() for part in drawn.split("\n\n")}
    found = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    assert len(found) >= 3 and {x.strip() for x in found[1:]} <= known
    assert set(re.findall(r"^\d+ runs[,;] .*$", README, re.MULTILINE)) <= known
    for name in ("curves", "map", "reasons", "addition/map"):
        assert f"(results/{name}.png)" in README and (RESULTS / f"{name}.png").is_file()
    assert len(README.splitlines()) <= 250


def test_the_results_have_five_seeds_of_every_row_and_its_own_settings():
    """None left out; but for the row's own settings, all runs have the same: the defaults."""
    runs = collected("study")
    names = {run["name"] for run in runs}
    assert {"base", "score", "multi_turn"} <= names
    assert sorted((run["name"], run["seed"]) for run in runs) == sorted(
        (name, seed) for name in names for seed in range(5)
    )
    for run in runs:
        assert (run["split"], run["n"], run["threads"]) == ("test", 2000, 1)
        own = tables.VARIANTS[run["name"]].options or dict(method=run["name"])
        c = methods.Config(**own | {key: run["config"][key] for key in ("seed", "base")})
        assert run["config"] == asdict(c)


def test_what_is_said_of_the_seeds_holds():
    group = tables.grouped(collected("study"))

    def of(name, key):
        return np.array(tables.values(group[name], key))

    ahead = of("score", "acc_t2") - of("multi_turn", "acc_t2")
    assert (ahead > 0).all() and ahead.mean() >= 8
    assert (abs(of("multi_turn", "delta")) <= 2).all() and (of("multi_turn", "changed") <= 3).all()
    assert (of("score", "delta") >= 20).all() and (of("score", "delta_c_to_i") <= 3).all()
    assert (of("score", "acc_t2") >= 80).all()
    assert (abs(of("base", "delta")) <= 1).all()
    rates = [run["phases"]["base"]["sampled"]["repair_rate"] for run in group["base"]]
    assert 0.003 < min(rates) < max(rates) < 0.006
    assert round(of("multi_turn", "changed").max(), 1) == 0.8
    assert (ahead.min().round(), ahead.max().round()) == (9, 38)
    first = of("base", "acc_t1").mean()
    for name in ("star", "star_plus", "pair_sft", "pair_sft_plus"):
        assert of(name, "acc_t1").mean() < first
        assert (
            of("base", "acc_t2").mean() < of(name, "acc_t2").mean() < of("score", "acc_t2").mean()
        )
    assert sorted(of("no_stage1", "delta").round(1))[:3] == [0.0, 0.0, 1.8]
    gaps = {name: (of(name, "acc_t2") - of("score", "acc_t2")).mean() for name in group}
    assert round(gaps["no_stage1"]) == -20 and all(
        abs(gaps[x]) < 1 for x in ("no_bonus", "star_stage2", "offline")
    )
    p = tables.paired_t(list(of("no_stage1", "acc_t2")), list(of("score", "acc_t2")))
    assert round(p, 2) == 0.03 and "p 0.126" in tables.text(collected("study"))
    assert round((of("score", "delta") - of("no_bonus", "delta")).mean()) == 6
    assert abs(of("second", "acc_t2") - of("score", "acc_t2")).max() < 1.5
    assert (of("second", "delta") > 60).all()
    assert round(first - of("second", "acc_t1").mean()) == 6
    for name in ("offline", "star_stage2"):
        assert round((of(name, "delta") - of("score", "delta")).mean()) == 2
    rising = [of(name, "acc_t1").mean() for name in ("alpha30", "score", "no_bonus")]
    assert rising == sorted(rising) and 0.4 < of("leak", "acc_t1").mean() / first < 0.5
    assert max(group, key=lambda name: of(name, "delta").mean()) == "leak"


def test_what_is_said_of_ten_seeds_holds():
    runs = collected("ten")
    assert (RESULTS / "ten.md").read_text() == tables.text(runs)
    group = tables.grouped(runs)
    t2, delta = ({x: np.array(tables.values(group[x], key)) for x in group}
                 for key in ("acc_t2", "delta"))  # fmt: skip
    copied = [study_map.collapsed(run) for run in group["multi_turn"]]
    assert copied == [True] * 10 and (t2["score"] > t2["multi_turn"]).all()
    assert round((t2["no_stage1"] - t2["score"]).mean()) == -19
    assert round((delta["no_bonus"] - delta["score"]).mean()) == -6
    found = tables.sections(runs)["Ablations"]
    assert "-19.1 (p 0.004)" in found and "-5.6 (p 0.000)" in found


def test_what_is_said_of_the_learning_rates_holds():
    runs, best = collected("tune"), {}
    assert (RESULTS / "tune.md").read_text() == tables.text(runs)
    for run in runs[1:]:
        best.setdefault(run["name"], {})[run["config"]["lr"]] = tables.values([run], "acc_t2")[0]
    rates = {name: max(t2, key=t2.get) for name, t2 in best.items()}
    assert rates.pop("star") == 3e-3 and set(rates.values()) == {1.5e-3} and len(rates) == 6
    assert round(best["star"][3e-3] - best["star"][1.5e-3]) == 14


def pairs(levels):
    """Return of each run of multi-turn RL: the base's repair rate, whether it collapsed, and of
    SCoRe's beside it Acc@t2 less the other's, and delta; in per cent, by rising rate."""
    found = []
    for group in levels.values():
        rates = tables.values(group["base"], "repair_rate", sampled=True)
        control, ours = (np.array(tables.values(group[x], "acc_t2")) for x in study_map.PAIR)
        gone = map(study_map.collapsed, group["multi_turn"])
        delta = tables.values(group["score"], "delta")
        found += zip(rates, gone, ours - control, delta, strict=True)
    return sorted(found)


def test_what_is_said_of_the_map_holds():
    """README's sentences, and the one of eval.py's diagnosis."""
    runs = collected("map")["runs"]
    levels = study_map.by_level(runs, False)["signs"]
    found = pairs(levels)
    gone = [[x for rate, x, *_ in found if low < rate <= high]
            for low, high in ((0, 0.5), (0.6, 1.1), (2.95, 100))]  # fmt: skip
    assert [(sum(x), len(x)) for x in gone] == [(15, 15), (2, 5), (0, 10)]
    assert all(ahead > 0 and delta > 20 for rate, _, ahead, delta in found[2:])
    assert [round(rate, 2) for rate, *_ in found[:2]] == [0.03, 0.03] and found[2][0] > 0.1
    assert all(ahead < 0 for _, _, ahead, _ in found[:2])
    means = [{name: np.mean(tables.values(group[name], "acc_t2")) for name in group}
             for group in levels.values()]  # fmt: skip
    ahead = [round(x["score"] - x["multi_turn"], 1) for x in means]
    assert ahead[2:] == [27.3, 18.8, 3.5, 1.1] and max(ahead) == 27.3
    assert [x["pair_sft"] > x["multi_turn"] for x in means].count(True) == 5
    assert [x["pair_sft"] > x["score"] for x in means] == [True] + [False] * 5
    alone = [(run["phases"]["no_stage1"]["delta"] > 0.05, level) for level, group in levels.items()
             for run in group["no_stage1"]]  # fmt: skip
    assert sum(well for well, level in alone if level <= 0.01) == 3
    assert all(well for well, level in alone if level > 0.01)
    early = {phase: measure.mean([x for curve in curves for x in curve if x["step"] <= 30],
                                 methods.KEYS)
             for phase, curves in figures.reasons(levels[study_map.AT]).items()}  # fmt: skip
    control, stage1 = early["multi_turn"], early["stage1"]
    assert (round(control["changed_wrong"], 2), round(control["copied_wrong"], 2)) == (-0.09, -0.19)
    norms = round(control["norm2"], 2), round(control["norm1"], 1), round(stage1["norm1"], 1)
    assert norms == (0.09, 1.7, 0.3) and round(control["norm1"] / control["norm2"]) == 18
    assert round(control["groups"], 3) == 0.007

    spoils = study_map.by_level(runs, True)["signs"]
    found = pairs({level: group for level, group in spoils.items() if level})
    assert len(found) == 10 and round(found[-1][0], 1) == 2.6
    assert all(gone and ahead > 0 and delta > 20 for _, gone, ahead, delta in found)
    assert sorted(round(ahead, 1) for _, _, ahead, _ in found)[0] < 2

    levels = study_map.by_level(collected("addition/map")["runs"], False)["addition"]
    found = pairs(levels)
    assert sum(ahead > 0 for _, _, ahead, _ in found) == 2
    assert not any(gone and ahead > 0 for _, gone, ahead, _ in found)
    gone = [[x for rate, x, *_ in found if (rate > 0.3) == more] for more in (False, True)]
    assert [(sum(x), len(x)) for x in gone] == [(5, 6), (2, 6)]
    assert sum(study_map.collapsed(x) for group in levels.values() for x in group["score"]) == 4
    t2 = [[np.mean(tables.values(group[name], "acc_t2")) for name in ("no_stage1", "score")]
          for group in levels.values()]  # fmt: skip
    assert sum(x > y for x, y in t2) == 5
    for group in levels.values():
        norms = {phase: np.mean([x["norm1"] for rows in curves for x in rows if x["step"] <= 30])
                 for phase, curves in figures.reasons(group).items()}  # fmt: skip
        assert 5 < norms["stage1"] < 15 and norms["stage1"] > norms["multi_turn"]


def test_the_rows_of_the_study_are_settings_of_equal_budget():
    for name in study.NAMES:
        c = methods.Config(**tables.VARIANTS[name].options or dict(method=name))
        assert sum(x.steps for x in methods.schedule(c)[1:]) == c.stage1_steps + c.stage2_steps
        assert score.Config(**{key: getattr(c, key) for key in ("beta1", "beta2", "lr", "batch")})
