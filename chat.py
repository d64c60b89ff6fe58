"""How is a conversation written in tokens?

The toys' tokens are single characters, and `<|revise|>` is the whole instruction. A pretrained
model brings a tokenizer, a local Hugging Face `tokenizer.json`, and a format: who speaks is told by
special tokens. tiktoken does the encoding, and tokens are the same as Hugging Face's, or else
`read_tokenizer` raises: what cannot be represented exactly is refused, not approximated.

A conversation is put together in token space: prompt, the ids that the model sampled, instruction.
That equals what the family's own template writes for the whole conversation, as long as the attempt
is what encoding its text gives. Where it is not, the sampled ids stay. (Two templates moreover
change an answer once a question follows: Llama 3's strips white space round it, Qwen3's drops what
was thought. Here it stays as it was written.) A problem's text is never read for special tokens.

Differs from arXiv 2409.12917v2, appendix: the prompts are in our own words; an answer ends in a
box, which is what `verify.math` reads.

    python -c "import chat; print(chat.encode(chat.toy_encoding(), '12+34=46<|end|>'))"
"""

import json
import re
import unicodedata
from functools import cache
from math import inf
from pathlib import Path
from typing import NamedTuple

import tiktoken

import verify

END, REVISE = "<|end|>", "<|revise|>"

# How a family's tokenizer cuts text before it merges, as its files have it. The tests show of each
# that Hugging Face's and tiktoken's regular expressions cut alike; of others nobody has shown it.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# SmolLM2 takes each digit by itself and cuts the rest as GPT-2 does, as if the text ended there, so
# that white space goes to no digit. (What is a digit, Rust says there and tiktoken here: of the 13
# that Unicode 17 adds, only the former knows. Everything else of Unicode is cut alike.)
SMOLLM2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# --- the toys -------------------------------------------------------------------------------------


@cache
def toy_encoding() -> tiktoken.Encoding:
    """Return the toy's tokenizer: one token a character of 0-9 + =, and the two special tokens.

    >>> toy_encoding().encode("7+5=12<|end|>", allowed_special="all")
    [7, 10, 5, 11, 1, 2, 12]
    """
    ranks = {bytes([byte]): rank for rank, byte in enumerate(b"0123456789+=")}
    return tiktoken.Encoding(
        "toy", pat_str=r".", mergeable_ranks=ranks, special_tokens={END: 12, REVISE: 13}
    )


@cache
def countdown_encoding() -> tiktoken.Encoding:
    """Return countdown's tokenizer: one token a character of its expressions and prompts.

    >>> countdown_encoding().encode("8-(3+2)")
    [8, 11, 14, 3, 10, 2, 15]
    """
    ranks = {bytes([byte]): rank for rank, byte in enumerate(b"0123456789+-*/()=: ")}
    special = {END: len(ranks), REVISE: len(ranks) + 1}
    return tiktoken.Encoding(
        "countdown", pat_str=r".", mergeable_ranks=ranks, special_tokens=special
    )


def encoding_of(task: str) -> tiktoken.Encoding:
    """Return the tokenizer of a toy, or of its kind of problem."""
    return countdown_encoding() if task == "countdown" else toy_encoding()


# --- text and tokens ------------------------------------------------------------------------------


def encode(encoding: tiktoken.Encoding, text: str, nfc: bool = False) -> list[int]:
    """Return the ids of our own text, special tokens included (never of a model's text).

    As Hugging Face does: special tokens are found first, the leftmost and of these the longest, and
    what stands between them is encoded by itself.
    """
    special = sorted(encoding.special_tokens_set, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, special)) or '(?!)'})", text)
    return [
        token
        for i, part in enumerate(parts)
        for token in (
            [encoding.encode_single_token(part)] if i % 2 else encode_text(encoding, part, nfc)
        )
    ]


def encode_text(encoding: tiktoken.Encoding, text: str, nfc: bool = False) -> list[int]:
    """Return the ids of anybody's text, in which the names of special tokens are but text.

    Args:
      nfc: compose characters first (Qwen), by Python's Unicode tables: a character that is newer
        than these stays as it is.
    """
    return encoding.encode_ordinary(unicodedata.normalize("NFC", text) if nfc else text)


# --- a tokenizer from a file ----------------------------------------------------------------------


class Tokenizer(NamedTuple):
    """A pretrained model's tokenizer. nfc: its texts are composed first (see `encode_text`)."""

    encoding: tiktoken.Encoding
    nfc: bool


@cache
def read_tokenizer(folder: Path) -> Tokenizer:
    """Read `tokenizer.json` of a local folder: byte-level BPE as of GPT-2, SmolLM2, Qwen2 to 3, and
    Llama 3.

    What the file says of truncation, padding and a first token (`post_processor`) is not applied.
    Takes seconds, since each token of the vocabulary is looked at.

    Raises:
      ValueError: names the file and what cannot be represented exactly.
      OSError: the file cannot be read.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        model, normalizer = file["model"], file.get("normalizer")
        if model["type"] != "BPE":
            raise ValueError(f"a model of type {model['type']!r} is not supported, only BPE is")
        if model.get("byte_fallback"):
            raise ValueError("byte_fallback, as of SentencePiece and Llama 2, is not supported")
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name):
                raise ValueError(f"{name} {model[name]!r} is not supported")
        if normalizer not in (None, {"type": "NFC"}):
            raise ValueError(f"normalizer {normalizer} is not supported, only NFC is")
        added = added_tokens(file.get("added_tokens") or [], normalizer is not None)
        pattern = split_pattern(file.get("pre_tokenizer"))
        ranks = ranks_of(model, added)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a tokenizer.json: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    encoding = tiktoken.Encoding(
        path.parent.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=added
    )
    return Tokenizer(encoding, normalizer is not None)


def added_tokens(rows: list[dict], normalized_text: bool) -> dict[str, int]:
    """Return the tokens that are found in text before it is cut, special ones and others."""
    for row in rows:
        flags = [name for name in ("single_word", "lstrip", "rstrip") if row.get(name)]
        if flags or not row["content"]:
            raise ValueError(f"added token {row['content']!r}: {flags} is not supported")
    # without a normalizer the flag only matters where some tokens are looked for before others
    late = [row["content"] for row in rows if row.get("normalized")]
    if late and (normalized_text or len(late) < len(rows)):
        raise ValueError(f"added token {late[0]!r}: ['normalized'] is not supported")
    return {row["content"]: row["id"] for row in rows}


def split_pattern(pre_tokenizer: dict | None) -> str:
    """Return the one regular expression that cuts text as the file's pre-tokenizer does."""
    steps = [pre_tokenizer]
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    *before, last = [dict(step or {"type": None}) for step in steps]
    kinds = [step["type"] for step in (*before, last)]
    by_gpt2 = last.get("use_regex", True)
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space", True):
        if kinds == ["ByteLevel"] and by_gpt2:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and by_gpt2 and before[0]["individual_digits"]:
            return SMOLLM2
        if kinds == ["Split", "ByteLevel"] and not by_gpt2:
            split = before[0]
            pattern = split["pattern"].get("Regex")
            plain = split["behavior"] == "Isolated" and not split["invert"]
            if plain and pattern in (GPT2, QWEN2, LLAMA3):
                return pattern
    raise ValueError(f"pre_tokenizer {json.dumps(pre_tokenizer)[:300]} is not supported")


def ranks_of(model: dict, added: dict[str, int]) -> dict[bytes, int]:
    """Return a BPE's vocabulary as bytes and ids, if tiktoken merges by these as the file says.

    The file merges, again and again, the neighbours that come first in its list of merges; tiktoken
    those that together are the token of the lowest id. Say that neighbours x, y together are token
    t. No merge so far crossed the ends of x y, so t by itself would have been merged the same way,
    up to x, y. Hence both laws agree on every text if each token by itself is merged up to one, by
    last steps whose order in the list is the order of the ids: such a step is the one way in which
    a token ever comes about. A token of which three or more pieces remain is made by neither law.
    It is still read where it is all of a piece of cut text: tiktoken looks there first, and so must
    the file (`ignore_merges`).
    """
    vocab, byte_of = model["vocab"], byte_characters()
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    order = {pair: i for i, pair in enumerate(merges)}
    ranks, latest, before = {}, -1, ""
    for token, rank in sorted(vocab.items(), key=lambda item: item[1]):
        pieces, last = merge(token, order)
        if token in added:
            if len(pieces) == 1 or added[token] != rank:
                raise ValueError(f"added token {token!r} is an ordinary token, too")
            continue
        try:
            ranks[bytes(byte_of[character] for character in token)] = rank
        except KeyError:
            raise ValueError(f"token {token!r} is not made of byte-level characters") from None
        if len(pieces) == 2 or (len(pieces) > 1 and not model.get("ignore_merges")):
            raise ValueError(f"token {token!r} is not what its merges make of it: {pieces}")
        if len(pieces) == 1 < len(token):
            if last < latest:
                raise ValueError(f"{before!r} is merged after {token!r}, but has the lower id")
            latest, before = last, token
    for byte in {*range(256)} - {0xC0, 0xC1, *range(0xF5, 256)}:  # these are never in UTF-8
        if bytes([byte]) not in ranks:
            raise ValueError(f"byte {byte:#04x} has no token")
    unmade = [pair for pair in order if "".join(pair) not in vocab]
    if unmade:
        raise ValueError(f"merge {unmade[0]} makes no token")
    if len({*ranks.values(), *added.values()}) < len(ranks) + len(added):
        raise ValueError("two tokens have one id")
    return ranks


def merge(text: str, order: dict[tuple[str, str], int]) -> tuple[list[str], int]:
    """Return what the merges make of a text by itself, and the place of the last one (-1: none).

    >>> merge("abab", {("b", "a"): 5, ("a", "b"): 2, ("ab", "ab"): 3})
    (['abab'], 3)
    """
    pieces, last = list(text), -1
    while len(pieces) > 1:
        places = [order.get(pair, inf) for pair in zip(pieces, pieces[1:], strict=False)]
        first = min(places)
        if first == inf:
            break
        i, last = places.index(first), first
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces, last


def byte_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for: printable Latin-1
    for itself, the other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


# --- a conversation -------------------------------------------------------------------------------


def family_of(folder: Path) -> str:
    """Return how a tokenizer's model is spoken to, told by its special tokens: "chatml" (Qwen2 to
    3, SmolLM2) or "llama3".

    Raises:
      ValueError: neither, or as `read_tokenizer`.
    """
    special = read_tokenizer(folder).encoding.special_tokens_set
    if {"<|im_start|>", "<|im_end|>"} <= special:
        return "chatml"
    if {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= special:
        return "llama3"
    raise ValueError(f"{folder}: no known chat format, special tokens are {sorted(special)[:20]}")


def end_id(tokenizer: Tokenizer, family: str) -> int:
    """Return the token that ends a turn."""
    name = "<|im_end|>" if family == "chatml" else "<|eot_id|>"
    return tokenizer.encoding.encode_single_token(name)


def turn_ids(tokenizer: Tokenizer, family: str, role: str, text: str | None = None) -> list[int]:
    """Return the ids of one turn, or of its head alone if there is no text. Between two special
    tokens, our words and the text are encoded as one, as in the templates' output."""
    if family == "chatml":
        head, end = ["<|im_start|>", f"{role}\n{text or ''}"], ["<|im_end|>", "\n"]
    else:
        said = "\n\n" + (text or "")
        head, end = ["<|start_header_id|>", role, "<|end_header_id|>", said], ["<|eot_id|>"]
    encoding, nfc = tokenizer
    ids = []
    for i, part in enumerate(head if text is None else head + end):
        ids += encode_text(encoding, part, nfc) if i % 2 else [encoding.encode_single_token(part)]
    return ids


def asked_ids(tokenizer: Tokenizer, family: str, text: str) -> list[int]:
    """Return the ids of what the user says, and of the head of the assistant's turn."""
    text = text.strip() if family == "llama3" else text  # as its templates do
    user = turn_ids(tokenizer, family, "user", text)
    return user + turn_ids(tokenizer, family, "assistant")


def prompt_ids(tokenizer: Tokenizer, family: str, system: str | None, text: str) -> list[int]:
    """Return the ids of a conversation up to where the assistant's first word comes.

    Args:
      system: the system message, None for none. Where there is none, templates put in their own,
        Qwen2.5's and SmolLM2's who it is, Llama 3.1's and later the date (and the date before
        ours, too): to have that, pass it. For Qwen3, thinking is neither forced nor suppressed.
        For Llama 3 it is "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\\n\\n" and
        the message as it stands, then "<|eot_id|>".
      text: what the user says; the names of special tokens in it are but text.
    """
    ids = encode(tokenizer.encoding, "<|begin_of_text|>" if family == "llama3" else "")
    if system is not None:
        ids += turn_ids(tokenizer, family, "system", system)
    return ids + asked_ids(tokenizer, family, text)


def instruction_ids(tokenizer: Tokenizer, family: str, text: str) -> list[int]:
    """Return the ids between the end-of-turn token of one attempt and the first of the next."""
    ids = encode_text(tokenizer.encoding, "\n" if family == "chatml" else "")
    return ids + asked_ids(tokenizer, family, text)


# --- what the program uses ------------------------------------------------------------------------

SYSTEM = {
    "math": (
        "Solve the problem. Reason step by step, and end with the final answer, and nothing else, "
        r"inside \boxed{}."
    ),
    "code": (
        "Solve the task in Python. Give the whole program, imports and helper functions included, "
        "in one block that begins with ```python and ends with ```. Leave out tests and examples."
    ),
}
CHECK = (
    "There may or may not be a mistake in your answer. Check it, correct what is wrong, and give "
)
REVISION = {
    "math": CHECK + r"the whole solution again, with the final answer inside \boxed{}.",
    "code": CHECK + "the whole program again, in one ```python block.",
}


class Format(NamedTuple):
    """How a task's problems and attempts are written.

    end_id: the token that ends an attempt. instruction: the ids of p1, between an attempt's last
    token and the first of the next. family: "toy", or of `family_of`; system: its system message.
    """

    tokenizer: Tokenizer
    end_id: int
    instruction: list[int]
    family: str = "toy"
    system: str | None = None


@cache
def format_of(task: str, folder: Path | None = None) -> Format:
    """Return the format of a toy, "addition" or "countdown", or of "math" or "code" with the
    tokenizer in a folder.

    Raises:
      ValueError: a folder is missing or not wanted, the task is not known; or as `family_of`.

    >>> format_of("addition")[1:3]
    (12, [13])
    """
    if task in ("addition", "countdown"):
        if folder is not None:
            raise ValueError(f"task {task!r} has a tokenizer of its own, got {folder}")
        encoding = encoding_of(task)
        toy = Tokenizer(encoding, False)
        return Format(toy, encode(encoding, END)[0], encode(encoding, REVISE))
    if task not in SYSTEM:
        raise ValueError(f"task must be addition, countdown, math or code, got {task!r}")
    if folder is None:
        raise ValueError(f"task {task!r} needs a folder with a tokenizer.json")
    tokenizer, family = read_tokenizer(folder), family_of(folder)
    instruction = instruction_ids(tokenizer, family, REVISION[task])
    return Format(tokenizer, end_id(tokenizer, family), instruction, family, SYSTEM[task])


def prompt(format: Format, problem: verify.Problem) -> list[int]:
    """Return the ids of x1: a toy's prompt, special tokens included, or a whole conversation."""
    if format.family == "toy":
        return encode(format.tokenizer.encoding, problem.prompt)
    return prompt_ids(format.tokenizer, format.family, format.system, question(problem))


def question(problem: verify.Problem) -> str:
    """Return what the user asks.

    MBPP's texts do not name the function that is tested: they are followed by the first of the
    tests, one of three, as others do. HumanEval's problem is the head of a function.

    >>> print(question(verify.Problem("Add 1.", "assert f(1) == 2", "program")))
    Add 1.
    <BLANKLINE>
    For example:
    ```python
    assert f(1) == 2
    ```
    """
    if problem.kind != "program":
        return problem.prompt
    if problem.entry_point:
        return f"Write this function:\n```python\n{problem.prompt.rstrip()}\n```"
    tests = [line for line in problem.gold.splitlines() if line.startswith("assert")]
    example = f"\n\nFor example:\n```python\n{tests[0].rstrip()}\n```" if tests else ""
    return problem.prompt + example


def decode(format: Format, ids: list[int]) -> str:
    """Return the text of an attempt's ids. Bytes that are not UTF-8 become U+FFFD; ids without a
    token, of which a model with a padded vocabulary can sample some, become nothing.

    >>> decode(format_of("addition"), [1, 2, 99, 12])
    '12<|end|>'
    """
    found = []
    for token in ids:
        try:
            found.append(format.tokenizer.encoding.decode_single_token_bytes(token))
        except KeyError:
            continue
    return b"".join(found).decode("utf-8", errors="replace")
