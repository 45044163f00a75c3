"""The feed-forward part of a layer keeps one wide tensor less for the backward pass.

Autograd keeps the gate, its SiLU and what that is multiplied by, of intermediate_size each; the
product too, where down_proj learns. The SiLU is cheap to compute again from the gate, as in Liger
(arXiv 2410.10989, section 3.2). Gradients are those of the stock code, bit by bit, as the
operations are.

Where nothing of it learns it is one node on a CPU: back, one more wide tensor less, and what comes
from gate and up is summed in a product. Gradients are equal to rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

from recipe.model.lora_linear import hooked

_SILU = (SiLUActivation, nn.SiLU)  # hidden_act silu and swish


def keep_two_factors(model: nn.Module) -> None:
    """Exchange the class of every ``LlamaMLP`` in ``model`` whose activation is SiLU."""
    for module in model.modules():
        if type(module) is LlamaMLP and isinstance(module.act_fn, _SILU):
            module.__class__ = SwiGLU


class SwiGLU(LlamaMLP):  # type: ignore[misc]
    """``LlamaMLP`` that keeps less.

    Attributes:
        one_node: as on a CPU; False for a forecast, on tensors of a CPU, of a device elsewhere.
    """

    one_node = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden) → the same."""
        layers = self.gate_proj, self.up_proj, self.down_proj
        if x.requires_grad and self._plain(x, layers):
            frozen = *(layer.weight for layer in layers), *(layer.bias for layer in layers)
            states = x.reshape(-1, x.shape[-1])
            whole: torch.Tensor = _Frozen.apply(states, *frozen)  # type: ignore[no-untyped-call]
            return whole.view(x.shape)
        gate, up = self.gate_proj(x), self.up_proj(x)
        # Where only one needs a gradient, as in the lowest adapted layer, autograd keeps no more.
        ours = gate.requires_grad and up.requires_grad and gate.dtype == up.dtype
        product = _SiLUTimes.apply if ours else self._stock_product
        down: torch.Tensor = self.down_proj(product(gate, up))
        return down

    def _plain(self, x: torch.Tensor, layers: tuple[nn.Module, ...]) -> bool:
        return (
            self.one_node
            and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
            and all(type(layer) is nn.Linear and layer.weight.dtype == x.dtype for layer in layers)
            and not any(map(hooked, (*layers, self.act_fn)))
            and not any(parameter.requires_grad for parameter in self.parameters())
        )

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


class _Frozen(torch.autograd.Function):
    """(silu(x·gateᵀ) ∘ x·upᵀ)·downᵀ of x (T, hidden); ``biases`` are of gate, up and down."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        of_gate: torch.Tensor,
        of_up: torch.Tensor,
        of_down: torch.Tensor,
        *biases: torch.Tensor | None,
    ) -> torch.Tensor:
        gate, up = F.linear(x, of_gate, biases[0]), F.linear(x, of_up, biases[1])
        ctx.save_for_backward(gate, up, of_gate, of_up, of_down)
        return F.linear(F.silu(gate).mul_(up), of_down, biases[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, of_gate, of_up, of_down = ctx.saved_tensors
        inner = outer @ of_down
        of_x = F.silu(gate).mul_(inner) @ of_up
        inner.mul_(up)
        torch.ops.aten.silu_backward.grad_input(inner, gate, grad_input=inner)
        return torch.addmm(of_x, inner, of_gate, out=of_x), *[None] * 6
