"""Attention per row against one row at a time."""

import pytest
import torch

from recipe.model.attention import per_row_sdpa


def naive(query, key, value, scaling):
    """Causal attention of one row, written out."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = (query @ key.transpose(-1, -2)) * scaling
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def test_each_row_as_if_alone():
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 5, 3]
    q = torch.randn(1, 4, 9, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, 9, 8, generator=generator, dtype=torch.float64)
    got, weights = per_row_sdpa(None, q, k, v, None, row_lengths=lengths, scaling=0.3)
    alone = [
        naive(*parts, 0.3)
        for parts in zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-12)
    assert weights is None


def test_a_batch_without_borders_is_an_error():
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="row_lengths"):
        per_row_sdpa(None, x, x, x, None)
