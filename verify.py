"""Is an attempt right? The reward of SCoRe, and the toy problems that it is paid on.

The paper's reward r(y, y*) is 0 or 1; it pays in training, measures in evaluation, and is never
shown to the policy (arXiv 2409.12917v2, section 3). The toy's is `signs`: strict, and exact.
`math`, `program` and `load` are for other problems; they import from the folder tasks/ when they
are called. Nothing that a model wrote is ever run as code in this process.

The toy: put + or - before each number, so that they add up to the target. `4 2 6 1 3 =6` is solved
by `+4-2+6+1-3`. Signs are written from the left, so that a first attempt chooses each before it
sees where the others lead. Once they all stand on the page they can be added up, and how far the
sum misses the target says which to turn: turning +n to -n takes 2 n away. Finding is hard here and
checking is easy. That gap is what there is to learn.

    python -c "import verify; print(verify.signs('+4+2+6-1-3', '+4-2+6+1-3'))"

Dimension key: N problems, M numbers of each, C = 2**(M - 1) choices of signs.
"""

import itertools
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


def signed(text: str) -> list[int] | None:
    """Return the signed numbers that `text` is a row of, or None: of one digit each, no spaces.

    >>> signed("+4-2"), signed("4-2"), signed("+4 - 2"), signed("+42")
    ([4, -2], None, None, None)
    """
    row = re.fullmatch(r"(?:[+-][1-9]){1,99}", text.strip(" \t\r\n"))
    return [int(x) for x in re.findall("..", row[0])] if row else None


def signs(answer: str, gold: str) -> Verdict:
    """Return the verdict on a whole attempt: the gold answer's numbers, in its order, with signs
    that give the same sum. There may be several that do.

    >>> signs("+3-1+1", "+3+1-1").reward, signs("+3+1-1=3", "+3+1-1").status
    (1, 'unparsed')
    """
    found, expected = signed(answer), signed(gold)
    if expected is None:
        return Verdict(None, "error", f"gold answer is not a row of signed numbers: {gold[:50]!r}")
    if found is None:
        return Verdict(0, "unparsed", f"not a row of signed numbers: {answer[:50]!r}")
    if [abs(x) for x in found] != [abs(x) for x in expected]:
        return Verdict(0, "wrong", "other numbers than the problem's")
    return Verdict(1, "right") if sum(found) == sum(expected) else Verdict(0, "wrong")


def math(answer: str, gold: str, timeout: float = 2.0) -> Verdict:
    r"""Return the verdict on an answer in LaTeX: in its last \boxed{}, after closing words or bare.

    timeout: seconds that sympy may take to prove two expressions equal. What counts as equal is
    decided in a table in tasks/README.md; nothing is searched for in prose.
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
    verifier: Callable[[str, str], Verdict] = signs


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

LARGEST = 6  # the numbers of a problem are 1 to LARGEST


def split_of(key_N: np.ndarray) -> np.ndarray:
    """Return each problem's split, [N] of "test" (10 %), "dev" (10 %) or "train" (80 %).

    A hash (splitmix64's mixer) of its key, a non-negative integer: no list is needed.
    """
    x_N = key_N.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x_N = (x_N ^ (x_N >> np.uint64(shift))) * np.uint64(factor)
    bucket_N = (x_N ^ (x_N >> np.uint64(31))) % np.uint64(10)
    return np.where(bucket_N == 0, "test", np.where(bucket_N == 1, "dev", "train"))


def draw(n: int, split: str, rng: np.random.Generator, M: int):
    """Draw n problems of one split. Return their numbers [N, M]; targets [N], each the sum that a
    random choice of signs gives, kept if not negative; all choices of signs [C, M], 1 or -1, the
    first always 1; and which of them solve which problem [N, C].

    The same numbers in another order, with the same target, are always in the same split.
    """
    if not 2 <= M <= 9 or split not in ("train", "dev", "test"):
        raise ValueError(f"2 to 9 numbers of split train, dev or test, got {M} of {split!r}")
    sign_CM = np.array([(1, *signs) for signs in itertools.product((1, -1), repeat=M - 1)])
    x_NM, target_N = np.zeros((0, M), int), np.zeros(0, int)
    while len(x_NM) < n:
        more_NM = rng.integers(1, LARGEST + 1, ((2 if split == "train" else 20) * n, M))
        more_N = (more_NM * rng.choice(sign_CM, len(more_NM))).sum(axis=1)
        key_N = np.sort(more_NM) @ 10 ** np.arange(M) * 100 + more_N
        kept_N = (more_N >= 0) & (split_of(key_N) == split)
        x_NM, target_N = np.r_[x_NM, more_NM[kept_N]], np.r_[target_N, more_N[kept_N]]
    x_NM, target_N = x_NM[:n], target_N[:n]
    return x_NM, target_N, sign_CM, x_NM @ sign_CM.T == target_N[:, None]


def written(x_NM, target_N, *signs_NM) -> list[tuple[str, ...]]:
    """Return each problem's text, and its numbers as the given choices [N, M] sign them."""
    rows = np.c_[x_NM, target_N].tolist()
    asked = [("%d " * (len(row) - 1) + "=%d") % tuple(row) for row in rows]
    answers = [[("%+d" * len(row)) % tuple(row) for row in (x_NM * s).tolist()] for s in signs_NM]
    return list(zip(asked, *answers, strict=True))


def problems(n: int, split: str, rng: np.random.Generator, M: int) -> list[Problem]:
    """Draw n problems of one split, no two the same.

    Raises:
      ValueError: M or split out of range, or the split has fewer problems of M numbers.

    >>> problems(1, "train", np.random.default_rng(0), M=5)[0][:2]
    ('6 4 4 2 2 =6', '+6+4-4+2-2')
    """
    found: dict[str, str] = {}
    for _ in range(100):
        x_NM, target_N, sign_CM, solves_NC = draw(n, split, rng, M)
        found |= written(x_NM, target_N, sign_CM[solves_NC.argmax(axis=1)])
        if len(found) >= n:
            return [Problem(*pair) for pair in list(found.items())[:n]]
    raise ValueError(f"{split!r} has {len(found)} problems of {M} numbers, not {n}: --eval-n")


# --- the toy: what the base model has read --------------------------------------------------------


def corpus(
    n: int, rng: np.random.Generator, M: int, slip: float, slip_hard: float, rights: float,
    careless: float,
) -> list[tuple[str, str, str]]:  # fmt: skip
    """Draw n documents (prompt, draft, revision) that teach the base model to draft and revise.

    A draft is hasty: it adds while not beyond the target, else takes away, and looks ahead only
    when two numbers are left. Each sign but the first slips, is turned, with probability `slip`; a
    minus before a number larger than its left neighbour, with `slip_hard`: people like to take the
    smaller from the larger. If slip < 0.5 < slip_hard, greedy decoding writes no such minus.

    rights, careless: probabilities of a right revision, which turns as few signs of the draft as
    can be (none if it is right), and of a careless one, which turns each but the first with
    probability 0.15; the other revisions are copies of the draft.
    """
    x_NM, target_N, sign_CM, solves_NC = draw(n, "train", rng, M)
    draft_NM, left_N = np.ones((n, M), int), target_N - x_NM[:, 0]  # left: up to the target
    for i, (before_N, x_N) in enumerate(zip(x_NM.T, x_NM.T[1:], strict=False), start=1):
        adds_N = left_N >= 0
        if i == M - 2:
            adds_N = abs(abs(left_N - x_N) - x_NM[:, -1]) <= abs(abs(left_N + x_N) - x_NM[:, -1])
        slip_N = np.where(~adds_N & (x_N > before_N), slip_hard, slip)
        draft_NM[:, i] = np.where(adds_N ^ (rng.random(n) < slip_N), 1, -1)
        left_N = left_N - draft_NM[:, i] * x_N
    turns_NC = (draft_NM[:, None] != sign_CM).sum(axis=2)
    right_NM = sign_CM[np.where(solves_NC, turns_NC, M + 1).argmin(axis=1)]
    turned_NM = (rng.random((n, M)) < 0.15) & (np.arange(M) > 0)
    kind_N1 = rng.random((n, 1))
    revision_NM = np.where(turned_NM & (kind_N1 < rights + careless), -draft_NM, draft_NM)
    revision_NM = np.where(kind_N1 < rights, right_NM, revision_NM)
    return written(x_NM, target_N, draft_NM, revision_NM)
