"""The model as Meta's code computes it: equal to the stock model, and to a closed form."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from recipe.model.meta.forward import frequencies, meta_logits
from recipe.model.meta.layout import Params, Split, load_params
from recipe.model.meta.shards import open_shards
from tests.model.meta.files import (
    COLUMNS,
    DEFAULT_ROPE,
    ROWS,
    SCALED_ROPE,
    edit_shard,
    tiny_llama,
    write_shards,
)

# Wavelengths below 2048, between, and above 8192: each of the three cases of scaling.
SCALED = {"use_scaled_rope": True, "rope_theta": 500_000.0}


def drawn(lengths, vocabulary=768):
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(vocabulary, (length,), generator=draw).tolist() for length in lengths]


def logits(folder, sequences, embedding, scale=8.0):
    with torch.no_grad():
        return meta_logits(
            load_params(folder / "params.json"), open_shards(folder), sequences,
            embedding=Split(embedding), scale=scale,
        )  # fmt: skip


@pytest.mark.parametrize("embedding", [ROWS, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("rope", "params"),
    [({"rope_type": "default", "rope_theta": 1e4}, {}), (SCALED_ROPE, SCALED)],
    ids=["plain", "scaled"],
)
def test_logits_are_those_of_the_stock_model(tmp_path, embedding, shards, tied, rope, params):
    model = tiny_llama(num_key_value_heads=4, rope_parameters=rope, tie_word_embeddings=tied)
    params = {"vocab_size": 768, "n_kv_heads": 4, **params}
    folder = write_shards(
        model, tmp_path / "meta", shards=shards, embedding=embedding, params=params
    )
    if tied:
        for number in range(shards):
            edit_shard(folder, number, lambda tensors: tensors.pop("output.weight"))
    sequences = drawn([1, 2, 7, 400])
    for found, ids in zip(logits(folder, sequences, embedding), sequences, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0]
        assert found.shape == (len(ids), 768)
        assert (found - expected).abs().max() < 1e-4 * expected.std()


def test_scaling_is_seen_by_the_logits(tmp_path):
    """The control of the test above: without it they differ."""
    model = tiny_llama(rope_parameters=SCALED_ROPE)
    folder = write_shards(model, tmp_path / "meta", params={"vocab_size": 768, **SCALED})
    ids = drawn([400])
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits[0]
    for scale in (4.0, 16.0):
        (found,) = logits(folder, ids, ROWS, scale)
        assert (found - expected).abs().max() > 1e-3 * expected.std()


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("scale", [8.0, 32.0])
@pytest.mark.parametrize("high", [None, 2.0])
def test_scaled_frequencies_are_those_of_transformers(theta, head_dim, scale, high):
    params = Params(
        dim=4 * head_dim, n_layers=1, n_heads=4, norm_eps=1e-5, rope_theta=theta,
        use_scaled_rope=True, rope_high_freq_factor=high,
    )  # fmt: skip
    rope = {**SCALED_ROPE, "rope_theta": theta, "factor": scale, "high_freq_factor": high or 4.0}
    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=rope,
        max_position_embeddings=131_072,
    )  # fmt: skip
    expected, attention = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert attention == 1.0
    found = frequencies(params, scale)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    plain = [theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]
    slow = [scaled(one, scale, high or 4.0) for one in plain]
    assert found.tolist() == pytest.approx(slow, rel=1e-5)


def scaled(frequency, scale, high):
    """One at a time, in double precision: short waves stay, long ones become longer still."""
    waves = 8192 * frequency / (2 * math.pi)  # in the context of Llama 3
    if waves > high:
        return frequency
    smooth = max((waves - 1) / (high - 1), 0)
    return (1 - smooth) * frequency / scale + smooth * frequency


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_plain_frequencies_are_powers_of_theta(theta):
    params = Params(dim=64, n_layers=1, n_heads=2, norm_eps=1e-5, rope_theta=theta)
    expected = [theta ** (-2 * pair / 32) for pair in range(16)]
    assert frequencies(params, 8.0).tolist() == pytest.approx(expected, rel=1e-6)
    rope = {**DEFAULT_ROPE, "rope_theta": theta}
    stock = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope)
    )
    torch.testing.assert_close(frequencies(params, 8.0), stock.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shards", [1, 2])
def test_without_layers_that_add_anything_logits_are_a_closed_form(tmp_path, shards):
    """E_i / rms(E_i) · g · O_j, with E, g and O as numbers that a reader can multiply."""
    model = tiny_llama(
        num_hidden_layers=1, hidden_size=4, intermediate_size=8, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=2, rms_norm_eps=0.5,
    )  # fmt: skip
    state = model.state_dict()
    state["model.layers.0.self_attn.o_proj.weight"].zero_()
    state["model.layers.0.mlp.down_proj.weight"].zero_()
    state["model.embed_tokens.weight"].copy_(torch.tensor([[1.0, -1, 1, -1], [3, 0, 0, 0]]))
    state["model.norm.weight"].copy_(torch.tensor([1.0, 2, 3, 4]))
    state["lm_head.weight"].copy_(torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]]))
    folder = write_shards(model, tmp_path / "meta", shards=shards, params={"multiple_of": 8})
    (found,) = logits(folder, [[0, 1]], ROWS)
    first, second = math.sqrt(1 + 0.5), math.sqrt(9 / 4 + 0.5)
    expected = [[1 / first, (1 - 2 + 3 - 4) / first], [3 / second, 3 / second]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_what_follows_changes_no_logit(tmp_path):
    folder = write_shards(tiny_llama(), tmp_path / "meta", shards=2, params={"vocab_size": 768})
    (ids,) = drawn([30])
    (whole,), (part,) = logits(folder, [ids], ROWS), logits(folder, [ids[:11]], ROWS)
    torch.testing.assert_close(whole[:11], part, rtol=1e-4, atol=1e-5)


def test_sequences_do_not_see_each_other(tmp_path):
    folder = write_shards(tiny_llama(), tmp_path / "meta", params={"vocab_size": 768})
    sequences = drawn([5, 9, 3])
    together = logits(folder, sequences, ROWS)
    alone = [logits(folder, [ids], ROWS)[0] for ids in sequences]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
