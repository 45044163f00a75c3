"""Which rows go together: the micro-batches of a run, in the order in which it takes them."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from recipe.data.tokens import TokenizedRow
from recipe.training.disk import planned_steps


def micro_batches(loader: Any, *, steps: int, accumulation: int) -> Iterator[list[int]]:
    """Places of the rows of each micro-batch of this process.

    Args:
        loader: the Trainer's own; its epoch is set.
        steps: optimizer steps of the run, of ``accumulation`` micro-batches at most.
    """
    left, epoch = steps * accumulation, 0
    while left > 0:
        loader.set_epoch(epoch)
        batches = [list(places) for places in islice(loader.batch_sampler, left)]
        if not batches:
            return
        yield from batches
        # The last step of an epoch may have fewer micro-batches than the others.
        left -= -(-len(batches) // accumulation) * accumulation
        epoch += 1


def planned_micro_batches(
    rows: Sequence[TokenizedRow], arguments: TrainingArguments
) -> Iterator[list[int]]:
    """The same of a run that is not there yet: transformers' Trainer deals them, to no model."""
    trainer = Trainer(
        model=nn.Linear(1, 1), args=arguments, train_dataset=rows, data_collator=lambda rows: {}
    )
    return micro_batches(
        trainer.get_train_dataloader(),
        steps=planned_steps(arguments, len(rows)),
        accumulation=arguments.gradient_accumulation_steps,
    )
