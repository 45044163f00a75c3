"""The runs that a proof makes: real ones, on the first rows, in a folder that goes away."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from recipe.finetune import finetune
from recipe.proving.plan import Plan, first_rows
from recipe.settings import Settings, plain

EPOCHS = 2
BATCH, ACCUMULATION = 2, 2
# Each belongs to the length of a run, to evaluation or to what is kept; set below, or left out.
_REPLACED = (
    "dataloader_drop_last",
    "eval_delay",
    "eval_steps",
    "greater_is_better",
    "max_steps",
    "metric_for_best_model",
    "save_total_limit",
)
# What a config says of where and how gradients are computed, and not of the optimizer.
_OF_GRADIENTS = (
    "activation_checkpointing_kwargs",
    "full_determinism",
    "gradient_checkpointing_kwargs",
    "seed",
    "use_cpu",
)


def gradient_settings(
    plan: Plan,
    *,
    batch: int,
    accumulation: int,
    share_openings: bool = False,
    checkpointing: bool = False,
    **training: Any,
) -> Settings:
    """One epoch over the first rows in their order, in float32, without dropout.

    The learning rate is next to nothing, so that each step sees the weights of the first and one
    oracle serves all.
    """
    settings = plan.settings
    kept = {k: v for k, v in plain(settings.training).items() if k in _OF_GRADIENTS}
    training = {
        **kept,
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": checkpointing,
        "learning_rate": 1e-30,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        **training,
    }
    data = first_rows(plan, held_out=False, share_openings=share_openings)
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"dtype": "float32"}),
            "data": settings.data.model_copy(update=data),
            "lora": {**plain(settings.lora), "lora_dropout": 0.0},
            "training": training,
        }
    )


def short_settings(plan: Plan) -> Settings:
    """Two epochs over the first rows with the config's own optimizer, schedule, dropout, sampling
    and openings, in windows small enough that there are several, the last one short.
    """
    settings = plan.settings
    kept = {k: v for k, v in plain(settings.training).items() if k not in _REPLACED}
    data = first_rows(plan, held_out=True, share_openings=settings.data.share_openings)
    training = {
        **kept,
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "eval_strategy": "epoch" if data["held_out"] else "no",
        "eval_on_start": False,
        "load_best_model_at_end": False,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": max(steps(plan) // 2 - 1, 1),
        "report_to": "none",
    }
    return settings.model_copy(
        update={"data": settings.data.model_copy(update=data), "training": training}
    )


def steps(plan: Plan) -> int:
    """Optimizer steps of a short run."""
    micro_batches = -(-len(plan.rows) // BATCH)
    return EPOCHS * -(-micro_batches // ACCUMULATION)


def run(
    settings: Settings,
    folder: Path,
    watchers: Sequence[TrainerCallback],
    *,
    resume: bool = False,
) -> Path:
    """The real run into ``folder``, or its continuation there; it prints nothing.

    Raises:
        UserError, RunFailed: as ``finetune``.
    """
    training = {**plain(settings.training), "output_dir": str(folder)}
    if resume:
        training["resume_from_checkpoint"] = str(folder)
    with silence():
        return finetune(settings.model_copy(update={"training": training}), watchers=watchers)


@contextmanager
def silence() -> Iterator[None]:
    """Nothing that is printed while the block runs is seen."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
