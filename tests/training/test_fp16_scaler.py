"""fp16's gradient scaler without a GPU: the Trainer's accelerator gets a scaler for the CPU."""

import json

import pytest
import torch

from recipe import finetune as finetune_module
from recipe.settings import load_settings


@pytest.fixture
def scaled(monkeypatch):
    """Makes every run behave as fp16 on a GPU does, beginning with a scale that overflows."""
    build = finetune_module.build_trainer

    def with_scaler(*arguments, **named):
        trainer = build(*arguments, **named)
        trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = "fp16"
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        return trainer

    monkeypatch.setattr(finetune_module, "build_trainer", with_scaler)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_overflow_is_counted_and_the_run_goes_on(write_config, scaled, optim, max_grad_norm):
    training = {"optim": optim, "max_grad_norm": max_grad_norm, "num_train_epochs": 10}
    folder = finetune_module.finetune(load_settings(str(write_config(training=training))))
    steps = [r for r in records(folder) if "loss" in r]
    overflowed = [r for r in steps if r["grad_norm"] is None]
    assert overflowed
    assert len(overflowed) < len(steps)
    assert steps[-1]["skipped_steps"] == len(overflowed)
    epochs = [r["epoch_loss"] for r in records(folder) if "epoch_loss" in r]
    assert epochs[-1] < epochs[0]
