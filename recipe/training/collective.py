"""What several processes agree on."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from recipe.training.loss import distributed


def of_first(compute: Callable[[Any], Any], value: Any) -> Any:
    """What the first process computes of ``value``, on all: under FSDP2 it alone loads weights."""
    if not distributed():
        return compute(value)
    told = [compute(value) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    return told[0]
