"""bitsandbytes layers as they must be to be trained and evaluated in turns."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn


def keep_layout(model: nn.Module) -> None:
    """Leave 4-bit weights as they were stored, on every processor.

    On a CPU with AVX512-BF16 bitsandbytes 0.50 repacks them at the first forward pass that wants
    no gradient, such as an evaluation before training. The repacked kernel computes in bfloat16
    whatever ``bnb_4bit_compute_dtype`` says, and has no backward: every gradient below it is
    silently zero.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def scales(model: nn.Module) -> list[torch.Tensor]:
    """Of weights in 4 or 8 bit, which bitsandbytes keeps beside them."""
    found: list[torch.Tensor | None] = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        found.append(getattr(getattr(module, "state", None), "SCB", None))
        found.append(getattr(weight, "SCB", None))
        state = getattr(weight, "quant_state", None)
        found += [
            getattr(state, "absmax", None),
            getattr(getattr(state, "state2", 0), "absmax", None),
        ]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def bytes_by_kind(model: nn.Module) -> Mapping[str, int]:
    """Bytes of the frozen weights: ``nf4``, ``fp4``, ``int8``, their ``scales``, and whatever stays
    in a dtype of its own, such as the embedding; what is shared counts once.
    """
    counted: Counter[str] = Counter()
    seen: set[int] = set()
    every = (*model.parameters(), *model.buffers())
    frozen = [(kind_of(tensor), tensor) for tensor in every if not tensor.requires_grad]
    for kind, tensor in [*frozen, *(("scales", one) for one in scales(model))]:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            counted[kind] += storage.nbytes()
    return counted


def kind_of(tensor: torch.Tensor) -> str:
    """``nf4`` or ``fp4`` of weights in 4 bit, else the dtype."""
    state = getattr(tensor, "quant_state", None)
    return str(state.quant_type if state else tensor.dtype).removeprefix("torch.")
