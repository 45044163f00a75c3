"""How each engine is started on the CPU, and how far two adapters are apart."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file

BIN = Path(sys.executable).parent
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
ENGINES = [("ddp", 2), ("ddp", 4), ("zero2", 2), ("zero3", 2), ("fsdp2", 2)]


def lacking(engine: str) -> str | None:
    """Why an engine cannot be started here."""
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        return "DeepSpeed is not installed; make deepspeed"
    return None


def launch(engine: str, processes: int) -> tuple[list[str], dict[str, str]]:
    """The words before train.py's arguments, and the environment.

    By the files in launch/; FSDP2, which accelerate does on GPUs only, as fsdp2_on_cpu.py has it,
    with what accelerate makes of launch/fsdp2.yaml in the environment.
    """
    here = {**os.environ, "OMP_NUM_THREADS": "1"}
    if engine == "single":
        return [sys.executable, "recipe/train.py"], here
    if engine == "fsdp2":
        run = [str(BIN / "torchrun"), "--standalone", f"--nproc_per_node={processes}"]
        return [*run, "tests/equalities/fsdp2_on_cpu.py"], here | FSDP2
    run = [str(BIN / "accelerate"), "launch", "--quiet"]
    run += ["--config_file", f"launch/{engine}.yaml", "--num_processes", str(processes)]
    return [*run, "--main_process_port", "0", "recipe/train.py"], here


def lora_b(folder: Path) -> torch.Tensor:
    """All of an adapter's B matrices, float64, one after another."""
    state = load_file(folder / "adapter_model.safetensors")
    return torch.cat([t.double().flatten() for n, t in sorted(state.items()) if "lora_B" in n])


def apart(ours: Path, theirs: Path) -> float:
    """Norm of the difference of two adapters' B, relative to the norm of ``theirs``."""
    one, other = lora_b(ours), lora_b(theirs)
    return float((one - other).norm() / other.norm())
