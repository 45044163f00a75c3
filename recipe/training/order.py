"""Which rows go together: the micro-batches of a run, in the order in which it takes them."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from torch import nn
from torch.utils.data import BatchSampler
from transformers import Trainer, TrainingArguments

from recipe.data.tokens import TokenizedRow
from recipe.training.disk import planned_steps


class _EvenShare(BatchSampler):
    """Of the micro-batches of a single process every Nth, and empty ones where they do not suffice.

    accelerate's own deal repeats rows instead, so that the mean over the last step of an epoch, and
    with it the adapter, would depend on how many processes there are.
    """

    def __init__(self, batch_sampler: BatchSampler, *, processes: int, process: int) -> None:
        # By these names accelerate finds the sampler whose epoch it sets, behind a skip too.
        self.batch_sampler = batch_sampler
        self.sampler = batch_sampler.sampler
        self.batch_size = batch_sampler.batch_size
        self.drop_last = batch_sampler.drop_last
        self._processes, self._process = processes, process

    def __len__(self) -> int:
        return -(-len(self.batch_sampler) // self._processes)

    def __iter__(self) -> Iterator[list[int]]:
        batches = iter(self.batch_sampler)
        while dealt := list(islice(batches, self._processes)):
            yield list(dealt[self._process]) if self._process < len(dealt) else []


def deal_evenly(loader: Any) -> None:
    """Make accelerate's loader of several processes hand out ``_EvenShare``."""
    own = getattr(loader, "base_dataloader", loader)  # with workers accelerate's is a shell
    dealt = own.batch_sampler
    even = _EvenShare(
        dealt.batch_sampler, processes=dealt.num_processes, process=dealt.process_index
    )
    # A DataLoader lets no one exchange it.
    object.__setattr__(own, "batch_sampler", even)


def evaluated_batches(rows: int, size: int, *, processes: int, process: int) -> list[list[int]]:
    """The places of the rows that a process evaluates, ``size`` at a time; every process gets as
    many batches, empty ones at the end.
    """
    own = range(process, rows, processes)
    most = math.ceil(math.ceil(rows / processes) / size)
    return [list(own[start : start + size]) for start in range(0, most * size, size)]


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
