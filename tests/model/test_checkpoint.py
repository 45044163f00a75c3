"""What is loaded is what was asked for, or nothing."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from recipe.model.checkpoint import (
    generation_config_notes,
    load_base,
    load_config,
    load_tokenizer,
)
from recipe.model.special_ids import check_special_ids
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


def edit(file, **values):
    """Set keys of a JSON file; ``...`` takes one out."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    content.update(values)
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def check(folder):
    settings = ModelSettings(name_or_path=str(folder))
    check_special_ids(settings, load_tokenizer(settings), load_config(settings))


def problems(call):
    with pytest.raises(UserError) as raised:
        call()
    assert all(str(problem).isprintable() for problem in raised.value.problems)
    return [problem.message for problem in raised.value.problems]


def test_special_ids_that_agree_pass(copy):
    check(copy)
    edit(copy / "generation_config.json", eos_token_id=[5, 1], pad_token_id=7)  # pad may differ
    edit(copy / "config.json", eos_token_id=[1, 9], pad_token_id=None)
    check(copy)
    edit(copy / "generation_config.json", bos_token_id=..., eos_token_id=...)  # says nothing
    check(copy)
    (copy / "generation_config.json").unlink()
    check(copy)


def test_special_ids_of_the_starter_pass(starter):
    check(starter)


@pytest.mark.parametrize(
    ("tokenizer", "config", "generation"),
    [
        # As published: Llama-3.1-8B-Instruct, Llama-2-7b-hf.
        (
            {"bos": 128000, "eos": 128009, "pad": None},
            {"bos": 128000, "eos": [128001, 128008, 128009], "pad": None, "vocab": 128256},
            {"bos": 128000, "eos": [128001, 128008, 128009], "pad": None},
        ),
        (
            {"bos": 1, "eos": 2, "pad": None},
            {"bos": 1, "eos": 2, "pad": None, "vocab": 32000},
            {"bos": 1, "eos": 2, "pad": 0},
        ),
    ],
)
def test_special_ids_of_published_models_pass(tmp_path, tokenizer, config, generation):
    def ids(of):
        return {f"{name}_token_id": of[name] for name in ("bos", "eos", "pad")}

    GenerationConfig(**ids(generation)).save_pretrained(tmp_path)
    check_special_ids(
        ModelSettings(name_or_path=str(tmp_path)),
        SimpleNamespace(**ids(tokenizer)),
        LlamaConfig(vocab_size=config["vocab"], **ids(config)),
    )


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("config.json", {"eos_token_id": 7}, "eos_token_id 1 ('</s>'), but config.json has 7."),
        ("config.json", {"eos_token_id": [7, 8]}, "but config.json has [7, 8]."),
        ("config.json", {"bos_token_id": 7}, "bos_token_id 0 ('<s>'), but config.json has 7."),
        ("config.json", {"eos_token_id": ...}, "config.json has 2 (which is also what leaving"),
        ("generation_config.json", {"eos_token_id": 7}, "but generation_config.json has 7."),
        ("generation_config.json", {"bos_token_id": [7]}, "but generation_config.json has 7."),
    ],
)
def test_another_end_of_text_is_told(copy, file, values, expected):
    if file == "config.json":
        (copy / "generation_config.json").unlink()
    if values.get("eos_token_id") is ...:
        edit(copy / "config.json", bos_token_id=0)
    edit(copy / file, **values)
    (message,) = problems(lambda: check(copy))
    assert expected in message
    assert message.endswith(f"tokenizer_config.json or {file}.")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_id_outside_the_vocabulary_is_told(copy, file):
    edit(copy / file, pad_token_id=-1)
    (message,) = problems(lambda: check(copy))
    assert f"{file} has pad_token_id -1, which is no token of a vocabulary of" in message


def test_each_disagreement_is_told_at_once(copy):
    edit(copy / "config.json", pad_token_id=-1, eos_token_id=5)
    edit(copy / "generation_config.json", eos_token_id=[10**9, "x"], bos_token_id=7)
    assert len(problems(lambda: check(copy))) == 6


def test_a_vocabulary_that_the_tokenizer_leaves_is_told(copy):
    edit(copy / "tokenizer_config.json", pad_token="[PAD]")
    (message,) = problems(lambda: check(copy))
    assert "the tokenizer has pad_token_id" in message


# As published with Llama-2-7b-hf.
CONTRADICTORY = {"do_sample": ..., "temperature": 0.9, "top_p": 0.6, "max_length": 4096}


def test_a_generation_config_that_contradicts_itself_is_noted_and_left_out(copy, tmp_path):
    edit(copy / "generation_config.json", **CONTRADICTORY)
    settings = ModelSettings(name_or_path=str(copy))
    temperature, top_p = generation_config_notes(settings)
    assert "temperature 0.9 is not taken over, because do_sample is not set" in temperature
    assert "top_p 0.6 is not taken over" in top_p
    base = load_base(settings)
    # Without it, any change makes the stock class refuse.
    stock = LlamaForCausalLM.from_pretrained(copy)
    for model in (base, stock):
        model.generation_config.pad_token_id = 0
    with pytest.raises(ValueError, match="temperature"):
        stock.save_pretrained(tmp_path / "stock")
    base.save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (0, 1, 0)
    assert (saved.temperature, saved.top_p) == (None, None)


def test_a_sound_generation_config_has_no_notes(copy, starter):
    assert generation_config_notes(ModelSettings(name_or_path=str(starter))) == []
    edit(copy / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.9)
    assert generation_config_notes(ModelSettings(name_or_path=str(copy))) == []
    (copy / "generation_config.json").unlink()
    assert generation_config_notes(ModelSettings(name_or_path=str(copy))) == []


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"load_in_8bit": True}


@pytest.fixture(scope="module", params=[NF4, INT8], ids=["nf4", "int8"])
def quantised(request, tiny_checkpoint, tmp_path_factory):
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("quantised") / "q")
    (folder / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(
        tiny_checkpoint, quantization_config=BitsAndBytesConfig(**request.param)
    ).save_pretrained(folder)
    return folder, request.param


def test_a_quantised_checkpoint_is_loaded_as_said(quantised):
    folder, options = quantised
    base = load_base(ModelSettings(name_or_path=str(folder), quantization=options))
    assert base.is_quantized


def test_a_quantised_checkpoint_must_be_said(quantised):
    folder, options = quantised
    (message,) = problems(lambda: load_base(ModelSettings(name_or_path=str(folder))))
    said = message.partition("Say so: ")[2].removesuffix(".")
    assert json.loads(said) == options


def test_another_quantisation_than_the_checkpoint_s_is_refused(quantised):
    """transformers takes the checkpoint's own, and 4 bit where 8 were asked for."""
    folder, options = quantised
    other = INT8 if options == NF4 else NF4
    with pytest.raises(UserError) as raised:
        load_base(ModelSettings(name_or_path=str(folder), quantization=other))
    wheres = [problem.where for problem in raised.value.problems]
    assert wheres[:2] == ["model.quantization.load_in_4bit", "model.quantization.load_in_8bit"]
    assert len(wheres) == len(set(wheres))


def test_another_kind_of_4_bit_is_refused(quantised):
    folder, options = quantised
    asked = {**options, "bnb_4bit_use_double_quant": True}
    (message,) = problems(
        lambda: load_config(ModelSettings(name_or_path=str(folder), quantization=asked))
    )
    assert "is True, but" in message
    assert "Write false" in message


@pytest.mark.parametrize("stored", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "x"}, {}])
@pytest.mark.parametrize("asked", [None, NF4])
def test_another_method_of_quantisation_is_refused(copy, stored, asked):
    edit(copy / "config.json", quantization_config=stored)
    (message,) = problems(
        lambda: load_base(ModelSettings(name_or_path=str(copy), quantization=asked))
    )
    assert f"quant_method {stored.get('quant_method')!r}" in message
