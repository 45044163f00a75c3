"""The rows that decide what a run takes, found without its weights and without a network."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from transformers import LlamaConfig, TrainingArguments

from recipe.data.batch import largest_batch
from recipe.data.lengths import fit_rows
from recipe.data.openings import shared_openings
from recipe.data.tokens import TokenizedRow
from recipe.memory.forecast import Plan, Rows
from recipe.memory.probe import resident
from recipe.model.shapes import cached_folder, shape_of
from recipe.run_data import Data, load_data, share_openings
from recipe.settings import Settings, UserError
from recipe.training.arguments import training_arguments
from recipe.training.disk import planned_steps
from recipe.training.machine import check_ordinary
from recipe.training.order import planned_micro_batches

# Where neither rows nor max_length say how long a row is.
_ASSUMED_TOKENS = 512
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_COUNTED = 500  # micro-batches, of which the share of common openings is counted


@dataclass(frozen=True)
class Workload:
    """``plan`` is the micro-batch that decides on memory; of the whole run there are
    ``computed_tokens``, or None where the rows are not here. ``described``
    says where shape and rows are from.
    """

    plan: Plan
    computed_tokens: int | None
    described: Sequence[str]

    def times(self) -> float | None:
        """How often the whole run computes what the micro-batch does, by its tokens."""
        if self.computed_tokens is None:
            return None
        return self.computed_tokens / computed(self.plan.rows, share=self.plan.share_openings)


def workload(settings: Settings, *, device: str) -> Workload:
    """What ``settings`` make of memory, without weights and without a network.

    Raises:
        UserError: no shape is known for the checkpoint, or rows that are here do not fit it.
    """
    check_ordinary(settings)
    config, source = shape_of(settings.model)
    described = [f"base      {settings.model.name_or_path}, {source}"]
    share = share_openings(settings)
    local = _local(settings)
    if local is None:
        rows, evaluated = _assumed(settings, config)
        here = os.path.isfile(settings.data.path)  # noqa: PTH113
        lacking = "the model's tokenizer is" if here else f"{settings.data.path} is"
        described.append(
            f"rows      assumed: {len(rows)} rows of {len(rows[0]):,} tokens, all trained, because "
            f"{lacking} not on this machine"
        )
        plan = Plan(settings, config, rows, evaluated, device, share, resident())
        return Workload(plan, None, described)
    return _counted(settings, config, load_data(local), device=device, described=described)


def _counted(
    settings: Settings, config: LlamaConfig, data: Data, *, device: str, described: list[str]
) -> Workload:
    trained, share = data.train.rows, share_openings(settings)
    batches = _dealt(trained, settings)
    decisive, held_out = _decisive(data, settings)
    tokens = sum(len(trained[place]) for places in batches for place in places)
    needed = sum(trained[place].needed for places in batches for place in places)
    shared = _shared_share(trained, batches) * needed if share else 0.0
    described.append(
        f"rows      {len(trained):,} of {settings.data.path} · "
        f"{planned_steps(_arguments(settings), len(trained)):,} steps, {tokens:,} tokens, "
        f"{shared / tokens:.0%} of them shared openings · the longest micro-batch has "
        f"{computed(decisive, share=share):,} left in {len(decisive)} rows"
    )
    deal = partial(_decisive, data)
    plan = Plan(settings, config, decisive, held_out, device, share, resident(), deal)
    return Workload(plan, round(needed - shared), described)


def _decisive(data: Data, settings: Settings) -> tuple[Rows, Rows]:
    """The micro-batch that needs the most tokens, and the largest batch of held-out rows."""
    asked = settings.data
    if asked.max_length not in (None, data.max_length):
        fit = partial(fit_rows, max_length=asked.max_length, too_long=asked.too_long)
        trained, held_out = fit(data.train.whole, part="training").rows, data.held_out.whole
        held_out = fit(held_out, part="held-out").rows if held_out else []
    else:
        trained, held_out = data.train.rows, data.held_out.rows
    batches = _dealt(trained, settings)
    longest = max(batches, key=lambda places: sum(trained[place].needed for place in places))
    size = _arguments(settings).per_device_eval_batch_size
    return [trained[place] for place in longest], largest_batch(held_out, size)


def _dealt(rows: Rows, settings: Settings) -> list[list[int]]:
    batches = list(planned_micro_batches(rows, _arguments(settings)))
    if not batches:
        raise UserError.single(
            "training.dataloader_drop_last", f"{len(rows)} rows fill no batch. Leave it out."
        )
    return batches


def _arguments(settings: Settings) -> TrainingArguments:
    """As far as rows go: transformers refuses a precision that this machine has not."""
    left_out = ("fp16", "bf16", "tf32", "load_best_model_at_end", "eval_on_start")
    kept = {key: value for key, value in settings.training.items() if key not in left_out}
    # Nothing is evaluated, saved or reported by whoever deals the rows.
    kept |= {"use_cpu": True, "report_to": "none", "eval_strategy": "no", "save_strategy": "no"}
    return training_arguments(settings.model_copy(update={"training": kept}))


def _local(settings: Settings) -> Settings | None:
    """The settings with everything that rows need on this machine; None where some is elsewhere."""
    name = settings.model.name_or_path
    if not os.path.isdir(name):  # noqa: PTH112
        cached = cached_folder(settings.model, "tokenizer.json")
        if cached is None or cached != cached_folder(settings.model, "config.json"):
            return None
        name = str(cached)
    elif not any(os.path.isfile(f"{name}/{file}") for file in _TOKENIZERS):  # noqa: PTH113
        return None
    if not os.path.isfile(settings.data.path):  # noqa: PTH113
        return None
    model = settings.model.model_copy(update={"name_or_path": name, "revision": None})
    return settings.model_copy(update={"model": model})


def _assumed(settings: Settings, config: LlamaConfig) -> tuple[Rows, Rows]:
    arguments = _arguments(settings)
    context = int(config.max_position_embeddings)
    if settings.data.max_length and settings.data.max_length > context:
        raise UserError.single(
            "data.max_length",
            f"{settings.data.max_length} is beyond this model's context of {context}. Lower it.",
        )
    tokens = min(settings.data.max_length or _ASSUMED_TOKENS, context)

    def rows(count: int) -> list[TokenizedRow]:
        # No two begin alike.
        return [
            TokenizedRow(n, np.full(tokens, n, dtype=np.int32), np.ones(tokens, dtype=np.bool_))
            for n in range(count)
        ]

    held_out = arguments.per_device_eval_batch_size if settings.data.held_out else 0
    return rows(arguments.per_device_train_batch_size), rows(held_out)


def _shared_share(rows: Sequence[TokenizedRow], batches: Sequence[Sequence[int]]) -> float:
    """Of the tokens that rows need, those of shared openings."""
    step = max(len(batches) // _COUNTED, 1)
    counted = [[rows[place] for place in places] for places in islice(batches, 0, None, step)]
    needed = sum(row.needed for batch in counted for row in batch)
    return 1 - sum(computed(batch, share=True) for batch in counted) / needed


def computed(rows: Sequence[TokenizedRow], *, share: bool) -> int:
    """Tokens of a micro-batch that are computed."""
    opened = shared_openings(rows) if share else None
    return sum(row.needed for row in rows) - sum(one.opening for one in opened or ())
