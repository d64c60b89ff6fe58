"""The sampler draws from the law that the trainer scores, and keeps every token it drew."""

import copy

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import model

import chat
import rollout
from model import Cache

END, INSTRUCTION = 4, [7, 9, 7]


def sample(gpt, prompts, seed=0, **changes):
    law = dict(max_new=4, end_id=END, generator=torch.Generator().manual_seed(seed)) | changes
    return rollout.rollout(gpt, prompts, INSTRUCTION, **law)


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


def parse(r, prompts):
    """Cut each row into x1 y1 p1 y2 by the masks, checking them against a walk along the row."""
    out = []
    for b, prompt in enumerate(prompts):
        row, length = r.ids_BT[b].tolist(), int(r.length_B[b])
        assert row[: len(prompt)] == prompt
        at, attempts = len(prompt), []
        for turn in (1, 2):
            inside = [s + 1 for s in range(len(row) - 1) if r.turn_BS[b, s] == turn]
            assert inside == list(range(at, at + len(inside))) and inside
            attempts.append(row[at : at + len(inside)])
            at += len(inside)
            if turn == 1:
                assert row[at : at + 3] == INSTRUCTION
                at += 3
        assert at == length
        assert row[length:] == [0] * (len(row) - length)
        out.append(attempts)
    return out


@settings(max_examples=25)
@given(st.integers(1, 7), st.integers(0, 99))
def test_a_rollout_is_prompt_attempt_instruction_attempt_without_gaps(n, seed):
    """Masks equal a walk: up to and including the first end of turn, or to the limit."""
    prompts = ragged(n, seed)
    r = sample(short(model()), prompts, seed)
    for b, attempts in enumerate(parse(r, prompts)):
        for attempt, cut in zip(attempts, r.truncated_BK[b], strict=True):
            ended = END in attempt
            assert bool(cut) == (not ended)
            assert len(attempt) == (attempt.index(END) + 1 if ended else 4)
    assert not (r.mask1_BS & r.mask2_BS).any()
    assert (r.logp_BS[~(r.mask1_BS | r.mask2_BS)] == 0).all()
    assert not r.offline1_B.any()


def test_the_samples_above_cover_all_kinds_of_row():
    prompts = ragged(200)
    r = sample(short(model()), prompts)
    lengths = {len(attempt) for pair in parse(r, prompts) for attempt in pair}
    assert lengths == {1, 2, 3, 4}
    assert 0.1 < r.truncated_BK[:, 0].float().mean() < 0.9


def test_attempts_may_all_be_cut_or_all_be_empty():
    """No token ends an attempt; or, with all logits equal, the likeliest token 0 always does."""
    gpt = short(model())
    never = sample(gpt, ragged(5), end_id=10_000)
    assert never.truncated_BK.shape == (5, 2) and never.truncated_BK.all()
    with torch.no_grad():
        gpt.head.weight.zero_()
    at_once = sample(gpt, ragged(5), end_id=0, temperature=0)
    assert [len(a) for pair in parse_with_end(at_once) for a in pair] == [1] * 10
    assert not at_once.truncated_BK.any()


def parse_with_end(r):
    return [
        [r.ids_BT[b, 1:][mask[b]].tolist() for mask in (r.mask1_BS, r.mask2_BS)]
        for b in range(len(r.ids_BT))
    ]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_sampler_and_trainer_agree_on_every_token(dtype, bound, temperature):
    gpt, prompts = short(model(dtype)), ragged(64)
    r = sample(gpt, prompts, temperature=temperature)
    scored = torch.log_softmax(gpt(r.ids_BT[:, :-1]) / temperature, -1)
    for b, s in (r.mask1_BS | r.mask2_BS).nonzero().tolist():
        assert abs(scored[b, s, r.ids_BT[b, s + 1]] - r.logp_BS[b, s]) <= bound


FIELDS = ("ids_BT", "length_B", "turn_BS", "logp_BS", "truncated_BK")


def assert_same(a, b, at=slice(None)):
    """Equal tokens and masks; log-probabilities to rounding, as sums may go another way."""
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name)[at], rtol=0, atol=1e-12)


@pytest.mark.parametrize("attempts", [2, 3])
@pytest.mark.parametrize("temperature", [5, 20])
def test_leaving_finished_rows_out_changes_nothing(temperature, attempts, monkeypatch):
    gpt, prompts, sizes = short(model(max_positions=90)), ragged(40), []
    take = Cache.take
    monkeypatch.setattr(Cache, "take", lambda c, row: sizes.append(len(row)) or take(c, row))
    law = dict(temperature=temperature, attempts=attempts, max_new=25)
    whole = sample(gpt, prompts, **law)
    assert not sizes
    assert_same(sample(gpt, prompts, compact=True, **law), whole)
    assert len(sizes) > attempts and min(sizes) < 10  # it was done, more than once a turn


def test_a_prompt_read_once_for_its_group_changes_nothing():
    gpt, other, prompts = short(model()), short(model(), 1.2), ragged(6)
    offline = torch.arange(18) % 2 == 0
    for more in ({}, dict(author1=other, offline1_B=offline)):
        one = sample(gpt, [x for x in prompts for _ in range(3)], temperature=1.3, **more)
        assert len({tuple(row) for row in one.ids_BT[:3].tolist()}) > 1  # rows are independent
        assert_same(sample(gpt, prompts, group=3, temperature=1.3, **more), one)


def test_processes_sample_their_shares_of_one_and_the_same_rollout():
    gpt, prompts = short(model()), ragged(12)
    whole, seen = sample(gpt, prompts, temperature=1.3), 0
    for i in range(3):
        at = slice(4 * i, 4 * i + 4)
        share = sample(gpt, prompts[at], temperature=1.3, share=(i, 3))
        assert_same(share, whole.rows(at))
        seen += len(share.ids_BT)
    assert seen == 12


def test_sampled_tokens_follow_the_softmax():
    """Chi-squared statistics of 40,000 first tokens and of second tokens given the first.

    Each sums over 10 degrees of freedom; a right sampler exceeds 42 in one of the two with
    probability below 2e-5, and the seed is fixed.
    """
    gpt, n = short(model(), boost=1.0), 40_000
    with torch.no_grad():
        gpt.norm.weight.mul_(3)
    cache = Cache(gpt, n, 4)
    chunk = torch.tensor([[3, 8]]).expand(n, -1)
    law = dict(end_id=END, generator=torch.Generator().manual_seed(0), temperature=1.3)
    state = rollout.read(gpt, cache, chunk, torch.full((n,), 2))
    turn = rollout.sample_turn(gpt, cache, state, max_new=2, **law)
    first = turn.ids_BN[:, 0]
    common = first[first != END].mode().values
    second = turn.ids_BN[first == common, 1]
    for tokens, prefix in ((first, [3, 8]), (second, [3, 8, int(common)])):
        p = torch.softmax(gpt(torch.tensor([prefix]))[0, -1] / 1.3, -1)
        expected, counts = p * len(tokens), torch.bincount(tokens, minlength=11)
        assert ((counts - expected) ** 2 / expected).sum() < 42
        assert p.max() / p.min() > 2  # the law is far enough from uniform to notice


def test_greedy_takes_the_likeliest_token_of_the_uncached_model():
    gpt, prompts = short(model()), ragged(20)
    r = sample(gpt, prompts, temperature=0, generator=None)
    parse(r, prompts)
    best = gpt(r.ids_BT).argmax(-1)[:, :-1]
    mask = r.mask1_BS | r.mask2_BS
    assert torch.equal(best[mask], r.ids_BT[:, 1:][mask])
    assert (r.logp_BS == 0).all()


def test_a_turns_log_probabilities_are_0_beyond_its_end():
    """Whether finished rows are left out or go on unseen."""
    gpt, prompts = short(model()), rollout.pad(ragged(99), "cpu")
    for compact in (False, True):
        cache = Cache(gpt, 99, 9)
        turn = rollout.sample_turn(
            gpt, cache, rollout.read(gpt, cache, *prompts), max_new=4, end_id=END,
            generator=torch.Generator().manual_seed(0), compact=compact,
        )  # fmt: skip
        lengths = set(turn.n_B.tolist())
        assert lengths == {1, 2, 3, 4}
        for row, n in zip(turn.logp_BN.tolist(), turn.n_B.tolist(), strict=True):
            assert all(x < 0 for x in row[:n]) and not any(row[n:])


def test_the_generator_is_the_only_randomness():
    gpt, prompts = short(model()), ragged(9)
    torch.manual_seed(1)
    a = sample(gpt, prompts)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    b = sample(gpt, prompts)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a.ids_BT, b.ids_BT)
    assert not torch.equal(a.ids_BT, sample(gpt, prompts, seed=1).ids_BT)


def test_the_second_turn_depends_on_nothing_but_its_own_row():
    """Greedy attempts of a row are the same alone and among rows of other lengths."""
    gpt, prompts = short(model()), ragged(12)
    together = parse_with_end(sample(gpt, prompts, temperature=0))
    alone = [parse_with_end(sample(gpt, [p], temperature=0))[0] for p in prompts]
    assert together == alone


def test_offline_first_attempts_are_another_models_and_are_continued():
    """Greedy, so that each author's attempt is known: marked rows start with the other model's."""
    gpt, other, prompts = short(model()), short(model()), ragged(12)
    with torch.no_grad():
        other.head.weight.copy_(other.head.weight.roll(3, 0))
    offline = torch.arange(12) % 3 == 0
    r = sample(gpt, prompts, temperature=0, author1=other, offline1_B=offline)
    mine, theirs = (parse_with_end(sample(m, prompts, temperature=0)) for m in (gpt, other))
    found = parse(r, prompts)
    assert torch.equal(r.offline1_B, offline)
    assert sum(a[0] != b[0] for a, b in zip(mine, theirs, strict=True)) > 6
    best = gpt(r.ids_BT).argmax(-1)[:, :-1]
    for b in range(12):
        assert found[b][0] == (theirs if offline[b] else mine)[b][0]
    assert torch.equal(best[r.mask2_BS], r.ids_BT[:, 1:][r.mask2_BS])


def test_offline_rows_keep_the_cache_law():
    gpt, other, prompts = short(model()), short(model(), 1.2), ragged(40)
    offline = torch.arange(40) < 20
    r = sample(gpt, prompts, author1=other, offline1_B=offline)
    for author, rows in ((other, offline), (gpt, ~offline)):
        logp = torch.log_softmax(author(r.ids_BT[:, :-1]), -1)
        logp = logp.gather(-1, r.ids_BT[:, 1:, None])[..., 0]
        own = r.mask1_BS & rows[:, None]
        torch.testing.assert_close(logp[own], r.logp_BS[own], rtol=0, atol=1e-12)
        if author is gpt:
            torch.testing.assert_close(logp[r.mask2_BS], r.logp_BS[r.mask2_BS], rtol=0, atol=1e-12)


@given(st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=8), st.floats(0.2, 3),
       st.integers(0, 4), st.floats(0.05, 1))  # fmt: skip
def test_token_law_keeps_the_likeliest_and_renormalises(logits, temperature, top_k, top_p):
    p = torch.softmax(torch.tensor(logits).double() / temperature, -1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept, total = [], 0.0
    for rank, i in enumerate(order):
        if (top_k and rank >= top_k) or total >= top_p - 1e-9:
            break
        kept.append(i)
        total += p[i]
    law = rollout.token_law(torch.tensor([logits]).double(), temperature, top_k, top_p)[0].exp()
    if abs(sum(p[i] for i in kept) - top_p) < 1e-6:
        return  # at the very edge of top_p rounding decides
    expected = [p[i] / total if i in kept else 0.0 for i in range(len(p))]
    # tokens of equal probability may be kept in either order
    assert sorted(law.tolist()) == pytest.approx(sorted(expected), abs=1e-9)


def test_the_law_of_half_precision_logits_is_computed_in_float32():
    assert rollout.token_law(torch.zeros(1, 3, dtype=torch.bfloat16), 1.0).dtype == torch.float32


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(1, 5)), min_size=1,
                max_size=5))  # fmt: skip
def test_join_leaves_no_gap(lengths):
    parts, rows = [], [[] for _ in lengths]
    for piece in range(3):
        n = [row[piece] for row in lengths]
        values = torch.arange(len(n) * (max(n) + 1)).view(len(n), -1) + 100 * piece + 1
        parts.append((values, torch.tensor(n)))
        for b, k in enumerate(n):
            rows[b] += values[b, :k].tolist()
    width = max(map(len, rows))
    expected = [row + [0] * (width - len(row)) for row in rows]
    assert rollout.join(parts, torch.long).tolist() == expected


def test_pad():
    ids, n = rollout.pad([[5], [6, 7, 8], [9, 1]], torch.device("cpu"))
    assert ids.tolist() == [[5, 0, 0], [6, 7, 8], [9, 1, 0]]
    assert n.tolist() == [1, 3, 2]


def test_rows_of_a_rollout_are_its_rows():
    prompts = ragged(30)
    r = sample(short(model()), prompts)
    part = r.rows(slice(7, 12))
    assert parse(part, prompts[7:12]) == parse(r, prompts)[7:12]
    assert part.ids_BT.shape[1] == int(r.length_B[7:12].max())
    assert torch.equal(part.truncated_BK, r.truncated_BK[7:12])


def test_the_toy_encoding_is_one_token_a_character_and_reversible():
    encoding = chat.toy_encoding()
    assert isinstance(encoding, tiktoken.Encoding)
    text = "0123456789+=" + chat.END + chat.REVISE
    ids = chat.encode(encoding, text)
    assert ids == list(range(14)) and encoding.n_vocab == 14
    assert encoding.decode(ids) == text


def test_attempts_are_read_back_without_their_end_of_turn():
    ids = torch.tensor([[1, 11, 4, 2, 12, 13, 7, 12], [1, 11, 4, 2, 3, 13, 12, 0]])
    turn = torch.tensor([[0, 1, 1, 1, 0, 2, 2], [0, 1, 1, 1, 0, 2, 0]])
    cut = torch.tensor([[False, False], [True, False]])
    r = rollout.Rollout(ids, torch.tensor([8, 7]), turn, torch.zeros(2, 7), cut, cut[:, 1])
    assert rollout.written(r, 1) == [[4, 2, 12], [4, 2, 3]]
    toy = chat.format_of("addition")
    assert rollout.texts(r, 1, toy) == ["42", "423"] and rollout.texts(r, 2, toy) == ["7", ""]


@settings(max_examples=10)
@given(st.integers(1, 5), st.integers(0, 99))
def test_further_attempts_are_further_turns(n, seed):
    """Five attempts in one row, each after an instruction, scored as sampled; the first two are
    those of a rollout of two."""
    gpt, prompts = short(model(max_positions=64)), ragged(n, seed)
    r = sample(gpt, prompts, seed, temperature=0, attempts=5)
    two = sample(gpt, prompts, seed, temperature=0)
    for turn in (1, 2):
        assert rollout.written(r, turn) == rollout.written(two, turn)
    for b, prompt in enumerate(prompts):
        row = list(prompt)
        for turn in range(1, 6):
            attempt = rollout.written(r, turn)[b]
            assert bool(r.truncated_BK[b, turn - 1]) == (END not in attempt)
            for token in attempt:
                assert gpt(torch.tensor([row])).argmax(-1)[0, -1] == token
                row.append(token)
            row += INSTRUCTION
        assert r.ids_BT[b, : r.length_B[b]].tolist() == row[:-3]
