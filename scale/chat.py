"""How is a conversation with an open checkpoint written in tokens?

An open model brings a tokenizer, the tokenizer.json of its folder, and a format: who speaks is told
by special tokens. The library `tokenizers` does the encoding; two formats are known, and others are
refused. How conversations are put together, and where templates differ: scale/README.md.

Differs from arXiv 2409.12917v2, appendix: the prompts are in our own words; an answer ends in a
box, which is what `verify.math` reads.

    pip install tokenizers==0.23.3
    python -c "from scale import chat; print(chat.read_tokenizer('Qwen2.5-0.5B-Instruct'))"
"""

import re
from pathlib import Path
from typing import NamedTuple

SYSTEM = {
    "math": "Solve the problem. Reason step by step, and end with the final answer, and nothing "
            r"else, inside \boxed{}.",
    "code": "Solve the task in Python. Give the whole program, imports and helper functions "
            "included, in one block that begins with ```python and ends with ```. Leave out tests "
            "and examples.",
}  # fmt: skip
CHECK = ("There may or may not be a mistake in your answer. Check it, correct what is wrong, "
         "and give ")  # fmt: skip
REVISION = {
    "math": CHECK + r"the whole solution again, with the final answer inside \boxed{}.",
    "code": CHECK + "the whole program again, in one ```python block.",
}


class Format(NamedTuple):
    """How a family's conversations are written, special tokens by name."""

    system: str  # the system's turn, with all that comes before it
    user: str  # the user's turn, up to where the assistant's first word comes
    after: str  # what stands between an attempt's end and the user's next turn
    end: str  # the special token that ends a turn


CHATML = Format(  # Qwen2 to 3, SmolLM2
    "<|im_start|>system\n{text}<|im_end|>\n",
    "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
    "\n",
    "<|im_end|>",
)
LLAMA3 = Format(
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{text}<|eot_id|>",
    "<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "",
    "<|eot_id|>",
)
SPECIAL = re.compile(r"(<\|\w+\|>)")


def read_tokenizer(folder: str | Path):
    """Return the `tokenizers.Tokenizer` in a folder, to which the name of any special or added
    token in a text is but text. What the file says of truncation, of padding and of tokens to be
    added to a text is not applied.
    ValueError if the library is missing, or the file is missing or damaged."""
    path = Path(folder) / "tokenizer.json"
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
    except ImportError:
        raise ValueError(f"{path} needs: pip install tokenizers==0.23.3") from None
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"cannot read {path}: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    tokenizer.add_special_tokens(added)  # those that were not special, as Qwen's <tool_call>
    tokenizer.encode_special_tokens = True  # as text, that is
    return tokenizer


def format_of(tokenizer) -> Format:
    """Return the format that a tokenizer's special tokens tell; ValueError if none is known."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for found in (CHATML, LLAMA3):
        if added >= {*SPECIAL.findall(found.system + found.user)}:
            return found
    raise ValueError(f"no known chat format, only ChatML and Llama 3's: the tokenizer's special "
                     f"tokens are {', '.join(sorted(added)[:20]) or 'none'}")  # fmt: skip


def fill(tokenizer, template: str, text: str) -> list[int]:
    """Return the ids of a turn, or of turns, with the text in its place. Only the template's own
    special tokens are special; what stands between two of them is encoded as one."""
    ids = []
    for i, part in enumerate(SPECIAL.split(template)):
        if i % 2:
            ids.append(tokenizer.token_to_id(part))
        else:
            ids += tokenizer.encode(part.format(text=text)).ids
    return ids
