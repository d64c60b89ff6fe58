"""The losses and the step: groups, micro-batches, padding, order, and that it learns."""

import copy
import json
import math
import threading

import numpy as np
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st

import chat
import countdown
import rollout
import run as runs
import score
import verify
from model import GPT


@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 99))
def test_the_baseline_is_the_mean_of_the_others(G, n, seed):
    reward = torch.rand(n * G, generator=torch.Generator().manual_seed(seed)).tolist()
    expected = []
    for i in range(n * G):
        first = i // G * G
        others = [reward[j] for j in range(first, first + G) if j != i]
        expected.append(sum(others) / len(others))
    found = score.leave_one_out(torch.tensor(reward), G)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "G"), [(4, 1), (4, 3), (3, 2), (2, 0)])
def test_groups_that_have_no_others_are_refused(rows, G):
    with pytest.raises(ValueError, match=f"G = {G} and {rows} rows"):
        score.leave_one_out(torch.zeros(rows), G)


def test_returns_of_the_second_turn_in_stage_2():
    """The four cases of the paper's alpha = 10, worked by hand."""
    r1, r2 = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert score.shaped_reward(r1, r2, 10.0).tolist() == [0, 11, -10, 1]


def random_rollout(n=12):
    """Return rows of several lengths in the truth's tiny world, sampled, with rewards."""
    program = truth.load_program()
    policy, base = truth.tiny_model(program, 1), truth.tiny_model(program, 2)
    order = torch.randperm(len(truth.PAIRS), generator=torch.Generator().manual_seed(0))
    r, *rewards = truth.all_rows(program, [truth.PAIRS[i] for i in order[:n]])
    return policy, base, r, rewards


def gradient(policy, base, r, rewards, stage, kl="exact", micro_batch=None, G=2, chunk=0):
    """Return the gradient of the mean loss, as the step takes it, and the loss of each row."""
    policy.zero_grad()
    losses, n = [], len(r.ids_BT)
    micro_batch = micro_batch or n
    for at in range(0, n, micro_batch):
        here = slice(at, at + micro_batch)
        part = r.rows(here)
        logp, kl1, kl2 = score.score_terms(policy, base, part, 0.8, kl, chunk)
        if stage == "stage1":
            loss = score.loss_stage1(logp, part.mask2_BS, kl1, kl2, rewards[1][here], G, 0.3, 0.7)
        else:
            loss = score.loss_stage2(
                logp, score.own_mask1(part), part.mask2_BS, kl1, kl2,
                rewards[0][here], rewards[1][here], G, 3.0, 0.3,
            )  # fmt: skip
        (loss.sum() / n).backward()
        losses.append(loss.detach())
    return torch.cat([w.grad.reshape(-1) for w in policy.parameters()]), torch.cat(losses)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kl", ["exact", "k1"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_micro_batches_padding_and_order_change_nothing(stage, kl):
    policy, base, r, rewards = random_rollout()
    whole = gradient(policy, base, r, rewards, stage, kl)
    assert whole[0].norm() > 0.01
    for micro_batch in (2, 4, 6):
        assert_same(gradient(policy, base, r, rewards, stage, kl, micro_batch), whole)

    for chunk in (1, 3, 100):
        for policy.lean in (False, True):
            assert_same(gradient(policy, base, r, rewards, stage, kl, 4, chunk=chunk), whole)
    policy.lean = False

    padded = copy.copy(r)  # nonsense behind every row, and one more column of it
    beyond = torch.arange(r.ids_BT.shape[1]) >= r.length_B[:, None]
    padded.ids_BT = torch.cat([r.ids_BT.masked_fill(beyond, 2), r.ids_BT[:, :1]], dim=1)
    for name in ("turn_BS", "logp_BS"):
        wide = torch.nn.functional.pad(getattr(r, name), (0, 1))
        setattr(padded, name, wide)
    padded.length_B = r.length_B + 1
    padded.length_B[0] = padded.ids_BT.shape[1]
    assert_same(gradient(policy, base, padded, rewards, stage, kl), whole)

    groups = torch.tensor([4, 0, 5, 2, 1, 3])
    order = (groups[:, None] * 2 + torch.arange(2)).view(-1)
    moved = rollout.Rollout(**{name: value[order] for name, value in vars(r).items()})
    g, losses = gradient(policy, base, moved, [x[order] for x in rewards], stage, kl)
    assert_same((g, losses), (whole[0], whole[1][order]))


@pytest.mark.parametrize("kl", ["exact", "k1"])
def test_no_gradient_reaches_the_base_and_no_input_is_changed(kl):
    policy, base, r, rewards = random_rollout()
    before = {name: value.clone() for name, value in vars(r).items()}
    gradient(policy, base, r, rewards, "stage2", kl)
    assert all(weight.grad is None for weight in base.parameters())
    assert all(torch.equal(before[name], value) for name, value in vars(r).items())


@pytest.mark.parametrize("kl", ["exact", "k1"])
def test_the_kl_of_equal_models_is_zero(kl):
    policy, _, r, _ = random_rollout()
    _, kl1, kl2 = score.score_terms(policy, policy, r, 0.8, kl)
    assert kl1.abs().max() < 1e-12 and kl2.abs().max() < 1e-12


def test_the_kls_value_is_the_sum_over_the_attempts_tokens():
    policy, base, r, _ = random_rollout()
    law, ref = (torch.log_softmax(m(r.ids_BT[:, :-1]) / 0.8, -1).tolist() for m in (policy, base))
    for kl in ("exact", "k1"):
        _, kl1, kl2 = score.score_terms(policy, base, r, 0.8, kl)
        for found, mask in ((kl1, r.mask1_BS), (kl2, r.mask2_BS)):
            for b, row in enumerate(mask.tolist()):
                total = 0.0
                for s in [s for s, inside in enumerate(row) if inside]:
                    p, q, token = law[b][s], ref[b][s], r.ids_BT[b, s + 1].item()
                    if kl == "k1":
                        total += p[token] - q[token]
                    else:
                        total += sum(math.exp(p[v]) * (p[v] - q[v]) for v in range(truth.V))
                assert abs(found[b].item() - total) < 1e-12


@pytest.mark.parametrize("kl", ["exact", "k1"])
def test_offline_first_attempts_are_context_not_actions(kl):
    """Their tokens get no gradient: neither reward nor KL of turn 1 enters such a row's loss."""
    policy, base, r, rewards = random_rollout()
    r.offline1_B = torch.ones_like(r.offline1_B)
    a = gradient(policy, base, r, rewards, "stage2", kl)
    no_turn1 = copy.copy(r)
    no_turn1.turn_BS = r.turn_BS.masked_fill(r.mask1_BS, 0)
    assert_same(a, gradient(policy, base, no_turn1, rewards, "stage2", kl))
    r.offline1_B[:] = False
    assert not torch.allclose(a[0], gradient(policy, base, r, rewards, "stage2", kl)[0])


def test_sft_loss_is_the_tokens_cross_entropy():
    documents = [("12+34=", "046", "45"), ("00+01=", "1", "001")]
    r = rollout.read_documents(documents, "cpu")
    encoding = chat.toy_encoding()
    for row, mask1, mask2, (prompt, draft, revision) in zip(
        r.ids_BT, r.mask1_BS, r.mask2_BS, documents, strict=True
    ):
        text = f"{prompt}{draft}<|end|><|revise|>{revision}<|end|>"
        ids = chat.encode(encoding, text)
        assert row[: len(ids)].tolist() == ids
        assert encoding.decode(row[1:][mask1].tolist()) == draft + "<|end|>"
        assert encoding.decode(row[1:][mask2].tolist()) == revision + "<|end|>"
    logp = torch.tensor([[-1.0, -2.0, -4.0]])
    assert score.loss_sft(logp, torch.tensor([[True, False, True]])).tolist() == [5.0]


def test_beta2_is_drawn_to_the_balance_and_kept_in_bounds():
    beta2 = 0.1
    for _ in range(200):
        beta2 = score.balanced_beta2(beta2, reward2=0.6, kl1=2.0, start=0.1)
    assert abs(beta2 - 0.3) < 1e-6
    for kl1, bound in ((0.0, 1.0), (1e9, 0.01)):
        for _ in range(200):
            beta2 = score.balanced_beta2(beta2, reward2=0.6, kl1=kl1, start=0.1)
        assert abs(beta2 - bound) < 1e-6


def test_both_stages_learn_at_bandit_size():
    """80 steps of sampling and the shipped losses in the truth's world of 49 trajectories.

    Judged exactly, by enumeration. Over seeds 0 to 39 Stage I raised its objective by 1.78 to 1.89
    and Stage II by 0.98 to 1.08; the bounds are half of the least, so that no seed tried is near.
    """
    oracle = truth.Oracle()
    start = oracle.objectives()
    for stage, bound in (("stage1", 0.89), ("stage2", 0.49)):
        program = truth.load_program()
        policy, generator = oracle.policy, torch.Generator().manual_seed(5)
        policy.load_state_dict(truth.tiny_model(program, 1).state_dict())
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
        for _ in range(80):
            r = score.rollout(
                policy, [list(truth.PROMPT)] * 64, list(truth.INSTRUCTION), max_new=truth.LIMIT,
                end_id=truth.END, generator=generator, temperature=truth.TEMPERATURE,
            )  # fmt: skip
            rewards = [
                torch.tensor([float(tuple(row[1:][m].tolist()) in truth.RIGHT)
                              for row, m in zip(r.ids_BT, mask, strict=True)]).double()
                for mask in (r.mask1_BS, r.mask2_BS)
            ]  # fmt: skip
            logp, kl1, kl2 = score.score_terms(policy, oracle.base, r, truth.TEMPERATURE, "exact")
            if stage == "stage1":
                loss = score.loss_stage1(
                    logp, r.mask2_BS, kl1, kl2, rewards[1], 4, truth.BETA1, truth.BETA2
                )
            else:
                loss = score.loss_stage2(
                    logp, r.mask1_BS, r.mask2_BS, kl1, kl2, *rewards, 4, truth.ALPHA, truth.BETA1
                )
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
        assert oracle.objectives()[stage] - start[stage] > bound


TINY = dict(
    digits=1, n_layer=1, n_head=2, n_kv_head=1, d_model=8, d_ff=8, sft_steps=4, sft_batch=8,
    stage1_steps=3, stage2_steps=3, batch=8, group=2, warmup=1, sft_warmup=1, eval_n=10,
)  # fmt: skip


def train(folder, program=None, **changes):
    """Return the log of a tiny run."""
    modules = program or type("shipped", (), {"score": score, "run": runs})
    run = modules.run.create(modules.run.Config(**TINY | changes), folder)
    assert modules.score.train(run, threading.Event())
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["score", "pair_sft_plus"])
def test_a_step_does_not_depend_on_the_micro_batch(tmp_path, monkeypatch, method):
    """The weights after all steps, base included, in float64, where Adam enlarges no rounding."""
    monkeypatch.setattr(runs, "GPT", lambda *words, **more: GPT(*words, **more).double())
    changes = dict(method=method, batch=32, forget=0.1)
    train(tmp_path / "whole", **changes)
    train(tmp_path / "micro", micro_batch=6 if method == "score" else 2, chunk=5, **changes)
    name = f"{method}.pt"
    whole, micro = (runs.load(tmp_path / x / name)["model"] for x in ("whole", "micro"))
    start = runs.load(tmp_path / "whole/base.pt")["model"]
    assert any(not torch.equal(whole[key], start[key]) for key in whole)
    for key in whole:
        torch.testing.assert_close(whole[key], micro[key], rtol=1e-7, atol=1e-9)


def first_kl_of_stage_2(rows):
    return next(row["kl1"] + row["kl2"] for row in rows if row["phase"] == "score")


def test_the_reference_stays_the_base_in_stage_2(tmp_path):
    """Stage I has moved the policy, so its KL to the base is above 0 where Stage II starts."""
    changes = dict(lr=0.05, stage1_steps=6)
    assert first_kl_of_stage_2(train(tmp_path / "shipped", **changes)) > 0.01
    mutant = truth.load_program(
        ("score.py", 'if phase.objective == "sft":\n        run.base', "if True:\n        run.base")
    )
    assert first_kl_of_stage_2(train(tmp_path / "mutant", mutant, **changes)) < 1e-6


def test_a_sampler_of_another_law_is_noticed_before_the_first_step(tmp_path):
    edit = ("rollout.py", "torch.log_softmax(logits_BV.to(wide) / temperature, dim=-1)\n",
            "torch.log_softmax(logits_BV.to(wide) / temperature, dim=-1)\n"
            "    if len(logits_BV.shape) == 2:\n"
            "        logp_BV = torch.log_softmax(1.1 * logp_BV, -1)\n")  # fmt: skip
    with pytest.raises(RuntimeError, match="disagree"):
        train(tmp_path / "mutant", truth.load_program(edit))


def test_multi_turn_is_stage_2_without_bonus_for_as_many_steps():
    phases = runs.schedule(runs.Config(method="multi_turn", stage1_steps=7, stage2_steps=5))
    assert [(p.objective, p.steps, p.alpha) for p in phases[1:]] == [("stage2", 12, 0.0)]


STAGE1 = ("stage1", "stage1", 7, 0.0, 2, False, False)
PHASES = {  # name, objective, steps, alpha, attempts, plus, continues; after the base
    "base": [],
    "score": [STAGE1, ("score", "stage2", 5, 3.0, 2, False, False)],
    "multi_turn": [("multi_turn", "stage2", 12, 0.0, 2, False, False)],
    "single_turn": [("single_turn", "single_turn", 12, 0.0, 2, False, False)],
    "no_stage1": [("no_stage1", "stage2", 12, 3.0, 2, False, False)],
    "no_bonus": [STAGE1, ("no_bonus", "stage2", 5, 0.0, 2, False, False)],
    "star": [(f"star{i}", "star", 4, 0.0, 2, False, i != "-1") for i in ("-1", "-2", "")],
    "star_plus": [(f"star_plus{i}", "star", 4, 0.0, 2, True, i != "-1") for i in ("-1", "-2", "")],
    "pair_sft": [("pair_sft", "pair_sft", 12, 0.0, 2, False, False)],
    "pair_sft_plus": [("pair_sft_plus", "pair_sft", 12, 0.0, 2, True, False)],
    "star_stage2": [
        STAGE1,
        ("star_stage2-1", "star", 1, 0.0, 2, True, False),
        ("star_stage2-2", "star", 2, 0.0, 2, True, True),
        ("star_stage2", "star", 2, 0.0, 2, True, True),
    ],
    "three_turn": [
        ("stage1", "stage1", 3, 0.0, 2, False, False),
        ("stage1b", "stage1b", 4, 0.0, 3, False, False),
        ("three_turn", "stage2", 5, 3.0, 3, False, False),
    ],
}


@pytest.mark.parametrize("method", runs.METHODS)
def test_the_phases_of_every_method(method):
    c = runs.Config(method=method, stage1_steps=7, stage2_steps=5, alpha=3.0)
    base, *rest = runs.schedule(c)
    assert base == ("base", "sft", 1500, 0.0, 2, False, False)
    assert rest == PHASES[method] and sum(p.steps for p in rest) in (0, 12)


def test_star_samples_from_what_its_last_iteration_has_become(tmp_path, monkeypatch):
    """And Pair-SFT from the base; STaR's iterations share one optimiser and one warm-up."""
    authors, real = [], score.sample

    def sample(model, *words, **more):
        authors.append(copy.deepcopy(model.state_dict()))
        return real(model, *words, **more)

    monkeypatch.setattr(score, "check_sampler", lambda *_: None)
    monkeypatch.setattr(score, "sample", sample)
    monkeypatch.setattr(  # so that there is something to imitate
        score,
        "grade",
        lambda r, problems, *_: [torch.zeros(len(problems)), torch.ones(len(problems))],
    )
    for method, expected in (
        ("star", ["base", "base", "star-1", "star-1", "star-2", "star-2"]),
        ("pair_sft", ["base"] * 6),
    ):
        authors.clear()
        train(tmp_path / method, method=method)
        assert len(authors) == 6
        for found, name in zip(authors, expected, strict=True):
            kept = runs.load(tmp_path / method / f"{name}.pt")["model"]
            assert all(torch.equal(found[key], kept[key]) for key in kept)
    a, b = (runs.load(tmp_path / "star" / f"{x}.pt")["model"] for x in ("star-1", "star-2"))
    assert not all(torch.equal(a[key], b[key]) for key in a)

    c = runs.Config(**TINY | dict(warmup=3), method="star")
    rates = [score.learning_rate(c, phase, 0) / c.lr for phase in runs.schedule(c)[1:]]
    assert rates == [0.25, 1.0, 1.0]
    run = runs.create(c, tmp_path / "optimiser")
    kept = []
    for phase in runs.schedule(c):
        kept.append(run.optimizer)
        score.finish_phase(run, phase)
    assert kept[0] is not kept[1] and kept[1] is kept[2] is kept[3]


@pytest.mark.parametrize("task", ["addition", "countdown"])
def test_the_base_reads_training_problems_of_the_runs_own_split(task):
    c = runs.Config(task=task, split_seed=1)
    read = runs.documents(c, 400, np.random.default_rng(0), clean=True)
    for prompt, *_ in read:
        if task == "addition":
            a, b = prompt.removesuffix("=").split("+")
            assert verify.split_of(np.array([int(a)]), np.array([int(b)]), 1)[0] == "train"
        else:
            numbers, target = prompt.removesuffix("=").split(":")
            numbers = [int(x) for x in numbers.split()]
            assert countdown.split_of(numbers, int(target), 1) == "train"


def test_single_turn_training_leaves_what_only_attempt_2_would_teach(tmp_path):
    """Its gradient does not depend on the second attempt's rewards."""
    config = runs.Config(**TINY, method="single_turn")
    gradients = []
    for reward2 in (0.0, 1.0):
        run = runs.create(config, tmp_path / str(reward2))
        run.base = copy.deepcopy(run.policy).requires_grad_(False)
        run.optimizer.step = lambda: None
        r1 = torch.tensor([1.0, 0.0] * 4)
        r2 = torch.tensor([reward2, 0.0] * 4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(score, "grade", lambda r, problems, *_, r1=r1, r2=r2: (r1, r2))
            score.rl_step(run, runs.schedule(config)[1])
        gradients.append([w.grad.clone() for w in run.policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert max(g.abs().max() for g in gradients[0]) > 0


def test_a_run_from_anothers_base_goes_on_as_if_it_had_trained_it(tmp_path):
    whole = train(tmp_path / "whole")
    run = runs.create(runs.Config(**TINY), tmp_path / "part", tmp_path / "whole")
    assert score.train(run, threading.Event())
    part = [json.loads(line) for line in (tmp_path / "part" / "log.jsonl").read_text().splitlines()]
    assert part == [row for row in whole if row["phase"] != "base"] and len(part) == 6
    for phase in ("base", "score"):
        a, b = (runs.load(tmp_path / name / f"{phase}.pt")["model"] for name in ("whole", "part"))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_base_of_other_settings_is_refused_and_nothing_is_left(tmp_path):
    train(tmp_path / "whole")
    for change, words in ((dict(seed=1), "--seed 0, not 1"), (dict(copy=0.5), "--copy")):
        with pytest.raises(ValueError, match=words):
            runs.create(runs.Config(**TINY | change), tmp_path / "other", tmp_path / "whole")
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    with pytest.raises(ValueError, match="not a run"):
        runs.create(runs.Config(**TINY), tmp_path / "other", tmp_path / "nowhere")


def test_both_methods_start_from_the_same_base(tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b", method="multi_turn")
    a, b = (runs.load(tmp_path / name / "base.pt")["model"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_interleaved_stages_share_out_the_steps(tmp_path):
    rows = train(tmp_path / "run", rounds=2, stage1_steps=5, stage2_steps=4)
    order = [row["phase"] for row in rows[4:]]
    assert order == ["stage1-1"] * 2 + ["stage2-1"] * 2 + ["stage1-2"] * 3 + ["score"] * 2


def script(monkeypatch, acc_t1, acc_t2):
    """Replace the reinforcement step by one that reports given accuracies in turn, and writes the
    number of the step into a weight."""
    monkeypatch.setattr(score, "BLOCK", 2)

    def step(run, phase):
        i = run.progress.step
        with torch.no_grad():
            run.policy.norm.weight.fill_(i + 1)
        return dict(acc_t1=acc_t1[i], acc_t2=acc_t2[i], delta=acc_t2[i] - acc_t1[i], kl1=0, kl2=0)

    monkeypatch.setattr(score, "rl_step", step)


@pytest.mark.parametrize(("gain", "steps"), [(0.0, 8), (0.15, 6), (0.09, 4), (0.5, 8)])
def test_stage_1_may_end_when_delta_has_moved(tmp_path, monkeypatch, gain, steps):
    """Blocks of two steps with mean deltas 0.1, 0.2, 0.3, 0.4: one block's rise ends it early."""
    delta = [0.0, 0.2, 0.1, 0.3, 0.2, 0.4, 0.3, 0.5]
    script(monkeypatch, [0.0] * 8, delta)
    rows = train(tmp_path / "run", stage1_steps=8, stage1_gain=gain)
    assert sum(row["phase"] == "stage1" for row in rows) == steps


@pytest.mark.parametrize(("select", "step"), [("best", 4), ("last", 8)])
def test_the_last_phase_keeps_its_best_weights_by_reward(tmp_path, monkeypatch, select, step):
    """Blocks of two steps with mean r1 + r2 of 0.5, 0.9, 0.8, 0.8; single steps are higher later,
    and so is r2 alone."""
    script(monkeypatch, [0.2, 0.2, 0.5, 0.5, 0.0, 0.6, 0.1, 0.1],
           [0.3, 0.3, 0.4, 0.4, 0.3, 0.7, 0.7, 0.7])  # fmt: skip
    train(tmp_path / "run", stage2_steps=8, select=select)
    kept = runs.load(tmp_path / "run" / "score.pt")
    assert kept["selected_step"] == step
    assert kept["model"]["norm.weight"].tolist() == [step] * TINY["d_model"]
    assert runs.load(tmp_path / "run" / "stage1.pt")["selected_step"] == TINY["stage1_steps"]


def test_offline_attempts_and_adaptive_beta2_run(tmp_path):
    rows = train(tmp_path / "run", offline=0.5, adaptive_beta2=True)
    beta2 = [row["beta2"] for row in rows if row["phase"] == "stage1"]
    assert len(set(beta2)) == len(beta2)
