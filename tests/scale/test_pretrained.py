"""Open weights mean here what they mean to transformers, both ways; what differs is refused.

The oracle is transformers itself, with tiny models whose weights are all random, norms and biases
too. Wide logits and many positions: a slip in any part of the network moves them by per cents.
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from model import GPT, Cache, GPTConfig
from scale import pretrained

transformers.utils.logging.disable_progress_bar()

SIZES = dict(
    vocab_size=89, hidden_size=48, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=160, rms_norm_eps=1e-5,
    bos_token_id=3, eos_token_id=5, attn_implementation="eager", tie_word_embeddings=False,
)  # fmt: skip
SCALED = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip


def plain(theta):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


FAMILIES = {
    "qwen2": (transformers.Qwen2Config, plain(7000.0) | dict(num_key_value_heads=6)),
    "qwen2.5": (transformers.Qwen2Config, plain(3000.0) | dict(tie_word_embeddings=True)),
    "qwen3": (transformers.Qwen3Config, plain(2000.0) | dict(head_dim=14)),
    "llama2": (transformers.LlamaConfig, plain(10_000.0) | dict(num_key_value_heads=6)),
    "llama3": (transformers.LlamaConfig, dict(rope_parameters=SCALED, num_attention_heads=3)),
    "smollm2": (transformers.LlamaConfig, plain(900.0) | dict(tie_word_embeddings=True)),
}
IDS = torch.randint(0, 89, (2, 120), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def open_models(tmp_path_factory):
    """Return each family's transformers model, and the folder that transformers wrote of it."""
    made = {}
    for name, (config, changes) in FAMILIES.items():
        reference = transformers.AutoModelForCausalLM.from_config(config(**SIZES | changes)).eval()
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for path, weight in reference.named_parameters():
                weight.normal_(0, 0.3, generator=generator)
                if "norm" in path:
                    weight.add_(1)
                elif weight.dim() == 2:
                    weight.mul_(0.5 if "embed" in path else 4 * weight.shape[1] ** -0.5)
        folder = tmp_path_factory.mktemp(name) / "model"
        reference.save_pretrained(folder)
        made[name] = reference, folder
    return made


@torch.no_grad()
def logits_of(anything):
    out = anything(IDS)
    return out if torch.is_tensor(out) else out.logits


def distance(a, b):
    """Return the largest difference, as a share of the largest logit."""
    return ((a - b).abs().max() / b.abs().max()).item()


def reload(folder):
    """Return what transformers makes of a folder, which must hold its model and nothing else."""
    loaded, about = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, attn_implementation="eager"
    )
    assert not any(about.values())
    return loaded.eval()


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edited(source, target, **changes):
    """Copy a folder with fields of its config.json changed; None takes a field out."""
    shutil.copytree(source, target)
    raw = json.loads((target / "config.json").read_text()) | changes
    raw = {name: value for name, value in raw.items() if value is not None}
    (target / "config.json").write_text(json.dumps(raw))
    return target


def weights_edited(source, target, edit):
    """Copy a folder with its tensors, a dictionary, changed by `edit`."""
    shutil.copytree(source, target)
    tensors = safetensors.torch.load_file(target / "model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(open_models, family):
    reference, folder = open_models[family]
    gpt, expected = pretrained.load(folder), logits_of(reference)
    cache = Cache(gpt, 2, 120)
    with torch.no_grad():
        pieces = torch.cat([gpt(part, cache) for part in IDS.split([50, 1, 69], dim=1)], dim=1)
    assert distance(logits_of(gpt), expected) < 1e-5
    assert distance(pieces, expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_by_transformers_and_here_bit_for_bit(
    open_models, family, tmp_path
):
    reference, folder = open_models[family]
    gpt, out = pretrained.load(folder), tmp_path / "much/deeper/out"
    pretrained.save(gpt, out)
    loaded, again = reload(out), pretrained.load(out)
    assert type(loaded) is type(reference) and same_weights(loaded, reference)
    assert torch.equal(logits_of(loaded), logits_of(reference))
    assert again.config == gpt.config and same_weights(again, gpt)
    assert (again.head.weight is again.embed.weight) == again.config.tied_head
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with safetensors.safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # which older transformers ask for


def test_a_model_of_ours_becomes_an_open_one(tmp_path):
    """Also where no checkpoint exists: the sizes decide which family says them."""
    for options, expected in (
        ({}, "LlamaForCausalLM"),
        ({"qkv_bias": True, "head_dim": 10}, "Qwen2ForCausalLM"),
        ({"qk_norm": True, "rope_scaling": (4.0, 1.0, 4.0, 32)}, "Qwen3ForCausalLM"),
    ):
        gpt = GPT(
            pretrained.OpenConfig(89, 2, 4, 2, 24, 20, 128, tied_head=True, **options), seed=4
        )
        pretrained.save(gpt, tmp_path / expected)
        loaded = reload(tmp_path / expected)
        assert type(loaded).__name__ == expected
        assert distance(logits_of(gpt), logits_of(loaded)) < 1e-5


# --- folders --------------------------------------------------------------------------------------


def test_several_files_are_one_model(open_models, tmp_path):
    reference, folder = open_models["qwen2.5"]
    reference.save_pretrained(tmp_path / "several", max_shard_size="40KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    several = pretrained.load(str(tmp_path / "several"))
    assert same_weights(several, pretrained.load(folder))


@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_both_layouts_of_the_rope_settings_are_read_and_written(open_models, family, tmp_path):
    _, folder = open_models[family]
    sizes = pretrained.read_config(folder)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    for key in ("type", "rope_type"):
        scaling = rope | {key: kind} if kind == "llama3" else None
        old = edited(
            folder, tmp_path / key, rope_parameters=None, rope_theta=theta, rope_scaling=scaling
        )
        assert pretrained.read_config(old) == sizes
    pretrained.save(pretrained.load(folder), tmp_path / "new")
    for name, gone in {"as4": ["rope_parameters"], "as5": ["rope_theta", "rope_scaling"]}.items():
        layout = edited(tmp_path / "new", tmp_path / name, **dict.fromkeys(gone))
        assert pretrained.read_config(layout) == sizes
        assert reload(layout).config.rope_parameters == rope | {
            "rope_theta": theta, "rope_type": kind,
        }  # fmt: skip


def test_fields_that_older_folders_leave_out_have_their_meaning(open_models, tmp_path):
    _, llama = open_models["llama2"]
    names = ("num_key_value_heads", "head_dim", "rope_parameters", "tie_word_embeddings",
             "hidden_act", "attention_bias", "mlp_bias", "architectures")  # fmt: skip
    old = edited(llama, tmp_path / "old", **dict.fromkeys(names))
    assert pretrained.read_config(old) == pretrained.read_config(llama)
    _, qwen = open_models["qwen3"]
    wide = edited(qwen, tmp_path / "wide", head_dim=None)
    assert pretrained.read_config(wide)["head_dim"] == 128


def test_the_dtype_asked_for_is_that_of_the_weights_and_of_what_is_written(open_models, tmp_path):
    _, folder = open_models["qwen3"]
    half = pretrained.load(folder, torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert (half.cos.dtype, half.sin.dtype) == (torch.float32, torch.float32)
    pretrained.save(half, tmp_path / "half")
    assert reload(tmp_path / "half").dtype == torch.bfloat16
    raw = json.loads((tmp_path / "half/config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"
    assert same_weights(pretrained.load(tmp_path / "half", torch.bfloat16), half)


def test_a_source_gives_its_companions_and_the_fields_that_are_not_ours(open_models, tmp_path):
    _, folder = open_models["llama2"]
    source = edited(
        folder, tmp_path / "source", eos_token_id=[5, 7], note="kept", max_position_embeddings=99
    )
    for name in pretrained.COMPANIONS[:3]:
        (source / name).write_text(name)
    (source / "README.md").write_text("not copied")
    pretrained.save(pretrained.load(folder), tmp_path / "out", source)
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert (raw["eos_token_id"], raw["note"]) == ([5, 7], "kept")
    assert raw["max_position_embeddings"] == 160
    companions = {*pretrained.COMPANIONS[:3], "generation_config.json"}
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == companions | {"config.json", "model.safetensors"}
    assert (tmp_path / "out/tokenizer.json").read_text() == "tokenizer.json"


def test_buffers_and_a_tied_head_that_was_stored_after_all_are_no_surprise(open_models, tmp_path):
    _, folder = open_models["smollm2"]

    def edit(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    more = weights_edited(folder, tmp_path / "more", edit)
    assert same_weights(pretrained.load(more), pretrained.load(folder))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama2", {"model_type": "mistral"}, "'mistral'.*accepted: 'llama' or 'qwen2' or 'qwen3'"),
        ("llama2", {"model_type": None}, "model_type None"),
        ("llama2", {"architectures": ["LlamaModel"]}, "LlamaModel.*not supported"),
        ("llama3", {"rope_parameters": SCALED | {"rope_type": "yarn"}},
         "rope_type 'yarn' is not supported; accepted: 'default' or 'llama3'"),
        ("llama2", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ("llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ("llama2", {"attention_bias": True}, "attention_bias True.*accepted: False"),
        ("llama2", {"mlp_bias": True}, "mlp_bias True.*accepted: False"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window True"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
        ("llama2", {"hidden_act": "gelu"}, "hidden_act 'gelu'.*accepted: 'silu'"),
        ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama2", {"hidden_size": None}, "hidden_size must be a positive int, got None"),
        ("llama2", {"vocab_size": "89"}, "vocab_size must be a positive int, got '89'"),
        ("llama2", {"num_hidden_layers": 0}, "num_hidden_layers must be a positive int, got 0"),
    ],
)  # fmt: skip
def test_configurations_of_another_kind_are_refused_by_name(
    open_models, family, changes, named, tmp_path
):
    other = edited(open_models[family][1], tmp_path / "other", **changes)
    with pytest.raises(ValueError, match=named) as error:
        pretrained.load(other)
    assert "\n" not in str(error.value)


def cut_rows(name, tensors):
    tensors[name] = tensors[name][1:].clone()


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"),
         "lacks 1 tensors, first model.layers.2.mlp.up_proj.weight"),
        (lambda tensors: tensors.pop("lm_head.weight"), "lacks 1 tensors, first lm_head.weight"),
        (lambda tensors: tensors.update(more=torch.ones(2)), "unexpectedly, 1 tensors, first more"),
        (partial(cut_rows, "model.layers.1.self_attn.k_proj.weight"),
         r"layers.1.self_attn.k_proj.weight must be \(48, 48\), got \(47, 48\)"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(open_models, edit, named, tmp_path):
    broken = weights_edited(open_models["llama2"][1], tmp_path / "broken", edit)
    with pytest.raises(ValueError, match=named):
        pretrained.load(broken)


def test_missing_and_damaged_files_are_refused_by_name(open_models, tmp_path):
    reference, folder = open_models["llama2"]

    def refused(break_it, named, **options):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        reference.save_pretrained(tmp_path / "broken", **options)
        break_it(tmp_path / "broken")
        with pytest.raises(ValueError, match=named):
            pretrained.load(tmp_path / "broken")

    def writes(name, text):
        return lambda folder: (folder / name).write_text(text)

    def halve(folder):
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])

    several = {"max_shard_size": "40KB"}
    index = "model.safetensors.index.json"
    refused(shutil.rmtree, "cannot read .*config.json")
    refused(writes("config.json", "{"), "cannot read .*config.json")
    refused(lambda folder: (folder / "model.safetensors").unlink(),
            f"has neither model.safetensors nor {index}")  # fmt: skip
    refused(halve, "cannot read .*model.safetensors")
    refused(lambda folder: next(folder.glob("model-00002*")).unlink(),
            "cannot read .*model-00002-of", **several)  # fmt: skip
    refused(writes(index, "{}"), "lacks [0-9]+ tensors, first lm_head.weight", **several)


def test_a_folder_is_written_whole_or_not_at_all(open_models, tmp_path, monkeypatch):
    _, folder = open_models["llama2"]
    gpt, out = pretrained.load(folder), tmp_path / "place" / "out"

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(safetensors.torch, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            pretrained.save(gpt, out, folder)
    assert not list(out.parent.iterdir())
    pretrained.save(gpt, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="out exists"):
        pretrained.save(pretrained.load(open_models["qwen3"][1]), out)
    assert (out / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="cannot read .*nowhere.config.json"):
        pretrained.save(gpt, tmp_path / "new", tmp_path / "nowhere")
    both = GPT(GPTConfig(vocab_size=7, qk_norm=True, qkv_bias=True))
    with pytest.raises(ValueError, match="both qk_norm and qkv_bias"):
        pretrained.save(both, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_without_safetensors_the_message_names_the_version_that_is_tested(
    open_models, tmp_path, monkeypatch
):
    _, folder = open_models["llama2"]
    gpt = pretrained.load(folder)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for act in (lambda: pretrained.load(folder), lambda: pretrained.save(gpt, tmp_path / "out")):
        with pytest.raises(ValueError, match="need: pip install safetensors==") as error:
            act()
        assert str(error.value).split("==")[1] == safetensors.__version__
