"""The metrics count problems; their intervals cover; edit distances are shortest paths."""

import functools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_score import train

import eval as evaluation
import run as runs
import verify

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


@given(pairs)
def test_metrics_are_counts_over_all_problems(rights):
    m = evaluation.metrics(*(np.array(x) for x in zip(*rights, strict=True)))
    n = len(rights)
    count = {(a, b): sum(pair == (a, b) for pair in rights) for a in (0, 1) for b in (0, 1)}
    assert m["n"] == n
    assert round(m["acc_t1"] * n) == count[1, 0] + count[1, 1]
    assert round(m["acc_t2"] * n) == count[0, 1] + count[1, 1]
    assert round(m["delta_i_to_c"] * n) == count[0, 1]
    assert round(m["delta_c_to_i"] * n) == count[1, 0]
    assert m["delta"] == pytest.approx(m["acc_t2"] - m["acc_t1"])
    assert m["delta"] == pytest.approx(m["delta_i_to_c"] - m["delta_c_to_i"])
    wrong, right = count[0, 0] + count[0, 1], count[1, 0] + count[1, 1]
    assert m["repair_rate"] == (pytest.approx(count[0, 1] / wrong) if wrong else None)
    assert m["spoil_rate"] == (pytest.approx(count[1, 0] / right) if right else None)
    for name in ("acc_t1", "acc_t2", "delta", "delta_i_to_c", "delta_c_to_i"):
        low, high = m[name + "_interval"]
        assert low - 1e-9 <= m[name] <= high + 1e-9
    json.dumps(m)


@given(st.integers(1, 300), st.data())
def test_wilson_ends_where_the_score_test_rejects(n, data):
    """Each end p satisfies |k/n - p| = 1.96 sqrt(p (1 - p) / n), or is 0 or 1."""
    k = data.draw(st.integers(0, n))
    for p in evaluation.wilson(k, n):
        if 1e-12 < p < 1 - 1e-12:
            assert abs(k / n - p) == pytest.approx(1.959964 * (p * (1 - p) / n) ** 0.5, abs=1e-6)
    low, high = evaluation.wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1


def test_intervals_of_no_trials_and_of_certain_ones():
    assert evaluation.wilson(0, 0) == [0.0, 1.0]
    assert evaluation.wilson(0, 10)[0] == 0 and evaluation.wilson(10, 10)[1] == 1
    assert evaluation.paired_bootstrap(0, 0, 50) == [0.0, 0.0]


def test_the_bootstrap_agrees_with_resampling_problems_one_by_one():
    gained, lost, n = 30, 12, 200
    rng = np.random.default_rng(1)
    change = np.array([1] * gained + [-1] * lost + [0] * (n - gained - lost))
    means = [rng.choice(change, n).mean() for _ in range(4000)]
    assert evaluation.paired_bootstrap(gained, lost, n) == pytest.approx(
        np.percentile(means, [2.5, 97.5]), abs=0.01
    )


@given(st.text("ab0", max_size=7), st.text("ab0", max_size=7))
def test_edit_distance_is_the_recursive_definition(a, b):
    @functools.cache
    def d(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert evaluation.edit_distance(a, b) == d(len(a), len(b)) == evaluation.edit_distance(b, a)
    assert 0 <= evaluation.edit_ratio(a, b) <= 1
    assert (evaluation.edit_ratio(a, b) == 0) == (a == b)


def test_a_run_is_reported_and_evaluated_again_to_the_same_report(tmp_path, capsys):
    folder = tmp_path / "run"
    train(folder, eval_n=40)
    assert evaluation.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())
    assert list(report["phases"]) == ["base", "stage1", "score"]
    for name, m in report["phases"].items():
        assert m["n"] == 40 and m["seed"] == 0 and m["seconds"] > 0
        assert {"acc_t1", "acc_t2", "delta", "delta_i_to_c", "delta_c_to_i"} <= set(m)
        title = f"| {evaluation.TITLES[name]}"
        cells = next(line for line in printed.splitlines() if line.startswith(title))
        assert f" {100 * m['acc_t2']:.1f} [" in cells
    assert report["split"] == "test" and report["seconds"] > 0
    (folder / "report.json").unlink()
    assert evaluation.main([str(folder)]) == 0
    assert json.loads((folder / "report.json").read_text()) == report
    assert evaluation.main([str(folder), "--split", "dev", "--n", "20"]) == 0
    assert json.loads((folder / "report.json").read_text()) == report
    assert json.loads((folder / "report-dev-20.json").read_text())["n"] == 20


def test_the_global_generator_and_the_order_of_calls_do_not_matter(tmp_path):
    import torch

    train(tmp_path / "run")
    torch.manual_seed(1)
    first = evaluation.report(tmp_path / "run", "test", 30)
    torch.manual_seed(2)
    evaluation.report(tmp_path / "run", "dev", 7)
    assert evaluation.report(tmp_path / "run", "test", 30) == first


def phases(repair, changed, cut=0.0, n=2000):
    more = {"truncated_t1": cut, "n": n}
    base = {"sampled": {"repair_rate": repair}, "changed_if_wrong": 0.5} | more
    return {"base": base, "score": {"changed_if_wrong": changed} | more}


@pytest.mark.parametrize(
    ("repair", "changed", "words"),
    [
        (0.10, 0.50, []), (0.039, 0.50, ["repairs 3.9 %"]), (0.10, 0.049, ["Collapsed"]),
        (0.0, 0.0, ["repairs 0.0 %", "Collapsed"]), (None, None, []),
    ],
)  # fmt: skip
def test_diagnosis(repair, changed, words):
    notes = evaluation.diagnose(phases(repair, changed))
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


def test_cut_attempts_and_few_problems_are_said_first():
    notes = evaluation.diagnose(phases(0.1, 0.049, cut=0.11))
    assert "11 % were cut" in notes[0] and "Collapsed" in notes[1]
    assert evaluation.diagnose(phases(0.1, 0.5, cut=0.1)) == []
    few = evaluation.diagnose(phases(0.0, 0.0, n=49))
    assert len(few) == 1 and "49 problems are too few" in few[0]


def test_transcripts_show_one_of_each_kind():
    problems = [verify.Problem(f"{i}+0=", str(i)) for i in range(4)]
    said = [("9", "9", False, False), ("1", "1", True, True), ("9", "2", False, True),
            ("3", "9", True, False)]  # fmt: skip
    found = evaluation.transcripts([(p, *row) for p, row in zip(problems, said, strict=True)])
    assert [(t["kind"], t["prompt"]) for t in found] == [
        ("repaired", "2+0="), ("kept", "1+0="), ("failed", "0+0=")
    ]  # fmt: skip


@pytest.mark.parametrize("damage", ["no run", "no config", "config", "weights", "other size"])
def test_what_cannot_be_evaluated_is_one_line_and_changes_nothing(tmp_path, capsys, damage):
    folder = tmp_path / "run"
    train(folder)
    evaluation.main([str(folder)])
    if damage == "no run":
        folder = tmp_path / "nowhere"
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "weights":
        content = (folder / "score.pt").read_bytes()
        (folder / "score.pt").write_bytes(content[: len(content) // 2])
    else:
        about = json.loads((folder / "config.json").read_text())
        about["config"]["d_model"] = 16
        (folder / "config.json").write_text(json.dumps(about))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert evaluation.main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("eval.py: error: ") and error.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_phase_files_of_an_unfinished_run_are_evaluated_as_far_as_they_go(tmp_path, capsys):
    train(tmp_path / "run")
    (tmp_path / "run" / "score.pt").unlink()
    assert evaluation.main([str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(report["phases"]) == ["base", "stage1"]
    assert runs.read_about(tmp_path / "run")[0].eval_n == report["n"]


def test_what_a_model_says_cannot_drive_the_terminal(capsys):
    said = dict(kind="failed", prompt="2+2=", gold="4", attempt1="\x1b[2J5", attempt2="6" * 9000)
    evaluation.show(dict(n=1, split="test", seed=0, phases={}, transcripts=[said], diagnosis=[]))
    shown = capsys.readouterr().out
    assert "?[2J5" in shown and "\x1b" not in shown and len(shown) < 1500
