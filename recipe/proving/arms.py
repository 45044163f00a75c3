"""One arm of a study: a short run as ``train.py`` makes it, and what it took, by item."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from recipe.memory.probe import allocated_peak, peak_memory
from recipe.memory.watch import MemoryWatch
from recipe.model.checkpoint import load_base
from recipe.model.feed_forward import checkpoint_feed_forward
from recipe.model.lora import add_lora
from recipe.run_data import load_data, share_openings
from recipe.settings import Settings
from recipe.training.arguments import autocast_dtype, training_arguments
from recipe.training.build import build_trainer
from recipe.training.head import OutputHead
from recipe.training.loss import TokenLoss
from recipe.training.run_log import RunLog
from recipe.training.trainer import TokenWeightedTrainer

# peft wraps all models alike; this adapter is frozen, and is nothing beside the base.
_NO_ADAPTER = {"r": 1, "target_modules": ["q_proj"], "layers_to_transform": [0], "lora_dropout": 0}


class _Steps(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)


def measured_arm(settings: Settings) -> dict[str, Any]:
    """Train ``settings`` and measure; nothing of it is kept.

    Returns:
        ``bytes`` of weights, gradients, optimizer state and activations, and the ``allocated`` peak
        of a step with all of these; ``resident`` or CUDA's own peaks of the process;
        ``held_out_loss`` before and after; ``tokens`` and ``seconds`` of all steps, and the median
        step's; ``parameters`` that are trained.

    Raises:
        UserError: the arm cannot be run as it is described.
        RunFailed: a value that is not finite, or too little memory.
    """
    watch, steps = MemoryWatch(), _Steps()
    with tempfile.TemporaryDirectory(prefix="recipe-arm-") as folder:
        trainer, log = _prepared(settings, [watch, steps])
        trainer.args.output_dir, log.file = folder, Path(folder) / "metrics.jsonl"
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    process = peak_memory()
    trainer.model.zero_grad(set_to_none=True)
    rows = max(_batches(trainer), key=lambda rows: sum(row.needed for row in rows))
    trainer.rehearse_step(rows, watch.saving(rows, trainer.model))
    trainer.model.zero_grad(set_to_none=True)
    found = watch.measured(trainer.model)
    assert found is not None  # it has been trained
    dynamic = allocated_peak(lambda: _step(trainer, rows))
    static = found.weights + found.adapter + found.optimizer
    seconds = sorted(steps.seconds)
    return {
        "bytes": {
            "weights": found.weights + found.adapter,
            "gradients": found.gradients,
            "optimizer": found.optimizer,
            "activations": found.saved,
            "allocated": static + dynamic,
        },
        "process": process,
        "held_out_loss": {"before": before, "after": after},
        "tokens": log.tokens,
        "seconds": sum(steps.seconds),
        "median_step_seconds": seconds[len(seconds) // 2],
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def _prepared(
    settings: Settings, watchers: list[TrainerCallback]
) -> tuple[TokenWeightedTrainer, RunLog]:
    arguments = training_arguments(settings)
    data = load_data(settings)
    set_seed(arguments.seed)
    everything = settings.study.train == "everything"
    model = add_lora(
        load_base(settings.model),
        _NO_ADAPTER if everything else settings.lora,
        mixed_precision=arguments.fp16 or arguments.bf16,
    )
    if everything:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = ".lora_" not in name
    if settings.study.checkpoint == "feed_forward":
        checkpoint_feed_forward(model)
    whole = settings.study.logits == "whole"
    head = OutputHead(model, autocast=autocast_dtype(arguments), whole=whole)
    loss = TokenLoss(head.nll)
    log = RunLog(loss, peak_memory=peak_memory)
    trainer = build_trainer(
        model,
        arguments,
        data.train.rows,
        data.held_out.rows,
        callbacks=[log, *watchers],
        loss=loss,
        head=head,
        share_openings=share_openings(settings),
    )
    return trainer, log


def _batches(trainer: TokenWeightedTrainer) -> list[list[Any]]:
    rows, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _step(trainer: TokenWeightedTrainer, rows: list[Any]) -> None:
    """Two micro-batches where gradients accumulate: the second finds those of the first."""
    for _ in range(min(trainer.args.gradient_accumulation_steps, 2)):
        trainer.rehearse_step(rows)
    trainer.optimizer.step()
    trainer.model.zero_grad(set_to_none=True)
