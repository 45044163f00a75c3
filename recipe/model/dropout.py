"""LoRA's dropout on a CPU: the same distribution from a quarter of the random numbers.

torch draws one number for each element, and generating them shows in a training step. Here 64
random bits decide on four elements.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable

_LEVELS = 2**16  # the probability is rounded to a multiple of 1 / 65536


class SixteenBitDropout(nn.Dropout):
    """``nn.Dropout`` by comparing 16 random bits an element; elsewhere than on a CPU, as ever.

    The factor on what is kept is that of the rounded probability, so the mean stays. The bits come
    from torch's own generator: seeds, saved states and checkpointing hold.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop elements of ``x``, of any shape and float dtype."""
        if not self.draws(x):
            return super().forward(x)
        y: torch.Tensor = _Masked.apply(x, *self.drawn(x))  # type: ignore[no-untyped-call]
        return y

    def draws(self, x: torch.Tensor) -> bool:
        """Whether elements of ``x`` are dropped by ``drawn``."""
        some = round(self.p * _LEVELS) not in (0, _LEVELS)
        return x.device.type == "cpu" and self.training and some

    def drawn(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """1 for what is kept, uint8 of the shape of ``x``, and the factor on it."""
        dropped = round(self.p * _LEVELS)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = _reaches(words.view(torch.int16)[: x.numel()], dropped - _LEVELS // 2)
        return kept.view(x.shape), _LEVELS / (_LEVELS - dropped)


def _reaches(numbers: torch.Tensor, least: int) -> torch.Tensor:
    """1 where an int16 is ``least`` or more, else 0, uint8; ``numbers`` are written over.

    On a CPU torch is slow to compare, and to turn bool into float; this goes past both.
    """
    return numbers.clamp_(least - 1, least).sub_(least - 1).to(torch.uint8)


class _Masked(torch.autograd.Function):
    """Keeps one byte an element for the backward pass; a product would keep one of x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.save_for_backward(kept)
        ctx.factor = factor
        return kept.to(x.dtype).mul_(factor).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return kept.to(outer.dtype).mul_(ctx.factor).mul_(outer), None, None


def quicken(model: nn.Module) -> None:
    """Exchange every ``nn.Dropout`` of LoRA layers in ``model``."""
    for module in list(model.modules()):
        if isinstance(module, LoraLayer):
            for name, dropout in module.lora_dropout.items():
                if type(dropout) is nn.Dropout:
                    module.lora_dropout[name] = SixteenBitDropout(dropout.p)
