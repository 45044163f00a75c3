"""What is loaded is what was asked for, or nothing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipe.model.checkpoint import load_base, load_tokenizer
from recipe.settings import ModelSettings, UserError


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
    ],
)
def test_dtype(tiny_checkpoint, dtype, expected):
    base = load_base(ModelSettings(name_or_path=str(tiny_checkpoint), dtype=dtype))
    assert {p.dtype for p in base.parameters()} == {expected}


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def test_another_architecture_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    with pytest.raises(UserError, match="'mistral' model; this recipe trains LlamaForCausalLM"):
        load_base(ModelSettings(name_or_path=str(copy)))


def test_pickled_weights_are_not_read(copy):
    state = load_base(ModelSettings(name_or_path=str(copy))).state_dict()
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="could not be loaded"):
        load_base(ModelSettings(name_or_path=str(copy)))


def rewrite(copy, change):
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})


LAYER = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(LAYER), f"lacks weights .*{LAYER}"),
        (lambda w: w.pop("lm_head.weight"), "lacks weights .*lm_head.weight"),
        (lambda w: w.update({"model.q_norm.weight": torch.ones(4)}), "holds weights that no"),
        (lambda w: w.update({LAYER: torch.ones(3, 3)}), "could not be loaded|another shape"),
    ],
)
def test_weights_are_never_made_up(copy, change, message):
    rewrite(copy, change)
    with pytest.raises(UserError, match=message):
        load_base(ModelSettings(name_or_path=str(copy)))


def test_truncated_weights_are_refused(copy):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match="could not be loaded"):
        load_base(ModelSettings(name_or_path=str(copy)))


def test_a_revision_of_a_folder_is_refused(copy):
    with pytest.raises(UserError, match="v9 is of a hub id"):
        load_base(ModelSettings(name_or_path=str(copy), revision="v9"))


def test_a_tokenizer_without_eos_is_refused(copy):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    special = copy / "special_tokens_map.json"
    special.unlink(missing_ok=True)
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(ModelSettings(name_or_path=str(copy)))
