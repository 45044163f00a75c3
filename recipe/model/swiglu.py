"""The feed-forward part of a layer keeps one wide tensor less for the backward pass.

Autograd keeps the gate, its SiLU and what that is multiplied by, of intermediate_size each; the
product too, where down_proj learns. The SiLU is cheap to compute again from the gate, as in Liger
(arXiv 2410.10989, section 3.2). Gradients are those of the stock code, bit by bit, as the
operations are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

_SILU = (SiLUActivation, nn.SiLU)  # hidden_act silu and swish


def keep_two_factors(model: nn.Module) -> None:
    """Exchange the class of every ``LlamaMLP`` in ``model`` whose activation is SiLU."""
    for module in model.modules():
        if type(module) is LlamaMLP and isinstance(module.act_fn, _SILU):
            module.__class__ = _SwiGLU


class _SwiGLU(LlamaMLP):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        # Where only one needs a gradient, as in the lowest adapted layer, autograd keeps no more.
        ours = gate.requires_grad and up.requires_grad and gate.dtype == up.dtype
        product = _SiLUTimes.apply if ours else self._stock_product
        down: torch.Tensor = self.down_proj(product(gate, up))
        return down

    def _stock_product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.act_fn(gate) * up
        return product


class _SiLUTimes(torch.autograd.Function):
    """silu(gate) · up, all of one shape and dtype."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = outer * up
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return of_gate, F.silu(gate).mul_(outer)
