"""A small open checkpoint for tests: random weights, and a tokenizer trained on a few words."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as cut

from model import GPT, GPTConfig
from scale import pretrained

SPECIAL = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gpt2": ["<|endoftext|>"],
}
SPLIT = (  # as Qwen's; Llama 3's takes three digits at a time
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "system user assistant\n\n Solve the problem. Give the whole program again.\n\n\n",
    "There may or may not be a mistake in your answer. Check it, correct what is wrong.  \n",
    "```python\ndef add(x):\n    return x + 1\n```\nassert add(2) == 3\n\n How many? \\boxed{5}\n",
]


def tokenizer(family: str) -> Tokenizer:
    """Return a byte-level BPE with a family's special tokens, and a token that is not special."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC() if family == "chatml" else None
    split = cut.Split(Regex(SPLIT), "isolated")
    made.pre_tokenizer = cut.Sequence([split, cut.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=cut.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(3 * TEXTS, trainer)
    made.add_special_tokens(SPECIAL[family])
    made.add_tokens(["<think>"])
    if family == "llama3":  # as published: what is encoded begins with its first special token
        begin = SPECIAL[family][0]
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))]
        )
    return made


def checkpoint(folder: Path, family: str = "chatml") -> Path:
    """Write a folder of a model that reads 512 tokens, with more of them than its tokenizer has."""
    sizes = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, max_positions=512)
    pretrained.save(GPT(GPTConfig(384, **sizes, qkv_bias=True, tied_head=True)), folder)
    tokenizer(family).save(str(folder / "tokenizer.json"))
    return folder
