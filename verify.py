"""Is an attempt right? The rewards of SCoRe, and the toy problems that they are measured on.

The paper's oracle reward r(y, y*) is 0 or 1, is used in training only, and is never shown to the
policy (arXiv 2409.12917v2, section 3). Here it is `arithmetic`: one strict integer, compared
exactly. Nothing that a model wrote is ever evaluated.

The toy is addition, `483510+516489=`, answered from the left in a fixed number of digits. Half of
the columns are made to sum to 9, so that a carry runs far: a small model that writes the leading
digit first must foresee every carry, but on a second attempt it finds the digits to the right
already on the page and can check each carry locally. That gap is what there is to learn.

    python -c "import verify; print(verify.arithmetic('0999999', '999999'))"

Dimension key: N problems, D digits (one column each, most significant first).
"""

import re
from typing import NamedTuple

import numpy as np

MAX_INTEGER_DIGITS = 100  # int() of a long string is quadratic: a bound before any conversion
MAX_OPERAND_DIGITS = 9  # both operands, side by side, are hashed as one 64-bit number
INTEGER = re.compile(r"-?[0-9]+")  # [0-9], as \d would accept digits of every script


# --- the verifier ---------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What a verifier says of one attempt.

    reward: 1 right, 0 not right, None if the gold answer is unreadable or the verifier failed.
    status: "right", "wrong", "unparsed" (reward 0) or "error" (reward None).
    detail: why, in words; empty where the status says it all.
    """

    reward: int | None
    status: str
    detail: str = ""


def integer(text: str) -> int | None:
    """Return the integer that `text` is, or None: ASCII digits with an optional minus, no more.

    Surrounding ASCII white space and leading zeros are allowed; signs of plus, separators, decimal
    points, other scripts' digits and more than MAX_INTEGER_DIGITS digits are not.

    >>> integer("0042"), integer("-7"), integer("1_000"), integer("4 2"), integer("٣")
    (42, -7, None, None, None)
    """
    text = text.strip(" \t\r\n")
    if len(text) > MAX_INTEGER_DIGITS or not INTEGER.fullmatch(text):
        return None
    return int(text)


def arithmetic(answer: str, gold: str, truncated: bool = False) -> Verdict:
    """Return the verdict on an integer answer. Pure; safe to call from threads.

    Args:
      answer: the whole attempt as text, without its end-of-turn token.
      gold: the right answer, an integer in text.
      truncated: the attempt ran into the length limit before it ended. It then earns 0 even if its
        digits are right, since a policy that never stops must not be paid.

    >>> arithmetic("0999999", "999999")
    Verdict(reward=1, status='right', detail='')
    >>> arithmetic("", "5")
    Verdict(reward=0, status='unparsed', detail='empty answer')
    """
    expected = integer(gold)
    if expected is None:
        return Verdict(None, "error", f"gold answer is not an integer: {gold[:50]!r}")
    if truncated:
        return Verdict(0, "unparsed", "truncated: no end of turn")
    if not answer.strip(" \t\r\n"):
        return Verdict(0, "unparsed", "empty answer")
    found = integer(answer)
    if found is None:
        return Verdict(0, "unparsed", f"not an integer: {answer[:50]!r}")
    return Verdict(1, "right") if found == expected else Verdict(0, "wrong")


# --- the problems ---------------------------------------------------------------------------------


class Problem(NamedTuple):
    """One problem as the policy sees it, and the answer that only the verifier sees."""

    prompt: str
    gold: str


def split_of(a_N: np.ndarray, b_N: np.ndarray, split_seed: int = 0) -> np.ndarray:
    """Return each problem's split, [N] of "test" (10 %), "dev" (10 %) or "train" (80 %).

    The split is a hash of the unordered pair, so that it needs no list of problems, never leaks
    a + b as b + a, and is the same whatever else is drawn.

    Args:
      a_N, b_N: operands, int64 in [0, 10**MAX_OPERAND_DIGITS).
      split_seed: another seed gives another partition.
    """
    low, high = np.minimum(a_N, b_N).astype(np.uint64), np.maximum(a_N, b_N).astype(np.uint64)
    x = high * np.uint64(10**MAX_OPERAND_DIGITS) + low
    x ^= np.uint64(split_seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    bucket = (x ^ (x >> np.uint64(31))) % np.uint64(10)
    return np.where(bucket == 0, "test", np.where(bucket == 1, "dev", "train"))


def operands(
    n: int, split: str, rng: np.random.Generator, digits: int, split_seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw n pairs of operands from one split: two int64 arrays [N].

    In each column the digits are uniform with probability 0.5, else they sum to 9, where a carry
    that comes in from the right goes out again on the left.

    Raises:
      ValueError: a value is out of range, or the split holds (almost) no problem of this size.
    """
    if not 1 <= digits <= MAX_OPERAND_DIGITS:
        raise ValueError(f"digits must be 1 to {MAX_OPERAND_DIGITS}, got {digits}")
    if split not in ("train", "dev", "test"):
        raise ValueError(f"split must be 'train', 'dev' or 'test', got {split!r}")
    powers_D = 10 ** np.arange(digits - 1, -1, -1)
    a_parts, b_parts, have = [], [], 0
    for _ in range(100):
        if have >= n:
            break
        size = 2 * (n - have) if split == "train" else 12 * (n - have)
        a_ND = rng.integers(0, 10, (size, digits))
        free_ND = rng.integers(0, 10, (size, digits))
        b_ND = np.where(rng.random((size, digits)) < 0.5, 9 - a_ND, free_ND)
        a_N, b_N = a_ND @ powers_D, b_ND @ powers_D
        keep_N = split_of(a_N, b_N, split_seed) == split
        a_parts.append(a_N[keep_N])
        b_parts.append(b_N[keep_N])
        have += int(keep_N.sum())
    if have < n:
        raise ValueError(f"found only {have} of {n} problems of {digits} digits in split {split!r}")
    return np.concatenate(a_parts)[:n], np.concatenate(b_parts)[:n]


def problems(
    n: int, split: str, rng: np.random.Generator, digits: int, split_seed: int = 0
) -> list[Problem]:
    """Draw n problems from one split (with repetition, which is rare from 4 digits on).

    >>> problems(1, "train", np.random.default_rng(0), digits=3)
    [Problem(prompt='865+001=', gold='866')]
    """
    a_N, b_N = operands(n, split, rng, digits, split_seed)
    return [
        Problem(f"{a:0{digits}d}+{b:0{digits}d}=", str(a + b))
        for a, b in zip(a_N.tolist(), b_N.tolist(), strict=True)
    ]


# --- what the base model has read -----------------------------------------------------------------


def forgetful_sum(
    a_N: np.ndarray,
    b_N: np.ndarray,
    forget: float,
    lose: float,
    rng: np.random.Generator,
    digits: int,
) -> np.ndarray:
    """Add as a careless human does: [N, digits + 1] digits of a + b, most significant first.

    The carry out of a column that sums to 9 is wrong with probability `forget`, and from the third
    such column in a row on with probability `lose` (both 0 give the right sum). These are mistakes
    that a small model makes by itself; slips at random digits are not, and a base raised on them
    never learns to check its carries. A model that has read enough writes the likelier digit when
    greedy: with forget < 0.5 < lose it is right about where no carry runs through three columns,
    so that base's greedy accuracy is a property of these documents and not of its training.
    """
    carry_N, written_N, run_N = (np.zeros_like(a_N) for _ in range(3))
    columns = []
    for power in 10 ** np.arange(digits):
        pair_N = a_N // power % 10 + b_N // power % 10
        columns.append((pair_N + written_N) % 10)
        carry_N = (pair_N + carry_N) >= 10
        run_N = np.where(pair_N == 9, run_N + 1, 0)
        chance_N = np.where(run_N == 0, 0.0, np.where(run_N < 3, forget, lose))
        written_N = carry_N ^ (rng.random(len(a_N)) < chance_N)
    return np.stack([written_N.astype(np.int64), *reversed(columns)], axis=1)


def corpus(
    n: int,
    rng: np.random.Generator,
    digits: int,
    *,
    forget: float,
    lose: float,
    right_revision: float,
    copy: float,
    split_seed: int = 0,
) -> list[tuple[str, str, str]]:
    """Draw n documents (prompt, draft, revision) that teach the base model to draft and revise.

    It is to be mediocre at both, as the paper's base is: it sometimes repairs a wrong draft, which
    reinforcement learning can amplify, and sometimes spoils a right one.

    Args:
      forget, lose: of the drafts, each a `forgetful_sum`.
      right_revision, copy: probabilities of a right revision and of a copy of the draft; the
        remaining revisions are careless: the right sum with each digit off by one, either way,
        with probability 0.15.
    """
    a_N, b_N = operands(n, "train", rng, digits, split_seed)
    right_ND = forgetful_sum(a_N, b_N, 0.0, 0.0, rng, digits)
    draft_ND = forgetful_sum(a_N, b_N, forget, lose, rng, digits)
    step_ND = rng.choice([-1, 1], right_ND.shape) * (rng.random(right_ND.shape) < 0.15)
    kind_N1 = rng.random((n, 1))
    revision_ND = np.where(kind_N1 < right_revision + copy, draft_ND, (right_ND + step_ND) % 10)
    revision_ND = np.where(kind_N1 < right_revision, right_ND, revision_ND)
    rows = zip(a_N.tolist(), b_N.tolist(), draft_ND.tolist(), revision_ND.tolist(), strict=True)
    return [
        (f"{a:0{digits}d}+{b:0{digits}d}=", "".join(map(str, draft)), "".join(map(str, revision)))
        for a, b, draft, revision in rows
    ]
