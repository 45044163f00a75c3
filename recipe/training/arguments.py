"""``training:`` of the config → TrainingArguments for this process."""

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from recipe.settings import RunFailed, Settings, UserError, plain

# What the flattened batch, the run folder and honest logs need; the config may not change these.
_OURS: dict[str, Any] = {
    "remove_unused_columns": False,
    "disable_tqdm": True,
    # The filter replaces a NaN loss by the mean of earlier ones, and the run goes on.
    "logging_nan_inf_filter": False,
}


_METRICS = ("loss", "perplexity")


def world_size() -> int:
    """Processes of this run, as the launcher says.

    Raises:
        UserError: it says no number of processes.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdecimal() or int(said) < 1:
        raise UserError.single(
            "WORLD_SIZE", f"{said!r} in the environment is no number of processes. Unset it."
        )
    return int(said)


def training_arguments(settings: Settings) -> TrainingArguments:
    """Build TrainingArguments; the effective batch is the one that the config states.

    ``gradient_accumulation_steps`` is stated for one process: N processes divide it.

    Raises:
        UserError: N does not divide it, or the library refuses a value.
    """
    asked = plain(settings.training)
    asked.pop("resume_from_checkpoint", None)
    asked["gradient_accumulation_steps"] = accumulation(asked)
    if asked.get("gradient_checkpointing") or asked.get("activation_checkpointing"):
        _use_non_reentrant(asked)
    if str(asked.get("metric_for_best_model") or "loss").removeprefix("eval_") not in _METRICS:
        raise UserError.single(
            "training.metric_for_best_model",
            f"{asked['metric_for_best_model']} is not measured. Choose {' or '.join(_METRICS)}.",
        )
    asked.setdefault("report_to", "none")
    # Pinned memory speeds the copy to a GPU; without one the library warns at every run.
    asked.setdefault("dataloader_pin_memory", torch.accelerator.is_available())
    # All of an adapter is used in each pass; looking for what is not costs time, and torch warns.
    asked.setdefault("ddp_find_unused_parameters", False)
    # The run's folder is made, and set here, once nothing can be refused any more.
    asked.pop("output_dir", None)
    try:
        return TrainingArguments(output_dir=tempfile.gettempdir(), **{**asked, **_OURS})
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        check_reached(error)
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError.single(
            "training", f"transformers refuses it: {reason}. Correct the value or leave it out."
        ) from error


def of_other_processes(error: BaseException) -> bool:
    """Whether gloo, NCCL or torchrun's store raised it: another process, or the way to it, is
    gone.
    """
    words = ("gloo", "nccl", "connection closed by peer", "timed out waiting")
    text = str(error).lower()
    of_engine = isinstance(error, dist.DistError)
    return of_engine or (isinstance(error, RuntimeError) and any(word in text for word in words))


def check_reached(error: Exception) -> None:
    """Whether a library's error is of the network between processes, and of no value.

    Raises:
        RunFailed: it is.
    """
    if of_other_processes(error):
        text = " ".join(str(error).split())
        raise RunFailed(
            f"the processes do not reach each other ({text[:160]}). On hosts whose name resolves "
            "to no address that the others reach, name the interface in GLOO_SOCKET_IFNAME (CPU) "
            "or NCCL_SOCKET_IFNAME (GPU), such as eth0."
        ) from error


def autocast_dtype(arguments: TrainingArguments) -> torch.dtype | None:
    """What mixed precision computes in; None without it."""
    return torch.float16 if arguments.fp16 else torch.bfloat16 if arguments.bf16 else None


def accumulation(asked: dict[str, Any]) -> int:
    """Micro-batches a step of each process, so that the effective batch is the config's.

    Raises:
        UserError: the processes do not divide it.
    """
    steps, processes = int(asked.get("gradient_accumulation_steps", 1)), world_size()
    if steps % processes:
        raise UserError.single(
            "training.gradient_accumulation_steps",
            f"{steps} steps for one process cannot be divided over {processes} processes. Use a "
            f"multiple of {processes}, or start another number of processes.",
        )
    return steps // processes


def _use_non_reentrant(asked: dict[str, Any]) -> None:
    """Reentrant checkpointing gives a LoRA on a frozen base no gradient at all."""
    name = "activation" if asked.get("activation_checkpointing") else "gradient"
    kwargs = asked.get(f"{name}_checkpointing_kwargs") or {}
    asked[f"{name}_checkpointing_kwargs"] = {"use_reentrant": False, **kwargs}
