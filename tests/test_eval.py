"""The metrics count problems, their intervals cover, and a report comes again from the weights."""

import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import score
import verify
from tests.test_rollout import TOY, said
from tests.test_score import TINY

# --- intervals ------------------------------------------------------------------------------------


def test_wilson_ends_where_the_score_test_rejects():
    """Each end p satisfies |k/n - p| = 1.96 sqrt(p (1 - p) / n), or is 0 or 1."""
    for n in (1, 2, 7, 300):
        for k in range(n + 1):
            low, high = evaluation.wilson(k, n)
            assert 0 <= low <= k / n <= high <= 1
            assert (low == 0) == (k == 0) and (high == 1) == (k == n)
            for p in {low, high} - {0, 1}:
                assert abs(k / n - p) == pytest.approx(1.959964 * (p * (1 - p) / n) ** 0.5)
    assert evaluation.wilson(0, 0) == [0, 1]


def test_the_bootstrap_agrees_with_resampling_problems_one_by_one():
    gained, lost, n = 30, 12, 200
    rng = np.random.default_rng(1)
    change = np.array([1] * gained + [-1] * lost + [0] * (n - gained - lost))
    means = rng.choice(change, (4000, n)).mean(axis=1)
    assert evaluation.paired_bootstrap(gained, lost, n) == pytest.approx(
        np.percentile(means, [2.5, 97.5]), abs=0.01
    )
    assert evaluation.paired_bootstrap(0, 0, 50) == [0.0, 0.0]


# --- metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
def test_metrics_are_counts_over_all_problems(n):
    """All ways in which n problems can go."""
    for pairs in itertools.combinations_with_replacement(itertools.product((0, 1), repeat=2), n):
        m = evaluation.metrics(*(np.array(x) == 1 for x in zip(*pairs, strict=True)))
        kept, gained, lost = (pairs.count(kind) for kind in ((1, 1), (0, 1), (1, 0)))
        counts = dict(
            acc_t1=(kept + lost, n), acc_t2=(kept + gained, n),
            delta_i_to_c=(gained, n), delta_c_to_i=(lost, n),
            repair_rate=(gained, n - kept - lost), spoil_rate=(lost, kept + lost),
        )  # fmt: skip
        for name, (k, of) in counts.items():
            assert m[name] == (pytest.approx(k / of) if of else None), name
            assert m[name + "_interval"] == evaluation.wilson(k, of)
        assert m["n"] == n and m["delta"] == (gained - lost) / n
        assert m["delta_interval"] == evaluation.paired_bootstrap(gained, lost, n)
        json.dumps(m)


def answered(monkeypatch, *attempts, at_once=2, cut=(), temperature=0.3):
    """Return the evaluation of so many problems `1 1 =2` that were answered so, and the noise. The
    last problem's gold answer cannot be read."""
    n, seen = len(attempts[0]), []

    def given(model, task, prompts, noise_KBN, temperature):
        at = sum(x.shape[1] for x, _ in seen)
        seen.append((noise_KBN, temperature))
        r = said(*(column[at : at + len(prompts)] for column in attempts))
        assert prompts == [TOY.encode("1 1 =2")] * len(prompts)
        for turn, b in cut:
            if 0 <= b - at < len(prompts):
                r.attempts[turn - 1][b - at].pop()
        return r

    monkeypatch.setattr(evaluation, "rollout", given)
    problems = [verify.Problem("1 1 =2", "+1+1")] * (n - 1) + [verify.Problem("1 1 =2", "two")]
    model = SimpleNamespace(cos=torch.zeros(1))
    m = evaluation.evaluate(model, TOY, problems, temperature, at_once)
    assert {temperature for _, temperature in seen} == {0.3}
    return m, torch.cat([noise for noise, _ in seen], dim=1)


def test_behaviour_is_measured_on_what_was_said(monkeypatch):
    """By hand: kept, repaired, spoiled, changed in vain, copied wrong, cut at its first attempt and
    so not right, and one without a verdict, which is counted and left out of what is right."""
    right, wrong = "+1+1", "+1-1"
    firsts = [right, wrong, right, "+4", wrong, right, right]
    seconds = [right, right, "-1-1", "+3+3", wrong, right, "+3"]
    m, noise = answered(monkeypatch, firsts, seconds, cut=[(1, 5), (2, 3), (2, 4)])
    assert (m["n"], m["unjudged"]) == (6, 1)
    for name, k in dict(acc_t1=2, acc_t2=3, delta_i_to_c=2, delta_c_to_i=1, delta=1).items():
        assert m[name] == pytest.approx(k / 6), name
    assert (m["repair_rate"], m["spoil_rate"]) == (pytest.approx(2 / 4), pytest.approx(1 / 2))
    assert m["changed"] == pytest.approx(4 / 7)
    assert m["changed_if_wrong"] == pytest.approx(2 / 4)
    assert (m["truncated_t1"], m["truncated_t2"]) == (pytest.approx(1 / 7), pytest.approx(2 / 7))
    said = dict(kind="spoiled", prompt="1 1 =2", gold=right, attempt1=right, attempt2="-1-1")
    assert m["rows"][2] == said | dict(rewards=[1.0, 0.0])
    assert (m["rows"][6]["kind"], m["rows"][6]["rewards"]) == ("unjudged", [None, None])
    again, whole = answered(monkeypatch, firsts, seconds, at_once=99)
    assert torch.equal(noise, whole) and noise.dtype == torch.float64
    assert noise.shape == (2, 7, TOY.max_new) and 0 <= noise.min() < noise.max() < 1
    assert len(again["rows"]) == 7


def test_where_no_first_attempt_is_wrong_there_is_no_share_of_changed_ones(monkeypatch):
    m, _ = answered(monkeypatch, ["+1+1", "+1+1"], ["+2", "+1+1"])
    assert m["changed_if_wrong"] is None and m["changed"] == 0.5 and m["repair_rate"] is None
    with pytest.raises(ValueError, match="nothing to measure"):
        answered(monkeypatch, ["+1+1"], ["+1+1"])


def phases(changed, cut=0.0, n=2000, repairs=None):
    about, base, none = {"truncated_t1": cut, "n": n}, {}, {"repair_rate": None, "spoil_rate": 0.5}
    for name, rate in (("repair", repairs), ("spoil", 0.25)):
        base |= {f"{name}_rate": rate, f"{name}_rate_interval": [0.125, 0.375]}
    return {
        "base": about | {"changed_if_wrong": 0.5, "sampled": base},
        "score": about | {"changed_if_wrong": changed, "sampled": none},
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (phases(0.5), []), (phases(0.049), ["Collapsed: .* only 4.9% "]), (phases(0.05), []),
        (phases(0.0, cut=0.11), ["11% of the first attempts were cut", "Collapsed"]),
        (phases(None, cut=0.1), []), (phases(0.0, n=49), []),
        ({"base": phases(0.0)["score"]}, []), ({"score": phases(0.5)["score"]}, []),
        (phases(0.5, repairs=0.2), [r"Sampled, .* 20.0% \[12.5%, 37.5%\] .* spoils 25.0% "]),
        ({"single_turn": phases(0.5, repairs=0.2)["base"]}, ["Sampled, the base repairs 20.0%"]),
    ],
)  # fmt: skip
def test_a_run_that_is_not_worth_reading_is_said_to_be_so(given, words):
    """A base that copies has not collapsed: it was not trained to do better."""
    notes = evaluation.diagnose(given)
    assert len(notes) == len(words)
    for note, word in zip(notes, words, strict=True):
        assert re.match(word, note)


# --- the report -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a finished run. Its policies learned enough to differ."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    c = replace(TINY, sft_steps=40, sft_lr=0.2, eval_n=40)
    score.drive(score.open_run(score.create(c, folder)))
    return folder


def copied(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_report_is_of_greedy_and_sampled_answers_and_comes_again(trained, tmp_path, capsys):
    """Also beside the evaluation of another split, which has a file of its own."""
    folder = copied(trained, tmp_path)
    assert evaluation.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    text = (folder / "report.json").read_text()
    report = json.loads(text)
    assert (report["seed"], report["split"], report["n"]) == (0, "test", 40)
    assert list(report["phases"]) == ["base", "multi_turn", "stage1", "score"]
    run = score.open_run(folder)
    problems = run.task.draw(40, "test", np.random.default_rng(0))
    for name, m in report["phases"].items():
        run.policy.load_state_dict(score.load(folder / f"{name}.pt")["model"])
        sampled = m.pop("sampled")
        for found, temperature, same in ((m, 0.0, True), (sampled, 0.7, True), (m, 0.7, False)):
            expected = evaluation.evaluate(run.policy, run.task, problems, temperature, 12)
            del expected["rows"]
            assert (found == json.loads(json.dumps(expected))) == same
    assert printed.startswith("\n40 held-out problems (test), greedy, seed 0")

    torch.manual_seed(9)
    (folder / "report.json").unlink()
    assert evaluation.main([str(folder), "--split", "dev", "--n", "20"]) == 0
    assert evaluation.main([str(folder), "--split", "dev"]) == 0
    assert evaluation.main([str(folder), "--n", "39"]) == 0
    assert not (folder / "report.json").exists()
    assert evaluation.main([str(folder)]) == 0
    assert (folder / "report.json").read_text() == text
    for split, n in (("dev", 20), ("dev", 40), ("test", 39)):
        other = json.loads((folder / f"report-{split}-{n}.json").read_text())
        assert (other["split"], other["n"]) == (split, n)
        asked = {x.prompt for x in run.task.draw(n, split, np.random.default_rng(0))}
        assert other["examples"] and {x["prompt"] for x in other["examples"]} <= asked
    assert not list(folder.glob("*.part"))


def test_with_show_so_many_of_each_kind_are_printed_and_all_rows_kept(trained, tmp_path, capsys):
    """The report itself is as without."""
    folder = copied(trained, tmp_path)
    assert evaluation.main([str(folder)]) == 0
    text = (folder / "report.json").read_text()
    assert not (folder / "report.jsonl").exists() and capsys.readouterr()
    assert evaluation.main([str(folder), "--show", "2"]) == 0
    printed, lines = capsys.readouterr().out, (folder / "report.jsonl").read_text().splitlines()
    assert (folder / "report.json").read_text() == text and not list(folder.glob("*.part"))
    said, run = list(map(json.loads, lines)), score.open_run(folder)
    problems = run.task.draw(40, "test", np.random.default_rng(0))
    assert [(x["phase"], x["prompt"], x["gold"]) for x in said] == [
        (phase, problem.prompt, problem.gold)
        for phase in ("base", "multi_turn", "stage1", "score") for problem in problems
    ]  # fmt: skip
    of_rewards = {(0, 1): "repaired", (1, 0): "spoiled", (1, 1): "kept", (0, 0): "failed"}
    for x in said:
        rewards = [verify.signs(x[f"attempt{k}"], x["gold"]).reward for k in (1, 2)]
        assert x["rewards"] == rewards and x["kind"] == of_rewards[tuple(rewards)]
    last = [x["kind"] for x in said[-40:]]
    assert max(map(last.count, last)) > 2  # more than are shown
    for kind in of_rewards.values():
        shown = re.findall(rf"^ +{kind}  .* gold .*\n attempt 1  ", printed, re.M)
        assert len(shown) == min(2, last.count(kind))


def test_the_table_has_the_metrics_in_per_cent_with_their_intervals():
    right1, right2 = np.arange(40) < 12, np.arange(40) % 4 > 0
    m = evaluation.metrics(right1, right2)
    head, _, line, last = evaluation.table({"stage1": m, "other": m}).splitlines()
    assert head == "| | Acc@t1 | Acc@t2 | Δ(t1,t2) | Δ i→c | Δ c→i |"
    name, *cells = line.strip("| ").split(" | ")
    assert name == "Stage I" and last.startswith("| other | 30.0 [")
    for key, found in zip(("acc_t1", "acc_t2", "delta", "delta_i_to_c", "delta_c_to_i"), cells,
                          strict=True):  # fmt: skip
        numbers = [float(x) for x in re.findall(r"[+-]?[0-9.]+", found)]
        expected = [100 * x for x in (m[key], *m[key + "_interval"])]
        assert numbers == [round(x, 1) for x in expected]
        assert (found[0] in "+-") == (key == "delta")


def rows(phase, *kinds, copies=False):
    """Return what was said to the problems `i`: attempts `ai` and `bi`, or copies."""
    return [dict(phase=phase, kind=kind, prompt=f"{i}", gold=f"+{i}", attempt1=f"a{i}",
                 attempt2=f"a{i}" if copies else f"b{i}")
            for i, kind in enumerate(kinds)]  # fmt: skip


def kinds(*rows, most=1):
    found = []
    for x in evaluation.examples(rows, most):
        i = x["prompt"]
        assert (x["gold"], x["attempt1"]) == (f"+{i}", f"a{i}") and x["attempt2"][1:] == i
        found.append((x["kind"], x["phase"], int(i), x["attempt2"][0]))
    return found


FAILED, FIXED, LOST, KEPT = "failed", "repaired", "spoiled", "kept"


def test_examples_are_the_first_of_each_kind_in_the_last_phase():
    last = rows("score", FAILED, KEPT, "unjudged", FIXED, FIXED, LOST, FIXED)
    first = dict(failed=0, kept=1, unjudged=2, repaired=3, spoiled=5)
    before = rows("base", *[LOST] * 6)
    assert kinds(*before, *last) == [(kind, "score", i, "b") for kind, i in first.items()]
    two = [x[2] for x in kinds(*before, *last, most=2)]
    assert two == [0, 1, 2, 3, 4, 5]


def test_the_first_example_is_a_mistake_that_the_control_copied_and_score_repaired():
    """Not one that the control changed in vain, repaired or did not make; if there is none, and
    where there is no other phase than the control, examples are as ever."""
    control = rows("multi_turn", FIXED, LOST, FAILED, FAILED, FAILED, copies=True)
    control[2]["attempt2"] = "b2"
    last = rows("score", FIXED, FIXED, FIXED, FAILED, FIXED)
    pair = [("copied", "multi_turn", 4, "a"), ("repaired", "score", 4, "b")]
    assert kinds(*control, *last) == [*pair, ("failed", "score", 3, "b")]
    shown = [x[2] for x in kinds(*control, *last, most=9)]
    assert shown == [4, 4, 0, 1, 2, 3]  # each once
    last = rows("score", FIXED, FIXED, FIXED, FAILED, FAILED)
    none = kinds(*control, *last)
    assert none == [("repaired", "score", 0, "b"), ("failed", "score", 3, "b")]
    assert [x[:3] for x in kinds(*control)] == [
        (kind, "multi_turn", i) for kind, i in dict(repaired=0, spoiled=1, failed=2).items()
    ]


def test_what_a_model_says_cannot_drive_the_terminal(capsys):
    said = dict(kind="failed", phase="stage1", prompt="2 2 =4", gold="+2+2")
    said |= dict(attempt1="\x1b[2J5", attempt2="6" * 9000)
    notes = dict(examples=[said], diagnosis=["Collapsed: so much."])
    evaluation.show(dict(n=1, split="test", seed=0, phases={}) | notes)
    shown = capsys.readouterr().out
    assert "failed  2 2 =4   gold +2+2   (Stage I)" in shown
    assert "?[2J5" in shown and "\x1b" not in shown and len(shown) < 1500
    assert "DIAGNOSIS  Collapsed: so much." in shown


def test_a_transcript_of_long_texts_has_a_line_for_each(capsys):
    said = dict(kind="kept", phase="score", prompt="a\n" * 90, gold="assert f(1)\n" * 99)
    said |= dict(attempt1="\n\n\n7", attempt2="x" * 121)
    evaluation.show(dict(n=1, split="test", seed=0, phases={}, examples=[said], diagnosis=[]))
    *_, prompt, gold, attempt1, attempt2 = capsys.readouterr().out.splitlines()
    assert prompt == "     kept  " + "a⏎" * 60 + " .."
    assert gold.startswith("       gold assert f(1)⏎assert") and gold.endswith(" ..   (SCoRe)")
    assert attempt1 == " attempt 1  ⏎⏎⏎7" and attempt2 == f" attempt 2  {'x' * 120} .."
    assert evaluation.printable("x" * 120) == "x" * 120


def test_an_unfinished_run_is_evaluated_as_far_as_it_has_come(tmp_path, capsys):
    def interrupted(run):
        raise KeyboardInterrupt

    folder = score.create(TINY, tmp_path / "run")
    run = score.open_run(folder)
    run.phases[-1] = run.phases[-1]._replace(step=interrupted)
    with pytest.raises(KeyboardInterrupt):
        score.drive(run)
    assert evaluation.main([str(folder)]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert list(report["phases"]) == ["base", "multi_turn", "stage1"] and report["n"] == 10


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no run", "is not a run"), ("not begun", "no finished phase"),
        ("no weights", "no checkpoint at .*score.pt"), ("weights", "score.pt is not a readable"),
        ("checkpoint", "checkpoint.pt is not a readable"), ("config", "not a readable run"),
        ("n", "--n must be from 1, .* got 0 and 0"), ("show", "--show from 0, got 10 and -1"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_one_line_and_changes_nothing(
    trained, tmp_path, capsys, damage, words
):
    folder = copied(trained, tmp_path)
    more = dict(n=["--n", "0"], show=["--n", "10", "--show", "-1"]).get(damage, [])
    cut = dict(weights="score.pt", checkpoint="checkpoint.pt", config="config.json").get(damage)
    if damage == "no run":
        folder = tmp_path / "nowhere"
    elif damage == "not begun":
        (folder / "checkpoint.pt").unlink()
    elif damage == "no weights":
        (folder / "score.pt").unlink()
    elif cut:
        (folder / cut).write_bytes((folder / cut).read_bytes()[:100])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert evaluation.main([str(folder), *more]) == 2
    out, error = capsys.readouterr()
    assert re.match(f"eval.py: error: .*{words}", error) and error.count("\n") == 1 and not out
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_who_stops_it_is_told_so(monkeypatch, capsys, tmp_path):
    def stop(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "open_run", stop)
    assert evaluation.main([str(tmp_path)]) == 130
    assert capsys.readouterr().err == "eval.py: error: stopped\n"
