"""What ``plan.py`` says: the forecast, the cards that it fits, and what would make it fit."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from recipe.memory.cards import CARDS, Card
from recipe.memory.forecast import Forecast, Plan, forecast
from recipe.memory.rate import cpu_rate
from recipe.memory.remedies import Remedy, remedies
from recipe.memory.sharding import Sharded, sharded
from recipe.workload import Workload, computed

# Of the makers' rates; what good code reaches. Not measured here.
_REACHED = 0.45
_SHOWN_FROM = 2**30 // 200  # bytes that are 0.00 GiB no more
_MEASURED_TOKENS = 512


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


def report(
    asked: Workload, *, room: int | None, name: str, processes: int, strategy: str
) -> tuple[list[str], dict[str, Any]]:
    """Lines for the screen, and the same as JSON.

    Args:
        room: bytes that it must fit into; None is this machine's on a CPU, else no one card.
        name: of what has so much room.
        processes: that share the work, by ``strategy``.
    """
    found = forecast(asked.plan)
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
    tokens = min(computed(plan.rows, share=plan.share_openings), _MEASURED_TOKENS)
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
