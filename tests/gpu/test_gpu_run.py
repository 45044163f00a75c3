"""The same runs on a CUDA device: fp16 with its scaler, bf16, 4 bit."""

import json

import pytest
import torch

from recipe.finetune import finetune
from recipe.settings import load_settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.dtype=float16", "training.fp16=true"],
        ["model.dtype=bfloat16", "training.bf16=true", "training.gradient_checkpointing=true"],
        ["model.dtype=float32"],
        [
            "model.dtype=float16",
            "training.fp16=true",
            "model.quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4}",
        ],
        ["model.quantization={load_in_8bit: true}", "training.bf16=true"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_loss_falls_and_the_adapter_is_whole(write_config, overrides):
    config = write_config(
        data={"rows": "0:8", "held_out": "8:12"},
        training={"num_train_epochs": 5, "use_cpu": False},
    )
    folder = finetune(load_settings(str(config), overrides))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [r["epoch_loss"] for r in records if "epoch_loss" in r]
    assert epochs[-1] < epochs[0]
    assert (folder / "adapter/recipe.json").is_file()
    assert records[-1]["skipped_steps"] < 5
