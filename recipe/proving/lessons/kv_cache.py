"""What does the key-value cache cost in memory, and save in time?

With a cache, a step computes keys and values of one token and reads those of all before it;
without, it computes the whole text again. The cache holds 2·layers·kv_heads·head_dim numbers a
token.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from recipe.decoding.steps import Steps
from recipe.proving.finding import number
from recipe.proving.lessons import drawing
from recipe.proving.lessons.lesson import Asked, Taught
from recipe.proving.lessons.models import given_model, random_ids
from recipe.proving.lessons.wording import size, three_digits
from recipe.proving.watchers import relative

LENGTHS = (32, 64, 128, 256, 512)
_CACHED, _PLAIN = 9, 3  # steps that are timed; the median counts
_MIB = 2**20


@dataclass
class Read:
    """A row as it is read with a cache and without; logits are of its last token, float32 (1,
    vocabulary).
    """

    ids: torch.Tensor
    steps: Steps
    plain: Steps
    cache: Any = None
    cached_logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    plain_logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    cached_seconds: list[float] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)


def teach(asked: Asked) -> Taught:
    """Of ``asked.model`` in the dtype of its checkpoint, on random tokens."""
    model = given_model(asked.model_folder)
    longest = model.config.max_position_embeddings
    lengths = [length for length in LENGTHS if length <= longest] or [longest]
    numbers = {
        "model": asked.model_folder.name,
        **measured(model, seed=asked.seed, lengths=lengths),
    }
    return Taught(_drawn(numbers), _said(numbers), numbers)


@torch.no_grad()
def measured(model: Any, *, seed: int, lengths: Sequence[int]) -> dict[str, Any]:
    """One row of each length: its cache, and the time of its last token with and without one."""
    model.eval()
    ids = random_ids(model, rows=1, tokens=max(lengths), seed=seed)
    rows = [ids[:, :length] for length in lengths]
    timed(model, rows[:1])  # the first passes of a process are slow
    read = timed(model, rows)
    shape, element = shape_of(model), next(model.parameters()).element_size()
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        **shape,
        "length_tokens": list(lengths),
        "cache_bytes": [cache_bytes(one.cache) for one in read],
        "closed_form_bytes": [
            2 * shape["layers"] * shape["kv_heads"] * shape["head_dim"] * element * length
            for length in lengths
        ],
        "seconds_a_token": {
            "with_cache": [median(one.cached_seconds) for one in read],
            "without_cache": [median(one.plain_seconds) for one in read],
        },
        "largest_relative_logit_difference": max(
            relative(one.cached_logits, one.plain_logits) for one in read
        ),
    }


def shape_of(model: Any) -> dict[str, int]:
    """What the closed form needs, from the config."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": head_dim,
    }


def timed(model: Any, rows: Sequence[torch.Tensor]) -> list[Read]:
    """Read the last tokens of each int64 (1, tokens) of ``rows`` one by one, and a few times all of
    it at once. The rows take turns, so that another program slows all of them.
    """
    reads = []
    for ids in rows:
        steps = Steps(model, ids[:, :-_CACHED], None)
        steps.read()
        reads.append(Read(ids, steps, Steps(model, ids, None, use_cache=False)))
    for turn in range(_CACHED):
        for one in reads:
            one.steps.append(one.ids[:, turn - _CACHED])
            seconds, (one.cached_logits, output) = _clocked(one.steps)
            one.cached_seconds.append(seconds)
            one.cache = output.past_key_values
            if turn < _PLAIN:
                seconds, (one.plain_logits, _) = _clocked(one.plain)
                one.plain_seconds.append(seconds)
    return reads


def _clocked(steps: Steps) -> tuple[float, tuple[torch.Tensor, Any]]:
    start = time.perf_counter()
    found = steps.read()
    return time.perf_counter() - start, found


def cache_bytes(cache: Any) -> int:
    """Of the storages of a ``DynamicCache``, whatever of them is in use."""
    return sum(
        tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    )


def _drawn(numbers: dict[str, Any]) -> Figure:
    figure, (left, right) = drawing.panels(2, title=f"The key-value cache of {numbers['model']}")
    lengths = numbers["length_tokens"]
    drawing.closed_form(
        left,
        lengths,
        [count / _MIB for count in numbers["closed_form_bytes"]],
        label="closed form: 2 · layers · kv_heads ·\nhead_dim · bytes · length",
    )
    measured_mib = [count / _MIB for count in numbers["cache_bytes"]]
    drawing.line(left, lengths, measured_mib, label="the cache's tensors", style=0)
    times = numbers["seconds_a_token"]
    for style, (name, label) in enumerate(
        (("with_cache", "with cache"), ("without_cache", "without cache"))
    ):
        milliseconds = [1000 * seconds for seconds in times[name]]
        drawing.line(right, lengths, milliseconds, label=label, style=style)
    for axes in (left, right):
        drawing.log2_ticks(axes, lengths)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    drawing.finish(
        left,
        x="length (tokens)",
        y="bytes of the cache (MiB)",
        title=f"Memory, {numbers['dtype']}",
        legend="upper left",
    )
    drawing.finish(
        right,
        x="length (tokens)",
        y="time of one more token (ms)",
        title="Time, on the CPU",
        legend="upper left",
    )
    return figure


def _said(numbers: dict[str, Any]) -> str:
    lengths, count = numbers["length_tokens"], numbers["cache_bytes"]
    with_cache, without = (
        numbers["seconds_a_token"][name] for name in ("with_cache", "without_cache")
    )
    exact = "exactly" if count == numbers["closed_form_bytes"] else "not exactly"
    return (
        f"The cache of {numbers['model']} takes {size(count[-1])} for a row of {lengths[-1]:,} "
        f"tokens in {numbers['dtype']}, {size(count[-1] // lengths[-1])} a token; that is "
        f"{exact} 2 · {numbers['layers']} layers · {numbers['kv_heads']} key-value heads · "
        f"{numbers['head_dim']} numbers a head, at all lengths that were measured. Its "
        f"{numbers['heads']} query heads share those {numbers['kv_heads']}, which makes the cache "
        f"{three_digits(numbers['heads'] / numbers['kv_heads'])} times as small as one key-value "
        f"head for each would. From {lengths[0]} to {lengths[-1]:,} tokens the time of one more "
        f"token became {three_digits(with_cache[-1] / with_cache[0])} times as long with the "
        f"cache and {three_digits(without[-1] / without[0])} times without; at {lengths[-1]:,} "
        f"tokens the cache makes a token {three_digits(without[-1] / with_cache[-1])} times as "
        "fast. Both read the same: their logits differ by at most "
        f"{number(numbers['largest_relative_logit_difference'])} of their length, which is "
        "rounding."
    )
