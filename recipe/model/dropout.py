"""LoRA's dropout on a CPU: the same distribution from one random number a dropped element.

torch draws one for each element, and generating them shows in a training step. Here the gaps
between dropped elements are drawn, which are geometric; with the usual 0.05 a twentieth of them.
"""

import math
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable

_FEWEST, _MOST = 2**-16, 0.5  # the gaps of rarer ones are coarse in float32; more take longer


class GapDropout(nn.Dropout):
    """``nn.Dropout`` by drawing gaps; elsewhere than on a CPU, and for more than half, as ever.

    The numbers come from torch's own generator: seeds, saved states and checkpointing hold.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop elements of ``x``, of any shape and float dtype."""
        if not self.draws(x):
            return super().forward(x)
        y: torch.Tensor = _Dropped.apply(x, self.drawn(x), 1 / (1 - self.p))  # type: ignore[no-untyped-call]
        return y

    def draws(self, x: torch.Tensor) -> bool:
        """Whether elements of ``x`` are dropped by ``drawn``."""
        return x.device.type == "cpu" and self.training and _FEWEST <= self.p <= _MOST

    def drawn(self, x: torch.Tensor) -> torch.Tensor:
        """Where elements are dropped, int64 (any,), rising, in the order of ``x.flatten()``.

        There are more than it has place for, as their number must not depend on their values; those
        too many are ``x.numel()``. That there are too few has a probability below 1e-20.
        """
        expected = x.numel() * self.p
        enough = int(expected + 10 * math.sqrt(expected) + 60)
        uniform = torch.rand(enough, dtype=torch.float32)
        gaps = uniform.neg_().log1p_().mul_(1 / math.log1p(-self.p)).to(torch.int64)
        return gaps.add_(1).cumsum(0).sub_(1).clamp_(max=x.numel())


class Droppable:
    """Memory of ``like``'s shape and dtype in which elements can be dropped.

    Attributes:
        values: to be written.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self._all = like.new_empty(like.numel() + 1)  # the last one takes the places too many
        self.values = self._all[:-1].view(like.shape)

    def without(self, places: torch.Tensor) -> torch.Tensor:
        """``values``, zero where ``GapDropout.drawn`` said."""
        self._all.index_fill_(0, places, 0)
        return self.values


def without(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """A copy of ``x``, zero where ``GapDropout.drawn`` said."""
    copy = Droppable(x)
    copy.values.copy_(x)
    return copy.without(places)


class _Dropped(torch.autograd.Function):
    """Keeps the places for the backward pass; a product would keep a tensor like x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.factor = factor
        return without(x, places).mul_(factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return without(outer, places).mul_(ctx.factor), None, None


def quicken(model: nn.Module) -> None:
    """Exchange every ``nn.Dropout`` of LoRA layers in ``model``."""
    for module in list(model.modules()):
        if isinstance(module, LoraLayer):
            for name, dropout in module.lora_dropout.items():
                if type(dropout) is nn.Dropout:
                    module.lora_dropout[name] = GapDropout(dropout.p)
