"""The shipped losses have the gradients of eqs. 3 to 5, exactly; known-wrong variants do not."""

import pytest
import torch
import truth

TOLERANCE = 1e-8


@pytest.fixture(scope="module")
def oracle():
    return truth.Oracle()


def test_the_oracle_is_a_probability_and_its_gradient_is_not_small(oracle):
    for context in oracle.contexts:
        assert abs(sum(oracle.p0[context].values()) - 1) < 1e-12
    for gradient in oracle.gradients.values():
        assert gradient.norm() > 0.1


@pytest.mark.parametrize("kl", ["exact", "k1"])
@pytest.mark.parametrize("stage", ["stage1", "stage2", "single_turn", "gamma", "leak"])
def test_expected_gradient_of_the_loss_is_that_of_the_enumerated_objective(oracle, stage, kl):
    found = truth.expected_gradient(truth.load_program(), oracle, stage, kl)
    assert truth.relative_error(found, oracle.gradients[stage]) <= TOLERANCE


STAGE2_GAIN1 = "advantage1_B = return1_B - leave_one_out(return1_B, G)"
MUTANTS = {
    "bonus leaks into turn 1": [
        ("score.py", STAGE2_GAIN1, "advantage1_B = return2_B - leave_one_out(return2_B, G)")
    ],
    "one return for both turns": [
        ("score.py", STAGE2_GAIN1, "r = reward1_B + return2_B; advantage1_B = r - r.mean()")
    ],
    "shaping sign": [("score.py", "alpha * (reward2_B - reward1_B)\n\n\ndef",
                      "alpha * (reward1_B - reward2_B)\n\n\ndef")],
    "turn weights swapped": [
        ("score.py", "reinforce(logp_BS, mask1_BS, advantage1_B)",
         "reinforce(logp_BS, mask1_BS, advantage2_B)"),
        ("score.py", "reinforce(logp_BS, mask2_BS, advantage2_B)\n    return beta1 * (kl1_B",
         "reinforce(logp_BS, mask2_BS, advantage1_B)\n    return beta1 * (kl1_B"),
    ],
    "r2 rewards turn 1 in Stage I": [
        ("score.py", "gain_B = reinforce(logp_BS, mask2_BS, advantage2_B)",
         "gain_B = reinforce(logp_BS, torch.ones_like(mask2_BS), advantage2_B)")
    ],
    "turn-1 KL without gradient": [
        ("score.py", "(beta1 + beta2) * kl1_B +", "(beta1 + beta2) * kl1_B.detach() +"),
        ("score.py", "beta1 * (kl1_B + kl2_B)", "beta1 * (kl1_B.detach() + kl2_B)"),
    ],
    "turn-1 KL multiplies turn 2's tokens": [
        ("score.py", "turns = [own_mask1(r),", "turns = [r.mask2_BS,")
    ],
    "no beta1 KL on turn 2 in Stage I": [
        ("score.py", "(beta1 + beta2) * kl1_B + beta1 * kl2_B", "(beta1 + beta2) * kl1_B")
    ],
    "KL argument order": [
        ("score.py", "(law_BSV.exp() * (law_BSV - ref_law_BSV))",
         "(ref_law_BSV.exp() * (ref_law_BSV - law_BSV))"),
        ("score.py", "((logp_BS - ref_logp_BS) * mask_BS)", "((ref_logp_BS - logp_BS) * mask_BS)"),
    ],
    "k1 differentiated as KL": [
        ("score.py",
         "    return (k1_BS + score_function(logp_BS) * mask_BS * (k1_BS + after(k1_BS)))",
         "    return ((logp_BS - ref_logp_BS) * mask_BS)")
    ],
    "k3 differentiated as KL": [
        ("score.py",
         "    return (k1_BS + score_function(logp_BS) * mask_BS * (k1_BS + after(k1_BS)))",
         "    x = ref_logp_BS - logp_BS\n    return ((x.exp() - 1 - x) * mask_BS)")
    ],
    "KL without its future term": [
        ("score.py", "* mask_BS * after(kl_BS.detach())", "* 0"),
        ("score.py", "(k1_BS + after(k1_BS))", "k1_BS"),
    ],
    "KL of turn 2 credited to turn 1": [
        ("score.py", "turns = [own_mask1(r),", "turns = [own_mask1(r) | r.mask2_BS,")
    ],
    "end of turn out of the masks": [
        ("rollout.py", "(target_S < (before_B + n_B)[:, None])",
         "(target_S < (before_B + n_B - 1)[:, None])")
    ],
    "mask shifted by one": [
        ("rollout.py", "target_S = torch.arange(1, T", "target_S = torch.arange(0, T - 1")
    ],
    "instruction trained": [
        ("rollout.py", "[attempt_mask(T, b, turn.n_B)", "[attempt_mask(T, b - 1, turn.n_B + 1)")
    ],
    "tokens after the end of turn trained": [
        ("rollout.py", "    for turn in turns:\n        if len(pieces) > 1:\n",
         "    for turn in turns:\n        if len(pieces) > 1:\n"
         "            turn.n_B = torch.full_like(turn.n_B, turn.ids_BN.shape[1])\n")
    ],
    "own-length division": [
        ("score.py", "(score_function(logp_BS) * mask_BS).sum(dim=1) * advantage_B.detach()",
         "(score_function(logp_BS) * mask_BS).sum(dim=1) / mask_BS.sum(dim=1) * advantage_B")
    ],
    "temperature not in the log-probs": [
        ("score.py", "law_BSV = token_law(policy.logits(state_BSD), temperature)\n        with",
         "law_BSV = token_law(policy.logits(state_BSD), 1.0)\n        with")
    ],
    "temperature not in the reference": [
        ("score.py", "token_law(base.logits(ref_state_BSD), temperature)",
         "token_law(base.logits(ref_state_BSD), 1.0)")
    ],
    "own turn-2 reward in turn 1's baseline": [
        ("score.py", STAGE2_GAIN1,
         "advantage1_B = return1_B - (leave_one_out(return1_B, G) + reward2_B) / 2")
    ],
    "own reward in the baseline": [
        ("score.py", "((group_PG.sum(dim=1, keepdim=True) - group_PG) / (G - 1))",
         "(group_PG.mean(dim=1, keepdim=True) + 0 * group_PG)")
    ],
    "std normalisation": [
        ("score.py", "advantage2_B = return2_B - leave_one_out(return2_B, G)",
         "advantage2_B = return2_B - leave_one_out(return2_B, G)\n"
         "    advantage2_B = advantage2_B / (return2_B.view(-1, G).std(dim=1) + 1e-6"
         ").repeat_interleave(G)")
    ],
    "reference is the policy itself": [
        ("score.py", "ref_law_BSV = token_law(base.logits(ref_state_BSD), temperature)",
         "ref_law_BSV = law_BSV")
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_variant_is_caught(oracle, name):
    """A mutant is caught if any of the four gradients is off by a thousandth: 10^5 tolerances."""
    program = truth.load_program(*MUTANTS[name])
    errors = [
        truth.relative_error(truth.expected_gradient(program, oracle, s, kl), oracle.gradients[s])
        for s in ("stage1", "stage2")
        for kl in ("exact", "k1")
    ]
    assert max(errors) > 1e-3, errors


def test_half_of_the_bonus_has_no_expected_gradient(oracle):
    """The alpha identity: with gamma = 0, r2 + alpha (r2 - r1) has the gradient of (1+alpha) r2."""
    edit = ("score.py", "return reward2_B + alpha * (reward2_B - reward1_B)",
            "return (1 + alpha) * reward2_B")  # fmt: skip
    found = truth.expected_gradient(truth.load_program(edit), oracle, "stage2", "exact")
    assert truth.relative_error(found, oracle.gradients["stage2"]) <= TOLERANCE


def test_dividing_by_the_groups_deviation_would_erase_alpha():
    """Where a group's first attempts earn the same, alpha only scales, and the scale divides out.

    Undivided, the shipped advantage grows by (1 + 10) / (1 + 1).
    """
    score = truth.load_program().score
    reward2 = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    for first in (0.0, 1.0):
        advantage, normalised = [], []
        for alpha in (1.0, 10.0):
            value = score.shaped_reward(torch.full_like(reward2, first), reward2, alpha)
            advantage.append(value - score.leave_one_out(value, 4))
            normalised.append((value - value.mean()) / value.std())
        torch.testing.assert_close(normalised[0], normalised[1])
        torch.testing.assert_close(advantage[1], advantage[0] * 5.5)
