"""The ports have the losses and the gradients of score.py, and README shows what the ports are.

Random ragged rows, with logits as the leaves: what differs from score.py is only how it is said.
"""

import re
import textwrap
import types
import warnings
from pathlib import Path

import numpy as np
import port_tensors
import pytest
import torch
from truth import ROOT

import chat
import rollout
import score

V, G, ALPHA, BETA1, BETA2, TEMPERATURE = 7, 3, 5.0, 0.3, 0.8, 0.7
SETTINGS = dict(alpha=ALPHA, beta1=BETA1, beta2=BETA2)
README = (ROOT / "README.md").read_text()
STAGES_AND_KLS = [(stage, kl) for stage in (1, 2) for kl in ("exact", "k1")]


def library(name):
    """Return a module, or skip the test; what it warns of when it is imported is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            name, reason=f"{name} is not installed (tests/requirements.txt, tests/port_verl.py)"
        )


def example(seed=0):
    """Return a rollout of rows of many lengths, its rewards, and float64 logits of both models."""
    rng = np.random.default_rng(seed)

    def ids(longest):
        return [rng.integers(0, V, rng.integers(1, longest + 1)).tolist() for _ in range(4 * G)]

    r = rollout.lay_out(ids(5), [ids(4), ids(6)], [5, 6], "cpu")
    rewards = [torch.from_numpy(rng.integers(0, 2, 4 * G)).double() for _ in range(2)]
    logits = [torch.from_numpy(2 * rng.normal(size=(*r.turn_BS.shape, V))) for _ in range(2)]
    return r, rewards, logits[0].requires_grad_(), logits[1]


def laws(r, logits, ref_logits):
    """Return log-probabilities of the tokens that came, and each position's KL."""
    law, ref = (rollout.token_law(x, TEMPERATURE) for x in (logits, ref_logits))
    target = r.ids_BT[:, 1:]
    kl = (law.exp() * (law - ref)).sum(dim=-1)
    return score.of_tokens(law, target), score.of_tokens(ref, target), kl


def reference(r, rewards, logits, ref_logits, stage, kl):
    """Return the loss [B] of score.py, and the gradient of its mean."""
    logp, ref_logp, kl_BS = laws(r, logits, ref_logits)
    if kl == "exact":
        kls = [score.kl_exact(kl_BS, logp, mask) for mask in (r.mask1_BS, r.mask2_BS)]
    else:
        kls = [score.kl_k1(logp, ref_logp, mask) for mask in (r.mask1_BS, r.mask2_BS)]
    if stage == 1:
        loss = score.loss_stage1(logp, r.mask2_BS, *kls, rewards[1], G, BETA1, BETA2)
    else:
        masks = r.mask1_BS, r.mask2_BS
        loss = score.loss_stage2(logp, *masks, *kls, *rewards, G, ALPHA, BETA1)
    return loss.detach(), torch.autograd.grad(loss.mean(), logits)[0]


def with_tensors(port, r, rewards, logits, ref_logits, stage, kl):
    """Return the same of the three tensors."""
    logp, ref_logp, kl_BS = laws(r, logits, ref_logits)
    if kl == "k1":
        kl_BS = (logp - ref_logp).detach() * (1 + logp - logp.detach())
    tensors = port.score_tensors(r.turn_BS, *rewards, G, stage, **SETTINGS)
    loss = port.token_loss(logp, kl_BS, r.turn_BS, *tensors)
    return loss.detach(), torch.autograd.grad(loss.mean(), logits)[0]


def with_folded(port, r, rewards, logits, ref_logits, stage):
    """Return the gradient of a policy gradient that has the KL in its advantage."""
    logp, ref_logp, _ = laws(r, logits, ref_logits)
    tensors = port.score_tensors(r.turn_BS, *rewards, G, stage, **SETTINGS)
    advantage = port.fold(*tensors, logp, ref_logp, r.turn_BS)
    return torch.autograd.grad(-(advantage * logp).sum(dim=1).mean(), logits)[0]


def with_jax(port, r, rewards, logits, ref_logits, stage, kl):
    """Return the same of JAX, through its own gradient."""
    jax = library("jax")
    with jax.enable_x64(True):
        j = jax.numpy
        turn, target = j.array(r.turn_BS.numpy()), j.array(r.ids_BT[:, 1:].numpy())
        rewards = [j.array(x.numpy()) for x in rewards]
        tensors = port.score_tensors(turn, *rewards, G, stage, **SETTINGS)

        def loss(x):
            ref = j.array(ref_logits.numpy())
            return port.score_loss(x, ref, target, turn, *tensors, TEMPERATURE, kl)

        at = j.array(logits.detach().numpy())
        gradient = jax.grad(lambda x: loss(x).mean())(at)
        return tuple(torch.from_numpy(np.array(x)) for x in (loss(at), gradient))


def edited(name, *edits):
    """Return a port after edits (old, new) of its source."""
    source = (ROOT / f"tests/{name}.py").read_text()
    for old, new in edits:
        assert source.count(old) == 1, f"{name} has {source.count(old)} of {old!r}"
        source = source.replace(old, new)
    module = types.ModuleType(name)
    exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    return module


def assert_same(found, expected):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# --- the three tensors ----------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "kl"), STAGES_AND_KLS)
def test_three_tensors_have_the_losses_and_gradients_of_score_py(stage, kl):
    expected = reference(*example(), stage, kl)
    assert expected[1].norm() > 0.1
    assert_same(with_tensors(port_tensors, *example(), stage, kl), expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_kl_folded_into_the_advantage_has_the_gradient_of_k1(stage):
    expected = reference(*example(), stage, "k1")[1]
    assert_same([with_folded(port_tensors, *example(), stage)], [expected])


MUTANTS = {
    "bonus reaches turn 1": [
        ("nothing_B, reward1_B, shaped_B]",
         "nothing_B, reward1_B + alpha * (reward2_B - reward1_B), shaped_B]")
    ],
    "second reward reaches turn 1 in Stage I": [
        ("[nothing_B, nothing_B, reward2_B]", "[nothing_B, reward2_B, reward2_B]")
    ],
    "std normalisation": [
        ("(group_PG3 - others_PG3).view",
         "((group_PG3 - others_PG3) / (group_PG3.std(dim=1, keepdim=True) + 1e-6)).view")
    ],
    "own reward in the baseline": [("(group_PG3.sum(dim=1, keepdim=True) - group_PG3) / (G - 1)",
                                    "group_PG3.mean(dim=1, keepdim=True)")],
    "no score-function term": [("zero_BS * (later_BS - advantage_BS)", "zero_BS * -advantage_BS")],
    "later KL of both turns": [("sum(x.flip(1)", "sum(sum(own_BS).flip(1)")],
    "KL of turn 1 without gradient": [
        ("cost_BS = weight_BS * kl_BS",
         "cost_BS = weight_BS * torch.where(turn_BS == 1, kl_BS.detach(), kl_BS)")
    ],
    "weights of the turns swapped": [
        ("0.0, beta1 + beta2 if stage == 1 else beta1, beta1]",
         "0.0, beta1, beta1 + beta2 if stage == 1 else beta1]")
    ],
    "own-length division": [(".sum(dim=1)\n", ".sum(dim=1) / (turn_BS > 0).sum(dim=1)\n")],
    "context has a KL": [("new_tensor([0.0,", "new_tensor([beta1,")],
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_variant_of_the_tensors_is_caught(name):
    if name == "own-length division":
        source = (ROOT / "tests/port_tensors.py").read_text()
        assert source.endswith(MUTANTS[name][0][0])
    port = edited("port_tensors", *MUTANTS[name])
    errors = [
        distance(with_tensors(port, *example(), *case)[1], reference(*example(), *case)[1])
        for case in STAGES_AND_KLS
    ]
    assert max(errors) > 1e-3, errors


# --- JAX ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "kl"), STAGES_AND_KLS)
def test_jax_has_the_losses_and_gradients_of_score_py(stage, kl):
    library("jax")
    port = edited("port_jax")
    assert_same(with_jax(port, *example(), stage, kl), reference(*example(), stage, kl))


JAX_MUTANTS = {
    "bonus reaches turn 1": [("else [reward1_B, shaped_B]",
                              "else [reward1_B + shaped_B - reward2_B, shaped_B]")],
    "std normalisation": [("(group_PG3 - others_PG3)",
                           "((group_PG3 - others_PG3) / (group_PG3.std(1, keepdims=True) + 1e-6)"
                           ")")],
    "no score-function term": [("zero_BS * (later_BS - advantage_BS)", "zero_BS * -advantage_BS")],
    "KL of turn 1 without gradient": [
        ("cost_BS = weight_BS * kl_BS",
         "cost_BS = weight_BS * jnp.where(turn_BS == 1, stop_gradient(kl_BS), kl_BS)")
    ],
    "temperature of the policy alone": [("stop_gradient(ref_logits_BSV) / T",
                                         "stop_gradient(ref_logits_BSV)")],
}  # fmt: skip


@pytest.mark.parametrize("name", JAX_MUTANTS)
def test_a_wrong_variant_of_jax_is_caught(name):
    library("jax")
    port = edited("port_jax", *JAX_MUTANTS[name])
    errors = [
        distance(with_jax(port, *example(), *case)[1], reference(*example(), *case)[1])
        for case in STAGES_AND_KLS
    ]
    assert max(errors) > 1e-3, errors


def test_the_loop_in_jax_holds_attempt_1_in_stage_1_and_learns_both_in_stage_2():
    """A flat base is right at one token in five. The seed is fixed: nothing is left to chance."""
    jax = library("jax")
    (held, corrected), final = edited("port_jax").train(200, jax.random.key(0))
    assert abs(held - 0.2) < 0.15 and corrected > 0.8
    assert min(final) > 0.9


# --- TRL ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl():
    library("trl")
    return library("port_trl")


@pytest.fixture(scope="module")
def folders(trl, tmp_path_factory):
    return trl.random_folders(tmp_path_factory.mktemp("models"))


quiet = pytest.mark.filterwarnings("ignore")  # TRL's and transformers' own


@quiet
@pytest.mark.parametrize("stage", [1, 2])
def test_trl_has_the_gradient_of_score_py_on_the_rows_that_it_samples(trl, folders, stage):
    """In float32, in which it computes: 5e-6; the mutants below are off by a thousandth."""
    found, expected, batch = trl.gradients(*folders, stage, temperature=TEMPERATURE)
    assert expected.norm() > 0.01 and distance(found, expected) < 5e-6
    turn, ids = batch["turn"], batch["completion_ids"]
    end, instruction = chat.format_of("addition")[1:3]
    for row in zip(ids.tolist(), turn.tolist(), batch["completion_mask"].tolist(), strict=True):
        first, context, second, beyond = (
            [i for i, k, real in zip(*row, strict=True) if (k, real) == kind]
            for kind in ((1, 1), (0, 1), (2, 1), (0, 0))
        )
        assert row[0] == first + context + second + beyond and context == instruction
        for attempt in (first, second):
            assert len(attempt) == 9 or attempt[-1] == end
            assert end not in attempt[:-1]
    assert (batch["prompt_ids"].view(-1, 4, 16) == batch["prompt_ids"].view(-1, 4, 16)[:, :1]).all()
    assert (batch["advantages"][turn == 0] == 0).all()
    assert (batch["advantages"][turn == 1] != 0).any() == (stage == 2)


@quiet
@pytest.mark.parametrize("name", ["bonus reaches turn 1", "std normalisation"])
def test_a_wrong_variant_in_trl_is_caught(trl, folders, name, monkeypatch):
    wrong = edited("port_tensors", *MUTANTS[name])
    monkeypatch.setattr(trl, "score_tensors", wrong.score_tensors)
    found, expected, _ = trl.gradients(*folders, stage=2)
    assert distance(found, expected) > 1e-3


@quiet
def test_trls_own_kl_has_not_the_gradient_of_later_tokens(trl, folders, monkeypatch):
    """It is that of score.py's k1 without what comes after a token."""
    more = dict(stage=2, kl="native", beta1=0.5)
    found, expected, _ = trl.gradients(*folders, **more)
    assert distance(found, expected) > 1e-3
    monkeypatch.setattr(score, "after", torch.zeros_like)
    found, expected, _ = trl.gradients(*folders, **more)
    assert distance(found, expected) < 5e-6


@quiet
def test_trl_takes_steps_and_its_base_stays_the_base(trl, folders, tmp_path):
    problems = trl.verify.problems(8, "train", np.random.default_rng(0), 7)
    pay = [trl.parity_of(1), trl.parity_of(2)]
    trainer = trl.make_trainer(
        folders[0], problems, 16, steps=2, rewards=pay, warmup=0, out=tmp_path
    )
    trainer.train()
    assert len(trainer.clock.seconds) == 2
    base = type(trainer.model).from_pretrained(folders[0]).state_dict()
    unmoved = [torch.equal(base[name], x) for name, x in trainer.model.state_dict().items()]
    assert not any(unmoved)
    assert all(torch.equal(base[name], x) for name, x in trainer.ref_model.state_dict().items())


@quiet
def test_trls_script_says_what_it_found(trl, monkeypatch, capsys):
    for words, lines in (["--check"], 2), (["--steps", "1", "--batch", "8"], 1):
        monkeypatch.setattr("sys.argv", ["port_trl.py", *words])
        trl.main()
        printed = capsys.readouterr().out
        found = re.findall(r"^(?:Stage \d: .* = \S+e-0[5-9]|seconds a step.*)$", printed, re.M)
        assert len(found) == lines, printed


def test_the_toys_tokens_and_rewards_are_the_same_in_trl(trl):
    text = "0186956+9513543=09600499<|end|><|revise|>9700499<|end|>"
    ids = chat.encode(chat.toy_encoding(), text)
    assert trl.toy_tokenizer().encode(text) == ids
    turn = [0] * 16 + [1] * 9 + [0] + [2] * 8
    cut = [k if i < len(turn) - 1 else 0 for i, k in enumerate(turn)]  # without its last <|end|>
    for attempt, expected in ((1, [0.0, 0.0]), (2, [1.0, 0.0])):
        given = dict(completion_ids=[ids, ids], turn=[turn, cut], gold=["9700499"] * 2)
        assert trl.reward_of(attempt)(**given) == expected
    with pytest.raises(ValueError, match="Stage I needs two"):
        trl.make_trainer("", [], stage=1, kl="native")


# --- verl -----------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("stage", [1, 2])
def test_verl_has_the_gradient_of_score_py(stage):
    """Through its own configuration and registries, with a problem's rows apart from each other."""
    verl = library("verl.trainer.ppo.ray_trainer")
    port = library("port_verl")
    from hydra import compose, initialize_config_dir
    from tensordict import TensorDict
    from verl import DataProto
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    documented = re.findall(r"(?<=  )\+?[a-z_]+\.\S+=(?:\{.*?\}|\S+)", port.__doc__)
    with initialize_config_dir(f"{Path(verl.__file__).parents[1]}/config", version_base=None):
        config = compose("ppo_trainer", documented)
    assert len(documented) == 8 and set(config.algorithm.score) == {"stage", *SETTINGS}
    config.algorithm.score.update(SETTINGS | {"stage": stage})
    actor = config.actor_rollout_ref.actor

    r, rewards, logits, ref_logits = example()
    logp, ref_logp, _ = laws(r, logits, ref_logits)
    mask, scores = r.turn_BS > 0, torch.zeros_like(logp)
    for k, reward in enumerate(rewards, 1):
        last = (r.turn_BS == k).long().cumsum(dim=1).argmax(dim=1)
        scores[torch.arange(len(last)), last] = reward
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(0))
    columns = dict(
        response_mask=mask.long(), token_level_scores=scores, token_level_rewards=scores,
        old_log_probs=logp.detach(), ref_log_prob=ref_logp,
    )  # fmt: skip
    uid = np.array([f"problem {i // G}" for i in range(len(mask))], dtype=object)
    data = DataProto(
        TensorDict({k: x[order] for k, x in columns.items()}, len(mask)), {"uid": uid[order]}
    )
    estimator = config.algorithm.adv_estimator
    data = verl.compute_advantage(data, estimator, config=config.algorithm)
    loss, _ = get_policy_loss_fn(actor.policy_loss.loss_mode)(
        logp.detach()[order], logp[order], data.batch["advantages"], mask[order],
        actor.loss_agg_mode, types.SimpleNamespace(global_batch_info={}),
    )  # fmt: skip
    found = torch.autograd.grad(loss, logits)[0]
    assert_same([found], [reference(r, rewards, logits, ref_logits, stage, "k1")[1]])
    data.non_tensor_batch["uid"][0] = "alone"
    with pytest.raises(ValueError, match="from 1 to 3 rows"):
        verl.compute_advantage(data, estimator, config=config.algorithm)


# --- README ---------------------------------------------------------------------------------------


def test_the_readmes_code_stands_in_the_ports():
    section = README.split("\n## Porting\n")[1].split("\n## ")[0]
    blocks = re.findall(r"`tests/(port_\w+\.py)`[^\n]*\n(?:[^`\n]*\n)*\n?```python\n(.*?)```",
                        section, re.DOTALL)  # fmt: skip
    assert [name for name, _ in blocks] == ["port_trl.py", "port_verl.py", "port_jax.py"]
    assert section.count("```python") == len(blocks)
    for name, block in blocks:
        source = (ROOT / "tests" / name).read_text()
        for part in block.split("\n\n"):
            lines = part.strip("\n") + "\n"
            assert lines in source or textwrap.indent(lines, "    ") in source, part  # a method
