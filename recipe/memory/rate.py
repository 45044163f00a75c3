"""How fast this CPU is: matrix products, and all other operations, which memory bounds."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_SECONDS = 0.3  # each


@dataclass(frozen=True)
class Rate:
    """``flops`` of matrix products and ``written`` bytes of results, both a second."""

    flops: float
    written: float

    def seconds(self, *, flops: float, written: float) -> float:
        """Of so much work, one after the other."""
        return flops / self.flops + written / self.written


def cpu_rate(*, tokens: int, hidden: int, inner: int) -> Rate:
    """Measured on all threads that torch has, float32, in the shapes of a feed-forward layer."""
    x, weight = torch.randn(tokens, hidden), torch.randn(inner, hidden)
    wide = torch.randn(tokens, inner)
    return Rate(
        flops=2 * tokens * hidden * inner * _a_second(lambda: x @ weight.t()),
        written=wide.nbytes * _a_second(lambda: wide * wide),
    )


def _a_second(act: Callable[[], object]) -> float:
    act()
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < _SECONDS:
        act()
        count += 1
    return count / spent
