"""The map: its runs and their resume, the line, and numbers of the reason that change nothing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import model
import score
from rollout import find_task, make_rows, token_terms
from study import map as study_map
from study import measure, methods
from study.methods import Config

TINY = dict(n_layer=1, d_model=8, d_ff=8, sft_steps=2, sft_batch=4, eval_n=8)
TINY |= dict(stage1_steps=11, stage2_steps=3, batch=8, group=2)
OPTIONS = [f"--{key}={x}".replace("_", "-") for key, x in TINY.items()]


def jobs_of(c, right, careless, methods, seeds, runs):
    levels = [study_map.level(c.task, right, careless, methods)]
    return measure.jobs(c, levels, seeds, runs, "test")


def test_a_map_goes_on_with_killed_runs_and_ends_with_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(study_map, "RIGHTS", (0.005, 0.01))
    monkeypatch.setattr(study_map, "CARELESS", (0.1,))
    (base,), (killed,) = jobs_of(Config(**TINY), 0.005, 0, ["score"], [0], tmp_path)
    before = base._replace(n=20, config=replace(base.config, eval_n=20), commit="before")
    measure.work(before)
    whole = json.loads(json.dumps(measure.work(killed._replace(folder=tmp_path / "whole"))))
    folder = score.create(killed.config, killed.folder)
    with pytest.raises(ZeroDivisionError):  # at Stage II's second step
        for row in score.train(run := score.open_run(folder)):
            with open(folder / "log.jsonl", "a") as log:
                print(json.dumps(row), file=log)
            model.save(score.state_of(run), folder / "checkpoint.pt")
            if run.step == run.phases[run.phase].steps:
                model.save(dict(model=run.policy.state_dict()), folder / f"{row['phase']}.pt")
            1 / (row["phase"] != "score")
    results, written = tmp_path / "part-results", (base.folder / "base.pt").stat()
    words = ["--task=signs", "--seeds=0", "--workers=1", f"--runs={tmp_path}", *OPTIONS]
    assert study_map.main(words) == 0
    assert (base.folder / "base.pt").stat().st_mtime_ns == written.st_mtime_ns
    names = "map.json map.md"
    assert " ".join(sorted(path.name for path in results.iterdir())) == names
    data = json.loads((results / "map.json").read_text())
    found = {(x["name"], x["right_revisions"], x["careless"]): x for x in data["runs"]}
    assert len(found) == 3 + 2 * 5 + 2
    mine = found["score", 0.005, 0.0]
    for name in ("stage1", "score"):
        assert mine["phases"][name]["acc_t2"] == whole["phases"][name]["acc_t2"]
        ends = [model.load(x / f"{name}.pt") for x in (folder, tmp_path / "whole")]
        torch.testing.assert_close(*ends, rtol=0, atol=0)
    assert [x["step"] for x in mine["curve"] if "norm2" in x] == [10]
    base = found["base", 0.01, 0.0]
    assert "repair_rate" in base["phases"]["base"]["sampled"] and not base["curve"]
    assert found["base", 0.005, 0.0]["commit"] == "before" != mine["commit"] == whole["commit"]
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["phase"] == "stage1" and row["step"] <= 10]
    kinds = [kind for kind in methods.KINDS if any(row.get(f"{kind}_n") for row in rows)]
    for kind in kinds:
        pay, share = (sum(row[key] for row in rows) for key in (kind, f"{kind}_n"))
        assert mine["curve"][0][kind] == pytest.approx(pay / share, rel=1e-2, abs=1e-3)
    assert kinds and kinds == [kind for kind in methods.KINDS if kind in mine["curve"][0]]
    text = (results / "map.md").rename(tmp_path / "before.md").read_text()
    assert study_map.main(["--table", str(results / "map.json")]) == 0
    assert (results / "map.md").read_text() == text


def test_every_task_has_its_own_settings_and_runs_of_a_seed_a_base():
    for task in study_map.TASKS:
        c = score.parse(["--task", task], Config)[1]
        (base,), rest = jobs_of(c, 0.3, 0.1, ("score", "no_bonus"), [4, 4], Path("x"))
        own = dict(task=task, seed=4) | find_task(task)[1]
        for job in (base, *rest):
            own |= dict(method=job.name, right_revisions=0.3, careless=0.1)
            assert job.config == Config(**own)
            own |= dict(base=str(base.folder))


def test_an_advantage_is_the_mean_of_the_rows_of_its_kind(tmp_path):
    """Of a kind without rows there is none, though what it adds to a step's mean is 0."""
    _, (job,) = jobs_of(Config(**TINY), 0.1, 0, ["score"], [0], tmp_path)
    kinds = {key: 0.0 for kind in methods.KINDS for key in (kind, f"{kind}_n")}
    steps = [dict(changed_wrong=0.2, changed_wrong_n=0.1), dict(changed_wrong_n=0.3)]
    rows = [dict(phase="stage1", step=i, **kinds | x) for i, x in enumerate(steps, start=1)]
    job.folder.mkdir()
    (job.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (block,) = study_map.short(job, dict(phases={}, commit="x"))["curve"]
    assert block["changed_wrong"] == pytest.approx(0.5) and "copied_wrong" not in block


def run_of(name, rate, delta, changed, seed=0):
    m = dict(acc_t1=0.5, acc_t2=0.5 + delta, delta=delta, changed=changed)
    m |= dict(sampled=dict(repair_rate=rate, spoil_rate=rate / 2))
    return dict(name=name, seed=seed, task="signs", right_revisions=rate, careless=0.0,
                phases={name: m}, curve=[])  # fmt: skip


def test_who_collapsed_at_each_level():
    for pair in ((0.02, 0.03), (-0.02, 0.0), (0.021, 0.03), (-0.03, 0.0), (0.0, 0.031)):
        assert study_map.collapsed(run_of("x", 0.1, *pair)) == (pair[0] in (0.02, -0.02))
    runs = []
    for rate, *deltas in ((0.01, 0.0, 0.01), (0.04, 0.05, 0.3), (0.09, 0.2, 0.3)):
        for seed, delta in enumerate(deltas):
            three = dict(base=0.0, score=0.1, multi_turn=delta)
            runs += [run_of(name, rate, x, x, seed) for name, x in three.items()]
    levels = study_map.by_level(runs[::-1], False)["signs"]
    assert list(levels) == [0.01, 0.04, 0.09] and not study_map.by_level(runs, True)
    rows = study_map.table(levels, False).splitlines()[2:]
    for row, n, x in zip(rows, ((2, 2), (0, 1), (0, 0)), (1, 4, 9), strict=True):
        rates = " | ".join(f"{y:.2f} ({y:.2f} to {y:.2f})" for y in (x, x / 2))
        assert f" | {rates} | {n[0]} of 2 | {n[1]} of 2 | " in row


def test_numbers_of_the_reason_are_those_of_a_loop_over_rows(tmp_path):
    run = score.open_run(score.create(Config(**TINY | dict(batch=24, group=4)), tmp_path / "run"))
    attempts = (rng := np.random.default_rng(0)).integers(0, 2, (2, 24, 1)).tolist()
    r = make_rows([[1, 2, 3]] * 24, attempts, [4], "cpu")
    reward_KB = torch.tensor(rng.choice([0.0, 1.0, np.nan], (2, 24), p=[0.5, 0.4, 0.1])).float()
    adv_KB, held = score.stage2(reward_KB, run.config)
    groups, rows = {b // 4 for b in range(24) if reward_KB[:, b].tolist() == [0, 1]}, {}
    expected = dict(groups=len(groups) / 6)
    for b, (y1, y2) in enumerate(zip(*attempts, strict=True)):
        first = {0.0: "wrong", 1.0: "right"}.get(reward_KB[0, b].item())
        kind = f"{'copied' if y1 == y2 else 'changed'}_{first}"
        rows.setdefault(kind, []).append(adv_KB[1][b].item())
    for kind in methods.KINDS:  # of a first attempt without a verdict there is none
        expected |= {kind: sum(rows[kind]) / 24, f"{kind}_n": len(rows[kind]) / 24}
    found = methods.paid_for(r, reward_KB, adv_KB[1], 4)
    assert found == pytest.approx(expected, abs=1e-6) and 0 < len(groups) < 6
    run.base.head.weight += 0.1 * torch.randn(run.base.head.weight.shape)
    terms = token_terms(run.policy, run.base, r, 1.0)
    for k, norm in enumerate(methods.norms(run, r, terms, (adv_KB, held)).values()):
        alone = ([x * (i == k) for i, x in enumerate(pair)] for pair in (adv_KB, held))
        run.policy.zero_grad()
        terms = token_terms(run.policy, run.base, r, 1.0)
        score.loss(*terms, r.turn_BS, *alone).mean().backward()
        squares = sum(x.grad.square().sum().item() for x in run.policy.parameters())
        assert norm == pytest.approx(squares**0.5, rel=1e-5) and norm > 0


@pytest.mark.parametrize("method", ["multi_turn", "score"])
def test_seeing_the_reasons_leaves_training_bit_for_bit_the_same(tmp_path, monkeypatch, method):
    (base,), (job,) = jobs_of(Config(**TINY), 0.1, 0, [method], [0], tmp_path)
    measure.work(base)
    logs, ends = [], []
    for x in (job, job._replace(folder=tmp_path / "other")):
        measure.work(x)
        logs.append([*map(json.loads, (x.folder / "log.jsonl").read_text().splitlines())])
        ends.append([model.load(x.folder / f"{name}.pt") for name in (method, "checkpoint")])
        monkeypatch.setattr(methods, "seen", lambda *_: {})
    for seen, row in zip(*logs, strict=True):
        assert {key: seen[key] for key in row} == row
    assert "groups" in logs[0][-1] and "groups" not in logs[1][-1]
    torch.testing.assert_close(*ends, rtol=0, atol=0)
