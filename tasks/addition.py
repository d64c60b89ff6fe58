"""Does each carry arrive? A second toy: addition, `48351+51648=`, and an example of a task.

Answers are written from the left in a fixed number of digits. Half of the columns are made to sum
to 9, so that a carry runs far: the leading digit, which comes first, depends on every carry. On a
second attempt the digits to the right are already on the page, and each carry can be checked there:
a column that sums to 9 shows a 0 if it hands one on, and else a 9.

    python score.py --task addition
    python -c "from tasks import addition; print(addition.arithmetic('0999999', '999999'))"

Dimension key: N problems, D digits of an operand, A = D + 1 of an answer, from the left.
"""

import re

import numpy as np

from rollout import Task, to_read
from verify import Problem, Verdict, split_of

SETTINGS = dict(slip_hard=0.6, sft_steps=1000, batch=256)  # where score.py's defaults differ
TOKENS = [*"0123456789+=", "<|end|>", "<|revise|>", "<|check|>"]


def arithmetic(answer: str, gold: str) -> Verdict:
    """Return the verdict on a whole attempt: one integer, equal to the gold one: 1 to 99 ASCII
    digits, of which the first may be zeros, with an optional minus.

    >>> arithmetic("0999999", "999999").reward, arithmetic("It is 5", "5").status
    (1, 'unparsed')
    """
    found, expected = (re.fullmatch(r"-?[0-9]{1,99}", x.strip(" \t\r\n")) for x in (answer, gold))
    if expected is None:
        return Verdict(None, "error", f"gold answer is not an integer: {gold[:50]!r}")
    if found is None:
        return Verdict(0, "unparsed", f"not an integer: {answer[:50]!r}")
    return Verdict(1, "right") if int(found[0]) == int(expected[0]) else Verdict(0, "wrong")


def operands(n: int, split: str, rng: np.random.Generator, D: int, distinct=False) -> np.ndarray:
    """Draw n pairs of operands of one split [2, N], if `distinct` no two the same. In each column
    the digits are uniform with probability 0.5, else they sum to 9, where a carry that comes in
    from the right goes out again on the left. a + b and b + a are always in the same split.

    Raises:
      ValueError: D or split out of range, or the split has too few problems of D digits.
    """
    if not 1 <= D <= 9 or split not in ("train", "dev", "test"):
        raise ValueError(f"1 to 9 digits of split train, dev or test, got {D} of {split!r}")
    found_2N, size = np.zeros((2, 0), int), (2 if split == "train" else 12) * n
    for _ in range(100):
        a_ND, free_ND = rng.integers(0, 10, (2, size, D))
        b_ND = np.where(rng.random((size, D)) < 0.5, 9 - a_ND, free_ND)
        more_2N = np.stack([a_ND, b_ND]) @ 10 ** np.arange(D)
        kept_N = split_of(more_2N.max(axis=0) * 10**9 + more_2N.min(axis=0)) == split
        found_2N = np.concatenate([found_2N, more_2N[:, kept_N]], axis=1)
        if distinct:
            found_2N = found_2N[:, np.sort(np.unique(found_2N, axis=1, return_index=True)[1])]
        if found_2N.shape[1] >= n:
            return found_2N[:, :n]
    raise ValueError(f"{split!r} has {found_2N.shape[1]} problems of {D} digits, not {n}: --eval-n")


def careless_sum(a_N, b_N, slip: float, slip_hard: float, rng: np.random.Generator, D: int):
    """Return digits [N, A] of sums. Left of a run of columns that sum to 9, the carry that comes
    out of the run is wrong with probability `slip`, of a run of two or more with `slip_hard`. With
    slip < 0.5 < slip_hard a trained base is greedily right where there is no run of two."""
    carry_N, run_N, columns = *np.zeros((2, len(a_N)), int), []
    for power in 10 ** np.arange(D + 1):
        pair_N = a_N // power % 10 + b_N // power % 10
        chance_N = np.where(run_N < 2, slip, slip_hard) * ((run_N > 0) & (pair_N != 9))
        columns.append((pair_N + (carry_N ^ (rng.random(len(a_N)) < chance_N))) % 10)
        carry_N = pair_N + carry_N >= 10
        run_N = np.where(pair_N == 9, run_N + 1, 0)
    return np.stack(columns[::-1], axis=1)


def corpus(n: int, rng, D: int, slip, slip_hard, rights, careless) -> list[tuple[str, str, str]]:
    """Draw n documents (prompt, draft, revision); a draft is a `careless_sum`.

    rights, careless: probabilities of a right revision, and of a careless one, the right sum with
    each digit off by one with probability 0.15; the other revisions are copies of the draft.
    """
    a_N, b_N = operands(n, "train", rng, D)
    right_NA = careless_sum(a_N, b_N, 0.0, 0.0, rng, D)
    draft_NA = careless_sum(a_N, b_N, slip, slip_hard, rng, D)
    step_NA = rng.choice([-1, 1], right_NA.shape) * (rng.random(right_NA.shape) < 0.15)
    kind_N1 = rng.random((n, 1))
    revision_NA = np.where(kind_N1 < rights + careless, (right_NA + step_NA) % 10, draft_NA)
    revision_NA = np.where(kind_N1 < rights, right_NA, revision_NA)
    prompts = [f"{a:0{D}d}+{b:0{D}d}=" for a, b in zip(a_N, b_N, strict=True)]
    texts = (["".join(map(str, row)) for row in rows] for rows in (draft_NA, revision_NA))
    return list(zip(prompts, *texts, strict=True))


def task(c) -> Task:
    """Return the task; its documents are of the two kinds that those of `rollout.signs` are.

    c: the settings of score.py. Used are size, the digits of each operand, and those of the
    documents; a slip is a wrong carry.
    """
    if not 1 <= (D := c.size) <= 9:
        raise ValueError(f"--size must be 1 to 9 digits of an operand, got {D}")
    end_id, revise_id, check_id = range(len(TOKENS))[-3:]

    def encode(text):
        return [TOKENS.index(character) for character in text]

    def draw(n, split, rng):
        pairs = operands(n, split, rng, D, distinct=True).T.tolist()
        return [Problem(f"{a:0{D}d}+{b:0{D}d}=", str(a + b), arithmetic) for a, b in pairs]

    return Task(
        draw, to_read(c, corpus, encode, end_id, check_id), encode,
        decode=lambda ids: "".join(TOKENS[x] for x in ids),
        instruction=[revise_id], end_id=end_id, vocab_size=len(TOKENS), max_new=D + 2,
        max_positions=2 * D + 2 + 2 * (D + 3),
    )  # fmt: skip
