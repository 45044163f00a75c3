"""transformers' Trainer with two things changed: evaluation is weighted by tokens, and a step that
is not finite ends the run.

The stock evaluation averages the means of its batches, so eval_loss and the perplexity from it
change with per_device_eval_batch_size. The stock training goes on with NaN, and saves it.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import EvalLoopOutput

from recipe.data.batch import flatten
from recipe.data.tokens import TokenizedRow
from recipe.settings import UserError
from recipe.training.finite import FiniteSteps, NotFinite
from recipe.training.head import OutputHead
from recipe.training.loss import TokenLoss, count_trained, sum_over_processes
from recipe.training.run_log import RunLog

_UNCHANGED = 1e-6  # relative; float32 rounds at 1e-7


class FrozenInputs(TrainerCallback):
    """No gradient flows below the lowest adapted layer.

    For reentrant checkpointing, which is refused here, transformers lets the embedding's output
    require one: with lora.layers_to_transform all layers below would be recomputed for nothing.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PeftModel = None,
        **_: Any,
    ) -> None:
        model.get_base_model().disable_input_require_grads()


class TokenWeightedTrainer(Trainer):
    """Each process evaluates its own share of the rows once; sums are added, then divided."""

    def __init__(self, *, finite: FiniteSteps, log: RunLog, head: OutputHead, **named: Any) -> None:
        super().__init__(**named)
        self._finite = finite
        self._log = log
        self._head = head

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        self._finite.micro_batches.append(inputs.pop("row_indices"))
        self._log.computed_tokens += sum(inputs["row_lengths"])
        self._log.shared_tokens += sum(inputs["openings"])
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(self, *args: Any, **named: Any) -> Any:
        with self._head.apart():
            return super().compute_loss(*args, **named)

    def _get_grad_norm(self, *args: Any, **named: Any) -> torch.Tensor:
        # The one place that has the norm from before clipping, whatever max_grad_norm is.
        norm: torch.Tensor = super()._get_grad_norm(*args, **named)
        self._finite.grad_norm = norm
        return norm

    def report_into(self, folder: Path) -> None:
        """TensorBoard's place, which it would take only when training begins: what is evaluated
        before, and with it all that follows, would go to a folder of its own in ``runs/``.
        """
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(folder / "tensorboard")

    def answers_unchanged(self, row: TokenizedRow) -> bool:
        """Whether the adapter leaves the base's logits for ``row`` as they are.

        PiSSA and OLoRA took their start out of the base, so with them it never does.
        """
        inputs = self._prepare_inputs(flatten([row]))
        for name in ("row_indices", "labels"):
            del inputs[name]
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            tuned = self._logits(inputs)
            with self.model.disable_adapter():
                base = self._logits(inputs)
        finally:
            for module, mode in modes:
                module.training = mode
        return bool((tuned - base).norm() <= _UNCHANGED * base.norm())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        share = rows[self.args.process_index :: self.args.world_size]
        return DataLoader(
            share,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.data_collator,
            # Without one, each pass draws a seed from the global generator, and a run that
            # evaluates would drop out other weights than one resumed behind the evaluation.
            generator=torch.Generator(),
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.model.eval()
        sums, tokens = [0.0], 0
        not_finite: NotFinite = []
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            labels, rows = inputs.pop("labels"), inputs.pop("row_indices")
            sums.append(self._nll(inputs, labels).sum().item())
            tokens += int(count_trained(labels))
            if not math.isfinite(sums[-1]):
                not_finite.append((sums[-1], rows))
        nll, count = sum_over_processes((math.fsum(sums), tokens), self.args.device)
        if not math.isfinite(nll):
            self._finite.stop_for_evaluation(not_finite, self.state.global_step)
        metrics = {
            f"{metric_key_prefix}_loss": nll / count,
            f"{metric_key_prefix}_perplexity": perplexity(nll / count),
            f"{metric_key_prefix}_trained_tokens": count,
        }
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=len(self.eval_dataset)
        )

    def _nll(self, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
        """float32 (K,) of one batch; see ``token_nll``."""
        with torch.no_grad(), self._head.apart():
            return self._head.nll(self._logits(inputs), labels)

    def _logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        """(K, vocabulary) of one batch without labels, or (K, hidden) with the head ``apart``;
        float32, or what the base computes in.
        """
        # autocast here too: before the first step the model is not yet wrapped in it.
        with torch.no_grad(), self.accelerator.autocast():
            logits: torch.Tensor = self.model(**inputs).logits[0]
        return logits


def perplexity(mean_nll: float) -> float:
    """exp of the mean negative log-likelihood in nats; infinite beyond what a float holds."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


def build_trainer(
    model: PeftModel,
    arguments: TrainingArguments,
    train: Sequence[TokenizedRow],
    held_out: Sequence[TokenizedRow],
    *,
    callbacks: list[TrainerCallback],
    loss: TokenLoss,
    head: OutputHead,
    share_openings: bool,
) -> TokenWeightedTrainer:
    """The Trainer over flattened batches; the model is moved to the device here.

    Args:
        callbacks: a ``RunLog`` among them, which says what ``FiniteSteps`` finds.
        loss: of what ``head`` makes of the model's output.
        share_openings: as ``flatten`` has it, for training and evaluation.

    Raises:
        UserError: no full batch where one is asked for, or the library refuses an optimizer, a
            schedule or a reporter.
    """
    batch = arguments.per_device_train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and len(train) < batch:
        raise UserError.single(
            "training.dataloader_drop_last",
            f"{len(train)} rows do not fill one batch of {batch}. Leave it out.",
        )
    log = next(callback for callback in callbacks if isinstance(callback, RunLog))
    finite = FiniteSteps(model, loss, log)
    try:
        trainer = TokenWeightedTrainer(
            finite=finite,
            log=log,
            head=head,
            model=model,
            args=arguments,
            data_collator=partial(flatten, share_openings=share_openings),
            train_dataset=train,
            eval_dataset=held_out or None,
            compute_loss_func=loss,
            callbacks=[FrozenInputs(), *callbacks, finite],
        )
        # Made once to see whether they can be; train() makes its own.
        trainer.create_optimizer()
        trainer.create_scheduler(num_training_steps=100, optimizer=trainer.optimizer)
        trainer.optimizer = trainer.lr_scheduler = None
    except (ValueError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError.single(
            "training", f"transformers refuses it: {reason}. Correct the value or leave it out."
        ) from error
    trainer.remove_callback(PrinterCallback)  # it prints each record; ours go to metrics.jsonl
    return trainer
