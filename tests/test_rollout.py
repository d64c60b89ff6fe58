"""The sampler draws from the law that the trainer scores, and keeps every token that it drew."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch

import rollout
import verify
from model import Cache
from tests.test_model import model

END, INSTRUCTION, LIMIT = 4, [7, 9, 7], 4
TASK = rollout.Task(None, None, None, str, INSTRUCTION, END, 11, LIMIT, 90)


def noise(rows, attempts=2, limit=LIMIT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(attempts, rows, limit, generator=generator, dtype=torch.float64)


def sample(gpt, prompts, noise_KBN=None, temperature=1.0, task=TASK):
    noise_KBN = noise(len(prompts)) if noise_KBN is None else noise_KBN
    return rollout.rollout(gpt, task, prompts, noise_KBN, temperature)


def ragged(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (n,), generator=generator).tolist()
    return [torch.randint(0, 11, (k,), generator=generator).tolist() for k in lengths]


def short(gpt, boost=1.5):
    """Return a model that ends attempts at different lengths: about a third run into the limit."""
    gpt = copy.deepcopy(gpt)
    with torch.no_grad():
        gpt.norm.weight.mul_(0.1)
        gpt.head.weight[END] *= boost
    return gpt


# --- the law of the samples -----------------------------------------------------------------------


def test_a_token_without_probability_is_never_drawn():
    """Not even by the first number, 0, or the last before 1, whatever rounding makes of the sum."""
    logits = torch.tensor([-torch.inf, 0.3, -torch.inf, 0.1, 0.2, -torch.inf])
    head = SimpleNamespace(head=lambda state: logits.expand(len(state), -1))
    number_BN = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    ids, _ = rollout.sample_turn(head, None, torch.zeros(2, 1), number_BN, 4, temperature=0.7)
    assert ids == [[1], [4]]


def test_sampler_and_trainer_agree_on_every_token_at_any_temperature():
    prompts = ragged(64)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for temperature in (0.7, 1.0, 2.0):
            gpt = short(model(dtype))
            r = sample(gpt, prompts, temperature=temperature)
            scored = torch.log_softmax(gpt(r.ids_BT[:, :-1]) / temperature, -1).tolist()
            for b, s in (r.turn_BS > 0).nonzero().tolist():
                assert abs(scored[b][s][r.ids_BT[b, s + 1]] - r.logp_BS[b, s]) <= bound
            assert (r.logp_BS[r.turn_BS == 0] == 0).all() and r.logp_BS.dtype == torch.float64


def test_greedy_takes_the_likeliest_token_of_the_uncached_model_whatever_the_noise():
    """Of all attempts, which may be more than two."""
    gpt, prompts, found = short(model(max_positions=64)), ragged(12), []
    for seed in (0, 1):
        r = sample(gpt, prompts, noise(12, attempts=4, seed=seed), temperature=0)
        found.append(r.attempts)
        assert (r.logp_BS == 0).all()
    assert found[0] == found[1]
    for b, prompt in enumerate(prompts):
        row = list(prompt)
        for k in range(4):
            for token in r.attempts[k][b]:
                assert gpt(torch.tensor([row])).argmax(-1)[0, -1] == token
                row.append(token)
            row += INSTRUCTION
        assert r.ids_BT[b].tolist()[: len(row) - 3] == row[:-3]


def test_half_precision_logits_are_scored_in_float32():
    logp = rollout.log_probs(torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16), 0.5)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp[0, 0].item(), -math.log(1 + math.exp(4.0)))


# --- rows -----------------------------------------------------------------------------------------


def test_a_rollout_is_prompt_attempt_instruction_attempt_without_gaps():
    """Rows are cut by their turns, and held against a walk along them. An attempt goes up to and
    including its first end of turn, or to the limit; both, and all lengths, are there."""
    prompts = ragged(200)
    r, lengths, cut = sample(short(model()), prompts), set(), []
    for b, prompt in enumerate(prompts):
        row, at = r.ids_BT[b].tolist(), len(prompt)
        assert row[:at] == prompt and r.turn_BS[b, : at - 1].tolist() == [0] * (at - 1)
        for k in (1, 2):
            attempt = r.attempts[k - 1][b]
            assert len(attempt) == (attempt.index(END) + 1 if END in attempt else LIMIT)
            assert row[at : at + len(attempt)] == attempt
            assert r.turn_BS[b, at - 1 : at - 1 + len(attempt)].tolist() == [k] * len(attempt)
            lengths.add(len(attempt))
            cut.append(END not in attempt)
            at += len(attempt)
            if k == 1:
                assert row[at : at + 3] == INSTRUCTION
                assert r.turn_BS[b, at - 1 : at + 2].tolist() == [0] * 3
                at += 3
        assert not any(row[at:]) and not r.turn_BS[b, at - 1 :].any()
    assert lengths == {1, 2, 3, 4} and 0.1 < np.mean(cut) < 0.9
    assert rollout.truncated(r, 1, TASK) == cut[::2] and rollout.truncated(r, 2, TASK) == cut[1::2]


def assert_same(r, b, other, c):
    """Row b of r is row c of another, but for padding. Sums may round in another way."""
    n = [int(x.turn_BS[i].nonzero().max()) + 1 for x, i in ((r, b), (other, c))]
    for name, more in (("ids_BT", 1), ("turn_BS", 0), ("logp_BS", 0)):
        found, expected = getattr(r, name)[b, : n[0] + more], getattr(other, name)[c, : n[1] + more]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert [turn[b] for turn in r.attempts] == [turn[c] for turn in other.attempts]


def test_a_rows_sample_depends_on_its_own_numbers_alone(monkeypatch):
    """Beside others or alone, in another order, in groups of one prompt or each with its own; and
    with rows left out as they end, more than once a turn."""
    gpt, prompts, sizes = short(model(max_positions=90)), ragged(15), []
    of_rows, numbers = [x for x in prompts for _ in range(3)], noise(45, limit=25)
    take = Cache.take
    monkeypatch.setattr(Cache, "take", lambda c, row: sizes.append(len(row)) or take(c, row))
    r = sample(gpt, prompts, numbers, temperature=6.0)
    assert sizes.pop(0) == 45 and len(sizes) > 4 and min(sizes) < 6
    assert len({tuple(row) for row in r.ids_BT[:3].tolist()}) == 3
    own = sample(gpt, of_rows, numbers, temperature=6.0)
    order = [7 * b % 45 for b in range(45)]
    moved = sample(gpt, [of_rows[b] for b in order], numbers[:, order], temperature=6.0)
    for b in range(45):
        alone = sample(gpt, of_rows[b : b + 1], numbers[:, b : b + 1], temperature=6.0)
        for other, c in ((r, b), (own, b), (moved, order.index(b))):
            assert_same(alone, 0, other, c)


def test_attempts_may_all_be_cut_or_all_be_empty():
    """No token ends an attempt; or, with all logits equal, the likeliest token 0 always does."""
    gpt, prompts = short(model()), ragged(5)
    never = sample(gpt, prompts, task=TASK._replace(end_id=10_000))
    assert all(len(y) == LIMIT for turn in never.attempts for y in turn)
    with torch.no_grad():
        gpt.head.weight.zero_()
    at_once = sample(gpt, prompts, temperature=0, task=TASK._replace(end_id=0))
    assert at_once.attempts == [[[0]] * 5] * 2


# --- what the trainer makes of them ---------------------------------------------------------------


def test_log_probabilities_and_divergences_are_those_of_loops_over_the_vocabulary():
    """With gradient to the policy alone, and nothing changed that was handed in."""
    gpt, base, prompts = short(model()), short(model(), boost=1.1), ragged(6)
    r = sample(gpt, prompts)
    before = copy.deepcopy(r)
    logp_BS, kl_BS = rollout.token_terms(gpt, base, r, 0.8)
    for b, row in enumerate(r.ids_BT.tolist()):
        for s in range(len(row) - 1):
            prefix = torch.tensor([row[: s + 1]])
            p, q = (torch.softmax(m(prefix)[0, -1] / 0.8, -1).tolist() for m in (gpt, base))
            kl = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
            own = r.turn_BS[b, s].item() > 0  # else of context
            assert abs(logp_BS[b, s].item() - own * math.log(p[row[s + 1]])) < 1e-9
            assert abs(kl_BS[b, s].item() - own * kl) < 1e-9
    (logp_BS.sum() + kl_BS.sum()).backward()
    assert all(weight.grad is None for weight in base.parameters())
    assert all(weight.grad is not None for weight in gpt.parameters())
    assert all(torch.equal(getattr(r, x), getattr(before, x)) for x in ("ids_BT", "turn_BS"))


# --- texts and rewards ----------------------------------------------------------------------------

SHARES = dict(size=4, slip=0.0, slip_hard=1.0, right_revisions=0.0, careless=0.0, checks=0.25)
TOY = rollout.signs(SimpleNamespace(**SHARES))
END_ID, REVISE, CHECK = range(12 * verify.LARGEST + 1, 12 * verify.LARGEST + 4)


def said(*attempts, end=True):
    """Return a rollout in which `1 1 =2` was answered so, by turn and row."""
    attempts = [[[*TOY.encode(x), *[TOY.end_id] * end] for x in column] for column in attempts]
    n = len(attempts[0])
    return rollout.make_rows([TOY.encode("1 1 =2")] * n, attempts, TOY.instruction, "cpu")


def test_the_toys_tokens_are_its_numbers_signed_numbers_and_targets():
    encoding = rollout.toy_encoding()
    assert isinstance(encoding, tiktoken.Encoding)
    numbers = range(1, verify.LARGEST + 1)
    words = [*(f"+{x}" for x in numbers), *(f"-{x}" for x in numbers), *(f"{x} " for x in numbers)]
    words += [f"={target}" for target in range(9 * verify.LARGEST + 1)]
    assert [TOY.encode(word) for word in words] == [[i] for i in range(len(words))]
    assert TOY.encode("3 2 =1+3-2") == sum(
        (TOY.encode(x) for x in ("3 ", "2 ", "=1", "+3", "-2")), []
    )
    assert (TOY.end_id, TOY.instruction, TOY.vocab_size) == (END_ID, [REVISE], CHECK + 1)
    assert encoding.decode([0, END_ID, REVISE, CHECK]) == "+1<|end|><|revise|><|check|>"
    assert TOY.decode([3, verify.LARGEST + 1]) == "+4-2" and TOY.max_new == len("1234") + 1
    assert TOY.encode("<|end|>") == []  # no text has a special token


@pytest.mark.parametrize("M", [4, 9])
def test_the_largest_problem_and_two_attempts_fit(M):
    toy = rollout.signs(SimpleNamespace(**SHARES | dict(size=M)))
    most = verify.LARGEST
    prompt = toy.encode(f"{most} " * M + f"={most * M}")
    assert len(prompt) == M + 1 and len(toy.encode(f"+{most}" * M)) == M == toy.max_new - 1
    assert toy.max_positions >= len(prompt) + 2 * toy.max_new + len(toy.instruction)
    problem = toy.draw(1, "dev", np.random.default_rng(0))[0]
    assert len(toy.encode(problem.prompt)) == M + 1 and len(toy.encode(problem.gold)) == M


@pytest.mark.parametrize("size", [3, 10])
def test_a_size_that_no_problem_has_is_refused(size):
    with pytest.raises(ValueError, match=f"--size must be 4 to 9 .*, got {size}"):
        rollout.signs(SimpleNamespace(**SHARES | dict(size=size)))


@pytest.mark.parametrize(("checks", "rights"), [(0.0, 0.0), (0.25, 0.0), (0.25, 1.0), (1.0, 0.0)])
def test_the_bases_documents_are_drafts_and_revisions_in_tokens(checks, rights):
    """Asked to check, a revision is right; asked to revise, of the shares that the settings name:
    here a copy, or right. Drafts slip where it is hard alone, and there always."""
    toy = rollout.signs(SimpleNamespace(**SHARES | dict(checks=checks, right_revisions=rights)))
    prompts, attempts = toy.documents(80, np.random.default_rng(0))
    assert [len(x) for x in (prompts, *attempts)] == [80] * 3
    seen = []
    for prompt, draft, revision in zip(prompts, *attempts, strict=True):
        if asked := prompt[-1] == CHECK:
            assert revision == []
            prompt, draft, revision = prompt[:5], prompt[5:-1], draft
        *numbers, target = toy.decode(prompt).split(" ")
        assert len(numbers) == 4 and len(draft) == len(revision) == 5
        assert draft[-1] == revision[-1] == END_ID
        first, second = (toy.decode(x[:-1]) for x in (draft, revision))
        assert first[1::2] == second[1::2] == "".join(numbers)
        sums = [sum(verify.signed(text)) == int(target[1:]) for text in (first, second)]
        signed = list(verify.signed(first))
        assert not any(x < 0 and -x > abs(y) for y, x in zip(signed, signed[1:], strict=False))
        assert sums[1] if asked or rights else first == second
        seen.append((asked, *sums))
    assert sum(asked for asked, *_ in seen) == 80 * checks
    assert {False, True} == {right for _, right, _ in seen}


def test_an_empty_second_attempt_has_no_instruction():
    r = rollout.make_rows([[1], [2, 3]], [[[4], [5]], [[6], []]], [8, 9], "cpu")
    assert r.ids_BT.tolist() == [[1, 4, 8, 9, 6], [2, 3, 5, 0, 0]]
    assert r.turn_BS.tolist() == [[1, 0, 0, 2], [0, 1, 0, 0]]


def test_truncated_attempts_are_not_paid_and_those_without_a_verdict_are_not_a_number():
    """Attempts that are cut after signed numbers that are right. The last problem's gold answer
    cannot be read."""
    problems = [verify.Problem("1 1 =2", "+1+1")] * 3 + [verify.Problem("1 1 =2", "two")]
    for end in (True, False):
        r = said(["+1+1", "+1", "+1+1", "+1+1"], ["+1-1", "+1+1", "+2", "-1-1"], end=end)
        assert rollout.texts(r, 1, TOY)[:3] == ["+1+1", "+1", "+1+1"]
        found = rollout.grade(r, problems, TOY)
        assert found.dtype == torch.float32 and found[:, 3].isnan().all()
        assert found[:, :3].tolist() == ([[1, 0, 1], [0, 1, 0]] if end else [[0] * 3] * 2)


def test_the_same_attempt_at_the_same_problem_is_judged_once():
    """A program's verdict takes seconds; a cut attempt is another one."""
    seen = []

    def verifier(answer, gold):
        seen.append((answer, gold))
        return verify.Verdict(int(answer == gold), "")

    problems = [verify.Problem("1 1 =2", gold, verifier) for gold in ("+1+1", "+1+1", "+1")]
    r = said(["+1+1"] * 3, ["+1", "+1+1", "+1"])
    assert rollout.grade(r, problems, TOY).tolist() == [[1, 1, 0], [0, 1, 1]]
    assert sorted(seen) == [("+1", "+1"), ("+1", "+1+1"), ("+1+1", "+1"), ("+1+1", "+1+1")]


def test_what_is_logged_is_counted_on_the_rows():
    r = said(["+1+1", "+1", "+2", "+4-4"], ["+3", "+2", "+2", "+4-4"])
    r.attempts[0][0] = r.attempts[0][0][:-1]  # cut
    r.logp_BS = torch.where(r.turn_BS == 1, -0.25, -0.5)  # also where nothing was written
    reward = torch.tensor([[1.0, 0, 1, torch.nan], [0, 1, 1, 0]])
    assert rollout.summary(r, reward, TOY) == pytest.approx(dict(
        acc_t1=2 / 3, acc_t2=2 / 4, delta=2 / 4 - 2 / 3, changed=2 / 4, truncated1=1 / 4,
        truncated2=0, entropy1=0.25, entropy2=0.5, unjudged=1 / 4))  # fmt: skip


@pytest.mark.parametrize("name", ["magic", "", "../score", "answers.py", "answers", "a b", "os"])
def test_a_task_that_is_no_module_of_tasks_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"--task must be signs or .*, got '{name}'"):
        rollout.find_task(name)
