"""Can this machine do what the config asks? Whatever it would silently do otherwise is refused."""

import os
from collections.abc import Callable

import psutil
import torch
from transformers import TrainingArguments

from recipe.settings import Problem, Settings, StudySettings, UserError
from recipe.training.arguments import world_size
from recipe.training.engine import asked_engine
from recipe.training.engine_limits import limits

_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # of srun and mpirun


def check_machine(settings: Settings) -> None:
    """Refuse a run that could only be another one than asked.

    Raises:
        UserError: with every mismatch between config, launcher and machine.
    """
    check_ordinary(settings)
    checks: list[Callable[[Settings], Problem | None]] = [
        _fp16_needs_an_accelerator,
        _bf16_on_cpu_is_said,
        _4bit_compute_fits_the_device,
        _paging_needs_a_gpu,
        _dora_on_8bit_needs_a_gpu,
        _launcher_keeps_precision_out,
        _launcher_compiles_nothing,
        _processes_are_what_was_started,
        _one_process_one_gpu,
    ]
    problems = [problem for check in checks if (problem := check(settings))]
    problems += limits(settings, asked_engine(), on_cpu=_on_cpu(settings))
    if problems:
        raise UserError(problems)


def check_ordinary(settings: Settings) -> None:
    """Refuse what only an arm of a study may be.

    Raises:
        UserError: ``study:`` asks for another run than the recipe trains.
    """
    asked, ordinary = settings.study, StudySettings()
    for key in ("train", "logits", "checkpoint"):
        value = getattr(asked, key)
        if value != getattr(ordinary, key):
            raise UserError.single(
                f"study.{key}",
                f"{value} is for recipe/study.py, which measures and keeps nothing. Leave it out.",
            )


def device_name(arguments: TrainingArguments) -> str:
    """The device that a run computes on, in words."""
    if arguments.device.type == "cuda":
        return str(torch.cuda.get_device_name(arguments.device))
    if arguments.device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return str(arguments.device.type)


def idle_threads(arguments: TrainingArguments) -> str | None:
    """Say it when a run on the CPU was given fewer threads than there are cores for it."""
    given, cores = torch.get_num_threads(), psutil.cpu_count(logical=False) or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", arguments.world_size))
    fair = max(cores // here, 1)
    if arguments.device.type != "cpu" or given >= fair:
        return None
    return (
        f"{given} of {cores} CPU cores, by OMP_NUM_THREADS; accelerate launch sets it to 1 unless "
        f"it gets --num_cpu_threads_per_process {fair}"
    )


def _on_cpu(settings: Settings) -> bool:
    asked = settings.training.get("use_cpu") or os.environ.get("ACCELERATE_USE_CPU") == "true"
    return bool(asked) or not torch.accelerator.is_available()


def _fp16_needs_an_accelerator(settings: Settings) -> Problem | None:
    if not (settings.training.get("fp16") and _on_cpu(settings)):
        return None
    return Problem(
        "training.fp16",
        "fp16 training needs a GPU; on the CPU accelerate would silently run fp32. Override with "
        "training.fp16=false model.dtype=float32, or start on a GPU.",
    )


def _bf16_on_cpu_is_said(settings: Settings) -> Problem | None:
    on_cpu = _on_cpu(settings) and not settings.training.get("use_cpu")
    if not (settings.training.get("bf16") and on_cpu):
        return None
    return Problem(
        "training.bf16",
        "no accelerator here, and bf16 on the CPU must be meant: it is many times slower than "
        "fp32. Add training.use_cpu=true, or override with training.bf16=false.",
    )


def _4bit_compute_fits_the_device(settings: Settings) -> Problem | None:
    where, key = "model.quantization.bnb_4bit_compute_dtype", "bnb_4bit_compute_dtype"
    asked = (settings.model.quantization or {}).get(key)
    if _on_cpu(settings):
        if asked not in ("bfloat16", "float16") or settings.training.get("use_cpu"):
            return None
        return Problem(
            where,
            f"no accelerator here, and {asked} on the CPU must be meant: it is many times slower "
            f"than float32 on most. Override with {where}=float32, or add training.use_cpu=true.",
        )
    emulated = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    if asked == "bfloat16" and emulated:
        return Problem(
            where, f"this GPU computes bfloat16 by emulation. Override with {where}=float16."
        )
    return None


def _paging_needs_a_gpu(settings: Settings) -> Problem | None:
    optim = str(settings.training.get("optim") or "")
    if not (optim.startswith("paged_") and _on_cpu(settings)):
        return None
    plain = "adamw_bnb_8bit" if optim == "paged_adamw_8bit" else "one that is not paged"
    return Problem(
        "training.optim",
        f"{optim} moves its state between GPU and CPU; without a GPU bitsandbytes would silently "
        f"not page it. Use {plain}.",
    )


def _dora_on_8bit_needs_a_gpu(settings: Settings) -> Problem | None:
    eight = (settings.model.quantization or {}).get("load_in_8bit")
    if not (settings.lora.get("use_dora") and eight and _on_cpu(settings)):
        return None
    return Problem(
        "lora.use_dora",
        "on a base in 8 bit needs a GPU: bitsandbytes does not give its weights back on a CPU. "
        "Leave it out, or use load_in_4bit.",
    )


def _launcher_keeps_precision_out(settings: Settings) -> Problem | None:
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    asked = next((name for name in ("fp16", "bf16") if settings.training.get(name)), "no")
    if launched in ("no", asked):
        return None
    return Problem(
        "accelerate launch",
        f"its mixed_precision is {launched}, the config asks for {asked}. Start with "
        "--mixed_precision no; precision belongs to the config.",
    )


def _launcher_compiles_nothing(settings: Settings) -> Problem | None:
    asked = [
        name
        for name in ("MEGATRON_LM", "PARALLELISM_CONFIG")
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() not in ("", "0", "false")
    ]
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if dynamo != "no":
        asked.append(f"dynamo ({dynamo})")
    if not asked:
        return None
    return Problem(
        "accelerate launch",
        f"asks for {', '.join(asked)}, which this version does not do. Start with a file in "
        "launch/ as it is; launch/README.md says which one when.",
    )


def _processes_are_what_was_started(settings: Settings) -> Problem | None:
    # accelerate's simple launcher starts one process where several were asked for, and leaves
    # MASTER_ADDR without WORLD_SIZE behind (github.com/huggingface/accelerate/issues/2741).
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        return Problem(
            "accelerate launch",
            "several processes were asked for, but only this one was started. Start with "
            "--config_file launch/ddp.yaml or --multi_gpu, or use torchrun --nproc_per_node N.",
        )
    alone = _started_alone()
    if alone:
        return Problem("accelerate launch", alone)
    if world_size() > 1 and _on_cpu(settings) and not settings.training.get("use_cpu"):
        return Problem(
            "training.use_cpu",
            f"{world_size()} processes on the CPU would each train alone. Add "
            "training.use_cpu=true.",
        )
    return None


def _started_alone() -> str | None:
    """Whether a cluster's launcher started several, of which none knows of the others."""
    own, here = world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    tasks = max(int(os.environ.get(name) or 1) for name in _TASKS)
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES") or 1)
    if own == 1 and tasks > 1:
        return (
            f"{tasks} tasks were started, and each would train alone. Start one task a node and "
            "torchrun in it, as launch/slurm.sh does."
        )
    if nodes > 1 and own == here:
        return (
            f"{nodes} nodes were given, and each would train alone with its {own} processes. Give "
            "all the same rendezvous, as launch/slurm.sh does."
        )
    return None


def _one_process_one_gpu(settings: Settings) -> Problem | None:
    gpus = 0 if _on_cpu(settings) else torch.cuda.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpus and here > gpus:
        return Problem(
            "accelerate launch",
            f"{here} processes on this machine, which has {gpus} GPU{'s'[: gpus > 1]}. Add "
            f"--num_processes {gpus}.",
        )
    if world_size() > 1 or gpus <= 1:
        return None
    return Problem(
        "accelerate launch",
        f"one process sees {gpus} GPUs, and the Trainer would split every batch over them. Set "
        f"CUDA_VISIBLE_DEVICES=0, or start --multi_gpu --num_processes {gpus}.",
    )
