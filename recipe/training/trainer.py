"""transformers' Trainer with one thing changed: evaluation is weighted by tokens.

The stock evaluation averages the means of its batches, so eval_loss and the perplexity from it
change with per_device_eval_batch_size.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from recipe.data.batch import flatten
from recipe.data.tokens import TokenizedRow
from recipe.settings import UserError
from recipe.training.loss import TokenLoss, count_trained, sum_over_processes, token_nll


class TokenWeightedTrainer(Trainer):
    """Each process evaluates its own share of the rows once; sums are added, then divided."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        share = rows[self.args.process_index :: self.args.world_size]
        return DataLoader(
            share,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=flatten,
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
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            labels = inputs.pop("labels")
            # autocast here too: before the first step the model is not yet wrapped in it.
            with torch.no_grad(), self.accelerator.autocast():
                logits = self.model(**inputs).logits[0]
            sums.append(token_nll(logits, labels).sum().item())
            tokens += int(count_trained(labels))
        nll, count = sum_over_processes((math.fsum(sums), tokens), self.args.device)
        metrics = {
            f"{metric_key_prefix}_loss": nll / count,
            f"{metric_key_prefix}_perplexity": perplexity(nll / count),
            f"{metric_key_prefix}_trained_tokens": count,
        }
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=len(self.eval_dataset)
        )


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
    loss: TokenLoss,
    callbacks: list[TrainerCallback],
) -> TokenWeightedTrainer:
    """The Trainer over flattened batches; the model is moved to the device here.

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
    try:
        trainer = TokenWeightedTrainer(
            model=model,
            args=arguments,
            data_collator=flatten,
            train_dataset=train,
            eval_dataset=held_out or None,
            compute_loss_func=loss,
            callbacks=callbacks,
        )
        # Made once to see whether they can be; train() makes its own.
        trainer.create_optimizer()
        trainer.create_scheduler(num_training_steps=100, optimizer=trainer.optimizer)
        trainer.optimizer = trainer.lr_scheduler = None
    except (ValueError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        raise UserError.single("training", f"transformers refuses it: {error}") from error
    trainer.remove_callback(PrinterCallback)  # it prints each record; ours go to metrics.jsonl
    return trainer
