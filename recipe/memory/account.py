"""A run's memory as it was forecast, beside what was measured: for the manifest and the screen."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from recipe.memory.forecast import ADAPTER, OPTIMIZER, Forecast
from recipe.memory.live_bytes import GRADIENTS, SAVED
from recipe.model.shards import local

_WEIGHTS = "base weights"
_MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """Bytes of real tensors, and the peak as the system counts it.

    ``saved`` are the activations between forward and backward pass of the micro-batch that needs
    the most tokens, ``gradients`` None where an engine gives them to no parameter, ``peak`` is of
    the resident set, or allocated on CUDA, where ``reserved`` is what torch holds of the card.
    """

    weights: int
    adapter: int
    gradients: int | None
    optimizer: int
    saved: int
    peak: int
    reserved: int | None = None


def account(foreseen: Forecast, found: Measured) -> dict[str, Any]:
    """Forecast and measured, bytes, by item; for ``manifest.json``."""
    return {
        "forecast": {
            "peak": foreseen.peak,
            "allocated": foreseen.allocated,
            "phase": foreseen.phase,
            "at_peak": dict(foreseen.items),
        },
        "items": {
            name: {"forecast": ahead, "measured": real}
            for name, (ahead, real) in _pairs(foreseen, found).items()
        },
        "measured": {"peak": found.peak, "reserved": found.reserved},
        "traced": {
            "flops": foreseen.trace.flops,
            "written": foreseen.trace.written,
            "moving": sum(foreseen.trace.peak.values()),
        },
    }


def lines(foreseen: Forecast, found: Measured) -> list[str]:
    """For the screen: both peaks, and each item that is not as forecast."""
    expected = foreseen.peak if found.reserved is None else foreseen.allocated
    difference = found.peak / expected - 1
    items = ", ".join(
        f"{name} {_mib(real)}" + ("" if _mib(ahead) == _mib(real) else f" ({_mib(ahead)} forecast)")
        for name, (ahead, real) in _pairs(foreseen, found).items()
    )
    return [
        f"memory    forecast {expected / 2**30:.2f} GiB, measured {found.peak / 2**30:.2f} "
        f"({difference:+.1%}), at the peak of the {foreseen.phase}",
        f"          MiB: {items}",
    ]


def live_bytes(tensors: list[torch.Tensor]) -> int:
    """Of the memory behind them on this process, each counted once."""
    tensors = list(map(local, tensors))
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _pairs(foreseen: Forecast, found: Measured) -> Mapping[str, tuple[int, int]]:
    weights = sum(n for name, n in foreseen.items.items() if name.startswith(_WEIGHTS))
    return {
        _WEIGHTS: (weights, found.weights),
        ADAPTER: (foreseen.items[ADAPTER], found.adapter),
        **({} if found.gradients is None else {GRADIENTS: (foreseen.gradients, found.gradients)}),
        OPTIMIZER: (foreseen.items[OPTIMIZER], found.optimizer),
        SAVED: (foreseen.saved, found.saved),
    }


def _mib(count: int) -> str:
    return f"{count / _MIB:,.1f}"
