"""4 and 8 bit: loaded as asked, trained, and reloaded with the adapter."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from recipe import adapter, compare
from recipe.answerer import load_answerer
from recipe.exit_codes import run_command
from recipe.finetune import finetune
from recipe.model.checkpoint import load_base
from recipe.model.lora import add_lora
from recipe.model.quantization import bytes_by_kind
from recipe.settings import load_settings
from recipe.sharing.receipt import read_receipt
from tests.asking import ask_one

QUANTIZATIONS = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
    },
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_trains_and_answers(write_config, tmp_path, name):
    # The evaluation before training is a forward pass without gradient; see keep_layout.
    config = write_config(
        model={"quantization": QUANTIZATIONS[name]}, data={"rows": "0:8", "held_out": "8:12"}
    )
    folder = finetune(load_settings(str(config)))
    receipt = read_receipt(folder / "adapter")
    assert receipt.base.quantization == QUANTIZATIONS[name]
    answerer = load_answerer(
        adapter=str(folder / "adapter"), model=None, template=None, runs=tmp_path
    )
    assert answerer.model.get_base_model().is_quantized
    answer = ask_one(answerer, "Name a fruit.", max_new_tokens=3)
    assert answer.finish_reason in ("eos", "length")
    assert 1 <= len(answer.ids) <= 3


def test_only_linear_layers_are_in_4_bit_and_the_rest_stays_as_asked(write_config, tiny_checkpoint):
    """The up-cast of norms, embedding and head that peft's helper does would cost memory."""
    config = write_config(model={"quantization": QUANTIZATIONS["nf4"], "dtype": "bfloat16"})
    settings = load_settings(str(config))
    model = add_lora(load_base(settings.model), settings.lora, mixed_precision=True)
    plain = LlamaForCausalLM.from_pretrained(tiny_checkpoint)
    inside = sum(p.numel() for p in plain.model.layers.parameters() if p.dim() == 2)
    whole = sum(p.numel() for p in plain.parameters()) - inside
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {
        torch.uint8, torch.bfloat16
    }  # fmt: skip
    found = dict(bytes_by_kind(model))
    frequencies = sum(buffer.nbytes for buffer in plain.buffers())
    assert found.pop("float32") == frequencies
    blocks = [p.numel() // 64 for p in plain.model.layers.parameters() if p.dim() == 2]
    scales = sum(n + 4 * -(-n // 256) for n in blocks)
    assert found == {"nf4": inside // 2, "bfloat16": 2 * whole, "scales": scales}


def test_a_run_says_what_its_base_takes(write_config, capsys):
    config = write_config(model={"quantization": QUANTIZATIONS["nf4"]}, data={"rows": "0:8"})
    folder = finetune(load_settings(str(config)))
    kept = json.loads((folder / "manifest.json").read_text())
    said = capsys.readouterr().out
    assert "parameters in float32, nf4\n" in said
    total = sum(kept["base_bytes"].values())
    listed = ", ".join(f"{n / 2**20:,.1f} {kind}" for kind, n in kept["base_bytes"].items())
    assert f"\n          MiB of it: {total / 2**20:,.1f} = {listed}\n" in said
    assert "compute float32 in the 4-bit layers, else as stored (float32, nf4)" in said


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_what_was_trained_is_verified_compared_and_merged(write_config, tmp_path, capsys, name):
    config = write_config(
        model={"quantization": QUANTIZATIONS[name]}, data={"rows": "0:8", "held_out": "8:12"}
    )
    folder = finetune(load_settings(str(config)))
    capsys.readouterr()
    assert run_command(lambda: adapter.main(["verify", str(folder / "adapter")])) == 0
    assert run_command(lambda: compare.main(["--run", str(folder), "max_new_tokens=4"])) == 0
    content = json.loads((folder / "report.json").read_text())
    assert content["verdict"]
    merged = tmp_path / "merged"
    given = ["merge", str(folder / "adapter"), "--output", str(merged), "--dtype", "float32"]
    assert run_command(lambda: adapter.main(given)) == 0
    said = capsys.readouterr().out
    assert "against    base with adapter" in said
    plain = LlamaForCausalLM.from_pretrained(merged)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
