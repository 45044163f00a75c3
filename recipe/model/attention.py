"""Attention over a flattened batch in which no row can see another.

Registered through transformers' attention interface. The row borders and shared openings come from
the batch (``row_lengths`` and ``openings``, see ``recipe.data.batch.flatten``). In float32 and
float64 on a CPU, ``recipe.model.cpu_attention`` goes before it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

PER_ROW_SDPA = "per_row_sdpa"
_ASSUMED_VARLEN: ContextVar[bool | None] = ContextVar("assumed_varlen", default=None)


def per_row_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    row_lengths: list[int] | None = None,
    openings: list[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row: no mask is built and no product between rows computed.

    By torch's variable-length FlashAttention where it exists (16 bit on CUDA), else by one call of
    ``scaled_dot_product_attention`` a row.

    Args:
        query: (1, heads, T, head_dim); ``key`` and ``value``: (1, key-value heads, T, head_dim).
        row_lengths: tokens of each row, T in all.
        openings: how many tokens of the row before each row begins with; None is 0 for all.

    Returns:
        (1, T, heads, head_dim) and no weights.

    Raises:
        ValueError: the batch has no row borders, or more than one sequence.
    """
    if row_lengths is None or query.shape[0] != 1:
        raise ValueError("per_row_sdpa needs one flattened sequence with row_lengths")
    openings = openings or [0] * len(row_lengths)
    varlen = _ASSUMED_VARLEN.get()
    if varlen is None:
        varlen = _has_varlen_kernel(query.device, query.dtype, query.shape[-1])
    if varlen and not dropout:
        return _varlen(query, key, value, row_lengths, openings, scaling), None
    whole = (_whole_rows(x, row_lengths, openings) for x in (query, key, value))
    rows = []
    for q, k, v, opening in zip(*whole, openings, strict=True):
        row = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
        rows.append(row[:, opening:] if opening else row)  # a slice of all would be copied, back
    return torch.cat(rows, dim=1), None


@contextmanager
def assumed_varlen(has_kernel: bool) -> Iterator[None]:
    """Compute as where the variable-length kernel is there or not: for a forecast, on tensors
    without memory, of a device that is elsewhere.
    """
    before = _ASSUMED_VARLEN.set(has_kernel)
    try:
        yield
    finally:
        _ASSUMED_VARLEN.reset(before)


@lru_cache
def _has_varlen_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """FlashAttention 2 as torch brings it: 16 bit, Ampere or later, heads of up to 256."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _whole_rows(x: torch.Tensor, lengths: list[int], openings: list[int]) -> list[torch.Tensor]:
    """Each row with its opening in front of its own tokens, (1, heads, tokens, head_dim).

    An opening is taken from where it lies in ``x``, and by all that share it from one tensor: cut
    from the row before, each would take a gradient of that whole row.
    """
    rows: list[torch.Tensor] = []
    parts: list[torch.Tensor] = []
    for own, opening in zip(torch.split(x, lengths, dim=2), openings, strict=True):
        parts = [*_first(parts, opening), own]
        rows.append(torch.cat(parts, dim=2) if opening else own)
    return rows


def _first(parts: list[torch.Tensor], tokens: int) -> list[torch.Tensor]:
    """Parts of a row that are its first tokens; the very same ones where they end there."""
    first: list[torch.Tensor] = []
    for part in parts:
        if not tokens:
            break
        first.append(part if part.shape[2] <= tokens else part[:, :, :tokens])
        tokens -= first[-1].shape[2]
    return first


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    openings: list[int],
    scaling: float | None,
) -> torch.Tensor:
    """All rows in one kernel, (1, T, heads, head_dim)."""
    places, own, borders = places_of_rows(tuple(lengths), tuple(openings), query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if places is not None:
        q, k, v = q[places], k[places], v[places]
    longest = max(map(sum, zip(lengths, openings, strict=True)))
    out = varlen_attn(
        q,
        k,
        v,
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)  # a pair only where the log-sums are asked for
    return (out if own is None else out[own])[None]


def places_of_rows(
    lengths: tuple[int, ...], openings: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Where in the sequence each token of each whole row lies, which of these are own, int64, and
    int32 borders of the whole rows. The first two are None where nothing is shared.
    """
    # Tensors without memory must not outlive what made them.
    made = _places if _ASSUMED_VARLEN.get() is None else _places.__wrapped__
    return made(lengths, openings, device)


@lru_cache(maxsize=2)  # every layer of a micro-batch asks for the same, twice with checkpointing
def _places(
    lengths: tuple[int, ...], openings: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    whole = np.add(lengths, openings)
    borders = torch.tensor([0, *whole.cumsum()], dtype=torch.int32).to(device)
    if not any(openings):
        return None, None, borders
    rows: list[NDArray[np.int64]] = []
    own: list[NDArray[np.bool_]] = []
    pieces = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    for piece, opening in zip(pieces, openings, strict=True):
        rows.append(np.concatenate([rows[-1][:opening], piece]) if opening else piece)
        own.append(np.arange(len(rows[-1])) >= opening)
    places = torch.tensor(np.concatenate(rows)).to(device)
    return places, torch.tensor(np.flatnonzero(np.concatenate(own))).to(device), borders


def register() -> None:
    """Make ``attn_implementation="per_row_sdpa"`` known to transformers; it builds no mask."""
    AttentionInterface.register(PER_ROW_SDPA, per_row_sdpa)
    AttentionMaskInterface.register(PER_ROW_SDPA, lambda *_, **__: None)
