"""Parameters that FSDP2 or ZeRO-3 have cut into one part for each process, and their whole values.

FSDP2 makes them DTensors. ZeRO-3 leaves an empty tensor behind and keeps its part beside it, as
``ds_tensor`` (Rajbhandari et al. 2019, arXiv 1910.02054).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import get_peft_model_state_dict
from torch import nn
from torch.distributed.tensor import DTensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of it only."""
    return isinstance(tensor, DTensor) or _of_zero3(tensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter; ZeRO-3 fills the last part up with zeros."""
    part: Any = tensor.detach()
    if isinstance(tensor, DTensor):
        part = part.to_local()
    elif _of_zero3(tensor):
        part = tensor.ds_tensor.detach()  # type: ignore[attr-defined]
    return cast(torch.Tensor, part)


@contextmanager
def whole(tensors: Iterable[torch.Tensor | None]) -> Iterator[list[torch.Tensor | None]]:
    """The whole values, to read, on the device of the parts; every process must ask for them.

    Parameters that are whole are given as they are.
    """
    asked = list(tensors)
    cut = [one for one in asked if one is not None and _of_zero3(one)]
    if cut:
        import deepspeed

        with deepspeed.zero.GatheredParameters(cut):
            yield [None if one is None else one.data for one in asked]
        return
    yield [one.full_tensor() if isinstance(one, DTensor) else one for one in asked]


def saved_state(
    model: Any, state: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the names that they are saved under.

    Args:
        state: ``whole_adapter`` of the model.
    """
    return dict(get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False))


def whole_adapter(model: Any) -> dict[str, torch.Tensor] | None:
    """The adapter's tensors by the names of the model's parameters, copied to the CPU; None where
    nothing is sharded. Every process must ask for them.

    peft would save empty tensors or parts (github.com/huggingface/peft/issues/453).
    """
    named = {n: p for n, p in model.named_parameters() if _of_adapter(n)}
    if not any(map(is_sharded, named.values())):
        return None
    with whole(named.values()) as values:
        return {
            name: value.detach().cpu().clone()
            for name, value in zip(named, values, strict=True)
            if value is not None
        }


def adapter_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The adapter's parameters by the names that they are saved under."""
    named = {n: p for n, p in model.named_parameters() if _of_adapter(n)}
    return saved_state(model, named)  # type: ignore[return-value]


def set_whole(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Give a parameter its value; every process holds the same one and calls this."""
    if isinstance(parameter, DTensor):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements
        here = value.to(parameter.to_local().device, parameter.dtype)
        with torch.no_grad():
            parameter.copy_(distribute_tensor(here, mesh, placements))
    elif _of_zero3(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    else:
        parameter.data.copy_(value)


def _of_zero3(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "ds_tensor", None) is not None


def _of_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name
