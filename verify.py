"""Is an attempt right? The reward of SCoRe, and the toy problems that it is paid on.

The paper's reward r(y, y*) is 0 or 1; it pays in training, measures in evaluation, and is never
shown to the policy (arXiv 2409.12917v2, section 3). The toy's is `arithmetic`: one strict integer,
compared exactly. `math`, `program` and `load` are for other problems; they import from the folder
tasks/ when they are called. Nothing that a model wrote is ever run as code in this process.

The toy is addition, `4835160+5164839=`, answered from the left in a fixed number of digits. Half of
the columns are made to sum to 9, so that a carry runs far: a small model that writes the leading
digit first must foresee every carry, but on a second attempt it finds the digits to the right
already on the page and can check each carry locally. That gap is what there is to learn.

    python -c "import verify; print(verify.arithmetic('0999999', '999999'))"

Dimension key: N problems, D digits (one column each, most significant first).
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# --- verifiers ------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What a verifier says of one attempt.

    reward: 1 right, 0 not right, None if the gold answer is unreadable or the verifier failed.
    status: "right", "wrong", "unparsed", "timeout" (reward 0) or "error" (reward None).
    """

    reward: int | None
    status: str
    detail: str = ""


def integer(text: str) -> int | None:
    """Return the integer that `text` is, or None: ASCII digits with an optional minus, no more.

    >>> integer("0042"), integer("-7"), integer("1_000"), integer("4 2"), integer("٣")
    (42, -7, None, None, None)
    """
    text = text.strip(" \t\r\n")
    return int(text) if len(text) <= 100 and re.fullmatch(r"-?[0-9]+", text) else None


def arithmetic(answer: str, gold: str) -> Verdict:
    """Return the verdict on a whole attempt as text: one integer, equal to the gold one.

    >>> arithmetic("0999999", "999999").reward, arithmetic("It is 5", "5").status
    (1, 'unparsed')
    """
    found, expected = integer(answer), integer(gold)
    if expected is None:
        return Verdict(None, "error", f"gold answer is not an integer: {gold[:50]!r}")
    if found is None:
        return Verdict(0, "unparsed", f"not an integer: {answer[:50]!r}")
    return Verdict(1, "right") if found == expected else Verdict(0, "wrong")


def math(answer: str, gold: str, timeout: float = 2.0) -> Verdict:
    r"""Return the verdict on an answer in LaTeX: its last \boxed{}, or a bare formula.

    timeout: seconds that sympy may take to prove two expressions equal. What counts as equal is
    decided in a table in tasks/answers.py; nothing is searched for in prose.
    """
    from tasks import answers

    return Verdict(*answers.judge(answer, gold, timeout))


def program(source: str, tests: str, timeout: float = 3.0, entry_point=None, prompt="") -> Verdict:
    """Return the verdict on a Python program, run in a process that has never held the tests.

    entry_point, prompt: of HumanEval: the function that the tests call, and the trusted code that
    comes before it. tasks/README.md says against what the process is guarded and against what not.
    """
    from tasks import programs

    return Verdict(*programs.judge(source, tests, timeout, entry_point, prompt))


class Problem(NamedTuple):
    """One problem as the policy sees it, and what only the verifier sees.

    verifier: called with an attempt's text and the gold answer (for a program its tests).
    """

    prompt: str
    gold: str
    verifier: Callable[[str, str], Verdict] = arithmetic


def judge(problem: Problem, answer: str, truncated: bool) -> Verdict:
    """Return the verdict of the problem's verifier. An attempt that ran into the length limit earns
    0 even if it is right so far: a policy that never stops must not be paid."""
    verdict = problem.verifier(answer, problem.gold)
    return Verdict(0, "unparsed", "no end of turn") if truncated and verdict.reward else verdict


def load(path) -> list[Problem]:
    """Return the problems in a local file with rows of MATH, GSM8K, MBPP or HumanEval."""
    from tasks import files

    return [problem for problem, _ in files.read(path)]


# --- the toy: problems ----------------------------------------------------------------------------


def split_of(a_N: np.ndarray, b_N: np.ndarray) -> np.ndarray:
    """Return each problem's split, [N] of "test" (10 %), "dev" (10 %) or "train" (80 %).

    A hash (splitmix64) of the unordered pair: it needs no list of problems, and a + b never leaks
    as b + a. Operands: int64 in [0, 10**9).
    """
    low, high = np.minimum(a_N, b_N).astype(np.uint64), np.maximum(a_N, b_N).astype(np.uint64)
    x_N = high * np.uint64(10**9) + low
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x_N = (x_N ^ (x_N >> np.uint64(shift))) * np.uint64(factor)
    bucket_N = (x_N ^ (x_N >> np.uint64(31))) % np.uint64(10)
    return np.where(bucket_N == 0, "test", np.where(bucket_N == 1, "dev", "train"))


def operands(n: int, split: str, rng: np.random.Generator, digits: int):
    """Draw n pairs of operands from one split: two int64 arrays [N].

    In each column the digits are uniform with probability 0.5, else they sum to 9, where a carry
    that comes in from the right goes out again on the left.

    Raises:
      ValueError: digits or split out of range, or the split has (almost) no problem of this size.
    """
    if not 1 <= digits <= 9 or split not in ("train", "dev", "test"):
        raise ValueError(f"1 to 9 digits of split train, dev or test, got {digits} of {split!r}")
    powers_D, found = 10 ** np.arange(digits - 1, -1, -1), np.zeros((2, 0), dtype=np.int64)
    for _ in range(100):
        size = (2 if split == "train" else 12) * (n - found.shape[1])
        a_ND = rng.integers(0, 10, (size, digits))
        free_ND = rng.integers(0, 10, (size, digits))
        b_ND = np.where(rng.random((size, digits)) < 0.5, 9 - a_ND, free_ND)
        pair_2N = np.stack([a_ND @ powers_D, b_ND @ powers_D])
        found = np.concatenate([found, pair_2N[:, split_of(*pair_2N) == split]], axis=1)
        if found.shape[1] >= n:
            return found[:, :n]
    raise ValueError(f"found only {found.shape[1]} of {n} problems of {digits} digits in {split!r}")


def problems(n: int, split: str, rng: np.random.Generator, digits: int) -> list[Problem]:
    """Draw n problems from one split (with repetition, which is rare from 4 digits on).

    >>> problems(1, "train", np.random.default_rng(0), digits=3)[0][:2]
    ('865+001=', '866')
    """
    pairs = operands(n, split, rng, digits).T.tolist()
    return [Problem(f"{a:0{digits}d}+{b:0{digits}d}=", str(a + b)) for a, b in pairs]


# --- the toy: what the base model has read --------------------------------------------------------


def careless_sum(a_N, b_N, slip: float, slip_hard: float, rng: np.random.Generator, digits: int):
    """Add as a careless human does: [N, digits + 1] digits of a + b, most significant first.

    The carry out of a column that sums to 9 is wrong with probability `slip`, and from the third
    such column in a row on with probability `slip_hard` (both 0 give the right sum). A small model
    makes such mistakes by itself; a base raised on wrong digits at random places would never learn
    to check its carries. With slip < 0.5 < slip_hard a trained base is greedily right where no
    three columns in a row sum to 9, however long its training.
    """
    carry_N, written_N, run_N = (np.zeros_like(a_N) for _ in range(3))
    columns = []
    for power in 10 ** np.arange(digits):
        pair_N = a_N // power % 10 + b_N // power % 10
        columns.append((pair_N + written_N) % 10)
        carry_N = (pair_N + carry_N) >= 10
        run_N = np.where(pair_N == 9, run_N + 1, 0)
        chance_N = np.where(run_N == 0, 0.0, np.where(run_N < 3, slip, slip_hard))
        written_N = carry_N ^ (rng.random(len(a_N)) < chance_N)
    return np.stack([written_N.astype(np.int64), *reversed(columns)], axis=1)


def corpus(
    n: int, rng: np.random.Generator, digits: int,
    slip: float, slip_hard: float, rights: float, copies: float,
) -> list[tuple[str, str, str]]:  # fmt: skip
    """Draw n documents (prompt, draft, revision) that teach the base model to draft and revise.

    It is to be mediocre at both, as the paper's base is: it sometimes repairs a wrong draft, which
    reinforcement learning can amplify, and sometimes spoils a right one.

    Args:
      slip, slip_hard: of the drafts, each a `careless_sum`.
      rights, copies: probabilities of a right revision and of a copy of the draft; the other
        revisions are careless: the right sum, each digit off by one with probability 0.15.
    """
    a_N, b_N = operands(n, "train", rng, digits)
    right_ND = careless_sum(a_N, b_N, 0.0, 0.0, rng, digits)
    draft_ND = careless_sum(a_N, b_N, slip, slip_hard, rng, digits)
    step_ND = rng.choice([-1, 1], right_ND.shape) * (rng.random(right_ND.shape) < 0.15)
    kind_N1 = rng.random((n, 1))
    revision_ND = np.where(kind_N1 < rights + copies, draft_ND, (right_ND + step_ND) % 10)
    revision_ND = np.where(kind_N1 < rights, right_ND, revision_ND)
    return [
        (f"{a:0{digits}d}+{b:0{digits}d}=", "".join(map(str, draft)), "".join(map(str, revision)))
        for a, b, draft, revision in zip(a_N, b_N, draft_ND, revision_ND, strict=True)
    ]
