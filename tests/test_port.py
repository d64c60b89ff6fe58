"""A port that is right passes, one that is wrong is told what it got wrong first."""

import json
import re
import subprocess
import sys

import check_port
import make_golden
import pytest
import test_truth
import truth

TESTS = truth.ROOT / "tests"
CASES = check_port.contract()
WEIGHTS = check_port.read(check_port.GOLDEN / "weights.json")
TOLERANCE = check_port.read(check_port.GOLDEN / "tolerances.json")["tolerance"]


def shipped(*edits, dtype="float64"):
    """Return what the shipped code makes of the golden cases, after edits of its source."""
    return make_golden.results(truth.load_program(*edits), WEIGHTS, CASES, dtype)


def numpy_port(*edits):
    """Return what the NumPy port makes of them, after edits (old, new) of its source."""
    source = (TESTS / "port_numpy.py").read_text()
    for old, new in edits:
        assert source.count(old) == 1, f"{source.count(old)} of {old!r}"
        source = source.replace(old, new)
    module = {"__name__": "port", "__file__": str(TESTS / "port_numpy.py")}
    exec(compile(source, "port_numpy.py", "exec"), module)
    return module["results"]()


def first(results, dtype="float64"):
    """Return the name of the quantity that differs first, or None."""
    found = check_port.first_difference(check_port.check(results, CASES), TOLERANCE[dtype])
    return found and found[0]


def run(capsys, path, content=None, dtype="float64"):
    """Return the checker's exit status and what it says of a file of results."""
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    status = check_port.main([str(path), "--dtype", dtype])
    told = capsys.readouterr()
    assert told.err == "" if status < 2 else told.out == ""
    return status, told.out + told.err


# --- what is right --------------------------------------------------------------------------------


def test_the_numpy_port_passes_and_the_checker_needs_the_standard_library_alone(tmp_path):
    """By the two commands; -S leaves installed packages out, and the port knows of no torch."""
    for words in (["port_numpy.py", "results.json"], ["-IS", "check_port.py", "results.json"]):
        words = [str(TESTS / word) if word.endswith(".py") else word for word in words]
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" compared: all agree\n")
    assert "torch" not in (TESTS / "port_numpy.py").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    absent = CASES["pairs"]["outputs"].keys() - results["pairs"].keys()
    kinds = {check_port.ORDER[check_port.PLACE[x]].kind for x in absent}
    assert kinds == {"logits", "decoded", "drawn", "weights"}  # it has no model
    assert all(results[name].keys() == CASES[name]["outputs"].keys()
               for name in CASES if name not in ("pairs", "triples"))  # fmt: skip


@pytest.mark.parametrize("dtype", check_port.DTYPES)
def test_the_shipped_code_passes(capsys, tmp_path, dtype):
    results = shipped(dtype=dtype)
    assert results.keys() == CASES.keys()
    assert all(results[name].keys() == case["outputs"].keys() for name, case in CASES.items())
    status, told = run(capsys, tmp_path / "results.json", results, dtype)
    assert status == 0 and "missing" not in told and "DIFFERS" not in told
    assert ("not compared" in told) == (dtype == "bfloat16")


def test_float32_is_not_float64():
    assert first(shipped(dtype="float32")) == "logits"


# --- what is wrong --------------------------------------------------------------------------------

FIRST = {
    "bonus leaks into turn 1": "stage2_advantage1",
    "one return for both turns": "stage2_advantage1",
    "shaping sign": "stage2_return2",
    "turn weights swapped": "stage2_advantage1",
    "r2 rewards turn 1 in Stage I": "stage1_advantage1",
    "turn-1 KL without gradient": "stage1_token_kl_weight",
    "turn-1 KL multiplies turn 2's tokens": "kl1_exact",
    "no beta1 KL on turn 2 in Stage I": "stage1_token_kl_weight",
    "KL argument order": "kl_token_exact",
    "k1 differentiated as KL": "stage1_k1_gradient",
    "k3 differentiated as KL": "kl_token_k1",
    "KL without its future term": "stage1_exact_gradient",
    "KL of turn 2 credited to turn 1": "kl1_exact",
    "end of turn out of the masks": "turn",
    "mask shifted by one": "turn",
    "instruction trained": "turn",
    "tokens after the end of turn trained": "ids",
    "own-length division": "stage1_token_advantage",
    "temperature not in the log-probs": "logp",
    "temperature not in the reference": "ref_logp",
    "own turn-2 reward in turn 1's baseline": "stage2_advantage1",
    "own reward in the baseline": "stage2_baseline1",
    "std normalisation": "stage2_advantage2",
    "reference is the policy itself": "ref_logp",
}
MORE = {
    "offline attempts trained": ("token_turn", [
        ("score.py", "return r.mask1_BS & ~r.offline1_B[:, None]", "return r.mask1_BS")]),
    "the second turn's positions start again": ("greedy1", [
        ("model.py", "self.cos[position_BT][:, :, None], self.sin[position_BT][:, :, None]",
         "self.cos[:T, None], self.sin[:T, None]")]),
    "gate and up swapped": ("logits", [
        ("model.py", "F.silu(gate_BTF) * up_BTF", "F.silu(up_BTF) * gate_BTF")]),
    "a cut attempt is given an end": ("sampled_logp", [
        ("rollout.py", "        chunk_BC = torch.cat([unread_B1, order_BC]",
         "        unread_B1[:] = end_id\n        chunk_BC = torch.cat([unread_B1, order_BC]")]),
    "the limit is one less": ("greedy1", [
        ("rollout.py", "    for i in range(max_new):", "    for i in range(max_new - 1):")]),
    "every attempt is cut": ("truncated", [
        ("rollout.py", "~ends_BN.any(dim=1)", "ends_BN[:, 0] >= 0")]),
    "the bonus is in Stage I": ("stage1_advantage2", [
        ("score.py", "    advantage2_B = reward2_B - leave_one_out(reward2_B, G)\n    gain_B",
         "    reward2_B = 2 * reward2_B\n    advantage2_B = reward2_B - leave_one_out(reward2_B, G)"
         "\n    gain_B")]),
    "sum instead of what comes later": ("after", [
        ("score.py", "x_BS.flip(1).cumsum(1).flip(1) - x_BS", "x_BS.flip(1).cumsum(1).flip(1)")]),
}  # fmt: skip


def test_every_mutant_of_the_truth_is_in_the_table():
    assert FIRST.keys() == test_truth.MUTANTS.keys()


@pytest.mark.parametrize("dtype", check_port.DTYPES)
@pytest.mark.parametrize("name", FIRST)
def test_a_mutant_is_told_what_it_got_wrong_first(name, dtype):
    assert first(shipped(*test_truth.MUTANTS[name], dtype=dtype), dtype) == FIRST[name]


@pytest.mark.parametrize("name", MORE)
def test_so_are_mutants_of_model_and_sampler(name):
    expected, edits = MORE[name]
    assert first(shipped(*edits)) == expected


PORT = {
    "end of turn left out": ("turn", (
        "[k for part, k in row for _ in part]",
        "[k * (x != case['end_id']) for part, k in row for x in part]")),
    "mask not shifted": ("turn", ("turn[:, 1:]", "turn[:, :-1]")),
    "left padding": ("ids", ("ids[b, : length[b]]", "ids[b, max(length) - length[b] :]")),
    "offline attempts trained": ("token_turn", (
        'np.where(np.array(case["offline1"])[:, None] & (turn_BS == 1), 0, turn_BS)', "turn_BS")),
    "no temperature": ("logp", ("x = logits / temperature", "x = logits")),
    "bonus sign": ("stage2_return2", (
        'case["alpha"] * (reward2_B - reward1_B)', 'case["alpha"] * (reward1_B - reward2_B)')),
    "own reward in the baseline": ("stage2_baseline1", ("np.delete(p, i).mean()", "p.mean()")),
    "std normalisation": ("stage2_advantage1", (
        "advantages[k] = return_B - baseline_B",
        "advantages[k] = (return_B - baseline_B) / (return_B.std() + 1e-6)")),
    "turns swapped": ("stage1_token_advantage", (
        "x_B[:, None] * (turn_BS == k) for", "x_B[:, None] * (turn_BS == 3 - k) for")),
    "inclusive": ("after", ("- x_BS.cumsum(axis=1)", "- x_BS.cumsum(axis=1) + x_BS")),
    "KL argument order": ("kl_token_exact", (
        "exact_BS = (p_BSV * ratio_BSV)", "exact_BS = -(np.exp(ref_BSV) * ratio_BSV)")),
    "k2 for k1": ("kl_token_k1", (
        "target_BS[..., None], axis=-1)[..., 0]\n    return",
        "target_BS[..., None], axis=-1)[..., 0] ** 2 / 2\n    return")),
    "both attempts' KL": ("kl1_exact", (
        "(kl_BS * (own_BS == k)).sum(axis=1)", "(kl_BS * (own_BS > 0)).sum(axis=1)")),
    "beta2 instead of beta1 + beta2": ("stage1_token_kl_weight", (
        'held[1] += case["beta2"]', 'held[1] = case["beta2"]')),
    "mean over tokens": ("stage1_exact_loss", (
        "(weight_BS * kl_BS).sum(axis=1)", "(weight_BS * kl_BS).mean(axis=1)")),
    "no future term": ("stage1_exact_gradient", ("weight_BS * ahead_BS -", "-")),
    "future term across attempts": ("stage1_exact_gradient", (
        "later(kl_BS * (own_BS == k))", "later(kl_BS * (own_BS > 0))")),
    "k1 without its own token": ("stage1_k1_gradient", (
        '"k1": (k1_BS, np.zeros_like(p_BSV), k1_BS)', '"k1": (k1_BS, np.zeros_like(p_BSV), 0.0)')),
    "no 1 / temperature": ("stage1_exact_gradient", (
        'gradient_BSV / case["temperature"] /', "gradient_BSV /")),
    "sum over rows": ("stage1_exact_gradient", (
        'case["temperature"] / len(kl_BS)', 'case["temperature"]')),
    "share of the wrong ones": ("delta_i_to_c", (
        '("delta_i_to_c", gained, n)', '("delta_i_to_c", gained, max(1, n - right1))')),
    "Wald's interval": ("acc_t1_interval", (
        "    a, b, c = 1", "    e = 1.96 * (k * (n - k) / n**3) ** 0.5\n"
        "    return [k / n - e, k / n + e]\n    a, b, c = 1")),
    "attempts resampled apart": ("delta_interval", (
        "draws = np.random.default_rng(1).choice(changes, size=(10_000, n)).mean(axis=1)",
        "one, two = (np.random.default_rng(i).choice(x, size=(10_000, n)).mean(axis=1)\n"
        "                for i, x in enumerate((right1_N, right2_N)))\n    draws = two - one")),
}  # fmt: skip


@pytest.mark.parametrize("name", PORT)
def test_a_mutant_of_the_numpy_port_is_told_what_it_got_wrong_first(name):
    expected, edit = PORT[name]
    assert first(numpy_port(edit)) == expected


def test_what_is_told_of_the_first_difference(capsys, tmp_path):
    results = shipped(*test_truth.MUTANTS["std normalisation"])
    del results["two_rows"], results["pairs"]["logp"]
    status, told = run(capsys, tmp_path / "results.json", results)
    assert status == 1
    listed, lines = told.split("differ\n\n")[0], told.split("differ\n\n")[1].splitlines()
    assert lines[0] == "stage2_advantage2 differs first, in case pairs"
    advantage = results["pairs"]["stage2_advantage2"]
    expected = CASES["pairs"]["outputs"]["stage2_advantage2"]
    worst = max(range(8), key=lambda b: abs(advantage[b] - expected[b]))
    assert f"[{worst}]: expected {expected[worst]}, got {advantage[worst]}" in lines[1]
    assert "float64 allows 1e-09" in lines[2] and "standard deviation" in lines[4]
    assert len(lines) == 5  # no reward depends on the log-probabilities that are missing
    assert re.search("^stage2_advantage2 +pairs DIFFERS", listed, re.MULTILINE)
    assert re.search("^logp +triples ok[^,]*$", listed, re.MULTILINE)
    assert "missing in pairs: logp\n" in listed and "missing in two_rows: " in listed
    assert max(map(len, lines + listed[listed.index("missing") :].splitlines())) <= 100
    results = dict(pairs=dict(stage2_k1_loss=results["pairs"]["stage1_k1_loss"]))
    _, told = run(capsys, tmp_path / "results.json", results)
    assert "not ruled out: ids, length, turn, " in told and "kl2_k1" in told


# --- what cannot be compared ----------------------------------------------------------------------


def test_a_part_is_enough(capsys, tmp_path):
    gradient = CASES["pairs"]["outputs"]["stage2_exact_gradient"]
    content = {"pairs": {"stage2_exact_gradient": gradient}}
    status, told = run(capsys, tmp_path / "results.json", content)
    missing = told.split("\n", 1)[1]  # after the line of what is there
    assert status == 0 and "1 of " in told and missing.startswith("missing in two_rows, pairs, ")
    names = {q.name for q in check_port.ORDER} - {"stage2_exact_gradient"}
    assert all(name in re.split(r"[\s,]+", missing) for name in names)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read"),
        ("{", "cannot read"),
        ("[1]", "must hold an object, {case: {quantity: values}}, got [1]"),
        pytest.param("[" * 100_000, "cannot read", id="deep"),
        ({}, "no quantity of any case"),
        ({"pairs": {}}, "no quantity of any case"),
        ({"pears": {}}, "there is no case 'pears'; is it 'pairs'?"),
        ({"pairs": [1, 2]}, "case 'pairs' must be an object, got [2]"),
        ({"pairs": {"advantage2": [1]}}, "there is no quantity of case 'pairs' named 'advantage2'"),
        ({"pairs": {"lenght": [1]}}, "'lenght'; is it 'length'?"),
        ({"pairs": {"length": [9, "9"]}}, "pairs.length[1] is '9', which is no number"),
    ],
)
def test_bad_input_is_named(capsys, tmp_path, content, said):
    status, told = run(capsys, tmp_path / "results.json", content)
    assert status == 2 and told.startswith("check_port.py: error: ") and said in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda x: x[:-1], "shape [7], expected [8]: pairs.stage2_k1_loss[7] is missing"),
        (
            lambda x: [*x, 0.0],
            "shape [9], expected [8]: pairs.stage2_k1_loss[8] should not be there",
        ),
        (lambda x: [x], "shape [1, 8], expected [8]"),
        (lambda x: x[0], "shape a number, expected [8]"),
        (lambda x: {"row": x}, "shape {row}, expected [8]"),
        (lambda x: [*x[:3], float("nan"), *x[4:]], "stage2_k1_loss[3]: expected "),
        (lambda x: [*x[:3], float("inf"), *x[4:]], "got inf"),
        (lambda x: [*x[:3], 10**400, *x[4:]], "stage2_k1_loss[3]"),
        (lambda x: [None, *x[1:]], "got None"),
    ],
)
def test_wrong_shapes_and_numbers_that_are_none_differ(capsys, tmp_path, wrong, said):
    results = {"pairs": {"stage2_k1_loss": wrong(CASES["pairs"]["outputs"]["stage2_k1_loss"])}}
    status, told = run(capsys, tmp_path / "results.json", results)
    assert status == 1 and said in told and "stage2_k1_loss differs first" in told


def test_null_is_expected_where_there_is_no_rate():
    name = "metrics_all_right_first"
    assert first({name: {"repair_rate": None}}) is None
    assert first({name: {"repair_rate": 0.0}}) == "repair_rate"


def test_help_tells_every_quantity_and_case(capsys):
    with pytest.raises(SystemExit, match="0"):
        check_port.main(["--help"])
    told = capsys.readouterr().out
    for name in [*CASES, *(row[0] for row in check_port.ROWS)]:
        assert name in told
    assert max(map(len, told.splitlines())) <= 100, max(told.splitlines(), key=len)
    with pytest.raises(SystemExit, match="2"):
        check_port.main(["results.json", "--dtype", "float16"])
