"""The same runs on a CUDA device: fp16 with its scaler, bf16, 4 bit."""

import json
from functools import partial

import pytest
import torch
from transformers import TrainerCallback

from recipe.finetune import finetune
from recipe.memory.watch import MemoryWatch
from recipe.rehearsal import rehearse
from recipe.settings import RunFailed, load_settings

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


class ForgetEmbeddings(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == 2:
            model.get_input_embeddings().weight.data.fill_(float("nan"))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_loss_that_is_not_finite_ends_the_run_under_a_scaler_too(
    write_config, tmp_path, precision
):
    training = {"use_cpu": False, "save_strategy": "steps", "save_steps": 1, precision: True}
    model = {"dtype": {"fp16": "float16", "bf16": "bfloat16"}[precision]}
    settings = load_settings(str(write_config(model=model, training=training)))
    with pytest.raises(RunFailed, match="is nan at step 3, so that step is not taken"):
        finetune(settings, watchers=[ForgetEmbeddings()])
    assert (tmp_path / "run/checkpoint-2").is_dir()
    assert not (tmp_path / "run/checkpoint-3").exists()
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.dtype=float16", "training.fp16=true"],
        ["model.dtype=bfloat16", "training.bf16=true", "training.gradient_checkpointing=true"],
        [
            "model.dtype=bfloat16",
            "training.bf16=true",
            "model.quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, "
            "bnb_4bit_compute_dtype: bfloat16}",
        ],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_memory_is_as_forecast(write_config, overrides):
    """Each item, and what torch allocated at the peak."""
    memory = MemoryWatch()
    config = write_config(data={"rows": "0:8", "held_out": "8:12"}, training={"use_cpu": False})
    folder = finetune(
        load_settings(str(config), overrides),
        rehearse=partial(rehearse, memory=memory),
        memory=memory,
    )
    found = json.loads((folder / "manifest.json").read_text())["memory"]
    for name, item in found["items"].items():
        assert item["forecast"] == pytest.approx(item["measured"], rel=0.02, abs=2**14), name
    # A tiny model: what evaluation and generation take beside it counts as much.
    allocated, measured = found["forecast"]["allocated"], found["measured"]["peak"]
    assert allocated == pytest.approx(measured, rel=0.1, abs=2**24)
