"""Rotary frequencies that a GGUF file scales are those of the folder, or the file is refused."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from recipe.convert import main as convert
from recipe.settings import UserError
from tests.untrusted.test_gguf_payloads import HEADS, WIDTH, write

HEAD_DIM = WIDTH // HEADS
THETA = 500_000.0


def llama3(factor: float) -> dict:
    return {
        "rope_type": "llama3", "rope_theta": THETA, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip


def divisors(factor: float) -> np.ndarray:
    """As llama.cpp's converter writes them: plain frequencies over those of transformers' rule."""
    config = LlamaConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, head_dim=HEAD_DIM,
        rope_parameters=llama3(factor),
    )  # fmt: skip
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return (plain / scaled).numpy().astype(np.float32)


@pytest.fixture
def scaled(tmp_path):
    def make(values=None, kind=None):
        def more(writer):
            writer.add_rope_freq_base(THETA)
            if kind:
                writer.add_string("llama.rope.scaling.type", kind)
                writer.add_float32("llama.rope.scaling.factor", 4.0)

        def change(tensors):
            if values is not None:
                tensors["rope_freqs.weight"] = np.asarray(values, dtype=np.float32)

        write(tmp_path / "model.gguf", change=change, more=more)
        convert([str(tmp_path / "model.gguf"), str(tmp_path / "model")])
        return LlamaForCausalLM.from_pretrained(tmp_path / "model").config.rope_parameters

    return make


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaling_is_kept(scaled, factor, capsys):
    assert scaled(divisors(factor)) == llama3(factor)
    assert "rope_freqs" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "kind"), [(None, None), (None, "none"), (np.ones(HEAD_DIM // 2), None)]
)
def test_what_is_not_scaled_stays_plain(scaled, values, kind):
    assert scaled(values, kind)["rope_type"] == "default"


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        (np.full(HEAD_DIM // 2, 4.0), None, "rope_freqs"),
        (None, "linear", "linear"),
        (None, "yarn", "yarn"),
    ],
)
def test_another_rule_is_refused(scaled, tmp_path, values, kind, said):
    with pytest.raises(UserError, match=f"scales its rotary frequencies .*{said}"):
        scaled(values, kind)
    assert not (tmp_path / "model").exists()
