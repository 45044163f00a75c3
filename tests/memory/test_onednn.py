"""What oneDNN keeps does not grow with the lengths that a 16-bit run on a CPU has seen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipe.model import onednn

REPOSITORY = Path(__file__).parents[2]


def measured_peak(config: Path, folder: Path, **environment: str) -> int:
    # Models that other tests load here set these for this process too.
    inherited = {name: value for name, value in os.environ.items() if name not in onednn._CACHES}
    command = [sys.executable, "recipe/train.py", "--config", str(config)]
    done = subprocess.run(
        [*command, f"training.output_dir={folder}"],
        cwd=REPOSITORY,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((folder / "manifest.json").read_text())
    return int(manifest["memory"]["measured"]["peak"])


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.cpu._is_avx512_bf16_supported(),
    reason="torch computes 16-bit products by oneDNN where the CPU has them",
)
def test_a_run_of_many_lengths(write_config, write_rows, tmp_path):
    rows = [{"instruction": "a " * (10 + n), "output": "b " * (5 + n % 7)} for n in range(120)]
    config = write_config(
        model={"dtype": "bfloat16"},
        data={"path": str(write_rows(rows))},
        training={"bf16": True, "per_device_train_batch_size": 1, "num_train_epochs": 1},
    )
    as_ever = measured_peak(config, tmp_path / "a", **dict.fromkeys(onednn._CACHES, "1024"))
    ours = measured_peak(config, tmp_path / "b")
    assert ours < as_ever - 60 * 2**20
