"""The golden files are what their command writes, and what a second derivation says."""

import json
import math

import check_port
import make_golden
import numpy as np
import pytest
import truth

FILES = {path.stem: path for path in sorted(make_golden.FOLDER.glob("*.json"))}
CONTENT = {name: json.loads(path.read_text()) for name, path in FILES.items()}
CASES = check_port.contract()
WEIGHTS, TOLERANCES = CONTENT["weights"], CONTENT["tolerances"]
LARGE, ROWS = ("pairs", "triples"), ("pairs", "triples", "two_rows")
COMBINED = [(stage, kl) for stage in ("stage1", "stage2") for kl in ("exact", "k1")]


@pytest.fixture(scope="module")
def made():
    return make_golden.make(truth.load_program())


def test_the_files_are_what_the_command_writes(made):
    """Inputs and texts to the letter; outputs within float64's tolerance, on any machine."""
    assert made.keys() == CONTENT.keys()
    for name, content in CONTENT.items():
        fresh = made[name]
        for case in content.get("cases", {}):
            outputs = fresh["cases"][case].pop("outputs")
            assert list(outputs) == list(CASES[case]["outputs"])
            for quantity, expected in CASES[case]["outputs"].items():
                assert check_port.compare(quantity, expected, outputs[quantity]).error <= 1e-9
            assert fresh["cases"][case] == {
                key: x for key, x in CASES[case].items() if key != "outputs"
            }
        strip = ("cases", "measured", "rotary")
        assert {key: x for key, x in fresh.items() if key not in strip} == {
            key: x for key, x in content.items() if key not in strip
        }
    rotary = check_port.compare("rotary", WEIGHTS["rotary"], made["weights"]["rotary"])
    assert rotary.error <= 1e-7  # float32: another machine's cosine may round the other way


def test_the_files_are_small_readable_and_rounded():
    assert sum(path.stat().st_size for path in FILES.values()) < 300_000
    for name, path in FILES.items():
        text = path.read_text()
        assert text == make_golden.written(CONTENT[name]) + "\n"
        assert max(map(len, text.splitlines())) <= 100
        for _, x in check_port.leaves(CONTENT[name].get("cases", {})):
            assert not isinstance(x, float) or x == float(f"{x:.12g}")


def test_tolerances_are_as_far_from_what_was_measured_as_they_say(made):
    """On another machine, half as far will do."""
    here = made["tolerances"]["measured"]
    for measured, share in ((TOLERANCES["measured"], 1), (here, 2)):
        for dtype, times in (("float64", 100), ("float32", 10), ("bfloat16", 3)):
            for kind, error in measured[dtype].items():
                most = TOLERANCES["tolerance"][dtype][kind]
                assert most is None or error * times / share <= most, (dtype, kind)
    assert {q.kind for q in check_port.ORDER} == TOLERANCES["tolerance"]["float32"].keys()


def test_every_quantity_has_a_case_and_every_case_has_only_known_quantities():
    there = {quantity for case in CASES.values() for quantity in case["outputs"]}
    assert there == check_port.PLACE.keys()
    for name in LARGE:
        metrics = [q.name for q in check_port.ORDER if q.kind == "metrics"]
        assert CASES[name]["outputs"].keys() == there - set(metrics) - {"after"}


def test_the_cases_cover_what_ports_get_wrong():
    for name in LARGE:
        given, found = CASES[name]["inputs"], CASES[name]["outputs"]
        B, T = np.shape(found["ids"])
        attempts = [*given["attempts1"], *given["attempts2"]]
        cut = [row[-1] != given["end_id"] for row in attempts]
        assert found["truncated"] == [list(pair) for pair in zip(cut[:B], cut[B:], strict=True)]
        assert any(cut) and not all(cut) and given["temperature"] != 1
        assert any(not gone and len(row) == given["max_new"]
                   for row, gone in zip(attempts, cut, strict=True))  # fmt: skip
        for k in (1, 2):
            assert len({len(row) for row in given[f"attempts{k}"]}) >= 3
        assert not any(r for r, gone in zip(given["reward1"] + given["reward2"], cut, strict=True)
                       if gone)  # fmt: skip
        assert any(given["end_id"] in prompt for prompt in given["prompts"])
        assert any(0 in row for row in attempts) and any(0 in row for row in given["prompts"])
        assert {len(x) for x in given["prompts"]} == ({2, 3, 5} if name == "pairs" else {2, 4})
        sizes = [B, T, T - 1, WEIGHTS["config"]["vocab_size"], given["G"], B // given["G"]]
        assert len(set(sizes)) == len(sizes)
        moves = set(zip(given["reward1"], given["reward2"], strict=True))
        assert moves == {(0, 0), (0, 1), (1, 0), (1, 1)}
    pairs, triples = (CASES[name]["inputs"] for name in LARGE)
    assert pairs["offline1"] == [True, True] + [False] * 6 and (pairs["G"], triples["G"]) == (2, 3)
    assert pairs["reward1"][4:6] == pairs["reward2"][4:6] == [0, 0]
    for name in ("alpha", "beta1", "beta2", "temperature", "max_new"):
        assert pairs[name] != triples[name]


# --- the models, in NumPy -------------------------------------------------------------------------


def norm(x, weight):
    size = np.sqrt((x * x).mean(axis=-1, keepdims=True) + WEIGHTS["config"]["norm_eps"])
    return x / size * weight


def attention(x_BTD, w, at):
    """Return the output of one layer's attention, head by head and position by position."""
    c, (B, T, _) = WEIGHTS["config"], x_BTD.shape
    K, H, J = c["head_dim"], c["n_head"], c["n_kv_head"]
    angle = np.array(WEIGHTS["rotary"]["cos"][:T]) + 1j * np.array(WEIGHTS["rotary"]["sin"][:T])
    heads = np.split(x_BTD @ w[f"{at}.qkv.weight"].T + w[f"{at}.qkv.bias"], H + 2 * J, axis=-1)

    def turned(head):
        z = (head[..., : K // 2] + 1j * head[..., K // 2 :]) * angle
        return np.concatenate([z.real, z.imag], axis=-1)

    mixed = np.zeros((B, T, H * K))
    for h in range(H):
        q, k, v = turned(heads[h]), turned(heads[H + h * J // H]), heads[H + J + h * J // H]
        for t in range(T):
            score = np.einsum("bk,bsk->bs", q[:, t], k[:, : t + 1]) / math.sqrt(K)
            weight = np.exp(score - score.max(axis=1, keepdims=True))
            weight /= weight.sum(axis=1, keepdims=True)
            mixed[:, t, h * K : (h + 1) * K] = np.einsum("bs,bsk->bk", weight, v[:, : t + 1])
    return mixed @ w[f"{at}.out.weight"].T


def forward(w: dict, ids_BT):
    """Return logits [B, T, V]."""
    x = w["embed.weight"][ids_BT]
    for layer in range(WEIGHTS["config"]["n_layer"]):
        at = f"blocks.{layer}"
        x = x + attention(norm(x, w[f"{at}.norm1.weight"]), w, f"{at}.attention")
        h = norm(x, w[f"{at}.norm2.weight"]) @ w[f"{at}.mlp.gate_up.weight"].T
        gate, up = np.split(h, 2, axis=-1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.mlp.down.weight"].T
    return norm(x, w["norm.weight"]) @ w["head.weight"].T


def arrays(name: str) -> dict:
    return {key: np.array(x) for key, x in WEIGHTS[name].items()}


def law(logits, temperature):
    """Return the log-probabilities of one token, by plain Python."""
    total = math.log(sum(math.exp(x / temperature) for x in logits))
    return [x / temperature - total for x in logits]


@pytest.mark.parametrize("name", LARGE)
def test_logits_are_those_of_a_transformer_in_numpy(name):
    found = CASES[name]["outputs"]
    ids_BT = np.array(found["ids"])
    for quantity, model in (("logits", "policy"), ("ref_logits", "base")):
        logits = forward(arrays(model), ids_BT[:, :-1])
        for b, length in enumerate(found["length"]):
            logits[b, length - 1 :] = 0
        np.testing.assert_allclose(found[quantity], logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", LARGE)
def test_attempts_are_drawn_token_by_token(name):
    """One row after another, without a cache: the noise's best token, or the likeliest one."""
    given, found = CASES[name]["inputs"], CASES[name]["outputs"]
    leads, logp_BS = [], np.zeros(np.shape(found["logp"]))

    def attempt(model, context, noise, b):
        row, w = [], arrays(model)
        while len(row) < given["max_new"] and given["end_id"] not in row:
            logits = forward(w, np.array([context + row]))[0, -1]
            logp = law(logits, given["temperature"])
            if noise is None:
                row.append(logp.index(max(logp)))
                continue
            p = [math.exp(x) / e for x, e in zip(logp, noise[len(row)][b], strict=True)]
            leads.append(sorted(p)[-1] / sorted(p)[-2])
            row.append(p.index(max(p)))
            logp_BS[b, len(context + row) - 2] = logp[row[-1]]
        return row

    for b, prompt in enumerate(x for x in given["prompts"] for _ in range(given["G"])):
        offline = given["offline1"][b]
        first = attempt("base" if offline else "policy", prompt,
                        given["noise1_base" if offline else "noise1"], b)  # fmt: skip
        second = attempt("policy", prompt + first + given["instruction"], given["noise2"], b)
        assert [first, second] == [found["sampled1"][b], found["sampled2"][b]]
        assert [first, second] == [given["attempts1"][b], given["attempts2"][b]]
    for p, prompt in enumerate(given["prompts"]):
        first = attempt("policy", prompt, None, 0)
        second = attempt("policy", prompt + first + given["instruction"], None, 0)
        assert [first, second] == [found["greedy1"][p], found["greedy2"][p]]
    assert min(leads) > 1.07
    assert check_port.compare("", logp_BS.tolist(), found["sampled_logp"]).error < 1e-9


# --- the rows and the losses, in plain Python -----------------------------------------------------


def tokens(case):
    """Return for each row its attempts' tokens: (s, turn, token, logits, base's logits)."""
    given, found = case["inputs"], case["outputs"] | case["inputs"]
    prompts = [x for x in given["prompts"] for _ in range(given["G"])]
    for b, prompt in enumerate(prompts):
        s, row = len(prompt) - 1, []
        for turn, skipped in ((1, 0), (2, len(given["instruction"]))):
            s += skipped
            for token in given[f"attempts{turn}"][b]:
                z, q = found["logits"][b][s], law(found["ref_logits"][b][s], given["temperature"])
                row.append((s, turn, token, z, q))
                s += 1
        yield row


def advantages(given, stage):
    """Return each row's advantages (attempt 1's, attempt 2's)."""
    r1, r2, G, found = given["reward1"], given["reward2"], given["G"], []
    shaped = [b + given["alpha"] * (b - a) for a, b in zip(r1, r2, strict=True)]
    first, second = ([0.0] * len(r1), r2) if stage == "stage1" else (r1, shaped)
    for b in range(len(r1)):
        others = [i for i in range(b - b % G, b - b % G + G) if i != b]
        found.append([x[b] - sum(x[i] for i in others) / (G - 1) for x in (first, second)])
    return found


def token_loss(z, token, q, temperature, advantage, weight, kl, ahead):
    """Return what a token adds to its row's loss, as a function of its logits z, where the score
    function has its weights: `ahead` is the KL that this token answers for, a constant."""
    p = law(z, temperature)
    exact = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)) if kl == "exact" else 0.0
    return weight * (exact + ahead * p[token]) - advantage * p[token]


def slope(f, z, v, h=1e-3):
    """Return the derivative of f by z[v], by five-point differences, error of order h^4."""
    at = [f([*z[:v], z[v] + k * h, *z[v + 1 :]]) for k in (-2, -1, 1, 2)]
    return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)


def derived(case, stage, kl):
    """Return a case's quantities of a stage and a form of the KL, token by token."""
    given, shape = case["inputs"], np.shape(case["outputs"]["turn"])
    V = len((case["outputs"] | given)["logits"][0][0])
    found = {x: np.zeros(shape) for x in ("turn", "token_turn", "token_advantage",
             "token_kl_weight", "kl_token", "logp", "ref_logp")}  # fmt: skip
    found |= {x: np.zeros(shape[0]) for x in ("kl1", "kl2", "loss")}
    found["gradient"] = np.zeros((*shape, V))
    T, gains = given["temperature"], advantages(given, stage)
    for b, row in enumerate(tokens(case)):
        for i, (s, turn, token, z, q) in enumerate(row):
            p = law(z, T)
            both = {"exact": sum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True)),
                    "k1": p[token] - q[token]}  # fmt: skip
            row[i] += (both[kl],)
            found["turn"][b, s], found["kl_token"][b, s] = turn, both[kl]
            found["logp"][b, s], found["ref_logp"][b, s] = p[token], q[token]
        for i, (s, turn, token, z, q, value) in enumerate(row):
            if turn == 1 and given["offline1"][b]:
                continue
            more = given["beta2"] if (stage, turn) == ("stage1", 1) else 0.0
            weight, gain = given["beta1"] + more, gains[b][turn - 1]
            ahead = sum(x[5] for x in row[i + (kl == "exact") :] if x[1] == turn)
            found["token_turn"][b, s], found["token_advantage"][b, s] = turn, gain
            found["token_kl_weight"][b, s] = weight
            found[f"kl{turn}"][b] += value
            found["loss"][b] += weight * value

            def loss(z, token=token, q=q, gain=gain, weight=weight, ahead=ahead):
                return token_loss(z, token, q, T, gain, weight, kl, ahead) / shape[0]

            found["gradient"][b, s] = [slope(loss, z, v) for v in range(V)]
    return found


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("stage", "kl"), COMBINED)
def test_losses_and_their_gradients_are_those_of_differences(name, stage, kl):
    """By finite differences of a plain Python formula, which knows nothing of score.py."""
    outputs, shared = CASES[name]["outputs"], ("turn", "token_turn", "logp", "ref_logp")
    by_kl = {"kl_token": f"kl_token_{kl}", "kl1": f"kl1_{kl}", "kl2": f"kl2_{kl}"}
    compared = 0
    for quantity, expected in derived(CASES[name], stage, kl).items():
        full = quantity if quantity in shared else f"{stage}_{quantity}"
        full = f"{stage}_{kl}_{quantity}" if quantity in ("loss", "gradient") else full
        full = by_kl.get(quantity, full)
        if full in outputs:
            assert check_port.compare(full, expected.tolist(), outputs[full]).error < 1e-9, full
            compared += 1
    assert compared == (11 if name in LARGE else 8)


@pytest.mark.parametrize("name", LARGE)
def test_returns_and_baselines_are_plain_sums(name):
    given, found = CASES[name]["inputs"], CASES[name]["outputs"]
    for stage in ("stage1", "stage2"):
        gains = advantages(given, stage)
        for k in (1, 2):
            advantage = found[f"{stage}_advantage{k}"]
            assert advantage == pytest.approx([gain[k - 1] for gain in gains])
            if (stage, k) != ("stage1", 1):
                rest = zip(found[f"{stage}_return{k}"], found[f"{stage}_baseline{k}"], strict=True)
                assert advantage == pytest.approx([a - b for a, b in rest])
    assert found["stage2_return1"] == given["reward1"]
    assert found["stage1_return2"] == given["reward2"]


@pytest.mark.parametrize("name", LARGE)
def test_rows_are_prompt_attempt_instruction_attempt(name):
    given, found = CASES[name]["inputs"], CASES[name]["outputs"]
    for b, ids in enumerate(found["ids"]):
        parts = [given["prompts"][b // given["G"]], given["attempts1"][b], given["instruction"],
                 given["attempts2"][b]]  # fmt: skip
        row = [token for part in parts for token in part]
        assert ids == row + [0] * (len(ids) - len(row)) and found["length"][b] == len(row)


@pytest.mark.parametrize("name", LARGE)
def test_gradients_by_the_weights_are_those_of_differences(name):
    """The NumPy transformer's logits, differentiated numerically, carry the logits' gradient."""
    found, w = CASES[name]["outputs"], arrays("policy")
    ids_BT = np.array(found["ids"])[:, :-1]
    by_logits = [np.array(found[f"{stage}_{kl}_gradient"]) for stage, kl in COMBINED]
    slopes = {}
    for key, weight in w.items():
        flat, slopes[key] = weight.reshape(-1), np.zeros((len(COMBINED), weight.size))
        for i, value in enumerate(flat.tolist()):
            moved = []
            for h in (-1e-4, 1e-4, -5e-5, 5e-5):
                flat[i] = value + h
                moved.append(forward(w, ids_BT))
            flat[i] = value
            coarse, fine = (moved[1] - moved[0]) / 2e-4, (moved[3] - moved[2]) / 1e-4
            change = (4 * fine - coarse) / 3
            slopes[key][:, i] = [(change * g).sum() for g in by_logits]
    for i, (stage, kl) in enumerate(COMBINED):
        grads = {key: x[i] for key, x in slopes.items()}
        norms = {key: float(np.linalg.norm(x)) for key, x in grads.items()}
        expected = {
            "grad_norm": float(np.linalg.norm(list(norms.values()))),
            "grad_norms": norms,
            "grad_entries": {key: [x[0], x[-1]] for key, x in grads.items()},
        }
        for quantity, x in expected.items():
            full = f"{stage}_{kl}_{quantity}"
            assert check_port.compare(full, x, found[full]).error < 1e-8, full


# --- by hand, and the metrics ---------------------------------------------------------------------


def test_derivations_end_in_the_outputs():
    """Every number of the small cases' outputs that is not whole stands in the derivation."""
    for name in ("leave_one_out", "three_token_kl", "two_rows", "metrics_by_hand"):
        text = " ".join(CASES[name]["derivation"])
        for quantity, x in CASES[name]["outputs"].items():
            if quantity.endswith(("gradient", "rate")):
                continue
            for _, value in check_port.leaves(x):
                assert f"{value:.5g}" in text, (name, quantity, value)
    gradient = {x: CASES["two_rows"]["outputs"][f"{x}_gradient"] for x in
                ("stage1_exact", "stage2_exact")}  # fmt: skip
    for x, s, v in (("stage1_exact", 3, 1), ("stage2_exact", 3, 1), ("stage2_exact", 0, 0)):
        assert f"{gradient[x][0][s][v]:.5g}" in " ".join(CASES["two_rows"]["derivation"])


@pytest.mark.parametrize("name", make_golden.TABLES)
def test_metrics_are_counts_and_the_bootstrap_is_the_binomial_sum(name):
    """The percentiles, by summing over all samples with replacement, are far from a step."""
    given, found = CASES[name]["inputs"], CASES[name]["outputs"]
    pairs = list(zip(given["right1"], given["right2"], strict=True))
    n, gained, lost = len(pairs), pairs.count((0, 1)), pairs.count((1, 0))
    assert found["acc_t1"] == pytest.approx(sum(given["right1"]) / n)
    assert found["delta_i_to_c"] == pytest.approx(gained / n)
    assert found["delta_c_to_i"] == pytest.approx(lost / n)
    assert found["delta"] == pytest.approx((gained - lost) / n)
    assert (found["repair_rate"] is None) == (sum(given["right1"]) == n)
    chances = {}
    for a in range(n + 1):
        for b in range(n + 1 - a):
            ways = math.comb(n, a) * math.comb(n - a, b)
            chance = ways * gained**a * lost**b * (n - gained - lost) ** (n - a - b) / n**n
            chances[a - b] = chances.get(a - b, 0.0) + chance
    for tail, end in ((0.025, 0), (0.975, 1)):
        below = 0.0
        for change in sorted(chances):
            if below < tail <= below + chances[change]:
                break
            below += chances[change]
        assert found["delta_interval"][end] == pytest.approx(change / n)
        room = 6 * math.sqrt(tail * (1 - tail) / 10_000)  # so many deviations of 10,000 draws
        assert below + room < tail < below + chances[change] - room
