"""Checkpoints, adapters, data and configs are data: what they carry is never executed.

Each payload here fires where it is read carelessly, which ``test_controls.py`` shows.
"""

import json
import pickle
import struct

import pytest
import torch

from recipe.answerer import load_answerer
from recipe.data.rows import read_rows
from recipe.model.checkpoint import load_tokenizer
from recipe.settings import DataSettings, ModelSettings, load_settings
from recipe.train import main as train
from tests.asking import ask_one
from tests.untrusted.payload import Payload, code_beside, edit, load, pickled, zipped

pytestmark = pytest.mark.usefixtures("nothing_runs")


def indexed(folder, name):
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_safetensors(write):
    def harm(folder, marker, _):
        (folder / "model.safetensors").unlink()
        write(folder, marker)

    return harm


def pickle_as_safetensors(folder, marker, _):
    pickled(folder, marker, "model.safetensors")


def pickle_in_the_index(folder, marker, _):
    (folder / "model.safetensors").unlink()
    zipped(folder, marker)
    indexed(folder, "pytorch_model.bin")


def pickle_beside_the_folder(folder, marker, _):
    (folder / "model.safetensors").unlink()
    zipped(folder.parent, marker, "evil.safetensors")
    indexed(folder, "../evil.safetensors")


def pickle_named_by_the_config(folder, marker, _):
    zipped(folder, marker)
    edit(folder / "config.json", transformers_weights="pytorch_model.bin")


def endless_header(folder, marker, _):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{" * 100)


def code_of_another_repository(folder, _, code):
    edit(
        folder / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil/repository--evil.Config"},
    )


def pickled_vocabulary(folder, marker, _):
    (folder / "tokenizer.json").unlink()
    pickled(folder, marker, "tokenizer.model")
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")


def other_quantisation(folder, *_):
    edit(folder / "config.json", quantization_config={"quant_method": "evil", "modules": ["os"]})


def dtype_that_is_a_function(folder, *_):
    edit(folder / "config.json", dtype="load")


@pytest.mark.parametrize(
    "harm",
    [
        without_safetensors(pickled),
        without_safetensors(zipped),
        pickle_as_safetensors,
        pickle_in_the_index,
        pickle_beside_the_folder,
        pickle_named_by_the_config,
        endless_header,
        code_beside,
        code_of_another_repository,
        pickled_vocabulary,
        other_quantisation,
        dtype_that_is_a_function,
    ],
)
def test_a_checkpoint_is_refused(copy, marker, code, refused, harm):
    harm(copy, marker, code)
    assert str(copy) in refused(load, copy)


def known_type(folder, _, code):
    (folder / "evil.py").write_text(code)
    edit(
        folder / "config.json",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )


def kernels(folder, *_):
    names = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
    edit(folder / "config.json", use_kernels=True, **dict.fromkeys(names, "evil/kernel"))


def own_generate(folder, _, code):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(code)


def pickle_beside_safetensors(folder, marker, _):
    zipped(folder, marker)
    pickled(folder, marker, "training_args.bin")


@pytest.mark.parametrize("harm", [known_type, kernels, own_generate, pickle_beside_safetensors])
def test_what_a_checkpoint_has_besides_is_not_looked_at(copy, marker, code, tiny_checkpoint, harm):
    harm(copy, marker, code)
    found, expected = load(copy), load(tiny_checkpoint)
    assert type(found).__module__.startswith("transformers.")
    assert found.config._attn_implementation == "per_row_sdpa"
    assert all(
        torch.equal(left, right)
        for left, right in zip(found.parameters(), expected.parameters(), strict=True)
    )
    answerer = load_answerer(adapter="none", model=str(copy), template="alpaca", runs=copy)
    ask_one(answerer, "Hello", max_new_tokens=2)


def tokenizer_of_its_own(folder, code, tokenizer_class):
    (folder / "evil.py").write_text(code)
    auto_map = {"AutoTokenizer": ["evil.Tokens", "evil.Tokens"]}
    edit(folder / "tokenizer_config.json", tokenizer_class=tokenizer_class, auto_map=auto_map)
    return ModelSettings(name_or_path=str(folder))


@pytest.mark.parametrize("tokenizer_class", ["Tokens", "evil.Tokens", "os.mkdir"])
def test_a_tokenizer_s_own_class_is_refused(copy, code, refused, tokenizer_class):
    assert "custom code" in refused(
        load_tokenizer, tokenizer_of_its_own(copy, code, tokenizer_class)
    )


def test_a_class_of_the_library_is_loaded_from_there(copy, code, tiny_checkpoint):
    found = load_tokenizer(tokenizer_of_its_own(copy, code, "PreTrainedTokenizerFast"))
    expected = load_tokenizer(ModelSettings(name_or_path=str(tiny_checkpoint)))
    assert type(found).__module__.startswith("transformers.")
    assert found("Blue.</s>")["input_ids"] == expected("Blue.</s>")["input_ids"]


def data_script(folder, _, code):
    (folder / "rows.py").write_text(code)
    return "rows.py"


def data_folder(folder, _, code):
    (folder / "rows").mkdir()
    (folder / "rows/rows.py").write_text(code)
    return "rows"


def data_pickle(suffix):
    def harm(folder, marker, _):
        (folder / f"rows{suffix}").write_bytes(pickle.dumps(Payload(marker)))
        return f"rows{suffix}"

    return harm


def data_builder(folder, marker, _):
    pickled(folder, marker, "train.pkl")
    return "pandas"


@pytest.mark.parametrize("start", ["", "./", "{folder}/"])
@pytest.mark.parametrize(
    "harm",
    [
        data_script,
        data_folder,
        data_builder,
        *map(data_pickle, (".pkl", ".json", ".jsonl", ".csv", ".parquet", ".pt", ".npy", ".arrow")),
    ],
)
def test_data_is_refused(tmp_path, marker, code, refused, monkeypatch, harm, start):
    monkeypatch.chdir(tmp_path)
    path = start.format(folder=tmp_path) + harm(tmp_path, marker, code)
    refused(read_rows, DataSettings(path=path))


CONFIG = "model: {{name_or_path: x}}\nlora: {{r: 4}}\ndata: {{path: x.json}}\n{line}\n"


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir ['{marker}']",
        "!!python/object/new:os.mkdir ['{marker}']",
        "!!python/module:evilmodule",
        "!!python/name:evilmodule.Config",
        "!<tag:yaml.org,2002:python/object/apply:os.mkdir> ['{marker}']",
    ],
)
def test_a_tag_of_yaml_is_refused(
    tmp_path, marker, code, refused, write_config, monkeypatch, value
):
    (tmp_path / "evilmodule.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    value = value.format(marker=marker)
    config = tmp_path / "evil.yaml"
    config.write_text(CONFIG.format(line=f"name: {value}"))
    assert "tag" in refused(train, ["--config", str(config)])
    assert "tag" in refused(load_settings, str(write_config()), [f"lora.r={value}"])


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "..", "a/b", "a\\b", "evil\0"])
def test_a_name_that_leaves_the_runs_is_refused(refused, write_config, name):
    refused(load_settings, str(write_config()), [f"name={json.dumps(name)}"])


def test_remote_code_cannot_be_asked_for(refused, write_config):
    refused(load_settings, str(write_config()), ["model.trust_remote_code=true"])
