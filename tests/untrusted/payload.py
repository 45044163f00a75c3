"""What an attacker writes, into which files, and how it would be noticed."""

import builtins
import json
import os
import pickle
import sys
from contextlib import contextmanager

import torch

from recipe.model.checkpoint import load_base, load_config, load_tokenizer
from recipe.sealed import SEAL, seal
from recipe.settings import ModelSettings


class Payload:
    """Pickles into a call of ``os.mkdir``."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def pickled(folder, marker, name="pytorch_model.bin"):
    """As any Python program writes it."""
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))


def zipped(folder, marker, name="pytorch_model.bin"):
    """As ``torch.save`` does."""
    torch.save({"model.norm.weight": Payload(marker)}, folder / name)


def module(marker):
    """A module that runs when it is imported, and has whatever it is asked for."""
    return (
        f"import os\nos.mkdir({str(marker)!r})\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig): model_type = 'evil'\n"
        "class Model(LlamaForCausalLM): config_class = Config\n"
        "class Tokens(PreTrainedTokenizerFast): pass\n"
    )


def code_beside(folder, _, code):
    """A model type that the library does not know, and a module that does."""
    (folder / "evil.py").write_text(code)
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(folder / "config.json", model_type="evil", auto_map=auto_map)


def load(folder):
    """As a run does."""
    settings = ModelSettings(name_or_path=str(folder))
    load_config(settings)
    load_tokenizer(settings)
    return load_base(settings)


def edit(file, **values):
    """Set keys of a JSON file."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **values}))


def reseal(folder):
    """As whoever hands on a folder can do."""
    (folder / SEAL).unlink(missing_ok=True)
    seal(folder)


class Silence:
    """A standard input that nobody sits at; reading it is noted, because libraries catch errors."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        self.asked.append(name)
        raise OSError("nobody is there to answer")


@contextmanager
def watched(marker, monkeypatch):
    """Fail if a payload made ``marker`` in the block, or if someone was asked."""
    stdin = Silence()

    def ask(*_):
        stdin.asked.append("input")
        raise OSError("nobody is there to answer")

    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(builtins, "input", ask)
    yield
    assert not marker.exists(), "a payload was executed"
    assert stdin.asked == [], "someone was asked"
