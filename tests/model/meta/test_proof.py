"""A conversion that is wrong is found out by its own proof, and leaves no folder."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

from recipe import convert
from recipe.model.meta import convert as meta_convert
from recipe.model.meta import proof as meta_proof
from recipe.model.meta.layout import Params
from recipe.settings import RunFailed
from tests.model.meta.files import COLUMNS, ROWS, tiny_llama, write_shards

LOGITS = "logits differ from those of Meta's files by"


@pytest.fixture
def meta(request, tmp_path, ranks, fewer_texts):
    """A model with scaled frequencies; a test can ask for another number of shards."""
    shards, embedding = getattr(request, "param", (2, COLUMNS))
    model = tiny_llama(num_hidden_layers=2, num_key_value_heads=4)
    params = {"vocab_size": 768, "n_kv_heads": 4, "use_scaled_rope": True}
    folder = write_shards(
        model, tmp_path / "meta", shards=shards, embedding=embedding, params=params
    )
    (folder / "tokenizer.model").write_bytes(ranks.read_bytes())
    return folder


HOWEVER_SPLIT = pytest.mark.parametrize(
    "meta", [(1, ROWS), (2, ROWS), (4, COLUMNS)], indirect=True, ids=str
)


def joined_otherwise(monkeypatch, change):
    """``change`` gets each joined tensor and what it is."""
    real = meta_convert._joined
    monkeypatch.setattr(
        meta_convert, "_joined", lambda found, entry: change(entry, real(found, entry))
    )


@HOWEVER_SPLIT
def test_rotary_pairs_left_as_neighbours_are_found(meta, refused, monkeypatch):
    monkeypatch.setattr(meta_convert, "halves_of_pairs", lambda weight, heads: weight)
    refused(meta, LOGITS, error=RunFailed)


@pytest.mark.parametrize("name", ["attention.wq", "attention.wk"])
def test_rotary_pairs_of_one_projection_left_as_they_are_are_found(
    meta, refused, monkeypatch, name
):
    real = meta_convert.halves_of_pairs
    count = {"attention.wq": 8, "attention.wk": 4}[name]
    monkeypatch.setattr(
        meta_convert,
        "halves_of_pairs",
        lambda weight, heads: weight if heads == count else real(weight, heads),
    )
    refused(meta, LOGITS, error=RunFailed)


@pytest.mark.parametrize(
    "name", ["attention.wo", "feed_forward.w2", "attention.wv", "tok_embeddings", "output"]
)
@HOWEVER_SPLIT
def test_parts_joined_along_the_other_axis_are_found(meta, refused, monkeypatch, name):
    """In the right shape, so that only the logits tell."""

    def change(entry, whole):
        if f"{name}.weight" not in entry.name:
            return whole
        axis = entry.split.value
        return torch.cat(whole.chunk(2, dim=axis), dim=1 - axis).reshape(whole.shape)

    joined_otherwise(monkeypatch, change)
    refused(meta, LOGITS, error=RunFailed)


@pytest.mark.parametrize("name", ["attention.wo", "feed_forward.w2", "output", "norm"])
def test_parts_joined_in_another_order_are_found(meta, refused, monkeypatch, name):
    def change(entry, whole):
        axis = entry.split.value or 0
        parts = reversed(whole.chunk(2, dim=axis))
        return torch.cat(list(parts), dim=axis) if f"{name}.weight" in entry.name else whole

    joined_otherwise(monkeypatch, change)
    refused(meta, LOGITS, error=RunFailed)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("mlp.gate_proj", "mlp.up_proj"),
        ("self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.q_proj", "self_attn.o_proj"),
        ("input_layernorm", "post_attention_layernorm"),
    ],
)
def test_tensors_under_each_other_s_name_are_found(meta, refused, monkeypatch, one, other):
    real = Params.layer

    def layer(params, number):
        def renamed(entry):
            name = entry.hugging_face
            if one in name:
                name = name.replace(one, other)
            elif other in name:
                name = name.replace(other, one)
            return replace(entry, hugging_face=name)

        return [renamed(entry) for entry in real(params, number)]

    monkeypatch.setattr(Params, "layer", layer)
    refused(meta, LOGITS, error=RunFailed)


def test_layers_in_another_order_are_found(meta, refused, monkeypatch):
    real = Params.layer

    def layer(params, number):
        return [
            replace(
                entry, hugging_face=entry.hugging_face.replace(f".{number}.", f".{1 - number}.")
            )
            for entry in real(params, number)
        ]

    monkeypatch.setattr(Params, "layer", layer)
    refused(meta, LOGITS, error=RunFailed)


def test_an_output_that_is_the_embedding_is_found(meta, refused, monkeypatch):
    monkeypatch.setattr(meta_convert, "_tied", lambda found: True)
    refused(meta, LOGITS, error=RunFailed)


def test_weights_that_lost_bits_are_found(meta, refused, monkeypatch):
    joined_otherwise(monkeypatch, lambda entry, whole: whole.bfloat16().float())
    refused(meta, LOGITS, error=RunFailed)


def test_a_single_weight_that_changed_is_found(meta, refused, monkeypatch):
    def change(entry, whole):
        if entry.name == "layers.1.attention.wo.weight":
            whole[3, 5] += 0.1
        return whole

    joined_otherwise(monkeypatch, change)
    refused(meta, LOGITS, error=RunFailed)


def test_logits_that_are_no_numbers_prove_nothing(meta, refused, monkeypatch):
    real = meta_proof.converted_logits
    monkeypatch.setattr(
        meta_proof, "converted_logits", lambda *given: [x * math.nan for x in real(*given)]
    )
    refused(meta, f"{LOGITS} nan", error=RunFailed)


def edited(config, **values):
    rope = {**config["rope_parameters"], **values.pop("rope", {})}
    return {**config, **values, "rope_parameters": rope}


@pytest.mark.parametrize(
    "values",
    [
        {"rms_norm_eps": 1e-6 + 1e-4},
        {"rope": {"rope_theta": 20_000.0}},
        {"rope": {"rope_theta": 500_000.0}},
        {"rope": {"rope_type": "default"}},
        {"rope": {"factor": 2.0}},
        {"rope": {"low_freq_factor": 2.0}},
        {"rope": {"high_freq_factor": 32.0}},
        {"num_hidden_layers": 1},
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_another_config_in_the_written_folder_is_found(meta, refused, monkeypatch, values):
    """It is the file that is proven, as whoever loads the folder reads it."""
    real = LlamaConfig.save_pretrained

    def save(config, folder):
        real(config, folder)
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(edited(json.loads(file.read_text()), **dict(values))))

    monkeypatch.setattr(LlamaConfig, "save_pretrained", save)
    refused(meta, LOGITS, error=RunFailed)


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_a_config_built_from_other_numbers_is_found(meta, refused, monkeypatch, name):
    class Otherwise(LlamaConfig):
        def __init__(self, **given):
            if name in given:
                given[name] *= 100
            elif "rope_parameters" in given:
                rope = given["rope_parameters"]
                given["rope_parameters"] = {**rope, "rope_theta": 2 * rope["rope_theta"]}
            super().__init__(**given)

    monkeypatch.setattr(meta_convert, "LlamaConfig", Otherwise)
    refused(meta, LOGITS, error=RunFailed)


def test_another_tokenizer_in_the_written_folder_is_found(meta, refused, monkeypatch):
    real = PreTrainedTokenizerFast.save_pretrained

    def save(tokenizer, folder):
        real(tokenizer, folder)
        file = Path(folder) / "tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["merges"].reverse()
        file.write_text(json.dumps(content))

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
    refused(meta, "has ids .* once converted", error=RunFailed)


def test_a_refusal_while_the_folder_is_written_leaves_nothing(meta, refused, monkeypatch):
    def full(*_):
        raise RunFailed("no space left on device")

    monkeypatch.setattr(meta_convert, "_saved", full)
    refused(meta, "no space left", error=RunFailed)


def test_a_bug_of_ours_leaves_nothing_either(meta, refused, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(meta_convert, "_named", broken)
    refused(meta, "a bug", error=ZeroDivisionError)


def test_what_float32_rounds_too_far_is_judged_in_float64(small, tmp_path, monkeypatch):
    folder = small(shards=2)
    convert.main([str(folder), str(tmp_path / "first")])
    rounded = json.loads((tmp_path / "first/conversion.json").read_text())["proof"]
    assert rounded["computed_in"] == "float32"
    monkeypatch.setattr(meta_proof, "TOLERANCE", 0.9 * rounded["difference"])
    convert.main([str(folder), str(tmp_path / "second")])
    exact = json.loads((tmp_path / "second/conversion.json").read_text())["proof"]
    assert exact["computed_in"] == "float64"
    assert exact["difference"] < 0.9 * rounded["difference"]
    assert exact["same_next"] == exact["positions"] == rounded["positions"]
