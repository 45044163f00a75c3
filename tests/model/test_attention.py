"""Attention per row against one row at a time."""

import pytest
import torch

from recipe.model import attention
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


def shared_case(dtype=torch.float64):
    """Queries, keys and values of the compact sequence; and, for each whole row, where its tokens
    lie in it: rows of 6, 3 + 2, 4 + 1 (of which one is the second row's own), 3 + 1, 0 + 4, 4 + 1
    tokens.
    """
    lengths, openings = [6, 2, 1, 1, 4, 1], [0, 3, 4, 3, 0, 4]
    whole = [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 6, 7],
        [0, 1, 2, 6, 8],
        [0, 1, 2, 9],
        [10, 11, 12, 13],
        [10, 11, 12, 13, 14],
    ]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 15, 8, generator=generator, dtype=dtype)
    k, v = torch.randn(2, 1, 2, 15, 8, generator=generator, dtype=dtype)
    return (q, k, v), lengths, openings, whole


def expected_with_openings(tensors, openings, whole):
    parts = []
    for places, opening in zip(whole, openings, strict=True):
        alone = naive(*(t[:, :, places] for t in tensors), 0.3)
        parts.append(alone[:, opening:])
    return torch.cat(parts, dim=1)


def test_rows_attend_to_the_opening_they_share():
    tensors, lengths, openings, whole = shared_case()
    ours = [t.clone().requires_grad_() for t in tensors]
    stock = [t.clone().requires_grad_() for t in tensors]
    got, _ = per_row_sdpa(None, *ours, None, row_lengths=lengths, openings=openings, scaling=0.3)
    expected = expected_with_openings(stock, openings, whole)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    slope = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
    (got * slope).sum().backward()
    (expected * slope).sum().backward()
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_the_variable_length_kernel_gets_whole_rows(monkeypatch, shared):
    """The kernel itself exists on CUDA only (tests/gpu); here one that is written out."""
    tensors, lengths, openings, whole = shared_case()
    if not shared:
        openings = [0] * len(lengths)
        whole = torch.arange(15).split(lengths)

    def kernel(q, k, v, borders_q, borders_k, longest_q, longest_k, *, scale, window_size, **_):
        assert window_size == (-1, 0)
        assert borders_q.dtype == torch.int32
        sizes = borders_q.diff().tolist()
        assert longest_q == longest_k == max(sizes)
        assert sizes == borders_k.diff().tolist()
        rows = zip(*(t.transpose(0, 1)[None].split(sizes, dim=2) for t in (q, k, v)), strict=True)
        return torch.cat([naive(*parts, scale) for parts in rows], dim=1)[0]

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    got = attention._varlen(*tensors, lengths, openings, 0.3)
    expected = expected_with_openings(tensors, openings, whole)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
