"""The ports to libraries pass check_port with what each is to have, and do not only compute."""

import importlib
import re
import runpy
import sys
import warnings
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch

import score
from ports import check_port
from rollout import signs
from scale import pretrained
from tests.truth import ROOT

CASES = check_port.contract()
HF = r"ids|turn|stage\d_(token_\w+|exact_(gradient|grad_norm))"
PORTS = {  # library, dtype, the quantities that the port has
    "hf_port": ("transformers", "float32", HF),
    "jax_port": ("jax", "float64", r"stage\d_(token_\w+|(exact|k1)_(loss|gradient))"),
    "trl_port": ("trl", "float32", r"stage\d_k1_grad_(norm|norms|entries)"),
    "verl_port": ("verl", "float64", r"stage\d_k1_gradient"),
}
quiet = pytest.mark.filterwarnings("ignore")  # the libraries' own


def load(name):
    """Return a port, or skip the test where its library is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(PORTS[name][0])
        return importlib.import_module(f"ports.{name}")


@quiet
@pytest.mark.parametrize("name", PORTS)
def test_a_port_passes_check_port(name):
    _, dtype, quantities = PORTS[name]
    found = check_port.check(load(name).results(), CASES)
    assert check_port.first_difference(found, check_port.TOLERANCE[dtype]) is None
    there = {quantity for (quantity, _), verdict in found.items() if verdict}
    assert there == {x for x in check_port.ORDER if re.fullmatch(quantities, x)}


WRONG = [  # a line of a port, a mistake in it, and the quantity that is to differ first
    # transformers: the bonus in turn 1, anchors without gradient, a mask that is late
    ("hf_port", "(r1_B, r2_B + c", "(r1_B + c['alpha'] * (r2_B - r1_B), r2_B + c",
     "stage2_token_advantage"),
    ("hf_port", "ref_logp_BSV)).sum(-1)", "ref_logp_BSV)).sum(-1).detach()",
     "stage1_exact_gradient"),
    ("hf_port", "(advantage_BS - later_BS)", "advantage_BS", "stage1_exact_gradient"),
    ("hf_port", "turn[1:] for turn", "turn[:-1] for turn", "turn"),
    ("hf_port", "x.div(temperature)", "x", "stage1_exact_gradient"),
    # and what a loop of one's own gets wrong besides
    ("hf_port", '(c["beta1"] + c["beta2"], ', '(c["beta2"], ', "stage1_token_kl_weight"),
    ("hf_port", "x1 + y1 + instruction + y2", "x1 + instruction + y1 + y2", "ids"),
    ("hf_port", "[1] * len(y1)", "[0] + [1] * (len(y1) - 1)", "turn"),
    ("hf_port", "logp_BSV.exp() *", "ref_logp_BSV.exp() *", "stage1_exact_gradient"),
    ("hf_port", "(G - 1)", "G", "stage1_token_advantage"),
    ("jax_port", "jnp.where(stage == 1, nothing_B, reward1_B)",
     "jnp.where(stage == 1, nothing_B, reward1_B + alpha * (reward2_B - reward1_B))",
     "stage2_token_advantage"),
    ("jax_port", "(jnp.exp(logp_BSV) * ratio_BSV)", "stop_gradient(jnp.exp(logp_BSV) * ratio_BSV)",
     "stage1_exact_gradient"),
    ("jax_port", "(later_BS - advantage_BS)", "-advantage_BS", "stage1_exact_gradient"),
    ("jax_port", "score_tensors(turn_BS, *rewards, G, stage, *settings)",
     "score_tensors(jnp.roll(turn_BS, 1, axis=1), *rewards, G, stage, *settings)",
     "stage1_token_advantage"),
    ("jax_port", "log_softmax(logits_BSV / temperature)", "log_softmax(logits_BSV)",
     "stage1_exact_loss"),
    # TRL's port has gradients by the weights alone
    ("trl_port", "paid_KB, held = self.stage(self.reward_B2.T, self.settings)",
     "paid_KB, held = self.stage(self.reward_B2.T, self.settings)\n"
     "        paid_KB = [paid_KB[self.stage is score.stage2], paid_KB[1]]",
     "stage2_k1_grad_norm"),
    ("trl_port", 'fold(inputs["advantages"], inputs["kl_weight"], *terms)', 'inputs["advantages"]',
     "stage1_k1_grad_norm"),
    ("trl_port", "[1] * len(y1) + [0] * len(p1) + [2] * len(y2) for",
     "([0] + [1] * len(y1) + [0] * len(p1) + [2] * len(y2))[:-1] for", "stage1_k1_grad_norm"),
    ("trl_port", "temperature=c.temperature", "temperature=1.0", "stage1_k1_grad_norm"),
    ("verl_port", "torch.stack(rewards)",
     "torch.stack([rewards[0] * (1 - c.alpha), rewards[1]])", "stage2_k1_gradient"),
    ("verl_port", "fold(advantage_BS, weight_BS, *terms)", "advantage_BS", "stage1_k1_gradient"),
    ("verl_port", 'mask_BS = batch["response_mask"].long()',
     'mask_BS = torch.nn.functional.pad(batch["response_mask"].long(), (1, -1))',
     "stage1_k1_gradient"),
    ("verl_port", 'x_BSV, case["temperature"])', "x_BSV, 1.0)", "stage1_k1_gradient"),
    # tensors.py, as TRL's port and the golden cases' own program use it
    ("tensors", "[nothing_B, *advantage_KB]", "[nothing_B, advantage_KB[-1], advantage_KB[-1]]",
     "stage1_token_advantage"),
    ("tensors", "k1_BS * (1 + logp_BS - logp_BS.detach())", "k1_BS", "stage1_k1_gradient"),
    ("tensors", ".flip(1).cumsum(1).flip(1)", "", "stage1_k1_grad_norm"),
    ("tensors", ".gather(1, turn_BS)", ".gather(1, turn_BS.roll(1, 1))", "stage1_token_advantage"),
    ("tensors", "wanted_BT=mask_BS), temperature)", "wanted_BT=mask_BS), 1.0)", "kl_token_k1"),
]  # fmt: skip


def edited(name, right, wrong):
    """Return a module of ports/ as made anew from its source, after a mistake."""
    source = (ROOT / f"ports/{name}.py").read_text()
    assert source.count(right) == 1
    module = ModuleType(f"ports.{name}")
    module.__file__ = str(ROOT / f"ports/{name}.py")
    exec(compile(source.replace(right, wrong), module.__file__, "exec"), vars(module))
    return module


@quiet
@pytest.mark.parametrize(("name", "right", "wrong", "quantity"), WRONG)
def test_a_wrong_port_fails_at_its_quantity(name, right, wrong, quantity, monkeypatch):
    """Its first difference, in the order of the checker. NumPy's are in test_check_port.py."""
    port = "trl_port" if name == "tensors" else name
    load(port)
    module = edited(name, right, wrong)
    if name == "tensors":
        monkeypatch.setitem(sys.modules, "ports.tensors", module)
        paths = (str(ROOT / f"ports/{x}.py") for x in ("make_golden", port))
        golden, trl = (runpy.run_path(path)["results"] for path in paths)
        results = {"triples": golden(CASES["triples"]["inputs"]) | trl()["triples"]}
    else:
        results = module.results()
    if name == "verl_port":
        importlib.reload(load(name))  # which gives verl the right estimator again
    found, dtype = check_port.check(results, CASES), PORTS[port][1]
    assert check_port.first_difference(found, check_port.TOLERANCE[dtype])[0] == quantity


def test_the_guide_has_a_command_for_each_port():
    guide = (ROOT / "ports/README.md").read_text()
    row = r"^\| .*\]\((\S+\.py)\) \| .* \| `python (?:.* )?(\S+\.py)\b.*` \|$"
    rows = re.findall(row, guide, re.M)
    named = {(ROOT / "ports" / link).resolve() for link, _ in rows}
    assert named == {ROOT / path for _, path in rows}
    ports = {*(ROOT / "ports").glob("*_port.py")} - {ROOT / "ports/check_port.py"}
    assert ports < named and all(path.is_file() for path in named)


@quiet
def test_a_loop_of_ones_own_samples_grades_and_steps():
    steps = list(load("hf_port").toy(4))
    assert steps[-1][0] > 0 and all(0 <= x <= 1 for _, *rewards in steps for x in rewards)


def test_the_loop_in_jax_holds_attempt_1_in_stage_1_and_learns_both_in_stage_2():
    """A flat base is right at one token in five. The seed is fixed: nothing is left to chance."""
    port = load("jax_port")
    (held, corrected), final = port.train(200, port.jax.random.key(0))
    assert abs(held - 0.2) < 0.15 and corrected > 0.8
    assert min(final) > 0.9


@quiet
def test_trl_samples_the_second_turn_after_the_first_and_moves_the_policy_alone(tmp_path):
    port, c = load("trl_port"), score.Config(batch=8, group=4, warmup=0)
    task, calls = signs(c), []
    problems = task.draw(4, "train", np.random.default_rng(0))
    pretrained.save(score.new_run(c, tmp_path).policy, tmp_path / "base")

    def odd(completion_ids, **_):
        return [float(sum(ids) % 2) for ids in completion_ids]

    given = task, problems, c, score.stage2, 2, tmp_path / "out", [odd, odd]
    trainer = port.make_trainer(tmp_path / "base", *given)
    write = trainer._generate_single_turn

    def watched(contexts, *more):
        calls.append((contexts, write(contexts, *more)[0]))
        return calls[-1][1], None

    trainer._generate_single_turn = watched
    trainer.train()
    assert len(trainer.clock.seconds) == 2 and len(calls) == 4
    (x1s, y1s), (contexts, y2s) = calls[:2]
    assert x1s[:4] == [x1s[0]] * 4 and task.decode(x1s[0]) in {x.prompt for x in problems}
    pairs = zip(x1s, y1s, strict=True)
    assert contexts == [x1 + y1 + task.instruction for x1, y1 in pairs]
    for ids in y1s + y2s:
        assert len(ids) <= task.max_new and task.end_id not in ids[:-1]
        assert len(ids) == task.max_new or ids[-1] == task.end_id
    base = type(trainer.model).from_pretrained(tmp_path / "base").state_dict()
    assert not any(torch.equal(base[name], x) for name, x in trainer.model.state_dict().items())
    assert all(torch.equal(base[name], x) for name, x in trainer.ref_model.state_dict().items())


def test_rewards_in_trl_are_the_verifiers(tmp_path):
    port, task = load("trl_port"), signs(score.Config(size=4))
    problems = [port.verify.Problem(*x) for x in (("4 2 =6", "+4+2"), ("4 2 =2", "+4-2"))]
    ids = [*task.encode("+4+2"), task.end_id, *task.instruction, *task.encode("+4+2")]
    turn = [1] * 3 + [0] + [2] * 2  # the second attempt has no end
    given = dict(completion_ids=[ids, ids], turn=[turn, turn], problem=[0, 1])
    assert port.reward_of(1, task, problems)(**given) == [1, 0]
    assert port.reward_of(2, task, problems)(**given) == [0, 0]


@quiet
def test_the_toy_trains_in_trl_by_the_command(monkeypatch, capsys):
    port = load("trl_port")
    monkeypatch.setattr(port.score, "Config", partial(score.Config, batch=4, size=4))
    port.main([])
    assert re.search(r"seconds a step, median: \d", capsys.readouterr().out)


@quiet
def test_verl_needs_as_many_rows_of_each_problem():
    port = load("verl_port")
    mask = torch.ones(3, 2)
    with pytest.raises(ValueError, match="from 1 to 2 rows"):
        batch = dict(response_mask=mask, token_level_scores=mask)
        port.score_advantage(batch, np.array(["a", "b", "a"]), {"score": {}})
