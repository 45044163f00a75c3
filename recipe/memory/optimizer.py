"""Bytes of an optimizer's state, by the name that ``training.optim`` gives it."""

import math
from collections.abc import Mapping

# Bytes a parameter of states in float32, and of those of 8 bit.
_FLOAT32 = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "paged_adamw_32bit": 8,
    "ademamix": 12,
    "paged_ademamix_32bit": 12,
    "lion_32bit": 4,
    "paged_lion_32bit": 4,
    "rmsprop_bnb_32bit": 4,
    "rmsprop_bnb": 4,
    "rmsprop": 4,
    "adagrad": 4,
    "sgd": 0,
}
_EIGHT_BIT = {
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "ademamix_8bit": 3,
    "paged_ademamix_8bit": 3,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "rmsprop_bnb_8bit": 1,
}
DEFAULT = "adamw_torch_fused"
# bitsandbytes keeps smaller tensors in float32, and a scale for so many values of larger ones.
_SMALLEST_8BIT, _BLOCK = 4096, 256


def is_known(optim: str) -> bool:
    """Whether ``state_bytes`` knows it; others are taken for AdamW in float32."""
    return optim in _FLOAT32 or optim in _EIGHT_BIT or optim == "adafactor"


def state_bytes(optim: str, shapes: Mapping[tuple[int, ...], int]) -> int:
    """Bytes of the states of so many parameters of each shape, after the first step.

    Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) keeps a row and a column of a matrix.
    """
    return sum(count * _state(optim, shape) for shape, count in shapes.items())


def _state(optim: str, shape: tuple[int, ...]) -> int:
    values = math.prod(shape)
    if optim == "adafactor":
        kept = values if len(shape) < 2 else math.prod(shape[:-2]) * (shape[-2] + shape[-1])
        return 4 * kept
    states = _EIGHT_BIT.get(optim)
    if states is None:
        return _FLOAT32.get(optim, _FLOAT32[DEFAULT]) * values
    if values < _SMALLEST_8BIT:
        return 4 * states * values
    return states * (values + 4 * math.ceil(values / _BLOCK))
