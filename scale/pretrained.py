"""How are open weights read and written? Hugging Face folders of Llama, Qwen2, Qwen3 and SmolLM2.

A folder holds a config.json and one or several files of weights. What our model does not compute is
refused by name, not approximated. A written folder says what it holds in the words of transformers
4 and of 5, so that both load it.

    pip install safetensors==0.8.0
    python -c "from scale import pretrained; print(pretrained.load('Qwen2.5-0.5B-Instruct').config)"
"""

import json
import math
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPT, GPTConfig, rotary_table

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SIZES = {
    "vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "d_model": "hidden_size", "d_ff": "intermediate_size",
    "max_positions": "max_position_embeddings",
}  # fmt: skip
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
MODULES = {  # where there are several, their rows follow one another in our one matrix
    "embed": ["model.embed_tokens"], "norm": ["model.norm"], "head": ["lm_head"],
    "norm1": ["input_layernorm"], "norm2": ["post_attention_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.q_norm": ["self_attn.q_norm"], "attention.k_norm": ["self_attn.k_norm"],
    "attention.out": ["self_attn.o_proj"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"], "mlp.down": ["mlp.down_proj"],
}  # fmt: skip
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip


@dataclass(frozen=True)
class OpenConfig(GPTConfig):
    """Sizes, and how positions are scaled: None, or the four numbers of LLAMA3."""

    rope_scaling: tuple[float, float, float, int] | None = None

    def frequencies(self) -> torch.Tensor:
        """Return those of GPTConfig, float64 [K / 2], scaled.

        Source: the code that Llama 3.1 was released with. Pairs that turn less than low_freq_factor
        times within the original length turn `factor` times slower, those that turn more than
        high_freq_factor times stay, and those between are interpolated.
        """
        usual_K = super().frequencies()
        if self.rope_scaling is None:
            return usual_K
        factor, low, high, original = self.rope_scaling
        turns_K = original * usual_K / (2 * math.pi)
        stays_K = ((turns_K - low) / (high - low)).clamp(0, 1)
        return usual_K * (stays_K + (1 - stays_K) / factor)


def read_json(path: Path) -> dict:
    """Return the object in a JSON file; ValueError if it cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def number(table: dict, name: str, kind: type, default=None):
    """Return a field that must be a positive int or float; null is as good as absent."""
    value = default if table.get(name) is None else table[name]
    if type(value) not in (int, kind) or value <= 0:
        raise ValueError(f"config.json: {name} must be a positive {kind.__name__}, got {value!r}")
    return kind(value)


def read_config(folder: str | Path) -> dict:
    """Return the sizes in a folder's config.json, by their names in OpenConfig; ValueError if it
    cannot be read, or asks for what our model does not compute."""
    raw = read_json(Path(folder) / "config.json")
    family, layers = raw.get("model_type"), set(raw.get("layer_types") or [])
    rope = raw | (raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    slides = bool(raw.get("use_sliding_window") or layers - {"full_attention"})
    architecture = FAMILIES.get(family)
    for name, value, *accepted in (
        ("model_type", family, *FAMILIES),
        ("architectures", raw.get("architectures") or [architecture], [architecture]),
        ("hidden_act", raw.get("hidden_act", "silu"), "silu"),
        ("attention_bias", raw.get("attention_bias", False), False),
        ("mlp_bias", raw.get("mlp_bias", False), False),
        ("use_sliding_window", slides, False),
        ("rope_type", rope_type, "default", "llama3"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1), 1),
    ):
        if value not in accepted:
            wanted = " or ".join(map(repr, accepted))
            raise ValueError(f"config.json: {name} {value!r} is not supported; accepted: {wanted}")
    raw["num_key_value_heads"] = raw.get("num_key_value_heads") or raw.get("num_attention_heads")
    sizes = {ours: number(raw, name, int) for ours, name in SIZES.items()}
    head_dim = 128 if family == "qwen3" else sizes["d_model"] // sizes["n_head"]
    if rope_type == "llama3":
        factors = [number(rope, name, float) for name in LLAMA3[:3]]
        sizes["rope_scaling"] = (*factors, number(rope, LLAMA3[3], int))
    return sizes | dict(
        rope_theta=number(rope, "rope_theta", float, 10_000),
        norm_eps=number(raw, "rms_norm_eps", float, 1e-6),
        tied_head=bool(raw.get("tie_word_embeddings", False)),
        head_dim=number(raw, "head_dim", int, head_dim),
        qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
    )  # fmt: skip


def config_json(config: GPTConfig, dtype: torch.dtype) -> dict:
    """Return the fields of config.json that say what the model is, in both layouts at once."""
    if config.qk_norm and config.qkv_bias:
        raise ValueError("no open family has both qk_norm and qkv_bias")
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    scaling = None
    if getattr(config, "rope_scaling", None) is not None:
        scaling = {"rope_type": "llama3", **dict(zip(LLAMA3, config.rope_scaling, strict=True))}
    rope = (scaling or {"rope_type": "default"}) | {"rope_theta": config.rope_theta}
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": rope,
        "dtype": name,
        "torch_dtype": name,
    }


def safetensors_library():
    """Return the package that reads and writes files of weights; nothing else needs it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("open checkpoints need: pip install safetensors==0.8.0") from None
    return safetensors


def parts(config: GPTConfig, state_dict: dict) -> dict[str, torch.Tensor]:
    """Return an open checkpoint's tensors, by their names there, as views of ours."""
    rows = {
        "attention.qkv": [n * config.head_size for n in (config.n_head, *2 * [config.n_kv_head])],
        "mlp.gate_up": [config.d_ff, config.d_ff],
    }
    views = {}
    for name, weight in state_dict.items():
        module, kind = name.rsplit(".", 1)
        block, module = re.fullmatch(r"(blocks\.\d+\.)?(.+)", module).groups("")
        before = block.replace("blocks", "model.layers")
        pieces = weight.detach().split(rows.get(module, len(weight)))
        for there, piece in zip(MODULES[module], pieces, strict=True):
            views[f"{before}{there}.{kind}"] = piece
    if config.tied_head:
        del views["lm_head.weight"]
    return views


def open_tensors(folder: Path) -> dict:
    """Return the open file of each tensor's name; nothing is read yet but the files' headers."""
    library = safetensors_library()
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file():
        if not index.is_file():
            raise ValueError(f"{folder} has neither {names[0]} nor {index.name}")
        names = set(read_json(index).get("weight_map", {}).values())
    where = {}
    for name in names:
        try:
            file = library.safe_open(folder / name, framework="pt")
        except (OSError, library.SafetensorError) as error:
            raise ValueError(f"cannot read {folder / name}: {error}") from None
        where |= dict.fromkeys(file.keys(), file)
    return where


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> GPT:
    """Return the model in a folder, on the CPU. ValueError names what is missing, damaged, or of
    another shape or kind."""
    config = OpenConfig(**read_config(folder))
    where = open_tensors(Path(folder))
    with torch.device("meta"):  # no initial weights: they would be drawn only to be overwritten
        model = GPT(config)
    tensors = {name: torch.empty(x.shape, dtype=dtype) for name, x in model.state_dict().items()}
    views = parts(config, tensors)
    extra = {name for name in where if name.endswith("rotary_emb.inv_freq")}  # of older folders
    extra |= {"lm_head.weight"} if config.tied_head else set()
    for fault, names in (("lacks", views.keys() - where.keys()),
                         ("has, unexpectedly,", where.keys() - views.keys() - extra)):  # fmt: skip
        if names:
            raise ValueError(f"{folder} {fault} {len(names)} tensors, first {min(names)}")
    for name, view in views.items():
        shape = tuple(where[name].get_slice(name).get_shape())
        if shape != view.shape:
            raise ValueError(f"{folder}: {name} must be {tuple(view.shape)}, got {shape}")
        view.copy_(where[name].get_tensor(name))
    if config.tied_head:  # a Parameter under two names stays one in load_state_dict(assign=True)
        tensors["embed.weight"] = torch.nn.Parameter(tensors["embed.weight"])
        tensors["head.weight"] = tensors["embed.weight"]
    model.load_state_dict(tensors, assign=True)
    model.cos, model.sin = rotary_table(config)
    return model


def save(model: GPT, folder: str | Path, source=None) -> None:
    """Write a new folder that transformers and vLLM load: whole, or not at all. ValueError if it
    exists, the source is none, or no open family has such a model.

    source: a folder to copy the tokenizer and the generation settings from, and the fields of
    config.json that do not follow from our model's.
    """
    library, folder = safetensors_library(), Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; name a new folder")
    settings = {} if source is None else read_json(Path(source) / "config.json")
    settings |= config_json(model.config, model.embed.weight.dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=folder.name + ".", dir=folder.parent) as place:
        draft = Path(place) / "whole"
        draft.mkdir()
        for name in COMPANIONS if source is not None else ():
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, draft / name)
        (draft / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        tensors = parts(model.config, model.state_dict())
        library.torch.save_file(tensors, draft / "model.safetensors", {"format": "pt"})
        draft.rename(folder)
