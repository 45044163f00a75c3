"""A forecast for one process of many."""

from collections.abc import Mapping
from dataclasses import dataclass

from recipe.memory.forecast import ADAPTER, OPTIMIZER, Forecast
from recipe.memory.live_bytes import GRADIENTS

STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
_GATHERED_LAYERS = 2  # the one that computes, and the next one, fetched meanwhile


@dataclass(frozen=True)
class Sharded:
    """``items`` are the bytes of one process at its peak."""

    items: Mapping[str, int]
    processes: int
    strategy: str

    @property
    def peak(self) -> int:
        return sum(self.items.values())


def sharded(found: Forecast, *, processes: int, strategy: str) -> Sharded:
    """What each of ``processes`` holds, where micro-batches stay as they are.

    DDP adds a bucket of the size of the gradients; ZeRO-2 (Rajbhandari et al. 2019, arXiv
    1910.02054) keeps a share of optimizer state and gradients, ZeRO-3 and FSDP of the weights too,
    and gather two layers at a time.
    """
    if processes == 1:
        return Sharded(found.items, 1, strategy)
    items = dict(found.items)
    if strategy in ("zero2", "zero3", "fsdp2"):
        items[OPTIMIZER] = -(-items[OPTIMIZER] // processes)
    if strategy in ("zero3", "fsdp2"):
        for name in [name for name in items if name.startswith("base weights") or name == ADAPTER]:
            items[name] = -(-items[name] // processes)
        items["gathered layers"] = _GATHERED_LAYERS * found.trace.layer_weights
    bucket = found.gradients
    items["communication buckets"] = bucket if strategy == "ddp" else -(-bucket // processes)
    if GRADIENTS in items and strategy != "ddp":
        items[GRADIENTS] = -(-items[GRADIENTS] // processes)
    return Sharded(items, processes, strategy)
