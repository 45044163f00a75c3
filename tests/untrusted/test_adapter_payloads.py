"""An adapter from elsewhere is data, however well its seal fits."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from recipe.answerer import load_answerer
from recipe.sealed import damage
from tests.asking import ask_one
from tests.untrusted.payload import Payload, code_beside, edit, load, pickled, reseal, zipped

pytestmark = pytest.mark.usefixtures("nothing_runs")


@pytest.fixture
def adapter(tiny_checkpoint, tmp_path):
    folder = tmp_path / "run/adapter"
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    get_peft_model(load(tiny_checkpoint), lora).save_pretrained(folder)
    base = {"name_or_path": str(tiny_checkpoint), "dtype": "float32"}
    (folder / "recipe.json").write_text(json.dumps({"base": base, "template": "alpaca"}))
    reseal(folder)
    return folder


def ask(adapter):
    answerer = load_answerer(adapter=str(adapter), model=None, template=None, runs=adapter)
    ask_one(answerer, "Hello", max_new_tokens=2)


def test_the_adapter_itself_answers(adapter):
    ask(adapter)


def adapter_pickled(folder, marker, _):
    (folder / "adapter_model.safetensors").unlink()
    pickled(folder, marker, "adapter_model.bin")


def adapter_zipped(folder, marker, _):
    (folder / "adapter_model.safetensors").unlink()
    zipped(folder, marker, "adapter_model.bin")


def adapter_without_safetensors(folder, *_):
    """Tensors alone, and still a pickle: nothing is read that would have to be trusted."""
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def parent_library(folder, *_):
    auto_mapping = {"base_model_class": "Model", "parent_library": "evilmodule"}
    edit(folder / "adapter_config.json", task_type=None, auto_mapping=auto_mapping)


def unknown_library(folder, *_):
    edit(folder / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evilmodule")


def known_library(folder, _, code):
    """peft imports it: its name begins as that of a library which is not installed here."""
    (folder.parent / "megatron").mkdir()
    (folder.parent / "megatron/evil.py").write_text(code)
    edit(folder / "adapter_config.json", megatron_config={"a": 1}, megatron_core="megatron.evil")


def calibration_cache(folder, marker, _):
    cache = folder / "cache.pt"
    torch.save(Payload(marker), cache)
    files = {"cache_file": str(cache), "covariance_file": str(cache)}
    edit(folder / "adapter_config.json", init_lora_weights="corda", corda_config=files)


def another_method(folder, *_):
    edit(folder / "adapter_config.json", peft_type="EVIL")


def base_with_code(folder, _, code):
    base = json.loads((folder / "recipe.json").read_text())["base"]
    copy = shutil.copytree(base["name_or_path"], folder.parent / "evil-base")
    code_beside(copy, _, code)
    edit(folder / "recipe.json", base={**base, "name_or_path": str(copy)})


def trusting_base(folder, *_):
    base = json.loads((folder / "recipe.json").read_text())["base"]
    edit(folder / "recipe.json", base={**base, "trust_remote_code": True})


def unknown_template(folder, *_):
    edit(folder / "recipe.json", template="evil.module")


def broken(name, content):
    def harm(folder, *_):
        (folder / name).write_bytes(content)

    harm.__name__ = f"{name} {content[:10]!r}"
    return harm


@pytest.mark.parametrize(
    "harm",
    [
        adapter_pickled,
        adapter_zipped,
        adapter_without_safetensors,
        unknown_library,
        known_library,
        calibration_cache,
        another_method,
        base_with_code,
        trusting_base,
        unknown_template,
        broken("recipe.json", b"[]"),
        broken("recipe.json", b"{}"),
        broken("recipe.json", b"[" * 100_000),
        broken("recipe.json", b'{"base": {"name_or_path": 3}, "template": "raw"}'),
        broken("adapter_config.json", b"\xff"),
        broken("adapter_config.json", b"[]"),
        broken("adapter_config.json", b"[" * 100_000),
        broken("adapter_model.safetensors", b"\xff" * 100),
    ],
)
def test_an_adapter_is_refused(adapter, marker, code, refused, monkeypatch, harm):
    # A module of that name can be imported: from where the command is started, say.
    (adapter.parent / "evilmodule.py").write_text(code)
    monkeypatch.syspath_prepend(adapter.parent)
    harm(adapter, marker, code)
    reseal(adapter)
    refused(ask, adapter)


def test_a_library_named_for_the_base_s_class_is_not_imported(adapter, code, monkeypatch):
    (adapter.parent / "evilmodule.py").write_text(code)
    monkeypatch.syspath_prepend(adapter.parent)
    parent_library(adapter)
    reseal(adapter)
    ask(adapter)


def test_an_adapter_s_seal_names_nothing_outside(adapter, refused):
    (adapter.parent / "outside").write_text("x")
    edit(adapter / "sha256.json", **{"../outside": "x", "/dev/zero": "x"})
    assert refused(ask, adapter).count("not inside the folder") == 2
    assert len(damage(adapter)) == 2
