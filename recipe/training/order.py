"""Which rows go together: the micro-batches of a run, in the order in which it takes them."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from recipe.data.tokens import TokenizedRow
from recipe.training.disk import planned_steps


def steps_of(loader: Any, *, steps: int, accumulation: int) -> Iterator[list[list[int]]]:
    """Of each optimizer step its micro-batches on this process, as places of their rows.

    Args:
        loader: the Trainer's own; its epoch is set.
        steps: of the whole run.
        accumulation: micro-batches a step; the last step of an epoch may have fewer.
    """
    epoch = 0
    while steps > 0:
        loader.set_epoch(epoch)
        batches = [list(places) for places in islice(loader.batch_sampler, steps * accumulation)]
        if not batches:
            return
        for start in range(0, len(batches), accumulation):
            yield batches[start : start + accumulation]
            steps -= 1
        epoch += 1


def micro_batches(loader: Any, *, steps: int, accumulation: int) -> Iterator[list[int]]:
    """The micro-batches of all steps; see ``steps_of``."""
    return chain.from_iterable(steps_of(loader, steps=steps, accumulation=accumulation))


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
