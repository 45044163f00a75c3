"""Of a run that was really trained, what was forecast and what was measured are the same."""

import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from safetensors.torch import load_file
from torch import nn

from recipe import keeping, run_memory
from recipe.finetune import finetune
from recipe.memory.account import Measured, account, lines, live_bytes
from recipe.memory.forecast import Forecast
from recipe.memory.watch import MemoryWatch
from recipe.rehearsal import rehearse
from recipe.settings import load_settings

NF4 = "load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: float32"
ITEMS = {"base weights", "adapter", "gradients", "optimizer state", "saved activations"}
EXACT = ITEMS - {"saved activations"}
SMALL = 4096  # position ids and the like, which the model is given and no operation makes


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """It takes a third of so short a run."""
    monkeypatch.setattr(keeping, "_plot", lambda *_: None)


@pytest.fixture(autouse=True)
def no_overrides_of_other_tests():
    """bitsandbytes keeps them for the process, by a parameter's place in any optimizer."""
    yield
    GlobalOptimManager._instance = None


@pytest.fixture
def trained(write_config, tmp_path, capsys):
    """A run in short, with its manifest and what it said."""

    def run(*overrides: str, rehearsed: bool = True):
        watch = MemoryWatch() if rehearsed else None
        config = write_config(data={"rows": "0:8"}, training={"num_train_epochs": 1})
        folder = finetune(
            load_settings(str(config), list(overrides)),
            rehearse=partial(rehearse, memory=watch) if watch else None,
            memory=watch,
        )
        return folder, json.loads((folder / "manifest.json").read_text()), capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.target_modules=all-linear", "lora.lora_dropout=0.1"],
        ["training.gradient_checkpointing=true", "training.gradient_accumulation_steps=2"],
        ["model.dtype=bfloat16", "lora.r=64", "training.optim=adamw_bnb_8bit"],
        ["training.bf16=true", "data.rows=0:5", "data.held_out=5:12"],
        [f"model.quantization={{{NF4}}}"],
        [f"model.quantization={{{NF4}, bnb_4bit_use_double_quant: true}}"],
        ["model.quantization={load_in_8bit: true}"],
        ["lora.use_dora=true"],
        ["lora.modules_to_save=[embed_tokens, lm_head]", "training.optim=adamw_bnb_8bit"],
    ],
    ids=" ".join,
)
def test_forecast_and_measured_are_the_same(trained, overrides):
    folder, manifest, _ = trained(*overrides)
    assert (folder / "adapter/adapter_model.safetensors").is_file()
    items = manifest["memory"]["items"]
    assert set(items) == ITEMS
    difference = {name: one["forecast"] - one["measured"] for name, one in items.items()}
    assert all(difference[name] == 0 for name in EXACT), difference
    assert abs(difference["saved activations"]) <= SMALL, difference


def test_what_was_measured_is_what_files_and_arithmetic_say(trained, tiny_checkpoint):
    folder, manifest, said = trained()
    found = manifest["memory"]
    base = sum(one.nbytes for one in load_file(tiny_checkpoint / "model.safetensors").values())
    files = load_file(folder / "adapter/adapter_model.safetensors").values()
    adapter = sum(one.nbytes for one in files)
    measured = {name: one["measured"] for name, one in found["items"].items()}
    # Two buffers of 64 / 4 / 2 rotary frequencies in float32 are in no file.
    assert measured["base weights"] == base + 2 * 8 * 4
    assert measured["adapter"] == measured["gradients"] == adapter
    assert measured["optimizer state"] == 2 * adapter
    ahead = found["forecast"]
    assert ahead["peak"] == sum(ahead["at_peak"].values())
    parts = {
        name: n for name, n in ahead["at_peak"].items() if name not in ("process", "allocator")
    }
    assert ahead["allocated"] == sum(parts.values())
    assert found["measured"]["reserved"] is None
    assert min(found["measured"]["peak"], ahead["at_peak"]["process"]) > 2**27
    assert found["traced"]["flops"] > 0
    check_said(said, found)


def check_said(said: str, found: dict) -> None:
    """Both peaks in GiB, and the items in MiB."""
    ahead, real = found["forecast"]["peak"], found["measured"]["peak"]
    line = re.search(r"^memory    (.*)\n          MiB: (.*)$", said, re.MULTILINE)
    assert line
    assert line[1] == (
        f"forecast {ahead / 2**30:.2f} GiB, measured {real / 2**30:.2f} "
        f"({100 * (real - ahead) / ahead:+.1f}%), at the peak of the {found['forecast']['phase']}"
    )
    assert {one.rsplit(" ", 1)[0] for one in line[2].split(" (")[0].split(", ")} == ITEMS
    saved = found["items"]["saved activations"]
    assert line[2].endswith(f"saved activations {saved['measured'] / 2**20:.1f}")
    # After what it cost, before where it is.
    assert said.index("\ncost ") < said.index("\nmemory ") < said.index("\nsaved ")


def test_a_run_without_rehearsal_has_no_account(trained):
    _, manifest, said = trained(rehearsed=False)
    assert "memory" not in manifest
    assert "\nmemory " not in said
    assert "forecast" not in said


def test_a_forecast_that_cannot_be_made_costs_no_adapter(trained, monkeypatch):
    """When it is made, hours of training are behind it."""

    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(run_memory, "forecast", fail)
    folder, manifest, said = trained()
    assert (folder / "adapter/adapter_model.safetensors").is_file()
    assert "memory" not in manifest
    assert "\nsaved " in said


def test_an_item_that_is_not_as_forecast_is_shown_with_its_forecast():
    trace = SimpleNamespace(flops=7, attention_flops=2, written=8, peak={"temporaries": 5})
    items = {
        "base weights, uint8": 6 << 20,
        "base weights, float32": 2 << 20,
        "adapter": 1 << 20,
        "optimizer state": 2 << 20,
        "process": 5 << 20,
    }
    ahead = Forecast(items, "loss", saved=3 << 20, gradients=1 << 20, trace=trace)
    real = Measured(8 << 20, 1 << 20, 1 << 20, 4 << 20, saved=3 << 20, peak=20 << 20)
    first, second = lines(ahead, real)
    assert first.endswith("(+25.0%), at the peak of the loss")
    assert second.strip() == (
        "MiB: base weights 8.0, adapter 1.0, gradients 1.0, optimizer state 4.0 (2.0 forecast), "
        "saved activations 3.0"
    )
    # On CUDA torch counts what it allocates, and no process.
    on_card = Measured(
        8 << 20, 1 << 20, 1 << 20, 2 << 20, 3 << 20, peak=11 << 20, reserved=13 << 20
    )
    assert "(+0.0%)" in lines(ahead, on_card)[0]
    assert account(ahead, on_card)["measured"] == {"peak": 11 << 20, "reserved": 13 << 20}
    traced = account(ahead, on_card)["traced"]
    assert (traced["flops"], traced["written"]) == (7, 8)


def test_memory_behind_several_tensors_is_counted_once():
    whole = torch.zeros(10, 10)
    assert live_bytes([whole, whole[:5], whole.T, torch.zeros(3)]) == 400 + 12
    assert live_bytes([]) == 0


class Twice(nn.Module):
    """Keeps its input and, until it returns, an exponential of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        passing = (x.detach().requires_grad_() * 1).exp()
        del passing
        return self.linear(x)


def test_what_is_kept_for_the_backward_pass_is_counted_and_nothing_else():
    """No weights, and nothing that is free again before the backward pass."""
    model, watch, x = Twice(), MemoryWatch(), torch.ones(100, 8, requires_grad=True)
    assert watch.measured(model) is None
    with watch.saving([], model):
        out = model(x)
    assert watch._saved == x.nbytes
    out.sum().backward()
    assert watch.measured(model) is None  # no rows, and nothing was trained
