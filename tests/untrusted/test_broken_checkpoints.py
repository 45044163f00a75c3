"""A checkpoint whose files are broken, or point elsewhere, ends in one line."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from recipe.model.checkpoint import load_base, load_config, load_tokenizer
from recipe.settings import ModelSettings, UserError


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def problem(call):
    with pytest.raises(UserError) as raised:
        call()
    (problem,) = raised.value.problems
    assert str(problem).isprintable()
    return problem.message


def shard(folder, name="model-00001-of-00001.safetensors"):
    """The one file of weights under ``name``, with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded_weights_are_loaded(copy):
    shard(copy)
    assert load_base(ModelSettings(name_or_path=str(copy))).num_parameters() > 0


@pytest.mark.parametrize(
    "name",
    [
        "../copy/model-00001-of-00001.safetensors",
        "/dev/zero",
        "/etc/x.safetensors",
        "..",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "pytorch_model.bin",
        "a\0.safetensors",
        "",
        7,
    ],
)
def test_weights_outside_the_checkpoint_are_refused(copy, name):
    shard(copy, name)
    message = problem(lambda: load_base(ModelSettings(name_or_path=str(copy))))
    assert f"names {name!r}, which is no safetensors file of that folder" in message


HARM = {
    "truncated": lambda content: content[: len(content) // 2],
    "not UTF-8": lambda content: b'{"a": "\xff\xfe"}',
    "empty": lambda content: b"",
    "NUL bytes": lambda content: b"\0" * 100,
    "a list": lambda content: b"[]",
    "null": lambda content: b"null",
    "a number": lambda content: b"3",
    "nested": lambda content: b"[" * 100_000,
    "nested object": lambda content: b'{"a":' * 100_000,
}
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("file", [*FILES, "model.safetensors.index.json"])
def test_a_broken_file_is_one_line(copy, file, harm):
    if file.startswith("model."):
        shard(copy)
    (copy / file).write_bytes(HARM[harm]((copy / file).read_bytes()))
    settings = ModelSettings(name_or_path=str(copy))
    message = problem(lambda: (load_tokenizer(settings), load_base(settings)))
    assert str(copy) in message


@pytest.mark.parametrize(
    "values",
    [
        {"vocab_size": "abc"},
        {"vocab_size": -1},
        {"vocab_size": 0},
        {"vocab_size": 10**15},
        {"hidden_size": -1},
        {"hidden_size": 63},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 0},
        {"hidden_act": "evil"},
        {"rope_parameters": {"rope_type": "evil"}},
        {"model_type": ["llama"]},
        {"dtype": "evil"},
        {"quantization_config": 3},
        {"auto_map": 3},
    ],
    ids=str,
)
def test_a_config_of_no_model_is_refused(copy, values):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **values}))
    assert str(copy) in problem(lambda: load_base(ModelSettings(name_or_path=str(copy))))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("version",), None),
        (("model", "type"), "Evil"),
        (("added_tokens",), [{}]),
        (("pre_tokenizer",), {"type": "Evil"}),
        # Makes the library, written in Rust, panic instead of raise.
        (("model", "continuing_subword_prefix"), "evil" * 10),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(copy, keys, value):
    file = copy / "tokenizer.json"
    content = part = json.loads(file.read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    file.write_text(json.dumps(content))
    message = problem(lambda: load_tokenizer(ModelSettings(name_or_path=str(copy))))
    assert "the tokenizer of" in message


def test_ctrl_c_while_loading_is_ctrl_c(copy, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("recipe.model.checkpoint.AutoConfig.from_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        load_config(ModelSettings(name_or_path=str(copy)))
