"""What Meta's params.json says of a model: the name, shape and shard of every tensor.

Source: the reference code of Llama 2 and 3 (github.com/meta-llama/llama, llama3, llama-models), of
which every weight is split over the shards as its model-parallel layers split it.
"""

import json
import math
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from recipe.settings import UserError

_LARGEST = 1e12  # beyond any number of a model
# What says nothing of the weights.
_RUNTIME = {"max_batch_size", "max_seq_len"}


class Split(Enum):
    """How the shards of a tensor come together."""

    ROWS = 0  # the output of a product is split: ColumnParallelLinear
    COLUMNS = 1  # its input is: RowParallelLinear
    COPIED = None  # each shard has the whole


@dataclass(frozen=True)
class Entry:
    """A tensor of the whole model. ``hugging_face`` is its name in a ``LlamaForCausalLM``;
    ``heads`` is given where rows are rotary pairs, which the two layouts order otherwise.
    """

    name: str
    hugging_face: str
    shape: tuple[int, ...]
    split: Split
    heads: int | None = None

    def of_shard(self, shards: int) -> tuple[int, ...]:
        """The shape in each of so many shards."""
        shape = list(self.shape)
        if self.split.value is not None:
            shape[self.split.value] //= shards
        return tuple(shape)


@dataclass(frozen=True)
class Params:
    """params.json, by its own names. ``vocab_size`` is -1 where the tokenizer says it."""

    dim: int
    n_layers: int
    n_heads: int
    norm_eps: float
    vocab_size: int = -1
    n_kv_heads: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    rope_theta: float = 10_000.0
    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = None
    rope_high_freq_factor: float | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward part, as Meta's ``FeedForward`` computes it."""
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)

    def layer(self, number: int) -> list[Entry]:
        """Tensors of one layer."""
        meta, ours = f"layers.{number}.", f"model.layers.{number}."
        dim, hidden = self.dim, self.hidden_dim
        queries, keys = self.n_heads * self.head_dim, self.kv_heads * self.head_dim
        rows, columns, copied = Split.ROWS, Split.COLUMNS, Split.COPIED

        def entry(
            name: str, to: str, shape: tuple[int, ...], split: Split, heads: int | None = None
        ) -> Entry:
            return Entry(f"{meta}{name}.weight", f"{ours}{to}.weight", shape, split, heads)

        return [
            entry("attention.wq", "self_attn.q_proj", (queries, dim), rows, self.n_heads),
            entry("attention.wk", "self_attn.k_proj", (keys, dim), rows, self.kv_heads),
            entry("attention.wv", "self_attn.v_proj", (keys, dim), rows),
            entry("attention.wo", "self_attn.o_proj", (dim, queries), columns),
            entry("feed_forward.w1", "mlp.gate_proj", (hidden, dim), rows),
            entry("feed_forward.w3", "mlp.up_proj", (hidden, dim), rows),
            entry("feed_forward.w2", "mlp.down_proj", (dim, hidden), columns),
            entry("attention_norm", "input_layernorm", (dim,), copied),
            entry("ffn_norm", "post_attention_layernorm", (dim,), copied),
        ]

    def around(self, vocab_size: int, embedding: Split) -> list[Entry]:
        """Tensors outside the layers; Llama 1 and 2 split the embedding by columns, 3 by rows."""
        shape = (vocab_size, self.dim)
        return [
            Entry("tok_embeddings.weight", "model.embed_tokens.weight", shape, embedding),
            Entry("norm.weight", "model.norm.weight", (self.dim,), Split.COPIED),
            Entry("output.weight", "lm_head.weight", shape, Split.ROWS),
        ]


def load_params(file: Path) -> Params:
    """Read params.json.

    Raises:
        UserError: it cannot be read, lacks a number, or describes another kind of model.
    """
    if not file.is_file():
        found = next(file.parent.glob(f"*/{file.name}"), None)
        remedy = f"Name {found.parent}." if found else "Name the folder with Meta's own files."
        raise UserError.single(str(file.parent), f"has no {file.name}. {remedy}")
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError.single(
            str(file), f"not readable as JSON ({error}). Use another copy."
        ) from None
    if not isinstance(content, dict):
        raise UserError.single(str(file), "is no table of numbers. Use another copy.")
    known = {field.name: field for field in fields(Params)}
    given = {key: value for key, value in content.items() if key not in _RUNTIME}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UserError.single(
            str(file),
            f"has {', '.join(unknown)}, which no Llama 1, 2 or 3 text model in full precision has. "
            "Convert one of those.",
        )
    for name, field in known.items():
        _check_number(file, name, field.type, given.get(name, field.default))
    params = Params(**given)
    _check_heads(file, params)
    return params


def _check_number(file: Path, name: str, kind: Any, value: Any) -> None:
    if value is None and "None" in str(kind):
        return
    number = isinstance(value, bool) if kind is bool else type(value) in (int, float)
    whole = "float" in str(kind) or kind is bool or type(value) is int
    positive = kind is bool or (number and (value > 0 or (name, value) == ("vocab_size", -1)))
    if not (number and whole and positive and (kind is bool or value < _LARGEST)):
        shown = "missing" if not isinstance(value, int | float | str | bool) else repr(value)
        raise UserError.single(
            f"{file}: {name}", f"is {shown}, not what a model has. Use another copy."
        )


def _check_heads(file: Path, params: Params) -> None:
    fits = params.dim % params.n_heads == 0 and params.n_heads % params.kv_heads == 0
    if not fits or params.head_dim % 2:
        raise UserError.single(
            str(file),
            f"dim {params.dim}, n_heads {params.n_heads} and n_kv_heads {params.kv_heads} fit no "
            "rotary attention. Use another copy.",
        )
