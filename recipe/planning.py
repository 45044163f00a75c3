"""What ``plan.py`` does: the rows that decide, the forecast, the cards it fits, and what would."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import psutil
import torch
from transformers import LlamaConfig, TrainingArguments

from recipe.data.batch import largest_batch
from recipe.data.openings import shared_openings
from recipe.data.tokens import TokenizedRow
from recipe.memory.cards import CARDS, Card
from recipe.memory.forecast import Forecast, Plan, forecast
from recipe.memory.probe import resident
from recipe.memory.rate import cpu_rate
from recipe.memory.remedies import Remedy, remedies
from recipe.memory.sharding import Sharded, sharded
from recipe.model.shapes import cached_folder, shape_of
from recipe.run_data import load_data, share_openings
from recipe.settings import Settings, UserError
from recipe.training.arguments import training_arguments
from recipe.training.disk import planned_steps
from recipe.training.machine import check_ordinary
from recipe.training.order import planned_micro_batches

# Of the makers' rates; what good code reaches. Not measured here.
_REACHED = 0.45
# Where neither rows nor max_length say how long a row is.
_ASSUMED_TOKENS = 512
_SHOWN_FROM = 2**30 // 200  # bytes that are 0.00 GiB no more
_MEASURED_TOKENS = 512
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_COUNTED = 500  # micro-batches, of which the share of common openings is counted


@dataclass(frozen=True)
class Workload:
    """``plan`` is the micro-batch that decides on memory; of the whole run there are
    ``computed_tokens`` in ``micro_batches``, or None where the rows are not here. ``described``
    says where shape and rows are from.
    """

    plan: Plan
    computed_tokens: int | None
    micro_batches: int | None
    described: Sequence[str]

    def times(self) -> float | None:
        """How often the whole run computes what the micro-batch does, by its tokens."""
        if self.computed_tokens is None:
            return None
        return self.computed_tokens / _computed(self.plan.rows, share=self.plan.share_openings)


def workload(settings: Settings, *, device: str) -> Workload:
    """What ``settings`` make of memory, without weights and without a network.

    Raises:
        UserError: no shape is known for the checkpoint, or rows that are here do not fit it.
    """
    check_ordinary(settings)
    config, source = shape_of(settings.model)
    described = [f"base      {settings.model.name_or_path}, {source}"]
    share = share_openings(settings)
    arguments = _arguments(settings)
    local = _local(settings)
    if local is None:
        rows, evaluated = _assumed(settings, config, arguments)
        here = os.path.isfile(settings.data.path)  # noqa: PTH113
        lacking = "the model's tokenizer is" if here else f"{settings.data.path} is"
        described.append(
            f"rows      assumed: {len(rows)} rows of {len(rows[0]):,} tokens, all trained, because "
            f"{lacking} not on this machine"
        )
        plan = Plan(settings, config, rows, evaluated, device, share, resident())
        return Workload(plan, None, None, described)
    data = load_data(local)
    trained = data.train.rows
    batches = list(planned_micro_batches(trained, arguments))
    if not batches:
        raise UserError.single(
            "training.dataloader_drop_last", f"{len(trained)} rows fill no batch. Leave it out."
        )
    longest = max(batches, key=lambda places: sum(len(trained[place]) for place in places))
    decisive = [trained[place] for place in longest]
    held_out = largest_batch(data.held_out.rows, arguments.per_device_eval_batch_size)
    tokens = sum(len(trained[place]) for places in batches for place in places)
    kept = _kept_share(trained, batches) if share else 1.0
    steps = planned_steps(arguments, len(trained))
    described.append(
        f"rows      {len(trained):,} of {settings.data.path} · {steps:,} steps, {tokens:,} tokens, "
        f"{1 - kept:.0%} of them shared openings · the longest micro-batch has "
        f"{sum(map(len, decisive)):,} in {len(decisive)} rows"
    )
    plan = Plan(settings, config, decisive, held_out, device, share, resident())
    return Workload(plan, round(kept * tokens), len(batches), described)


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


def _assumed(
    settings: Settings, config: LlamaConfig, arguments: TrainingArguments
) -> tuple[list[TokenizedRow], list[TokenizedRow]]:
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


def _kept_share(rows: Sequence[TokenizedRow], batches: Sequence[Sequence[int]]) -> float:
    """Of the tokens, those that are computed where openings are shared."""
    step = max(len(batches) // _COUNTED, 1)
    counted = [[rows[place] for place in places] for places in islice(batches, 0, None, step)]
    whole = sum(len(row) for batch in counted for row in batch)
    return sum(_computed(batch, share=True) for batch in counted) / whole


def _computed(rows: Sequence[TokenizedRow], *, share: bool) -> int:
    opened = shared_openings(rows) if share else None
    if opened is None:
        return sum(map(len, rows))
    return sum(len(one.row) - one.opening for one in opened)


@dataclass(frozen=True)
class Fits:
    """``hours`` is None where the rows are not counted."""

    card: Card
    fits: bool
    hours: float | None


def on_cards(asked: Workload, found: Forecast, peak: int, *, processes: int) -> list[Fits]:
    """Every named card, of which each process has one."""
    times, single = asked.times(), _computes_in_single(asked.plan)
    flops = found.trace.flops + found.trace.attention_flops

    def hours(card: Card) -> float | None:
        rate = _REACHED * (card.single if single else card.half) * processes
        return None if times is None else times * flops / rate / 3600

    usable = [card for card in CARDS if card.ampere or not _computes_in_bfloat16(asked.plan)]
    return [Fits(card, peak <= card.memory, hours(card)) for card in usable]


def _computes_in_single(plan: Plan) -> bool:
    training, model = plan.settings.training, plan.settings.model
    mixed = training.get("fp16") or training.get("bf16")
    return not mixed and model.dtype == "float32"


def _computes_in_bfloat16(plan: Plan) -> bool:
    training, model = plan.settings.training, plan.settings.model
    asked = (model.quantization or {}).get("bnb_4bit_compute_dtype")
    return bool(training.get("bf16")) or model.dtype == "bfloat16" or asked == "bfloat16"


def _foreseen(plan: Plan) -> Forecast:
    """Raises UserError where torch cannot follow these settings without weights."""
    try:
        return forecast(plan)
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:120]
        raise UserError.single(
            "plan",
            f"these settings cannot be followed without weights ({type(error).__name__}: {said}). "
            "recipe/train.py --check tries them with weights.",
        ) from error


def report(
    asked: Workload, *, room: int | None, name: str, processes: int, strategy: str
) -> tuple[list[str], dict[str, Any]]:
    """Lines for the screen, and the same as JSON.

    Args:
        room: bytes that it must fit into; None is this machine's on a CPU, else no one card.
        name: of what has so much room.
        processes: that share the work, by ``strategy``.
    """
    found = _foreseen(asked.plan)
    shards = sharded(found, processes=processes, strategy=strategy)
    if room is None and asked.plan.device == "cpu":
        room, name = int(psutil.virtual_memory().total) // processes, "this machine"
    lines = [*asked.described, *_table(asked.plan, found, shards)]
    content: dict[str, Any] = {
        "settings": asked.plan.settings.name,
        "device": asked.plan.device,
        "peak": shards.peak,
        "phase": found.phase,
        "items": dict(shards.items),
        "saved_activations": found.saved,
        "flops_micro_batch": found.trace.flops,
        "processes": processes,
        "strategy": strategy,
    }
    if asked.plan.device == "cuda":
        cards = on_cards(asked, found, shards.peak, processes=processes)
        lines += _cards(cards, counted=asked.computed_tokens is not None)
        if processes > 1:
            lines += _processes(asked.plan, processes, strategy)
        content["cards"] = {one.card.name: one.fits for one in cards}
    elif (times := asked.times()) is not None and _computes_in_single(asked.plan):
        content["seconds"] = seconds = round(times * _cpu_seconds(asked.plan, found))
        lines.append(
            f"time      about {_hours(seconds / 3600)} of training on this CPU, at the rate of its "
            f"{torch.get_num_threads()} threads now"
        )
    if room is not None:
        fits = shards.peak <= room
        told, ways = _room(asked.plan, found, shards, room=room, name=name)
        lines += told
        content |= {
            "room": room,
            "fits": fits,
            "remedies": [
                {"overrides": list(way.overrides), "peak": way.forecast.peak, "time": way.time,
                 "same": way.same}
                for way in ways
            ],
        }  # fmt: skip
    return lines, content


def _cpu_seconds(plan: Plan, found: Forecast) -> float:
    """Of the micro-batch, at the rate that this CPU has now."""
    tokens = min(_computed(plan.rows, share=plan.share_openings), _MEASURED_TOKENS)
    config = plan.config
    rate = cpu_rate(tokens=tokens, hidden=config.hidden_size, inner=config.intermediate_size)
    flops = found.trace.flops + found.trace.attention_flops
    return rate.seconds(flops=flops, written=found.trace.written)


def _table(plan: Plan, found: Forecast, shards: Sharded) -> list[str]:
    where = "a CUDA card" if plan.device == "cuda" else "this CPU, resident"
    ranks = f", for each of {shards.processes} processes by {shards.strategy}"
    lines = [
        f"memory    {_gib(shards.peak)} on {where}{ranks if shards.processes > 1 else ''}, at the "
        f"peak of the {found.phase}"
    ]
    lines += [
        f"          {_gib(n):>12}  {item}" for item, n in shards.items.items() if n > _SHOWN_FROM
    ]
    return [*lines, *(f"          {note}" for note in found.notes)]


def _cards(cards: Sequence[Fits], *, counted: bool) -> list[str]:
    def shown(one: Fits) -> str:
        hours = "" if one.hours is None else f" ({_hours(one.hours)})"
        return f"{one.card.name}{hours}"

    fit = [shown(one) for one in cards if one.fits]
    lacking = [one.card.name for one in cards if not one.fits]
    lines = [
        f"fits      {', '.join(fit) or 'none of the named cards'}",
        f"too small {', '.join(lacking) or 'none'}",
    ]
    if counted and fit:
        lines.append(
            f"          times at {_REACHED:.0%} of the maker's dense matrix rate, which is assumed"
        )
    return lines


def _room(
    plan: Plan, found: Forecast, shards: Sharded, *, room: int, name: str
) -> tuple[list[str], list[Remedy]]:
    if shards.peak <= room:
        return [f"fits      into {name}, {_gib(room)}: {_gib(room - shards.peak)} to spare"], []
    lines = [f"too large for {name}, {_gib(room)}, by {_gib(shards.peak - room)}"]
    if shards.processes > 1:
        return [*lines, "          what would make it fit is found for one process"], []
    ways = remedies(plan, found, room=room)
    if not ways:
        return [*lines, "          nothing known here makes it fit: take a larger card"], ways
    lines[0] += ". What makes it fit, first what trains the same:"
    for way in ways:
        changed = "" if way.same else " · trains otherwise"
        lines.append(
            f"          {_gib(way.forecast.peak):>10} · {way.time:.2f} of the time · "
            f"{shlex.join(way.overrides)}{changed}"
        )
    return lines, ways


def _processes(plan: Plan, processes: int, strategy: str) -> list[str]:
    """What of a forecast for many processes this version cannot run."""
    lines = []
    if strategy != "ddp":
        lines.append(f"          {strategy} is forecast only: this version trains by ddp")
    steps = int(plan.settings.training.get("gradient_accumulation_steps", 1))
    if steps % processes:
        lines.append(
            f"          training.gradient_accumulation_steps={steps} is not divided by {processes} "
            f"processes: use a multiple of {processes}"
        )
    return lines


def _gib(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:,.0f} min"
