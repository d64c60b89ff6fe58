"""How is a conversation written in tokens?

python -c "import chat; print(chat.encode(chat.toy_encoding(), '12+34=46<|end|>'))"
"""

from functools import cache

import tiktoken

END, REVISE = "<|end|>", "<|revise|>"


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
    """Return the tokenizer of a task, or of a kind of problem."""
    return countdown_encoding() if task == "countdown" else toy_encoding()


def encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Return the ids of our own text, special tokens included (never of a model's text)."""
    return encoding.encode(text, allowed_special="all")
