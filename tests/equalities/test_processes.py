"""N processes are one: the same gradient, losses and adapter as a single process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(write_config, tmp_path):
    config = write_config(
        data={"rows": "0:8", "held_out": "8:11"},
        training={
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "eval_strategy": "epoch",
            "train_sampling_strategy": "sequential",
            "optim": "sgd",  # Adam would blow up the rounding of near-zero gradients
        },
    )
    launches = {
        "one": [sys.executable, "recipe/train.py"],
        "two": [
            str(Path(sys.executable).with_name("torchrun")),
            "--nproc_per_node=2",
            "recipe/train.py",
        ],
    }
    for name, launch in launches.items():
        command = [*launch, "--config", str(config), f"training.output_dir={tmp_path / name}"]
        result = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("result ") == 1
    adapters = [load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in launches]
    for tensor_name, one in adapters[0].items():
        torch.testing.assert_close(adapters[1][tensor_name], one, rtol=1e-4, atol=1e-6)
    losses = [
        [r.get("epoch_loss", r.get("eval_loss")) for r in records if "loss" not in r]
        for records in (
            list(map(json.loads, (tmp_path / n / "metrics.jsonl").read_text().splitlines()))
            for n in launches
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # What synchronises gradients is forecast where there is something to synchronise.
    memory = [json.loads((tmp_path / n / "manifest.json").read_text())["memory"] for n in launches]
    at_peak = [found["forecast"]["at_peak"] for found in memory]
    gradients = memory[1]["items"]["gradients"]["measured"]
    assert [one.get("communication buckets") for one in at_peak] == [None, gradients]
