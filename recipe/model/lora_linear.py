"""LoRA on a CPU, as one node with its frozen layer: half the passes, one input kept for all.

Autograd keeps each adapter's dropped input and goes over the hidden states for the scaling, for the
sum and, back, for both again. Here the scaling and dropout's factor go into the small products, the
sums into the large ones, and a dropped input is made again from the input and the places where
elements were dropped. The gradients are equal to rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.function import once_differentiable

from recipe.model.dropout import Droppable, GapDropout, without


def join_adapters(model: nn.Module) -> None:
    """Exchange the class of every plain ``peft.tuners.lora.Linear`` in ``model``."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = JoinedLinear


def hooked(module: nn.Module) -> bool:
    """Whether something happens around the module's forward or backward pass, or in its place."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or hasattr(module, "_hf_hook") or "forward" in vars(module)


class JoinedLinear(Linear):  # type: ignore[misc]
    def forward(self, x: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        """(..., in) → (..., out); all but plain training on a CPU by peft's own code."""
        joined: torch.Tensor
        if args or named or not self._plain(x):
            joined = super().forward(x, *args, **named)
            return joined
        (adapter,) = self.active_adapters
        first, second = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        dropout, factor, places = self.lora_dropout[adapter], self.scaling[adapter], None
        states = x.reshape(-1, x.shape[-1])
        if isinstance(dropout, GapDropout):
            places = dropout.drawn(states)
            factor = factor / (1 - dropout.p)
        base = self.base_layer
        joined = _Products.apply(states, base.weight, base.bias, first, second, places, factor)  # type: ignore[no-untyped-call]
        return joined.view(*x.shape[:-1], len(base.weight))

    def _plain(self, x: torch.Tensor) -> bool:
        active = self.active_adapters
        if not self.training or self.disable_adapters or self.merged or len(active) != 1:
            return False
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        if active[0] not in self.lora_A or active[0] in self.lora_variant:
            return False
        base, dropout = self.base_layer, self.lora_dropout[active[0]]
        pair = self.lora_A[active[0]], self.lora_B[active[0]]
        layers = (base, *pair)
        return (
            all(type(layer) is nn.Linear and layer.weight.dtype == x.dtype for layer in layers)
            and not any(map(hooked, (*layers, dropout)))
            and not any(parameter.requires_grad for parameter in base.parameters())
            and all(layer.bias is None for layer in pair)
            and (type(dropout) is nn.Identity or _draws(dropout, x))
        )


def _draws(dropout: nn.Module, x: torch.Tensor) -> bool:
    return type(dropout) is GapDropout and dropout.draws(x)


class _Products(torch.autograd.Function):
    """x·Wᵀ + bias + factor · x'·Aᵀ·Bᵀ, where x' is x without the elements at ``places``, or x.

    x (T, in), W (out, in), A (r, in), B (out, r), all of one dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        first: torch.Tensor,
        second: torch.Tensor,
        places: torch.Tensor | None,
        factor: float,
    ) -> torch.Tensor:
        low = F.linear(x if places is None else without(x, places), first)
        ctx.save_for_backward(x, weight, first, second, places, low)
        ctx.factor = factor
        out = F.linear(x, weight, bias)
        return torch.addmm(out, low, second.T, alpha=factor, out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, first, second, places, low = ctx.saved_tensors
        through = outer @ second
        of_first = (through.T @ (x if places is None else without(x, places))).mul_(ctx.factor)
        of_second = (outer.T @ low).mul_(ctx.factor)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = outer @ weight
            if places is None:
                torch.addmm(of_x, through, first, alpha=ctx.factor, out=of_x)
            else:
                of_low = Droppable(x)
                torch.mm(through, first, out=of_low.values)
                of_x.add_(of_low.without(places), alpha=ctx.factor)
        return of_x, None, None, of_first, of_second, None, None
