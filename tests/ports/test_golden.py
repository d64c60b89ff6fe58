"""The golden files are what the program computes, and what a second derivation says.

Rows, credit, KLs, losses and their gradients by the logits are derived a second time by
ports/numpy_port.py (test_check_port.py); here models, samples and gradients by the weights.
"""

import json
import math
import re
import runpy
import struct
import sys

import numpy as np
import pytest

from ports import check_port, make_golden, numpy_port, one_row
from ports.check_port import ORDER, TOLERANCE, compare
from scale.pretrained import MODULES

CASES = check_port.contract()
WEIGHTS = check_port.read(check_port.GOLDEN / "weights.json")
C, LARGE = WEIGHTS["config"], ("pairs", "triples")


def test_the_files_have_the_keys_that_the_guide_names():
    guide = " ".join((check_port.GOLDEN.parent / "README.md").read_text().split())
    for path in check_port.GOLDEN.iterdir():
        keys = ["about", "cases"] if path.name != "weights.json" else list(WEIGHTS)
        assert list(check_port.read(path)) == keys and f"`{path.name}`" in guide
    assert f"`weights.json` is `{{{', '.join(WEIGHTS)}}}`" in guide


def test_the_guide_names_the_weights_as_transformers_does():
    guide = (check_port.GOLDEN.parent / "README.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z0-9_.]+)` \| (`[a-z].+`) \|$", guide, re.MULTILINE))
    names = {re.sub(r"blocks.\d.|.(weight|bias)$", "", name) for name in WEIGHTS["policy"]}
    assert {name: re.findall("`(.+?)`", told) for name, told in rows.items()} == {
        name: MODULES[name] for name in names
    }


def test_turn_and_token_turn_part_where_the_base_wrote_alone():
    for case in CASES.values():
        if "turn" in case["outputs"]:
            base_B1 = np.array(case["inputs"]["offline1"])[:, None]
            turn_BS, own_BS = (np.array(case["outputs"][x]) for x in ("turn", "token_turn"))
            assert ((turn_BS != own_BS) == (base_B1 & (turn_BS == 1))).all()


def test_the_files_are_what_the_command_writes():
    """To a unit of the twelfth digit: another machine may round the other way."""
    for path, text in make_golden.make().items():
        kept, fresh = json.loads(path.read_text()), json.loads(text)
        assert path.read_text() == make_golden.written(kept)
        for name, case in kept["cases"].items():
            outputs = fresh["cases"][name]["outputs"]
            assert list(outputs) == list(case["outputs"])
            for quantity, expected in case["outputs"].items():
                assert compare(quantity, expected, outputs[quantity]).error < 1e-11, quantity


@pytest.mark.parametrize(("dtype", "room"), [("float64", 50), ("float32", 5), ("bfloat16", 2)])
def test_the_program_agrees_with_every_case_and_tolerances_leave_room(dtype, room):
    found, errors = {}, dict.fromkeys(TOLERANCE[dtype], 0.0)
    for name, case in CASES.items():
        results = make_golden.results(case["inputs"], dtype)
        found[name] = {quantity: results[quantity] for quantity in case["outputs"]}
    for (quantity, _), verdict in check_port.check(found, CASES).items():
        kind = ORDER[quantity].kind
        errors[kind] = max(errors[kind], verdict.error)
    assert {quantity for case in CASES.values() for quantity in case["outputs"]} == ORDER.keys()
    for kind, most in TOLERANCE[dtype].items():
        assert most is None or room * errors[kind] <= most, kind
    finer = {"float32": "float64", "bfloat16": "float32"}.get(dtype)
    assert finer is None or errors["scored"] > TOLERANCE[finer]["scored"]  # it did compute so


# --- the models, in NumPy -------------------------------------------------------------------------


def norm(x, weight):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + C["norm_eps"]) * weight


def attention(x_BTD, w, at):
    K, H, J, T = C["head_dim"], C["n_head"], C["n_kv_head"], x_BTD.shape[1]
    cos, sin = (np.array(WEIGHTS["rotary"][x][:T]) for x in ("cos", "sin"))
    heads = np.split(x_BTD @ w[f"{at}.qkv.weight"].T + w[f"{at}.qkv.bias"], H + 2 * J, axis=-1)

    def turned(head):
        a, b = np.split(head, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    mixed = []
    for h in range(H):
        q, k, v = turned(heads[h]), turned(heads[H + h * J // H]), heads[H + J + h * J // H]
        weight = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(K)) * np.tri(T)
        mixed.append(weight / weight.sum(axis=2, keepdims=True) @ v)
    return np.concatenate(mixed, axis=-1) @ w[f"{at}.out.weight"].T


def forward(w: dict, ids_BT):
    """Return logits [B, T, V]."""
    x = w["embed.weight"][ids_BT]
    for layer in range(C["n_layer"]):
        at = f"blocks.{layer}"
        x = x + attention(norm(x, w[f"{at}.norm1.weight"]), w, f"{at}.attention")
        h = norm(x, w[f"{at}.norm2.weight"]) @ w[f"{at}.mlp.gate_up.weight"].T
        gate, up = np.split(h, 2, axis=-1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.mlp.down.weight"].T
    return norm(x, w["norm.weight"]) @ w["head.weight"].T


def arrays(name: str, dtype=float) -> dict:
    return {key: np.array(x, dtype=dtype) for key, x in WEIGHTS[name].items()}


@pytest.mark.parametrize("name", LARGE)
def test_logits_are_those_of_a_transformer_in_numpy(name):
    found = CASES[name]["outputs"]
    for quantity, model in (("logits", "policy"), ("ref_logits", "base")):
        logits = forward(arrays(model), np.array(found["ids"])[:, :-1])
        for b, length in enumerate(found["length"]):
            logits[b, length - 1 :] = 0
        assert compare(quantity, logits.tolist(), found[quantity]).error < 1e-11


@pytest.mark.parametrize("name", LARGE)
def test_attempts_are_drawn_token_by_token(name):
    """One row after another, without a cache: where the sum passes the number; or the likeliest."""
    given, found = CASES[name]["inputs"], CASES[name]["outputs"]
    logp_BS, nearest = np.zeros(np.shape(found["logp"])), []
    models = {name: arrays(name) for name in ("policy", "base")}

    def attempt(model, context, numbers, b):
        row = []
        while len(row) < given["max_new"] and given["end_id"] not in row:
            logits = forward(models[model], np.array([context + row]))[0, -1]
            p, token = np.exp(logits / given["temperature"]), int(logits.argmax())
            if numbers is not None:
                edges, token = np.cumsum(p / p.sum()), 0
                nearest.append(abs(edges - numbers[len(row)]).min())
                while edges[token] <= numbers[len(row)]:
                    token += 1
                if model == "policy":
                    logp_BS[b, len(context + row) - 1] = np.log(p[token] / p.sum())
            row.append(token)
        return row

    first, second = given["noise"]
    for b, prompt in enumerate(x for x in given["prompts"] for _ in range(given["G"])):
        y1 = attempt("base" if given["offline1"][b] else "policy", prompt, first[b], b)
        y2 = attempt("policy", prompt + y1 + given["instruction"], second[b], b)
        assert [y1, y2] == [found["sampled1"][b], found["sampled2"][b]]
        assert [y1, y2] == [given["attempts1"][b], given["attempts2"][b]]
        cut = [y[-1] != given["end_id"] for y in (y1, y2)]
        assert found["truncated"][b] == cut
    for i, prompt in enumerate(given["prompts"]):
        y1 = attempt("policy", prompt, None, 0)
        y2 = attempt("policy", prompt + y1 + given["instruction"], None, 0)
        assert [y1, y2] == [found["greedy1"][i], found["greedy2"][i]]
    assert compare("", logp_BS.tolist(), found["sampled_logp"]).error < 1e-11
    assert min(nearest) > 0.004


@pytest.mark.parametrize("name", LARGE)
def test_gradients_by_the_weights_are_those_of_complex_steps(name):
    """The NumPy transformer's logits, differentiated numerically, carry the logits' gradient."""
    found, w, h = CASES[name]["outputs"], arrays("policy", complex), 1e-30
    ids_BT = np.array(found["ids"])[:, :-1]
    names = [f"{stage}_{form}" for stage in ("stage1", "stage2") for form in ("exact", "k1")]
    by_logits = np.array([found[f"{x}_gradient"] for x in names])
    grads = {}
    for key, weight in w.items():
        flat, grads[key] = weight.reshape(-1), np.zeros((len(names), weight.size))
        for i in range(weight.size):
            flat[i] += 1j * h
            slope_BSV = forward(w, ids_BT).imag / h
            flat[i] = flat[i].real
            grads[key][:, i] = (by_logits * slope_BSV).sum(axis=(1, 2, 3))
    for i, x in enumerate(names):
        norms = {key: float(np.linalg.norm(grad[i])) for key, grad in grads.items()}
        expected = {
            "grad_norm": float(np.linalg.norm(list(norms.values()))),
            "grad_norms": norms,
            "grad_entries": {key: [*grad[i][[0, -1]].tolist()] for key, grad in grads.items()},
        }
        for quantity, value in expected.items():
            assert compare(quantity, value, found[f"{x}_{quantity}"]).error < 1e-11, (x, quantity)


# --- by hand, and the metrics ---------------------------------------------------------------------


def test_derivations_end_in_the_outputs():
    """Numbers that are not whole stand in the derivation, to five digits; of gradients some do."""
    for name in ("leave_one_out", "three_token_kl", "two_rows", "metrics_by_hand"):
        text, outputs = " ".join(CASES[name]["derivation"]), CASES[name]["outputs"]
        for quantity, x in outputs.items():
            if not quantity.endswith(("gradient", "rate")):
                assert all(f"{value:.5g}" in text for _, value in check_port.leaves(x)), quantity
    for x, s, v in (("stage1_exact", 3, 1), ("stage2_exact", 3, 1), ("stage2_exact", 0, 0)):
        value = CASES["two_rows"]["outputs"][f"{x}_gradient"][0][s][v]
        assert f"{value:.5g}" in " ".join(CASES["two_rows"]["derivation"])


@pytest.mark.parametrize("name", ["metrics", "metrics_all_right_first"])
def test_whoever_draws_the_bootstrap_finds_the_same_interval(name):
    given, found = CASES[name]["inputs"], CASES[name]["outputs"]
    changes = np.subtract(given["right2"], given["right1"])
    for seed in range(30):
        interval = numpy_port.bootstrap(changes, seed)
        assert interval == pytest.approx(found["delta_interval"], abs=1e-9)


@pytest.mark.parametrize("stage", make_golden.STAGES)
def test_the_row_as_a_table_says_what_the_gradient_multiplies_log_p_by(stage):
    """Solved for in the gradient by each logit, after the KL's own part is taken out."""
    about, text = one_row.table(stage).split("\n\n")
    cells = [[x.strip() for x in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    case, T = CASES["triples"]["outputs"], CASES["triples"]["inputs"]["temperature"]
    total = sum(float(row[7] or 0) for row in cells)
    assert total == pytest.approx(float(about.split()[-1]), abs=0.01)
    seen = 0
    for s, (token, turn, *numbers) in enumerate(cells[1:]):
        assert (int(token), int(turn)) == (case["ids"][0][s + 1], case["turn"][0][s])
        if not numbers[0]:
            continue
        logp_V, logq_V = (
            (x := np.array(case[name][0][s]) / T) - np.log(np.exp(x).sum())
            for name in ("logits", "ref_logits")
        )
        p_V, kl, w = np.exp(logp_V), float(numbers[2]), float(numbers[4])
        gradient_V = T * len(case["ids"]) * np.array(case[f"{stage}_exact_gradient"][0][s])
        rest_V = gradient_V - w * p_V * (logp_V - logq_V - kl)  # of one row, by logits / T
        came_V = np.eye(len(p_V))[int(token)] - p_V
        assert -rest_V / came_V == pytest.approx(np.full(len(p_V), float(numbers[7])), abs=0.02)
        seen += 1
    assert seen == 8


def test_the_command_draws_the_row_too_if_asked(tmp_path, monkeypatch, capsys):
    program = check_port.GOLDEN.parent / "one_row.py"
    monkeypatch.chdir(tmp_path)
    for stage, options in (("stage1", []), ("stage2", ["--picture", "row.png"])):
        monkeypatch.setattr(sys, "argv", ["one_row.py", stage, *options])
        runpy.run_path(str(program), run_name="__main__")
        assert capsys.readouterr().out == one_row.table(stage) + "\n"
        assert [path.name for path in tmp_path.iterdir()] == options[1:]
    width, height = struct.unpack(">II", (tmp_path / "row.png").read_bytes()[16:24])
    kept = program.with_suffix(".png").read_bytes()[16:24]
    assert (width, height) == struct.unpack(">II", kept) == (1296, 475)
