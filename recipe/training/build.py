"""Everything that a Trainer needs → one that can take its first step."""

from collections.abc import Sequence
from functools import partial

from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from recipe.data.batch import flatten
from recipe.data.tokens import TokenizedRow
from recipe.settings import RunFailed, UserError
from recipe.training.arguments import check_reached
from recipe.training.engine import SINGLE, Engine
from recipe.training.faults import first_line, out_of_memory
from recipe.training.finite import FiniteSteps
from recipe.training.flow import FrozenInputs, SaveBehindEvaluation
from recipe.training.head import OutputHead
from recipe.training.loss import TokenLoss
from recipe.training.run_log import RunLog
from recipe.training.sharded_trainer import ShardedTrainer
from recipe.training.trainer import TokenWeightedTrainer


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
    engine: Engine = SINGLE,
) -> TokenWeightedTrainer:
    """The Trainer over flattened batches; the model is moved to the device here.

    Args:
        callbacks: a ``RunLog`` among them, which says what ``FiniteSteps`` finds.
        loss: of what ``head`` makes of the model's output.
        share_openings: as ``flatten`` has it, for training and evaluation.
        engine: that the launcher asks for.

    Raises:
        UserError: no full batch where one is asked for, or the library refuses an optimizer, a
            schedule or a reporter.
    """
    batch = arguments.per_device_train_batch_size
    if arguments.dataloader_drop_last and len(train) < batch:
        raise UserError.single(
            "training.dataloader_drop_last",
            f"{len(train)} rows do not fill one batch of {batch}. Leave it out.",
        )
    log = next(callback for callback in callbacks if isinstance(callback, RunLog))
    finite = FiniteSteps(model, loss, log, engine=engine)
    try:
        trainer = (ShardedTrainer if engine.shards else TokenWeightedTrainer)(
            finite=finite,
            log=log,
            head=head,
            model=model,
            args=arguments,
            data_collator=partial(flatten, share_openings=share_openings),
            train_dataset=train,
            eval_dataset=held_out or None,
            compute_loss_func=loss,
            callbacks=[FrozenInputs(), *callbacks, SaveBehindEvaluation(), finite],
        )
        # Made once to see whether they can be; train() makes its own.
        trainer.create_optimizer()
        trainer.create_scheduler(num_training_steps=100, optimizer=trainer.optimizer)
        trainer.optimizer = trainer.lr_scheduler = None
    except (ValueError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        check_reached(error)
        if out_of_memory(error):
            raise RunFailed(f"the model does not fit into memory: {first_line(error)}") from error
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError.single(
            "training", f"transformers refuses it: {reason}. Correct the value or leave it out."
        ) from error
    trainer.remove_callback(PrinterCallback)  # it prints each record; ours go to metrics.jsonl
    return trainer
