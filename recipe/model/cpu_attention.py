"""Rotary embedding and attention per row on a CPU, as one node of a few whole products a row.

SDPA's kernel for a CPU goes in many small products. Here the query heads that share keys and values
lie behind one another, so one product serves them all, and the queries are those of a row's own
tokens alone. A row goes in blocks of queries, to the keys before each block's end. Equal to
rounding. 16 bit, autocast, dropout of probabilities and micro-batches with a long row are left to
SDPA.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaAttention

from recipe.model.attention import PER_ROW_SDPA, places_of_rows

_BLOCK = 128  # queries; of a longer row about half of the square is not computed
_LONGEST = 1024  # tokens of a row; of longer ones scores leave the caches, and SDPA is quicker


def attend_at_once(model: nn.Module) -> None:
    """Exchange the class of every ``LlamaAttention`` in ``model``."""
    for module in model.modules():
        if type(module) is LlamaAttention:
            module.__class__ = _Attention


class _Attention(LlamaAttention):  # type: ignore[misc]
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(1, T, hidden) → the same, and no weights; all but rows on a CPU by stock code."""
        lengths, openings = named.get("row_lengths"), named.get("openings")
        openings = openings or [0] * len(lengths or [])
        turns = [turn[0] for turn in position_embeddings]
        plain = lengths and self._plain(hidden_states, turns, lengths, openings)
        if past_key_values is not None or not plain:
            stock: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **named
            )
            return stock
        assert lengths is not None
        layout = _Layout(tuple(lengths), tuple(openings), self.num_key_value_groups, self.scaling)
        projected = (
            project(hidden_states)[0] for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = _Attended.apply(*projected, *turns, layout)  # type: ignore[no-untyped-call]
        return self.o_proj(attended[None]), None

    def _plain(
        self,
        x: torch.Tensor,
        turns: list[torch.Tensor],
        lengths: list[int],
        openings: list[int],
    ) -> bool:
        of_one_kind = {x.dtype, *(turn.dtype for turn in turns)}
        return (
            self.config._attn_implementation == PER_ROW_SDPA
            and x.device.type == "cpu"
            and x.shape[:2] == (1, sum(lengths))
            and turns[0].shape[-1] == self.head_dim
            and of_one_kind in ({torch.float32}, {torch.float64})
            and not torch.is_autocast_enabled("cpu")
            and not (self.training and self.attention_dropout)
            and max(map(sum, zip(lengths, openings, strict=True))) <= _LONGEST
        )


class _Block(NamedTuple):
    """``queries`` of ``own`` tokens as they lie (see ``_Attended``), and the ``keys`` of the row up
    to and with these tokens, among those of all whole rows.
    """

    queries: slice
    keys: slice
    own: int


class _Layout(NamedTuple):
    """``lengths`` and ``openings`` of rows; ``heads`` of queries that share one of keys."""

    lengths: tuple[int, ...]
    openings: tuple[int, ...]
    heads: int
    scaling: float

    def blocks(self) -> Iterator[_Block]:
        first = first_key = 0
        for length, opening in zip(self.lengths, self.openings, strict=True):
            for start in range(0, length, _BLOCK):
                end = min(start + _BLOCK, length)
                queries = slice(self.heads * (first + start), self.heads * (first + end))
                keys = slice(first_key, first_key + opening + end)
                yield _Block(queries, keys, end - start)
            first, first_key = first + length, first_key + opening + length

    def keeps(self, block: _Block, head_dim: int) -> bool:
        """Whether the probabilities are kept, and not computed again: where they take no more
        memory than twice the result, which SDPA keeps and this does not.
        """
        return int(block.keys.stop - block.keys.start) <= 2 * head_dim


class _Attended(torch.autograd.Function):
    """Of projections (T, heads · head_dim) of queries, keys and values, like what goes to o_proj.

    ``cos`` and ``sin``: (T, head_dim). Queries lie as (heads of keys, T · heads that share one,
    head_dim) within.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layout: _Layout,
    ) -> torch.Tensor:
        heads, dim = layout.heads, cos.shape[-1]
        # The scores' scaling goes into the queries, where it costs no pass of its own.
        scaled = cos * layout.scaling, sin * layout.scaling
        queries = _turned(_by_head(query, heads, dim), *scaled).flatten(1, 2)
        keys = _turned(_by_head(key, 1, dim), cos, sin).squeeze(2)
        values = _by_head(value, 1, dim).squeeze(2)
        places, _, _ = places_of_rows(layout.lengths, layout.openings, cos.device)
        if places is not None:
            keys, values = keys.index_select(1, places), values.index_select(1, places)
        attended, kept = torch.empty_like(queries), []
        for block in layout.blocks():
            probabilities = _probabilities(queries, keys, block)
            attended[:, block.queries] = torch.bmm(probabilities, values[:, block.keys])
            if layout.keeps(block, dim):
                kept.append(probabilities)
        ctx.save_for_backward(queries, keys, values, cos, sin, places, *kept)
        ctx.layout = layout
        return _by_token(attended, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, values, cos, sin, places, *kept = ctx.saved_tensors
        layout, heads, dim = ctx.layout, ctx.layout.heads, cos.shape[-1]
        of_attended = _by_head(outer, heads, dim).flatten(1, 2)
        of_queries = torch.empty_like(queries)
        by_token = [keys.new_zeros(keys.shape[1], len(keys) * dim) for _ in range(2)]
        of_keys, of_values = (_by_head(x, 1, dim).squeeze(2) for x in by_token)
        left = iter(kept)
        for block in layout.blocks():
            if layout.keeps(block, dim):
                probabilities = next(left)
            else:
                probabilities = _probabilities(queries, keys, block)
            g = of_attended[:, block.queries]
            of_values[:, block.keys] += torch.bmm(probabilities.mT, g)
            of_scores = torch.bmm(g, values[:, block.keys].mT)
            of_scores = torch._softmax_backward_data(of_scores, probabilities, -1, g.dtype)
            of_queries[:, block.queries] = torch.bmm(of_scores, keys[:, block.keys])
            if ctx.needs_input_grad[1]:  # not in the lowest layer that learns
                of_keys[:, block.keys] += torch.bmm(of_scores.mT, queries[:, block.queries])
        if places is not None:
            by_token = [
                x.new_zeros(len(cos), x.shape[1]).index_add_(0, places, x) for x in by_token
            ]
        # A turn back is one by -sin; each half goes with the other's, as it does on the way there.
        back = -sin.roll(dim // 2, -1)
        scaled = cos * layout.scaling, back * layout.scaling
        of_query = _turned(of_queries.view(len(keys), -1, heads, dim), *scaled)
        of_key = _turned(_by_head(by_token[0], 1, dim), cos, back)
        return _by_token(of_query, heads), _by_token(of_key, 1), by_token[1], None, None, None


def _probabilities(queries: torch.Tensor, keys: torch.Tensor, block: _Block) -> torch.Tensor:
    """(heads of keys, own · heads that share one, keys)."""
    scores = torch.bmm(queries[:, block.queries], keys[:, block.keys].mT)
    future = scores.new_full((block.own, block.own), float("-inf")).triu_(1)
    by_token = scores.view(len(scores), block.own, -1, scores.shape[-1])
    by_token[..., -block.own :].add_(future[:, None])
    return scores.softmax(-1)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864) of (…, T, heads, head_dim)."""
    half = x.shape[-1] // 2
    sin = sin[:, None]
    y = x.new_empty(x.shape)
    torch.mul(x, cos[:, None], out=y)
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


def _by_head(x: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
    """(T, all heads · dim) → (heads of keys, T, heads that share one, dim), a view."""
    return x.view(len(x), -1, heads, dim).transpose(0, 1)


def _by_token(x: torch.Tensor, heads: int) -> torch.Tensor:
    """The other way, from (heads of keys, T · heads, dim) too."""
    groups, dim = len(x), x.shape[-1]
    return x.reshape(groups, -1, heads * dim).transpose(0, 1).flatten(1)
