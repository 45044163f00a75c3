"""params.json: each value that no model has is refused by its name; those of published models give
their published shapes.
"""

import json
import math

import pytest
import torch
from transformers import LlamaForCausalLM

from recipe import convert
from recipe.model.meta.layout import Params, Split, load_params
from recipe.model.shapes import config_of, published
from recipe.settings import UserError
from tests.model.meta.files import edit_params

WHOLE = ["dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "vocab_size"]
REAL = [
    "norm_eps", "ffn_dim_multiplier", "rope_theta", "rope_scaling_factor", "rope_high_freq_factor",
]  # fmt: skip
NEEDED = ["dim", "n_layers", "n_heads", "norm_eps"]


def refused_values(name):
    """Of another type, or no size."""
    yield from ["64", [64], {"n": 64}, True, 0, -3, -1.5, math.nan, math.inf, -math.inf]
    yield from [10**400, 10**18]
    if name in WHOLE:
        yield from [64.0, 0.5]
    if name in NEEDED:
        yield None
    if name != "vocab_size":
        yield -1


@pytest.mark.parametrize("name", [*WHOLE, *REAL])
def test_a_value_that_no_model_has_is_refused_by_name(small, refused, name):
    folder = small(shards=1)
    for value in refused_values(name):
        edit_params(folder, **{name: value})
        message = refused(folder, f"params.json: {name}: is ")
        assert len(message.splitlines()) == 1


@pytest.mark.parametrize("value", [1, 0, "true", [], {}])
def test_a_switch_is_true_or_false(small, refused, value):
    folder = small(shards=1, use_scaled_rope=value)
    refused(folder, "params.json: use_scaled_rope: is ")


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_field_is_refused_by_name(small, refused, name):
    folder = small(shards=1)
    edit_params(folder, **{name: ...})
    refused(folder, f"params.json: {name}: is missing")


@pytest.mark.parametrize(
    ("name", "told"), [("n_kv_heads", "attention.wk"), ("multiple_of", "feed_forward.w1")]
)
def test_a_missing_field_that_has_a_default_is_held_to_the_tensors(small, refused, name, told):
    folder = small(shards=1)
    edit_params(folder, **{name: ...})
    refused(folder, f"{told}.weight: is of shape")


@pytest.mark.parametrize(
    "values",
    [
        {"dim": 128}, {"n_heads": 4}, {"n_kv_heads": 2}, {"n_kv_heads": None}, {"n_layers": 2},
        {"n_layers": 10**11}, {"multiple_of": 256}, {"ffn_dim_multiplier": 1.3},
        {"vocab_size": 767}, {"n_heads": 5}, {"n_heads": 64}, {"n_kv_heads": 3},
        {"ffn_dim_multiplier": 1e-9}, {"ffn_dim_multiplier": 1e11},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_of_another_model_are_refused(small, refused, values):
    refused(small(shards=1, **values), "params.json")


@pytest.mark.parametrize(
    "name", ["moe_args", "quantization_args", "lora_args", "vision_chunk_size"]
)
def test_what_no_text_model_in_full_precision_has_is_refused(small, refused, name):
    folder = small(shards=1, **{name: {"num_experts": 16}})
    refused(folder, f"has {name}, which no Llama 1, 2 or 3 text model")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b'"text"', b"7", b"null", b"[" * 100_000, b"9" * 5000],
    ids=lambda content: repr(content[:8]),
)
def test_what_is_no_table_is_refused(small, refused, content):
    folder = small(shards=1)
    (folder / "params.json").write_bytes(content)
    refused(folder, "params.json: (not readable as JSON|is no table)")


def test_without_params_json_is_refused(small, refused):
    folder = small(shards=1)
    (folder / "params.json").unlink()
    refused(folder, "has no params.json. Name the folder with Meta's own files")
    (folder / "original").mkdir()
    (folder / "original/params.json").write_text("{}")
    refused(folder, "has no params.json. Name .*/original\\.")


def test_what_says_nothing_of_the_weights_is_passed_over(small, tmp_path):
    folder = small(shards=1, max_batch_size=32, max_seq_len=2048)
    convert.main([str(folder), str(tmp_path / "model")])


# As Meta published them. 3.1's 405B is that in 8 shards.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": {
        "dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05,
        "vocab_size": -1,
    },
    "meta-llama/Llama-2-13b-hf": {
        "dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-05,
        "vocab_size": -1,
    },
    "meta-llama/Llama-2-70b-hf": {
        "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64,
        "n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1,
    },
    "meta-llama/Meta-Llama-3-8B": {
        "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
        "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0,
    },
    "meta-llama/Meta-Llama-3-70B": {
        "dim": 8192, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "n_heads": 64,
        "n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "meta-llama/Llama-3.1-405B": {
        "dim": 16384, "ffn_dim_multiplier": 1.2, "multiple_of": 4096, "n_heads": 128,
        "n_kv_heads": 8, "n_layers": 126, "norm_eps": 1e-05, "rope_theta": 500000.0,
        "use_scaled_rope": True, "vocab_size": 128256,
    },
    "meta-llama/Llama-3.2-1B": {
        "dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256, "n_heads": 32,
        "n_kv_heads": 8, "n_layers": 16, "norm_eps": 1e-05, "rope_theta": 500000.0,
        "use_scaled_rope": True, "vocab_size": 128256,
    },
    "meta-llama/Llama-3.2-3B": {
        "dim": 3072, "ffn_dim_multiplier": 1.0, "multiple_of": 256, "n_heads": 24,
        "n_kv_heads": 8, "n_layers": 28, "norm_eps": 1e-05, "rope_theta": 500000.0,
        "use_scaled_rope": True, "vocab_size": 128256,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_params_give_the_names_and_shapes_of_the_stock_model(tmp_path, name):
    (tmp_path / "params.json").write_text(json.dumps(PUBLISHED[name]))
    params, shape = load_params(tmp_path / "params.json"), published()[name]
    entries = [entry for number in range(params.n_layers) for entry in params.layer(number)]
    entries += params.around(shape["vocab_size"], Split.ROWS)
    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(shape))
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert {entry.hugging_face: entry.shape for entry in entries} == expected
    twice = math.prod(entries[-1].shape) if shape.get("tie_word_embeddings") else 0
    assert sum(math.prod(entry.shape) for entry in entries) - twice == shape["parameters"]


def test_heads_that_cannot_turn_in_pairs_are_refused(tmp_path):
    content = {"dim": 15, "n_layers": 1, "n_heads": 5, "norm_eps": 1e-5}
    (tmp_path / "params.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="fit no rotary attention"):
        load_params(tmp_path / "params.json")


def test_the_width_is_that_of_meta_s_feed_forward():
    """Llama 1's 65B: 22016, as its paper's code has it."""
    assert Params(dim=8192, n_layers=80, n_heads=64, norm_eps=1e-5).hidden_dim == 22016
