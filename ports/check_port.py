"""Does a port of SCoRe compute what this implementation computes? If not, where does it part first?

Standard library only. The golden vectors in ports/golden/ are the contract: each file but
weights.json is {about, cases: {case: {inputs, outputs}}}. A port reads the inputs, computes as many
of the outputs as it has (a loss alone takes `logits` and `ref_logits` from the outputs, where they
are no inputs), and writes them as {case: {quantity: values}}.

    python ports/check_port.py results.json
    python ports/check_port.py results.json --dtype float32

What it prints last is what to look at first: of the quantities that differ the first, in an order
in which each depends on those before it. If that one is off by no more than a coarser dtype rounds,
the first that is off by more follows. Status 0: all that is there agrees. 1: something differs. 2:
cannot be compared.
"""

import argparse
import difflib
import json
import math
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {  # by the kind of a quantity, as a share of its largest entry; None: not compared.
    # The finest dtype comes first.
    "float64": dict(exact=0, decoded=0, drawn=1e-9, reward=1e-9, scored=1e-9, weights=1e-9),
    "float32": dict(exact=0, decoded=0, drawn=2e-5, reward=1e-6, scored=2e-5, weights=5e-5),
    "bfloat16": dict(exact=0, decoded=None, drawn=None, reward=1e-6, scored=0.05, weights=0.2),
}

# --- the quantities -------------------------------------------------------------------------------


class Quantity(NamedTuple):
    """kind: which tolerance is its. cause: the usual one where it is the first that differs."""

    name: str
    kind: str
    what: str
    cause: str


def expand(row: Quantity) -> list[Quantity]:
    """Return the row, once for each stage and form of the KL that its name leaves open."""
    found = [row]
    for blank, names in (("FORM", ("exact", "k1")), ("STAGE", ("stage1", "stage2"))):
        filled = [(q, name) for q in found for name in (names if blank in q.name else [""])]
        found = [Quantity(*(x.replace(blank, name) for x in q)) for q, name in filled]
    return found


ROWS = (
    # what the rows are
    ("ids", "exact", "[B, T] prompt, attempt 1, instruction, attempt 2, then zeros",
     "prompts not repeated side by side; padding between the parts; tokens behind an attempt's end "
     "kept; text decoded and encoded again; in a port that samples, the temperature, or what else "
     "sampled1 and sampled2 depend on"),
    ("length", "exact", "[B] real tokens of each row",
     "padding or an end-of-turn token counted that is not there, or one missing"),
    ("turn", "exact", "[B, S] the attempt, 1 or 2, of token s + 1, whoever wrote it; 0: of none",
     "the end-of-turn token left out; the mask not shifted with the targets; the instruction in "
     "it; padding told by a token's id"),
    ("token_turn", "exact", "[B, S] as turn, but 0 where another model wrote attempt 1",
     "attempts that the base wrote (offline1) are taken for actions of the policy"),
    # what the models say of them
    ("logits", "scored", "[B, S, V] of the policy for token s + 1, 0 from the row's last token on",
     "weights laid out otherwise (weights.json, about); rotary pairs (k, k + K/2); cos and sin are "
     "rounded to float32 (about 1e-8); left padding; an attention mask"),
    ("ref_logits", "scored", "[B, S, V] of the base", "the base is the policy, or was trained"),
    ("logp", "scored", "[B, S] log-probability of token s + 1, 0 where turn is 0",
     "logits not divided by the temperature; targets shifted by one; log-softmax in bfloat16"),
    ("ref_logp", "scored", "[B, S] as logp, by the base",
     "the temperature is the policy's alone; the reference is the policy itself"),
    ("greedy1", "decoded", "each problem's first attempt at temperature 0, a list of ids each",
     "a key-value cache whose positions are off; padding that is seen"),
    ("greedy2", "decoded", "each problem's second attempt at temperature 0",
     "the first attempt's last token not read before the instruction; an end of turn put in"),
    ("sampled1", "decoded", "each row's first attempt, by noise[0][row][step]",
     "the temperature; the noise taken by step instead of by row; the base's rows (offline1)"),
    ("sampled2", "decoded", "each row's second attempt, likewise by noise[1]",
     "the first attempt's last token not read before the instruction; an end of turn put in"),
    ("sampled_logp", "drawn", "[B, S] as logp, as the token was drawn; 0 where token_turn is 0",
     "a key-value cache whose positions are off"),
    ("truncated", "decoded", "[B, 2] no end of turn within max_new tokens",
     "max_new counts the end of turn; told by the length alone"),
    # what they earn
    ("stage2_return1", "reward", "[B] what attempt 1 earns",
     "a bonus, or a share of attempt 2's return, is paid to attempt 1; it earns r1 alone"),
    ("STAGE_return2", "reward", "[B] what attempt 2 earns: r2, in Stage II r2 + alpha (r2 - r1)",
     "the bonus's sign, or none in Stage II, or one in Stage I"),
    ("stage2_baseline1", "reward", "[B] mean return 1 of the other G - 1 rows of the problem",
     "the row's own reward in its baseline; rows of a problem not side by side"),
    ("STAGE_baseline2", "reward", "[B] mean return 2 of the other G - 1 rows of the problem",
     "the row's own reward in its baseline; rows of a problem not side by side"),
    ("STAGE_advantage1", "reward", "[B] return 1 less its baseline; 0 in Stage I",
     "attempt 2's reward or bonus reaches attempt 1; turns swapped; divided by a deviation"),
    ("STAGE_advantage2", "reward", "[B] return 2 less its baseline",
     "turns swapped; divided by the group's standard deviation, which would erase alpha"),
    ("STAGE_token_advantage", "reward", "[B, S] the advantage of each token by its token_turn",
     "divided by the attempt's length; attempt 2's given to attempt 1's tokens; a mask that "
     "is late; attempts that the base wrote (offline1) given any"),
    # what holds them to the base
    ("kl_token_exact", "scored", "[B, S] KL(policy || base) over the vocabulary, 0 where turn is 0",
     "the order of its arguments; the temperature; mean over V"),
    ("kl_token_k1", "scored", "[B, S] logp - ref_logp, 0 where turn is 0",
     "the order of its arguments; k2 or k3 instead"),
    ("kl1_FORM", "scored", "[B] the sum of kl_token_FORM where token_turn is 1",
     "the wrong attempt's tokens, or both attempts'; k3 instead of k1; divided by the length"),
    ("kl2_FORM", "scored", "[B] the sum of kl_token_FORM where token_turn is 2",
     "the wrong attempt's tokens, or both attempts'; k3 instead of k1; divided by the length"),
    ("STAGE_token_kl_weight", "reward", "[B, S] by token_turn: beta1; in Stage I, 1: beta1 + beta2",
     "beta1 left out where beta2 is; attempts that the base wrote (offline1) given any"),
    # what is learned from it
    ("STAGE_FORM_loss", "scored", "[B] each row's sum of weighted KLs: not your loss's value",
     "advantage times log-probability is in the value, where it is in the gradient alone"),
    ("STAGE_FORM_gradient", "scored", "[B, S, V] of the mean over rows, by the policy's logits",
     "the KL is detached, or without its future term (a token also decides what comes later); k1, "
     "k2 or k3 differentiated; 1 / temperature; sum, or mean over tokens, not mean over rows"),
    ("STAGE_FORM_grad_norm", "weights", "the norm of its gradient by all weights",
     "the gradient by the logits agrees: the model's backward pass; or it was clipped"),
    ("STAGE_FORM_grad_norms", "weights", "{weight, as in weights.json: norm}",
     "one weight's backward pass"),
    ("STAGE_FORM_grad_entries", "weights", "{weight: [its first entry, its last]}",
     "transposed, or heads in another order; in bfloat16 the KL's gradient"),
    # whether it helped
    *((name, "reward", what, "rates are of all problems, repair and spoil rate of the wrong and "
       "the right first attempts") for name, what in (
        ("n", "problems"), ("acc_t1", "share right at attempt 1"),
        ("acc_t2", "share right at attempt 2"), ("delta", "acc_t2 - acc_t1"),
        ("delta_i_to_c", "share of all that went from wrong to right"),
        ("delta_c_to_i", "share of all that went from right to wrong"),
        ("repair_rate", "share repaired of the wrong first attempts, null if none"),
        ("spoil_rate", "share spoilt of the right first attempts, null if none"))),
    *((f"{name}_interval", "reward", "[low, high], 95 % Wilson", "Wilson's, not Wald's; z 1.96")
      for name in ("acc_t1", "acc_t2", "delta_i_to_c", "delta_c_to_i", "repair_rate",
                   "spoil_rate")),
    ("delta_interval", "reward", "[low, high], 95 % paired bootstrap over problems",
     "both attempts of a problem are drawn together"),
)  # fmt: skip
ORDER = {q.name: q for row in ROWS for q in expand(Quantity(*row))}

# --- comparing ------------------------------------------------------------------------------------


def leaves(x, at: str = ""):
    """Yield the place of everything in nested lists and objects that is neither, and the thing."""
    if isinstance(x, (dict, list)):
        for key, y in x.items() if isinstance(x, dict) else enumerate(x):
            yield from leaves(y, f"{at}[{key}]")
    else:
        yield at, x


def shape(x) -> str:
    """Return the sizes of nested lists, `?` where rows differ; the names of an object."""
    if isinstance(x, dict):
        return "{" + ", ".join(x) + "}"
    sizes, level = [], [x]
    while level and all(isinstance(y, list) for y in level):
        lengths = {len(y) for y in level}
        sizes.append(str(lengths.pop()) if len(lengths) == 1 else "?")
        level = [z for y in level for z in y]
    return f"[{', '.join(sizes)}]" if sizes else "a number"


def apart(expected, got) -> float:
    """Return the distance of two numbers, infinite if only one is null or the second is none."""
    if expected is None or got is None:
        return 0.0 if expected is got else math.inf
    return abs(got - expected) if abs(got) < 1e300 else math.inf  # nan is not, either


class Verdict(NamedTuple):
    """error: the largest difference over the largest expected entry (over 1 if all are 0).
    where: its place, with what was expected and what came; of another shape, both shapes."""

    error: float
    where: str


def compare(name: str, expected, got) -> Verdict:
    """Return how far a quantity is from the expected.

    Raises:
      ValueError: it holds what is no number.
    """
    due, came = dict(leaves(expected)), dict(leaves(got))
    for at, x in came.items():
        if x is not None and not isinstance(x, (int, float)):
            raise ValueError(f"{name}{at} is {x!r}, which is no number")
    if due.keys() != came.keys():
        at = min(due.keys() ^ came.keys(), key=[*due, *came].index)
        which = "is missing" if at in due else "should not be there"
        return Verdict(
            math.inf, f"shape {shape(got)}, expected {shape(expected)}: {name}{at} {which}"
        )
    errors = {at: apart(x, came[at]) for at, x in due.items()}
    at = max(errors, key=errors.get)
    largest = max(abs(x or 0.0) for x in due.values()) or 1.0
    return Verdict(errors[at] / largest, f"{name}{at}: expected {due[at]}, got {came[at]}")


# --- files ----------------------------------------------------------------------------------------


def read(path: Path) -> dict:
    """Return the object in a JSON file; ValueError if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object, {{case: {{quantity: values}}}}, "
                         f"got {shape(found)}")  # fmt: skip
    return found


def contract() -> dict[str, dict]:
    """Return all cases of the golden files, by name."""
    files = [read(path) for path in sorted(GOLDEN.glob("*.json"))]
    return {name: case for file in files for name, case in file.get("cases", {}).items()}


def known(kind: str, name: str, names) -> None:
    """Raise ValueError if a name is none of those there are."""
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        raise ValueError(f"there is no {kind} {name!r}" + (f"; is it {near[0]!r}?" if near else ""))


def check(results: dict, cases: dict[str, dict]) -> dict[tuple[str, str], Verdict | None]:
    """Return the verdict on each (quantity, case) of the contract, in order; None where missing.

    Raises:
      ValueError: a case or quantity has no such name, or nothing can be compared.
    """
    for name, quantities in results.items():
        known("case", name, list(cases))
        if not isinstance(quantities, dict):
            raise ValueError(f"case {name!r} must be an object, got {shape(quantities)}")
        for quantity in quantities:
            known("quantity", quantity, list(ORDER))
    found = {}
    for quantity in ORDER:
        for name, case in cases.items():
            if quantity in case["outputs"]:
                found[quantity, name] = None
                if quantity in results.get(name, {}):
                    pair = case["outputs"][quantity], results[name][quantity]
                    found[quantity, name] = compare(f"{name}.{quantity}", *pair)
    if not any(found.values()):
        raise ValueError("the results hold no quantity of any case")
    return found


def status(quantity: str, verdict: Verdict | None, tolerance: dict[str, float | None]) -> str:
    """Return a word: missing, not compared (in this dtype), ok or DIFFERS."""
    most = tolerance[ORDER[quantity].kind]
    if verdict is None or most is None:
        return "missing" if verdict is None else "not compared"
    return "ok" if verdict.error <= most else "DIFFERS"


def first_difference(found: dict, tolerance: dict) -> tuple[str, str] | None:
    """Return the first (quantity, case) in order of dependency that differs, or None."""
    for (quantity, case), verdict in found.items():
        if status(quantity, verdict, tolerance) == "DIFFERS":
            return quantity, case
    return None


# --- the report -----------------------------------------------------------------------------------


def rounding(quantity: str, verdict: Verdict, dtype: str) -> str | None:
    """Return the first dtype coarser than the given one that allows a difference, if one does."""
    names = list(TOLERANCE)
    for name in names[names.index(dtype) + 1 :]:
        if status(quantity, verdict, TOLERANCE[name]) == "ok":
            return name
    return None


def explain(found: dict, key: tuple[str, str], dtype: str) -> str:
    """Return where and by how much the first quantity differs, and the usual cause."""
    q, verdict, names = ORDER[key[0]], found[key], list(ORDER)
    before = [name for name in names[: names.index(q.name)] if found.get((name, key[1]), q) is None]
    if q.kind == "reward":  # what is paid and weighed depends on no model
        before = [name for name in before if ORDER[name].kind in ("exact", "reward")]
    if q.kind in ("scored", "weights"):  # on samples through the rows alone
        before = [name for name in before if ORDER[name].kind not in ("decoded", "drawn")]
    for a, b in (("stage1", "stage2"), ("stage2", "stage1"), ("exact", "k1"), ("k1", "exact")):
        before = [name for name in before if a not in q.name or b not in name]
    off = f"off by {verdict.error:.3g} times its largest entry; "
    lines = [
        verdict.where,
        f"{off if math.isfinite(verdict.error) else ''}{dtype} allows {TOLERANCE[dtype][q.kind]:g}",
        f"it is: {q.what}",
        f"usual cause: {q.cause}",
    ]
    told = [textwrap.fill(x, 99, initial_indent="  ", subsequent_indent="    ") for x in lines]
    if before:
        line = f"missing, and so not ruled out: {', '.join(before)}"
        told.append("  " + textwrap.shorten(line, 97, placeholder=" .. (--missing)"))
    return "\n".join([f"{q.name} differs first, in case {key[1]}", *told])


def differences(found: dict, first: tuple[str, str], dtype: str) -> str:
    """Return what is told of the first difference; if it is small enough to be the rounding of a
    coarser dtype, then of the first that is larger."""
    told = explain(found, first, dtype)
    if (coarse := rounding(first[0], found[first], dtype)) is None:
        return told
    told += f"\n  no more than {coarse} rounds: if a part computes in it, say --dtype {coarse}\n\n"
    if (large := first_difference(found, TOLERANCE[coarse])) is None:
        return f"{told}by {coarse}'s tolerances all agree"
    return f"{told}by {coarse}'s tolerances, {explain(found, large, coarse)}"


def listing(found: dict, tolerance: dict) -> str:
    """Return a line for each quantity that is there: its status and error, case by case."""
    words = {}
    for (quantity, case), verdict in found.items():
        if verdict is not None:
            error = f" {verdict.error:.0e}" if verdict.error else ""
            told = f"{case} {status(quantity, verdict, tolerance)}{error}"
            words.setdefault(quantity, []).append(told)
    return "\n".join(f"{name:<27} {', '.join(told)}" for name, told in words.items())


def missing(found: dict, named: bool) -> list[str]:
    """Return a line that counts the quantities that are missing; if named, their names by case."""
    names, there = {}, {case for (_, case), verdict in found.items() if verdict is not None}
    for (quantity, case), verdict in found.items():
        if verdict is None:
            names.setdefault(case, []).append(quantity)
    if named or not names:
        lines = [f"missing in {case}: {', '.join(x)}" for case, x in names.items()]
        return [textwrap.fill(line, 99, subsequent_indent="    ") for line in lines]
    parts = [f"{len(x)} in {case}" for case, x in names.items() if case in there]
    whole = len(names.keys() - there)
    parts += [f"whole cases {whole}"] if whole else []
    return [f"missing: {', '.join(parts)} (--missing names them)"]


def beside(found: dict, results: dict) -> list[str]:
    """Return a line for each case with the quantities in the results that it does not ask for."""
    lines = []
    for case, quantities in results.items():
        if names := [x for x in quantities if (x, case) not in found]:
            lines.append(f"{len(names)} not asked for in {case}: {', '.join(names)}")
    return [textwrap.fill(line, 99, subsequent_indent="    ") for line in lines]


def parser() -> argparse.ArgumentParser:
    """Return the command line, whose help tells the format."""
    lines = [
        "A golden file is {about, cases: {case: {inputs, outputs}}}; read `about` first.",
        "RESULTS.json is {case: {quantity: values}}, numbers in nested lists. The cases:",
        textwrap.fill(", ".join(contract()), 99, initial_indent="  ", subsequent_indent="  "),
        "Quantities may be left out, cases too, and there may be some that a case does not ask",
        "for: both are told. In order of dependency; STAGE is stage1 or stage2, FORM exact or k1:",
        *(f"  {name:<23} {what}" for name, _, what, _ in ROWS),
        "B rows (G of each problem, side by side), T tokens, S = T - 1 scored positions: position",
        "s predicts token s + 1. V vocabulary. A difference is told as a share of the quantity's",
        "largest expected entry.",
    ]
    found = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    found.add_argument("results", metavar="RESULTS.json", type=Path)
    found.add_argument(
        "--dtype", choices=TOLERANCE, default="float64",
        help="the coarsest that a part of the port computes in. float64: NumPy, JAX with x64, "
        "verl's loss. float32: transformers and TRL, for float64 weights, too, as their norms and "
        "rotary tables are in float32. bfloat16: autocast. That shows mistakes of the KL in "
        "Stage I's gradients; in Stage II's, advantages hide most of them. Default: float64",
    )  # fmt: skip
    found.add_argument("--missing", action="store_true", help="name what is missing")
    return found


def main(argv: list[str]) -> int:
    """Compare, print. Return the exit status."""
    try:
        asked = parser().parse_args(argv)
        results = read(asked.results)
        found = check(results, contract())
    except ValueError as error:
        print(f"check_port.py: error: {error}", file=sys.stderr)
        return 2
    tolerance = TOLERANCE[asked.dtype]
    first = first_difference(found, tolerance)
    there = sum(v is not None for v in found.values())
    lines = [listing(found, tolerance), *missing(found, asked.missing), *beside(found, results)]
    lines += ["", f"{there} of {len(found)} pairs of quantity and case "
             "compared: " + ("some differ" if first else "all agree")]  # fmt: skip
    lines += ["", differences(found, first, asked.dtype)] if first else []
    print("\n".join(lines))
    return 1 if first else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
