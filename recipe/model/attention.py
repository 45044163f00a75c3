"""Attention over a flattened batch in which no row can see another.

Registered through transformers' attention interface, so no model code is patched. The row borders
come from the batch (``row_lengths``, see ``recipe.data.batch.flatten``).
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

PER_ROW_SDPA = "per_row_sdpa"


def per_row_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    row_lengths: list[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row: no mask is built and no product between rows computed.

    Args:
        query: (1, heads, T, head_dim); ``key`` and ``value``: (1, key-value heads, T, head_dim).
        row_lengths: tokens of each row, T in all.

    Returns:
        (1, T, heads, head_dim) and no weights.

    Raises:
        ValueError: the batch has no row borders, or more than one sequence.
    """
    if row_lengths is None or query.shape[0] != 1:
        raise ValueError("per_row_sdpa needs one flattened sequence with row_lengths")
    rows = [
        F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
        for q, k, v in zip(
            *(torch.split(x, row_lengths, dim=2) for x in (query, key, value)), strict=True
        )
    ]
    return torch.cat(rows, dim=2).transpose(1, 2), None


def register() -> None:
    """Make ``attn_implementation="per_row_sdpa"`` known to transformers; it builds no mask."""
    AttentionInterface.register(PER_ROW_SDPA, per_row_sdpa)
    AttentionMaskInterface.register(PER_ROW_SDPA, lambda *_, **__: None)
