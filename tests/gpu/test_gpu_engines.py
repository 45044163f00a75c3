"""FSDP2 and ZeRO on CUDA devices, by the files in launch/: on one GPU, and on two if there are."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.equalities.engines import BIN, apart, lacking, lora_b

REPOSITORY = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def run(engine: str, processes: int, config: Path, *arguments: str) -> str:
    launch = [str(BIN / "accelerate"), "launch", "--quiet", "--main_process_port", "0"]
    launch += ["--config_file", f"launch/{engine}.yaml", "--num_processes", str(processes)]
    words = [sys.executable] if engine == "single" else launch
    done = subprocess.run(
        [*words, "recipe/train.py", "--config", str(config), *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def config(write_config):
    return write_config(
        data={"rows": "0:9", "held_out": "9:12"},
        lora={"lora_dropout": 0.0},
        training={
            "max_steps": 12,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "save_steps": 8,
            "use_cpu": False,
        },
    )


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [(("model.dtype=float32",), 1e-4), (("model.dtype=bfloat16", "training.bf16=true"), 5e-2)],
    ids=["fp32", "bf16"],
)
def test_an_engine_trains_the_adapter_of_one_process_and_resumes(
    config, tmp_path, engine, processes, precision, tolerance
):
    if reason := lacking(engine):
        pytest.skip(reason)
    if processes > torch.cuda.device_count():
        pytest.skip("one CUDA device")
    one, many, again = tmp_path / "one", tmp_path / "many", tmp_path / "again"
    run("single", 1, config, f"training.output_dir={one}", *precision)
    said = run(engine, processes, config, f"training.output_dir={many}", *precision)
    assert lora_b(one / "adapter").norm() > 0
    assert apart(many / "adapter", one / "adapter") < tolerance
    manifest = json.loads((many / "manifest.json").read_text())
    assert manifest["engine"] == engine
    for name, item in manifest["memory"]["items"].items():
        assert item["forecast"] == pytest.approx(item["measured"], rel=0.25, abs=2**16), name
    assert "memory    forecast" in said
    shutil.copytree(many, again)
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / "checkpoint-12")
    run(engine, processes, again / "settings.yaml", f"training.resume_from_checkpoint={again}")
    assert apart(again / "adapter", many / "adapter") == 0
