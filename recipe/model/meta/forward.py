"""The model that Meta's files are, computed as Meta's code does: each shard its part, and a sum.

It shares no line with what is converted: nothing is joined, and rotary pairs stay neighbours.
One layer at a time is in memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from recipe.model.meta.layout import Params, Split
from recipe.model.meta.shards import Shard

# Of Llama 3.1, apply_scaling in Meta's code.
SCALE, LOW_FREQUENCY, HIGH_FREQUENCY, ORIGINAL_CONTEXT = 8.0, 1.0, 4.0, 8192


def meta_logits(
    params: Params,
    files: Sequence[Shard],
    sequences: Sequence[Sequence[int]],
    *,
    embedding: Split,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Logits of token ids, (T, vocabulary) of ``dtype`` for each sequence.

    Args:
        embedding: how tok_embeddings is split, see ``Params.around``.
        scale: of scaled rotary frequencies.
        dtype: to compute in, float32 or float64.
    """
    shards = [_Read(file, dtype) for file in files]
    hidden = [_embedded(shards, ids, embedding) for ids in sequences]
    turns = [_turns(params, len(ids), scale) for ids in sequences]
    for number in tqdm(range(params.n_layers), "layers of Meta's", disable=None, leave=False):
        hidden = _layer(params, shards, number, hidden, turns)
    norm = shards[0].read("norm.weight")
    name = "output.weight" if "output.weight" in shards[0].names else "tok_embeddings.weight"
    split = Split.ROWS if name == "output.weight" else embedding
    out = [_norm(x, norm, params) for x in hidden]
    parts = [_product(shard, name, split, number, out) for number, shard in enumerate(shards)]
    together = torch.cat if split is Split.ROWS else _summed
    return [together(of_all, dim=-1) for of_all in zip(*parts, strict=True)]


@dataclass(frozen=True)
class _Read:
    """A shard whose tensors are read in the dtype of the computation."""

    shard: Shard
    dtype: torch.dtype

    @property
    def names(self) -> Sequence[str]:
        return self.shard.names

    def read(self, name: str) -> torch.Tensor:
        return self.shard.read(name).to(self.dtype)


def _summed(parts: Sequence[torch.Tensor], *, dim: int) -> torch.Tensor:
    return torch.stack(list(parts), dim=dim).sum(dim)


def _product(
    shard: _Read, name: str, split: Split, number: int, inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    weight = shard.read(name)
    if split is Split.ROWS:
        return [x @ weight.T for x in inputs]
    width = weight.shape[1]
    return [x[:, number * width : (number + 1) * width] @ weight.T for x in inputs]


def _embedded(shards: Sequence[_Read], ids: Sequence[int], embedding: Split) -> torch.Tensor:
    places = torch.tensor(ids)
    if embedding is Split.COLUMNS:
        return torch.cat([one.read("tok_embeddings.weight")[places] for one in shards], dim=-1)
    rows = torch.zeros(())
    for number, shard in enumerate(shards):
        weight = shard.read("tok_embeddings.weight")
        local = places - number * len(weight)
        mine = (local >= 0) & (local < len(weight))
        rows = rows + weight[local.clamp(0, len(weight) - 1)] * mine[:, None]
    return rows


def _layer(
    params: Params,
    shards: Sequence[_Read],
    number: int,
    hidden: list[torch.Tensor],
    turns: list[torch.Tensor],
) -> list[torch.Tensor]:
    prefix = f"layers.{number}."

    def weight(shard: _Read, name: str) -> torch.Tensor:
        return shard.read(f"{prefix}{name}.weight")

    normed = [_norm(x, weight(shards[0], "attention_norm"), params) for x in hidden]
    for shard in shards:
        wq, wk, wv, wo = (weight(shard, f"attention.{one}") for one in ("wq", "wk", "wv", "wo"))
        hidden = [
            total + _attention(params, x, turn, wq, wk, wv) @ wo.T
            for total, x, turn in zip(hidden, normed, turns, strict=True)
        ]
    normed = [_norm(x, weight(shards[0], "ffn_norm"), params) for x in hidden]
    for shard in shards:
        w1, w2, w3 = (weight(shard, f"feed_forward.{one}") for one in ("w1", "w2", "w3"))
        hidden = [
            total + (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
            for total, x in zip(hidden, normed, strict=True)
        ]
    return hidden


def _attention(
    params: Params,
    x: torch.Tensor,
    turns: torch.Tensor,
    wq: torch.Tensor,
    wk: torch.Tensor,
    wv: torch.Tensor,
) -> torch.Tensor:
    """Of the heads of one shard: (T, its heads · head_dim)."""
    queries, keys, values = ((x @ w.T).view(len(x), -1, params.head_dim) for w in (wq, wk, wv))
    queries, keys = _turned(queries, turns), _turned(keys, turns)
    groups = params.n_heads // params.kv_heads
    keys, values = (one.repeat_interleave(groups, dim=1) for one in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(params.head_dim)
    ahead = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(ahead, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)


def _turned(heads: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Each pair of neighbours is a complex number, turned by its position."""
    pairs = torch.view_as_complex(heads.reshape(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


def frequencies(params: Params, scale: float) -> torch.Tensor:
    """Radians a position, (head_dim / 2,)."""
    exponents = torch.arange(0, params.head_dim, 2).float() / params.head_dim
    plain = 1.0 / params.rope_theta**exponents
    if not params.use_scaled_rope:
        return plain
    high = params.rope_high_freq_factor or HIGH_FREQUENCY
    lengths = 2 * math.pi / plain
    smooth = (ORIGINAL_CONTEXT / lengths - LOW_FREQUENCY) / (high - LOW_FREQUENCY)
    between = (1 - smooth) * plain / scale + smooth * plain
    long, short = lengths > ORIGINAL_CONTEXT / LOW_FREQUENCY, lengths < ORIGINAL_CONTEXT / high
    return torch.where(short, plain, torch.where(long, plain / scale, between))


def _turns(params: Params, length: int, scale: float) -> torch.Tensor:
    angles = torch.outer(torch.arange(length).float(), frequencies(params, scale))
    return torch.polar(torch.ones_like(angles), angles)


def _norm(x: torch.Tensor, weight: torch.Tensor, params: Params) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params.norm_eps) * weight
