"""Published shapes are those of the models, and nothing is asked of a network."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from recipe.model.shapes import config_of, published, shape_of
from recipe.settings import UserError
from recipe.settings.schema import ModelSettings


@pytest.mark.parametrize("name", list(published()))
def test_a_shape_has_as_many_parameters_as_were_published(name):
    shape = published()[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(shape))
    assert sum(p.numel() for p in model.parameters()) == shape["parameters"]


def test_a_folder_goes_before_what_is_published(tiny_checkpoint):
    config, source = shape_of(ModelSettings(name_or_path=str(tiny_checkpoint)))
    assert (config.hidden_size, config.num_hidden_layers) == (64, 2)
    assert source == f"{tiny_checkpoint}/config.json"


def test_the_hub_cache_goes_before_what_is_published(tmp_path, monkeypatch):
    """Laid out as huggingface_hub does it."""
    name = "meta-llama/Llama-2-7b-hf"
    repository = tmp_path / "models--meta-llama--Llama-2-7b-hf"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    (snapshot / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 64})
    )
    monkeypatch.setattr("recipe.model.shapes.HF_HUB_CACHE", str(tmp_path))
    config, source = shape_of(ModelSettings(name_or_path=name))
    assert (config.num_hidden_layers, "cache" in source) == (3, True)


def test_what_nobody_knows_is_told_with_what_is_known():
    with pytest.raises(
        UserError, match=r"somebody/llama is no folder, .* meta-llama/Llama-2-7b-hf"
    ):
        shape_of(ModelSettings(name_or_path="somebody/llama"))
