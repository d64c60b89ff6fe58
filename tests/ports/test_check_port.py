"""A port that is right passes, and one that is wrong is told what it got wrong first."""

import json
import re
import runpy
import subprocess
import sys

import pytest

from ports import check_port
from ports.check_port import ORDER, TOLERANCE
from tests import truth

PORTS, CASES = truth.ROOT / "ports", check_port.contract()


def first(results, dtype="float64"):
    """Return the name of the quantity that differs first, or None."""
    found = check_port.check(results, CASES)
    return (check_port.first_difference(found, TOLERANCE[dtype]) or [None])[0]


def told(capsys, path, content, *options):
    """Return the checker's exit status and what it says of a file of results."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    status = check_port.main([str(path), *options])
    out, err = capsys.readouterr()
    assert (err if status < 2 else out) == ""
    return status, out + err


# --- what is right --------------------------------------------------------------------------------


def test_the_numpy_port_passes_by_the_two_commands(tmp_path):
    """-S leaves installed packages out: the checker needs none."""
    for words in (["numpy_port.py", "results.json"], ["-IS", "check_port.py", "results.json"]):
        words = [str(PORTS / word) if word.endswith(".py") else word for word in words]
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" compared: all agree\n")
    results = json.loads((tmp_path / "results.json").read_text())
    for name, case in CASES.items():
        kinds = {ORDER[x].kind for x in case["outputs"].keys() - results[name].keys()}
        no_model = {"scored", "decoded", "drawn", "weights"}
        assert kinds == (no_model if name in ("pairs", "triples") else set())


def test_null_is_expected_where_there_is_no_rate():
    name = "metrics_all_right_first"
    assert first({name: {"repair_rate": None}}) is None
    assert first({name: {"repair_rate": 0.0}}) == "repair_rate"


# --- what is wrong --------------------------------------------------------------------------------

SHAPED = 'reward2_B + case["alpha"] * (reward2_B - reward1_B)'
RETURNS = "return {1: reward1_B, 2: " + SHAPED
ADVANTAGE = "advantages[k] = return_B - baseline_B"
MUTANTS = {  # of the NumPy port: the first quantity that differs, and an edit of its source
    "left padding": ("ids", "ids[b, : length[b]]", "ids[b, max(length) - length[b] :]"),
    "end of turn left out": (
        "turn", "[k for part, k in row for _ in part]",
        "[k * (x != case['end_id']) for part, k in row for x in part]"),
    "padding told by an id": (
        "turn", "[k for part, k in row for _ in part]",
        "[k * (x > 0) for part, k in row for x in part]"),
    "mask not shifted": ("turn", "turn[:, 1:]", "turn[:, :-1]"),
    "instruction trained": ("turn", '(case["instruction"], 0)', '(case["instruction"], 2)'),
    "offline attempts trained": (
        "token_turn",
        'np.where(np.array(case["offline1"])[:, None] & (turn_BS == 1), 0, turn_BS)', "turn_BS"),
    "no temperature": ("logp", "x = logits / temperature", "x = logits"),
    "targets shifted": (
        "logp", 'turn_BS = found["ids"][:, 1:]', 'turn_BS = found["ids"][:, :-1]'),
    "temperature of the policy alone": (
        "ref_logp", "for x in (logits_BSV, ref_logits_BSV))",
        'for x in (logits_BSV, ref_logits_BSV * case["temperature"]))'),
    "reference is the policy": (
        "ref_logp", "for x in (logits_BSV, ref_logits_BSV)", "for x in (logits_BSV, logits_BSV)"),
    "bonus reaches turn 1": (
        "stage2_return1", RETURNS, RETURNS.replace("1: reward1_B", "1: 2 * reward2_B - reward1_B")),
    "one return for both turns": (
        "stage2_return1", RETURNS, RETURNS.replace("1: reward1_B", "1: reward1_B + reward2_B")),
    "bonus in Stage I": ("stage1_return2", "return {2: reward2_B}", "return {2: 2 * reward2_B}"),
    "bonus sign": ("stage2_return2", SHAPED, SHAPED.replace("B - reward1", "B + reward1")),
    "own reward in the baseline": ("stage2_baseline1", "np.delete(p, i).mean()", "p.mean()"),
    "rows of a problem apart": (
        "stage2_baseline1", "reward_B.reshape(-1, G)", "reward_B.reshape(G, -1).T"),
    "r2 pays turn 1 in Stage I": (
        "stage1_advantage1", "return {f\"{stage}_{name}\": x for",
        "if stage == 'stage1':\n        found['advantage1'] = advantages[2]\n"
        "    return {f\"{stage}_{name}\": x for"),
    "std normalisation": (
        "stage2_advantage1", ADVANTAGE,
        "advantages[k] = (return_B - baseline_B) / (return_B.std() + 1e-6)"),
    "turns swapped": (
        "stage1_token_advantage", "x_B[:, None] * (turn_BS == k) for",
        "x_B[:, None] * (turn_BS == 3 - k) for"),
    "own-length division": (
        "stage1_token_advantage", "x_B[:, None] * (turn_BS == k) for",
        "x_B[:, None] * (turn_BS == k) / (1e-9 + (turn_BS == k).sum(1, keepdims=True)) for"),
    "KL argument order": (
        "kl_token_exact", "exact_BS = (p_BSV * ratio_BSV)",
        "exact_BS = -(np.exp(ref_BSV) * ratio_BSV)"),
    "k3 for k1": (
        "kl_token_k1", "k1_BS = of_tokens(ratio_BSV, token_BS)",
        "k1_BS = of_tokens(np.exp(-ratio_BSV) - 1 + ratio_BSV, token_BS)"),
    "both attempts' KL": (
        "kl1_exact", "(kl_BS * (own_BS == k)).sum(axis=1)", "(kl_BS * (own_BS > 0)).sum(axis=1)"),
    "beta2 instead of beta1 + beta2": (
        "stage1_token_kl_weight", 'held[1] += case["beta2"]', 'held[1] = case["beta2"]'),
    "no KL on turn 2 in Stage I": (
        "stage1_token_kl_weight", 'held[1] += case["beta2"]',
        'held[1] += case["beta2"]\n        held[2] = 0.0'),
    "mean over tokens": (
        "stage1_exact_loss", "(weight_BS * kl_BS).sum(axis=1)", "(weight_BS * kl_BS).mean(axis=1)"),
    "turn-1 KL without gradient": (
        "stage1_exact_gradient", "+ now_BS", "+ now_BS\n        slope_BSV = slope_BSV * "
        "(own_BS == 2)[..., None]\n        ahead_BS = ahead_BS * (own_BS == 2)"),
    "no future term": ("stage1_exact_gradient", "weight_BS * ahead_BS -", "-"),
    "future term across attempts": (
        "stage1_exact_gradient", "later(kl_BS * (own_BS == k))", "later(kl_BS * (own_BS > 0))"),
    "future term inclusive": (
        "stage1_exact_gradient", "- x_BS.cumsum(axis=1)", "- x_BS.cumsum(axis=1) + x_BS"),
    "k1 without its own token": (
        "stage1_k1_gradient", "(k1_BS, np.zeros_like(p_BSV), k1_BS)",
        "(k1_BS, np.zeros_like(p_BSV), 0.0)"),
    "k1 differentiated": (
        "stage1_k1_gradient", "+ now_BS", "+ now_BS\n"
        "        ahead_BS = np.ones_like(ahead_BS) if form == 'k1' else ahead_BS"),
    "no 1 / temperature": (
        "stage1_exact_gradient", 'gradient_BSV / case["temperature"] /', "gradient_BSV /"),
    "sum over rows": (
        "stage1_exact_gradient", 'case["temperature"] / len(kl_BS)', 'case["temperature"]'),
    "share of the wrong ones": (
        "delta_i_to_c", '("delta_i_to_c", gained, n)',
        '("delta_i_to_c", gained, max(1, n - right1))'),
    "Wald's interval": (
        "acc_t1_interval", "    a, b, c = 1", "    e = 1.96 * (k * (n - k) / n**3) ** 0.5\n"
        "    return [k / n - e, k / n + e]\n    a, b, c = 1"),
    "attempts resampled apart": (
        "delta_interval", "draws = np.random.default_rng(seed).choice(changes, size=",
        "draws = 2**0.5 * np.random.default_rng(seed).choice(changes, size="),
}  # fmt: skip


def edited(old, new):
    """Return what the NumPy port makes of the cases after an edit of its source."""
    source = (PORTS / "numpy_port.py").read_text()
    assert source.count(old) == 1, f"{source.count(old)} of {old!r}"
    module = {"__name__": "port", "__file__": str(PORTS / "numpy_port.py")}
    exec(compile(source.replace(old, new), "numpy_port.py", "exec"), module)
    return module["results"]()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_port_is_told_what_it_got_wrong_first(name):
    """A mistake is larger than what any dtype's tolerance allows."""
    expected, old, new = MUTANTS[name]
    results = edited(old, new)
    assert {dtype: first(results, dtype) for dtype in TOLERANCE} == dict.fromkeys(
        TOLERANCE, expected
    )


SLOPE, LATER = "weight_BS[..., None] * slope_BSV +", "weight_BS * ahead_BS -"


@pytest.mark.parametrize(("old", "new"), [(SLOPE, ""), (LATER, "-")], ids=["detached", "no later"])
def test_bfloat16_sees_mistakes_of_the_kl_in_stage_1_alone(old, new):
    outputs = edited(old, new)["pairs"]
    names = "stage1_exact_gradient", "stage2_exact_gradient"
    one, two = ({"pairs": {x: outputs[x]}} for x in names)
    assert first(two, "float32") and first(one, "bfloat16") and first(two, "bfloat16") is None


PROGRAM = {  # the same of model and sampler
    "gate and up swapped": (
        "logits", "model.py", "F.silu(gate_BTF) * up_BTF", "F.silu(up_BTF) * gate_BTF"),
    "positions start again": (
        "greedy1", "model.py", "cos, sin = self.cos[position_BT]",
        "position_BT = torch.arange(T).expand(B, T)\n            cos, sin = self.cos[position_BT]"),
    "the limit is one less": (
        "greedy1", "rollout.py", "for i in range(N):", "for i in range(N - 1):"),
    "an attempt's last token is not read": (
        "greedy2", "rollout.py", "ids[-1:] + task.instruction", "task.instruction"),
    "one number for all rows": (
        "sampled1", "rollout.py", "noise_BN[row_R, i, None]", "noise_BN[0, i, None]"),
    "no temperature in the sampler": (
        "sampled1", "rollout.py", "log_probs(model.head(state_RD), temperature)",
        "log_probs(model.head(state_RD), min(temperature, 1.0))"),
    "every attempt is cut": (
        "truncated", "rollout.py", "[ids[-1] != task.end_id for ids", "[True for ids"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAM)
def test_so_are_mistakes_of_model_and_sampler(name, monkeypatch):
    expected, *edit = PROGRAM[name]
    for module, code in vars(truth.load_program(tuple(edit))).items():
        monkeypatch.setitem(sys.modules, module, code)
    results = runpy.run_path(PORTS / "make_golden.py")["results"]
    assert first({x: results(CASES[x]["inputs"]) for x in ("pairs", "triples")}) == expected


def test_what_is_told_of_the_first_difference(capsys, tmp_path):
    results = {x: dict(CASES[x]["outputs"]) for x in ("pairs", "triples")}
    expected = results["pairs"]["stage2_advantage2"]
    results["pairs"]["stage2_advantage2"] = [x if b != 3 else 0.5 for b, x in enumerate(expected)]
    results["pairs"]["stage2_exact_loss"] = results["pairs"]["stage1_exact_loss"]
    del results["pairs"]["logp"]
    status, said = told(capsys, tmp_path / "results.json", results)
    listed, lines = said.split("differ\n\n")[0], said.split("differ\n\n")[1].splitlines()
    assert status == 1 and lines[0] == "stage2_advantage2 differs first, in case pairs"
    assert f"[3]: expected {expected[3]}, got 0.5" in lines[1]
    assert "float64 allows 1e-09" in lines[2] and "standard deviation" in lines[4]
    assert len(lines) == 5  # no reward depends on the log-probabilities that are missing
    assert re.search("^stage2_advantage2 +pairs DIFFERS", listed, re.MULTILINE)
    assert re.search("^logp +triples ok$", listed, re.MULTILINE)
    assert "\nmissing: 1 in pairs, whole cases 7 (--missing names them)\n\n" in listed
    assert max(map(len, lines)) <= 100
    wrong = dict(pairs=dict(stage2_k1_loss=results["pairs"]["stage1_k1_loss"]))
    _, said = told(capsys, tmp_path / "results.json", wrong)
    last = said.splitlines()[-1]
    assert "not ruled out: ids, length, turn, " in last and last.endswith(", .. (--missing)")


def test_not_ruled_out_is_only_what_it_depends_on(capsys, tmp_path):
    outputs = CASES["triples"]["outputs"]
    upon = {"ids", "logp", "stage1_token_advantage", "kl2_exact", "stage1_exact_loss"}
    not_upon = {"greedy1", "sampled_logp", "stage2_return1", "kl_token_k1", "stage1_k1_loss"}
    there = outputs.keys() - upon - not_upon
    results = {x: outputs[x] for x in there} | {"stage1_exact_gradient": [[0]]}
    _, said = told(capsys, tmp_path / "results.json", {"triples": results})
    assert {*said.split("not ruled out: ")[1].strip().split(", ")} == upon


@pytest.mark.parametrize(
    ("quantity", "cause"),
    [("ids", "the temperature, or what else sampled1 and sampled2 depend on"),
     ("stage2_token_advantage", "a mask that is late"),
     ("stage1_exact_gradient", "the KL is detached")],
)  # fmt: skip
def test_causes_that_show_only_there_are_named(capsys, tmp_path, quantity, cause):
    wrong = {"triples": {quantity: [[0]]}}
    assert cause in " ".join(told(capsys, tmp_path / "results.json", wrong)[1].split())


def test_a_part_is_enough_and_some_is_not_compared_in_bfloat16(capsys, tmp_path):
    outputs = CASES["pairs"]["outputs"]
    content = {"pairs": {x: outputs[x] for x in ("greedy1", "stage2_exact_gradient")}}
    options = "--missing", "--dtype", "bfloat16"
    status, said = told(capsys, tmp_path / "results.json", content, *options)
    there, missing = said.split("\nmissing", 1)
    assert status == 0 and "\n2 of " in missing and "pairs not compared" in there
    names = ORDER.keys() - content["pairs"].keys()
    assert all(name in re.split(r"[\s,]+", missing) for name in names)
    assert max(map(len, missing.splitlines())) <= 100


def test_what_is_missing_is_one_line_and_no_line_if_nothing_is(capsys, tmp_path):
    results = {name: dict(case["outputs"]) for name, case in CASES.items()}
    status, said = told(capsys, tmp_path / "results.json", results)
    assert status == 0 and "missing" not in said
    del results["metrics"], results["pairs"]["logp"], results["pairs"]["ids"]
    _, said = told(capsys, tmp_path / "results.json", results)
    lines = [line for line in said.splitlines() if "missing" in line]
    assert lines == ["missing: 2 in pairs, whole cases 1 (--missing names them)"]


def test_what_a_case_does_not_ask_for_is_counted_and_the_rest_compared(capsys, tmp_path):
    outputs = CASES["two_rows"]["outputs"]
    results = {"two_rows": {"logits": [1], "ids": outputs["ids"], "logp": [1]}}
    status, said = told(capsys, tmp_path / "results.json", results)
    assert status == 0 and "\n2 not asked for in two_rows: logits, logp\n\n1 of " in said


@pytest.mark.parametrize(
    ("dtype", "coarse", "off"), [("float64", "float32", 1e-7), ("float32", "bfloat16", 1e-2)]
)
def test_behind_a_difference_of_rounding_the_first_large_one_is_told(
    capsys, tmp_path, dtype, coarse, off
):
    path, outputs = tmp_path / "results.json", CASES["two_rows"]["outputs"]
    loss_B, slope = outputs["stage1_exact_loss"], "stage1_exact_gradient"
    near = {"stage1_exact_loss": [x * (1 + off) for x in loss_B], slope: outputs[slope]}
    wrong = near | {slope: outputs["stage2_exact_gradient"]}
    heads = r"^(?:by (\w+)'s tolerances,? )?(\w+ differs first|all agree)"
    for results, last in ((near, "all agree"), (wrong, f"{slope} differs first")):
        status, said = told(capsys, path, {"two_rows": results}, "--dtype", dtype)
        assert status == 1 and f"no more than {coarse} rounds: " in said
        first, second = re.findall(heads, said, re.M)
        assert first == ("", "stage1_exact_loss differs first") and second == (coarse, last)
    _, said = told(capsys, path, {"two_rows": wrong}, "--dtype", coarse)
    assert re.findall(heads, said, re.M) == [("", f"{slope} differs first")]
    assert "rounds" not in said


# --- what cannot be compared ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot read"),
        ("[1]", "must hold an object, {case: {quantity: values}}, got [1]"),
        pytest.param("[" * 100_000, "cannot read", id="deep"),
        ({"pairs": {}}, "no quantity of any case"),
        ({"pears": {}}, "there is no case 'pears'; is it 'pairs'?"),
        ({"pairs": [1, 2]}, "case 'pairs' must be an object, got [2]"),
        ({"pairs": {"lenght": [1]}}, "there is no quantity 'lenght'; is it 'length'?"),
        ({"two_rows": {"logits": [1]}}, "no quantity of any case"),
        ({"pairs": {"length": [9, "9"]}}, "pairs.length[1] is '9', which is no number"),
    ],
)
def test_bad_input_is_named(capsys, tmp_path, content, said):
    status, line = told(capsys, tmp_path / "results.json", content)
    assert status == 2 and line.startswith("check_port.py: error: ") and said in line


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda x: x[:-1], "shape [7], expected [8]: pairs.stage2_k1_loss[7] is missing"),
        (lambda x: [*x, 0.0], "expected [8]: pairs.stage2_k1_loss[8] should not be there"),
        (lambda x: [x], "shape [1, 8], expected [8]"),
        (lambda x: x[0], "shape a number, expected [8]"),
        (lambda x: {"row": x}, "shape {row}, expected [8]"),
        (lambda x: [*x[:3], float("nan"), *x[4:]], "stage2_k1_loss[3]: expected "),
        (lambda x: [*x[:3], 10**400, *x[4:]], "stage2_k1_loss[3]"),
        (lambda x: [None, *x[1:]], "got None"),
    ],
)
def test_wrong_shapes_and_numbers_that_are_none_differ(capsys, tmp_path, wrong, said):
    results = {"pairs": {"stage2_k1_loss": wrong(CASES["pairs"]["outputs"]["stage2_k1_loss"])}}
    status, lines = told(capsys, tmp_path / "results.json", results)
    assert status == 1 and said in lines and "stage2_k1_loss differs first" in lines


STACKS = {"float64": ("NumPy", "JAX", "verl"), "float32": ("transformers", "TRL"),
          "bfloat16": ("autocast",)}  # fmt: skip


def help_text(capsys):
    with pytest.raises(SystemExit, match="0"):
        check_port.main(["--help"])
    return capsys.readouterr().out


def test_help_and_guide_say_which_dtype_suits_which_stack(capsys):
    for said in (help_text(capsys), (PORTS / "README.md").read_text().replace("`", "")):
        for dtype, stacks in STACKS.items():
            (line,) = re.findall(rf"\b{dtype}: ([^.]+)\.", " ".join(said.split()))
            assert all(stack in line for stack in stacks), line


def test_help_tells_every_quantity_and_case(capsys):
    said = help_text(capsys)
    for name in [*CASES, *(row[0] for row in check_port.ROWS)]:
        assert name in said
    assert max(map(len, said.splitlines())) <= 100
