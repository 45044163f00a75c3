"""Bytes of an optimizer's state, by the name that ``training.optim`` gives it."""

import math
from collections.abc import Mapping

# States a parameter. torch keeps them in the parameter's dtype, bitsandbytes in float32 or a byte.
_TORCH = {"adamw_torch": 2, "adamw_torch_fused": 2, "rmsprop": 1, "adagrad": 1, "sgd": 0}
_FLOAT32 = {
    "paged_adamw_32bit": 2,
    "ademamix": 3,
    "paged_ademamix_32bit": 3,
    "lion_32bit": 1,
    "paged_lion_32bit": 1,
    "rmsprop_bnb_32bit": 1,
    "rmsprop_bnb": 1,
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
KNOWN = frozenset({*_TORCH, *_FLOAT32, *_EIGHT_BIT, "adafactor"})
# bitsandbytes keeps smaller tensors in float32, and a scale for so many values of larger ones.
_SMALLEST_8BIT, _BLOCK = 4096, 256


def is_known(optim: str) -> bool:
    """Whether ``state_bytes`` knows it; others are taken for AdamW."""
    return optim in KNOWN


def state_bytes(
    optim: str, shapes: Mapping[tuple[int, ...], int], *, itemsize: int = 4, args: str | None = None
) -> int:
    """Bytes of the states of so many parameters of each shape, after the first step.

    Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) keeps a row and a column of a matrix.

    Args:
        itemsize: bytes of a parameter's value.
        args: ``training.optim_args``; SGD and RMSprop keep more with some.
    """
    return sum(count * _state(optim, shape, itemsize, args) for shape, count in shapes.items())


def _state(optim: str, shape: tuple[int, ...], itemsize: int, args: str | None) -> int:
    values = math.prod(shape)
    if optim == "adafactor":
        kept = values if len(shape) < 2 else math.prod(shape[:-2]) * (shape[-2] + shape[-1])
        return 4 * kept
    if optim in _EIGHT_BIT:
        states = _EIGHT_BIT[optim]
        if values < _SMALLEST_8BIT:
            return 4 * states * values
        return states * (values + 4 * math.ceil(values / _BLOCK))
    if optim in _FLOAT32:
        return 4 * _FLOAT32[optim] * values
    return itemsize * (_TORCH.get(optim, _TORCH[DEFAULT]) + _more(optim, args)) * values


def _more(optim: str, args: str | None) -> int:
    """States that only options ask for."""
    if not args or optim not in ("sgd", "rmsprop"):
        return 0
    given = dict(pair.partition("=")[::2] for pair in args.replace(" ", "").split(","))
    centered = given.get("centered", "False").lower() in ("true", "1")
    return (given.get("momentum", "0").strip("0.") != "") + centered
