"""What is converted is the model that was written in Meta's layout: every bit and every token.

Oracle: the stock transformers model that the shards were made of.
"""

import hashlib
import json
from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
from torch.nn import Parameter
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipe import convert
from recipe.model.meta import convert as meta_convert
from recipe.model.meta import tokenizer as meta_tokenizer
from recipe.sealed import damage
from tests.model.meta.files import (
    COLUMNS,
    DEFAULT_ROPE,
    ROWS,
    SCALED_ROPE,
    as_torch_1_wrote_it,
    edit_shard,
    greedy,
    repack,
    shard_file,
    tiny_llama,
    write_shards,
)

LLAMA_3 = {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "intermediate_size": 224}
LLAMA_3_PARAMS = {
    "vocab_size": 768, "n_kv_heads": 4, "rope_theta": 500000.0, "ffn_dim_multiplier": 1.3,
}  # fmt: skip
# Shape, params.json beside it, how the embedding is split, and which tokenizer.
FAMILIES = {
    "llama-2": ({"vocab_size": 448}, {"vocab_size": -1}, COLUMNS, "pieces"),
    "llama-3": ({**LLAMA_3, "rope_parameters": DEFAULT_ROPE}, LLAMA_3_PARAMS, ROWS, "ranks"),
    "llama-3.1": (
        {**LLAMA_3, "rope_parameters": SCALED_ROPE},
        {**LLAMA_3_PARAMS, "use_scaled_rope": True},
        ROWS,
        "ranks",
    ),
}
CASES = [(family, shards, "float32") for family in FAMILIES for shards in (1, 2, 4)]
CASES += [("llama-2", 2, "float16"), ("llama-3.1", 4, "bfloat16")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def converted(request, tmp_path_factory):
    """The stock model, what was written of it, and what that was converted to."""
    family, shards, dtype = request.param
    shape, params, embedding, kind = FAMILIES[family]
    folder = tmp_path_factory.mktemp("converted")
    model = tiny_llama(**shape)
    for parameter in model.parameters():  # not .to(), which rounds the rotary frequencies too
        parameter.data = parameter.data.to(getattr(torch, dtype))
    write_shards(model, folder / "meta", shards=shards, embedding=embedding, params=params)
    tokenizer = request.getfixturevalue(kind)
    if shards == 1:
        (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
        named = []
    else:
        named = ["--tokenizer", str(tokenizer)]
    with pytest.MonkeyPatch.context() as patch:
        if shards > 1:
            patch.setattr(meta_tokenizer, "STRINGS", 200)
        convert.main([str(folder / "meta"), str(folder / "model"), *named])
    return model, folder / "meta", folder / "model"


def loaded(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype="auto").eval()


def test_each_weight_has_the_same_bits(converted):
    model, _, folder = converted
    found, expected = loaded(folder).state_dict(), model.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_config_says_what_the_model_was_built_with(converted):
    model, _, folder = converted
    found = LlamaConfig.from_pretrained(folder)
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
        "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings",
        "hidden_act", "attention_bias", "mlp_bias",
    ):  # fmt: skip
        assert getattr(found, name) == getattr(model.config, name), name
    expected = {"rope_type": "default", "rope_theta": 10_000.0, **model.config.rope_parameters}
    assert found.rope_parameters == expected


def test_logits_are_the_same(converted):
    model, _, folder = converted
    ids = torch.randint(model.config.vocab_size, (2, 200), generator=torch.manual_seed(1))
    with torch.no_grad():
        difference = loaded(folder).float()(ids).logits - deepcopy(model).float()(ids).logits
    assert difference.abs().max() < 1e-4


def prompts(vocabulary):
    """100 of random ids, of four lengths."""
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(vocabulary, (25, length), generator=draw) for length in (1, 5, 17, 40)]


def test_greedy_decoding_gives_the_same_tokens(converted):
    model, _, folder = converted
    found = loaded(folder)
    for ids in prompts(model.config.vocab_size):
        ours, theirs = greedy(found, ids), greedy(model, ids)
        assert ours.shape == (25, ids.shape[1] + 20)
        assert torch.equal(ours, theirs)


def test_the_folder_is_sealed_and_its_proof_true(converted):
    model, meta, folder = converted
    assert damage(folder) == []
    facts = json.loads((folder / "conversion.json").read_text())
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["dtype"] == str(model.dtype).removeprefix("torch.")
    files = sorted(meta.glob("consolidated.*.pth"))
    assert facts["shards"] == len(files)
    tokenizer = facts["sources"].pop("tokenizer.model")
    files_named_so = meta.parents[1].rglob("tokenizer.model")
    assert tokenizer in {hashlib.sha256(one.read_bytes()).hexdigest() for one in files_named_so}
    assert facts["sources"] == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in [meta / "params.json", *files]
    }
    assert facts["strings"] == (10_000 if len(files) == 1 else 200)
    proof = facts["proof"]
    assert 0 < proof["difference"] <= proof["tolerance"] == 1e-4
    assert 300 < proof["same_next"] == proof["positions"]
    context = LlamaConfig.from_pretrained(folder).max_position_embeddings
    assert any(f"context of {context:,} tokens" in note for note in facts["notes"])


def test_the_index_lists_each_tensor_once(converted):
    model, _, folder = converted
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert index["metadata"]["total_size"] == total
    files = {file.name for file in folder.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files


@pytest.mark.parametrize(
    ("params", "options", "expected"),
    [
        ({}, [], 8192),
        ({"use_scaled_rope": True}, [], 131_072),
        ({"use_scaled_rope": True}, ["--context", "77"], 77),
    ],
)
def test_the_context_is_that_of_the_family_or_as_asked(small, tmp_path, params, options, expected):
    convert.main([str(small(**params)), str(tmp_path / "model"), *options])
    assert LlamaConfig.from_pretrained(tmp_path / "model").max_position_embeddings == expected


TINY = {
    "vocab_size": 768, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1234,
}  # fmt: skip


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({}, 1234),
        ({"tie_word_embeddings": True}, 8192),
        ({"num_key_value_heads": 8}, 8192),
        ({"max_position_embeddings": 131_072}, 8192),  # its frequencies would be scaled
    ],
)
def test_the_context_of_a_published_model_of_this_shape_is_taken(
    small, tmp_path, monkeypatch, other, expected
):
    monkeypatch.setattr(meta_convert, "published", lambda: {"some/one": {**TINY, **other}})
    convert.main([str(small()), str(tmp_path / "model")])
    assert LlamaConfig.from_pretrained(tmp_path / "model").max_position_embeddings == expected
    notes = json.loads((tmp_path / "model/conversion.json").read_text())["notes"]
    assert ("its shape is that of some/one" in notes) == (expected == 1234)


def same(folder, model):
    found = loaded(folder).state_dict()
    return all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("written", ["twice", "once"])
@pytest.mark.parametrize("embedding", [ROWS, COLUMNS])
def test_tied_embeddings_are_recognised(tmp_path, ranks, fewer_texts, shards, written, embedding):
    model = tiny_llama(num_hidden_layers=1, tie_word_embeddings=True)
    meta = write_shards(
        model, tmp_path / "meta", shards=shards, embedding=embedding, params={"vocab_size": 768}
    )
    if written == "once":
        for number in range(shards):
            edit_shard(meta, number, lambda tensors: tensors.pop("output.weight"))
    convert.main([str(meta), str(tmp_path / "model"), "--tokenizer", str(ranks)])
    found = loaded(tmp_path / "model")
    assert found.config.tie_word_embeddings
    assert found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()
    assert same(tmp_path / "model", model)


def test_tied_and_scaled_is_taken_for_llama_3_2(tmp_path, ranks, fewer_texts):
    rope = {**SCALED_ROPE, "factor": 32.0}
    model = tiny_llama(tie_word_embeddings=True, rope_parameters=rope)
    params = {"vocab_size": 768, "use_scaled_rope": True, "rope_theta": 500_000.0}
    meta = write_shards(model, tmp_path / "meta", params=params)
    convert.main([str(meta), str(tmp_path / "model"), "--tokenizer", str(ranks)])
    assert loaded(tmp_path / "model").config.rope_parameters == rope
    facts = json.loads((tmp_path / "model/conversion.json").read_text())
    assert any("scaled by 32, as in Llama 3.2" in note for note in facts["notes"])


def test_factors_of_params_json_are_taken(small, tmp_path):
    meta = small(
        use_scaled_rope=True, rope_theta=5e5, rope_scaling_factor=16, rope_high_freq_factor=2
    )
    convert.main([str(meta), str(tmp_path / "model")])
    rope = LlamaConfig.from_pretrained(tmp_path / "model").rope_parameters
    assert rope == {**SCALED_ROPE, "factor": 16.0, "high_freq_factor": 2.0}


def test_tensors_that_share_a_storage_are_told_apart(small, small_llama, tmp_path):
    """As in Llama 1 and 2, of which a layer's tensors are slices of one."""
    meta = small(shards=1)

    def into_one_storage(tensors):
        whole = torch.cat([tensor.flatten() for tensor in tensors.values()])
        sizes = [tensor.numel() for tensor in tensors.values()]
        slices = zip(tensors, whole.split(sizes), strict=True)
        tensors |= {name: part.view(tensors[name].shape) for name, part in slices}

    edit_shard(meta, 0, into_one_storage)
    convert.main([str(meta), str(tmp_path / "model")])
    assert same(tmp_path / "model", small_llama)


def test_a_file_without_torch_s_layout_is_read_where_its_tensors_lie(small, small_llama, tmp_path):
    meta = small(shards=2)
    for number in (0, 1):
        repack(shard_file(meta, number), as_torch_1_wrote_it)
    convert.main([str(meta), str(tmp_path / "model")])
    assert same(tmp_path / "model", small_llama)


def test_parameters_and_other_mappings_are_read(small, small_llama, tmp_path):
    meta = small(shards=1)
    meta_tensors = torch.load(shard_file(meta, 0), weights_only=True)
    torch.save(OrderedDict((k, Parameter(v)) for k, v in meta_tensors.items()), shard_file(meta, 0))
    convert.main([str(meta), str(tmp_path / "model")])
    assert same(tmp_path / "model", small_llama)


def test_the_tokenizer_of_the_written_folder_loads(converted):
    _, _, folder = converted
    assert AutoTokenizer.from_pretrained(folder)("the").input_ids[0] in (1, 512)
