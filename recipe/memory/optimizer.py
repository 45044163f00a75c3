"""Bytes of an optimizer's state, by the name that ``training.optim`` gives it."""

import math
from collections.abc import Mapping, Sequence

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
# Values, each as large as a parameter's, that torch's step holds at once for a tensor: on CUDA for
# all of them, as it takes them together. Adafactor's are float32.
_TORCH_STEP = {"adamw_torch": 2, "rmsprop": 1, "adagrad": 1}
# Bytes a parameter that bitsandbytes' step holds on a CPU, where it has no kernel: measured with
# torch's profiler, bitsandbytes 0.50.2. Parameters in 16 bit are made float32 beside.
_BYTES_STEP = {
    "ademamix": 16,
    "paged_ademamix_32bit": 16,
    "adamw_bnb_8bit": 20,
    "adamw_8bit": 20,
    "paged_adamw_8bit": 20,
    "ademamix_8bit": 37,
    "paged_ademamix_8bit": 37,
    "lion_8bit": 20,
    "paged_lion_8bit": 20,
}
_OTHER_BYTES_STEP = 12
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


def kept_whole(optim: str, embeddings: Sequence[tuple[int, ...]]) -> int:
    """Bytes that an 8-bit optimizer's states of trained embeddings take beyond ``state_bytes``:
    transformers keeps these in float32.
    """
    if optim not in _EIGHT_BIT:
        return 0
    return sum(
        4 * _EIGHT_BIT[optim] * math.prod(shape) - _state(optim, shape, 4, None)
        for shape in embeddings
    )


def step_bytes(
    optim: str, shapes: Mapping[int, Mapping[tuple[int, ...], int]], *, device: str
) -> int:
    """Bytes that the optimizer's step takes for itself, at its peak.

    Args:
        shapes: by the bytes of a parameter's value, how many tensors have each shape.
        device: ``cpu`` or ``cuda``, where bitsandbytes and fused AdamW compute in place.
    """
    each = [
        (size, math.prod(shape), count)
        for size, counts in shapes.items()
        for shape, count in counts.items()
    ]
    if optim == "adafactor":
        return max((values * (8 if size == 4 else 16) for size, values, _ in each), default=0)
    if optim in _TORCH_STEP:
        taken = [_TORCH_STEP[optim] * size * values for size, values, _ in each]
        together = sum(n * count for n, (*_, count) in zip(taken, each, strict=True))
        return together if device == "cuda" else max(taken, default=0)
    if device == "cuda" or optim not in {*_FLOAT32, *_EIGHT_BIT}:
        return 0
    a_value = _BYTES_STEP.get(optim, _OTHER_BYTES_STEP)
    return max((values * (a_value + (4 if size < 4 else 0)) for size, values, _ in each), default=0)


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
