"""The shipped losses have the gradients of eqs. 3 to 5, exactly; known-wrong variants do not."""

import pytest

from tests import truth

STAGES, TOLERANCE = ("stage1", "stage2"), 1e-8


@pytest.fixture(scope="module")
def oracle():
    return truth.Oracle()


def errors(program, oracle):
    """Return how far the expected gradient of each stage's loss is from the truth."""
    found = [truth.expected_gradient(program, oracle, getattr(program.score, s)) for s in STAGES]
    expected = [oracle.gradients[s] for s in STAGES]
    return [truth.relative_error(a, b) for a, b in zip(found, expected, strict=True)]


def test_the_oracle_is_a_probability_and_its_gradient_is_not_small(oracle):
    for context in oracle.contexts:
        assert abs(sum(oracle.p0[context].values()) - 1) < 1e-12
    for gradient in oracle.gradients.values():
        assert gradient.norm() > 0.1


@pytest.mark.parametrize("where", [1e-9, 1 - 1e-9])
def test_each_trajectory_is_written_for_just_its_probability_of_the_numbers(oracle, where):
    """A token's share of the numbers is as large as its probability: those at both ends of it give
    the token. So uniform numbers give the law that was enumerated, and none needs to be drawn."""
    program = truth.load_program()
    r = truth.all_rows(program, oracle, truth.tiny_model(program, 1), where)
    assert [(tuple(y1), tuple(y2)) for y1, y2 in zip(*r.attempts, strict=True)] == truth.PAIRS


def test_expected_gradient_of_the_loss_is_that_of_the_enumerated_objective(oracle):
    assert max(errors(truth.load_program(), oracle)) <= TOLERANCE


def test_half_of_the_bonus_has_no_expected_gradient(oracle):
    """The alpha identity: with gamma = 0, r2 + alpha (r2 - r1) has the gradient of (1+alpha) r2."""
    edit = ("score.py", "return reward2_B + alpha * (reward2_B - reward1_B)",
            "return (1 + alpha) * reward2_B")  # fmt: skip
    assert max(errors(truth.load_program(edit), oracle)) <= TOLERANCE


MASK, SECOND = "mask_BS = turn_BS == k\n", "advantage(return2_B, c.group)), (c.beta1, c.beta1)"
PAID2 = "return (advantage(reward1_B, c.group), " + SECOND
KL = "kl_W = (logp_WV.exp() * (logp_WV - base_WV)).sum(dim=-1)"
RATIO = "(base_WV - logp_WV).gather(-1, r.ids_BT[:, 1:][mask_BS][:, None])[:, 0]"
MUTANTS = {
    "bonus leaks into turn 1": [
        ("score.py", PAID2, "return (advantage(return2_B, c.group), " + SECOND)
    ],
    "one return for both turns": [
        ("score.py", PAID2, "return (advantage(reward1_B + return2_B, c.group), " + SECOND)
    ],
    "own turn-2 reward in turn 1's baseline": [
        ("score.py", PAID2, "return (advantage(reward1_B, c.group) - reward2_B / 2, " + SECOND)
    ],
    "turn weights swapped": [
        ("score.py", PAID2, "return (advantage(return2_B, c.group), advantage(reward1_B, c.group)),"
         " (c.beta1, c.beta1)")
    ],
    "std normalisation": [
        ("score.py", PAID2, "a = advantage(return2_B, c.group)\n    a = a / (return2_B.view(-1, "
         "c.group).std(dim=1) + 1e-6).repeat_interleave(c.group)\n"
         "    return (advantage(reward1_B, c.group), a), (c.beta1, c.beta1)")
    ],
    "shaping sign": [
        ("score.py", "+ alpha * (reward2_B - reward1_B)\n", "+ alpha * (reward1_B - reward2_B)\n")
    ],
    "r2 rewards turn 1 in Stage I": [
        ("score.py", "(nothing_B, advantage(reward2_B, c.group))",
         "(advantage(reward2_B, c.group),) * 2")
    ],
    "no beta1 KL on turn 2 in Stage I": [
        ("score.py", "(c.beta1 + c.beta2, c.beta1)", "(c.beta1 + c.beta2, 0.0)")
    ],
    "beta2 instead of beta1 + beta2": [
        ("score.py", "(c.beta1 + c.beta2, c.beta1)", "(c.beta2, c.beta1)")
    ],
    "own reward in the baseline": [
        ("score.py", "(group_PG - others_PG)", "(group_PG - group_PG.mean(dim=1, keepdim=True))")
    ],
    "turn-1 KL without gradient": [
        ("score.py", MASK, MASK + "        kl_BS = kl_BS.detach() if k == 1 else whole_BS\n"),
        ("score.py", "    loss_B = 0.0\n", "    loss_B, whole_BS = 0.0, kl_BS\n"),
    ],
    "turn-1 KL multiplies turn 2's tokens": [
        ("score.py", "weight * kl_BS * mask_BS", "weight * kl_BS * (turn_BS == 2)")
    ],
    "KL of turn 2 credited to turn 1": [
        ("score.py", "weight * kl_BS * mask_BS", "weight * kl_BS * (turn_BS >= k)")
    ],
    "KL without its future term": [
        ("score.py", "(advantage_B[:, None] - later_BS) * mask", "advantage_B[:, None] * mask")
    ],
    "KL of the tokens before": [
        ("score.py", "cost_BS.flip(1).cumsum(1).flip(1)", "cost_BS.cumsum(1)")
    ],
    "own-length division": [
        ("score.py", "(cost_BS - zero_BS * credit_BS).sum(dim=1)",
         "(cost_BS - zero_BS * credit_BS).sum(dim=1) / mask_BS.sum(dim=1)")
    ],
    "KL argument order": [
        ("rollout.py", KL, "kl_W = (base_WV.exp() * (base_WV - logp_WV)).sum(dim=-1)")
    ],
    "k1 differentiated as KL": [("rollout.py", KL, f"kl_W = -{RATIO}")],
    "k3 differentiated as KL": [("rollout.py", KL, f"x = {RATIO}\n    kl_W = x.exp() - 1 - x")],
    "temperature not in the log-probs": [
        ("rollout.py", "(policy(ids_BS, wanted_BT=mask_BS), temperature)",
         "(policy(ids_BS, wanted_BT=mask_BS), 1.0)")
    ],
    "temperature not in the reference": [
        ("rollout.py", "(base(ids_BS, wanted_BT=mask_BS), temperature)",
         "(base(ids_BS, wanted_BT=mask_BS), 1.0)")
    ],
    "reference is the policy itself": [("rollout.py", "base(ids_BS,", "policy(ids_BS,")],
    "end of turn out of the masks": [
        ("rollout.py", "[k] * len(column[b])", "[k] * (len(column[b]) - 1) + [0]")
    ],
    "mask shifted by one": [("rollout.py", "turn_B.append(turn[1:])", "turn_B.append(turn[:-1])")],
    "instruction trained": [
        ("rollout.py", "turn += [0] * len(context)", "turn += [k] * len(context)")
    ],
    "tokens after the end of turn trained": [
        ("rollout.py", "([*ids, end_id]).index(end_id) + 1 for ids", "len(ids) for ids")
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_variant_is_caught(oracle, name):
    """A mutant is caught if one of the gradients is off by a thousandth: 10^5 tolerances."""
    found = errors(truth.load_program(*MUTANTS[name]), oracle)
    assert max(found) > 1e-3, found
