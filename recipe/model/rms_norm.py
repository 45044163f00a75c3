"""The gradient of a norm whose weight is frozen, in five passes over the hidden states, not nine.

Autograd goes back through each operation of ``LlamaRMSNorm`` by itself. Together they are
``r·(w·g) - x·r³·mean(x·w·g)`` with ``r = 1 / sqrt(mean(x²) + eps)`` (Zhang and Sennrich 2019, arXiv
1910.07467). Forward, bits are those of the stock code.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def shorten_norms(model: nn.Module) -> None:
    """Exchange the class of every ``LlamaRMSNorm`` in ``model``."""
    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = _FrozenNorm


class _FrozenNorm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden) → the same; a weight that learns, or is of another dtype, by stock code."""
        if self.weight.requires_grad or hidden_states.dtype != self.weight.dtype:
            stock: torch.Tensor = super().forward(hidden_states)
            return stock
        eps = self.variance_epsilon
        normed: torch.Tensor = _Normed.apply(hidden_states.float(), self.weight, eps)  # type: ignore[no-untyped-call]
        return normed


class _Normed(torch.autograd.Function):
    """Of float32 states, as in the stock code, to the weight's dtype."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).to(weight.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        of_x = (outer * weight).float()
        shared = (x * of_x).mean(-1, keepdim=True).mul_(inverse.pow(3))
        return of_x.mul_(inverse).addcmul_(x, shared, value=-1), None, None
