"""Are k accumulated micro-batches the same as one big batch?

The gradient of a mean over tokens is a sum over rows divided by the number of tokens, so it can be
accumulated if every micro-batch is divided by the tokens of the whole batch. A layer that looks
across rows, BatchNorm (Ioffe and Szegedy 2015, arXiv 1502.03167), is no such sum.
"""

from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import nn

from recipe.data.batch import IGNORED
from recipe.proving.finding import number
from recipe.proving.lessons import drawing
from recipe.proving.lessons.lesson import Asked, Taught
from recipe.proving.lessons.models import random_ids, tiny_llama
from recipe.proving.lessons.wording import percent
from recipe.proving.watchers import relative
from recipe.training.loss import count_trained, token_nll

ROWS, TOKENS = 32, 48
MICRO_BATCHES = (2, 4, 8, 16, 32)
Divisor = Literal["all tokens", "own tokens"]


class OverTokens(nn.BatchNorm1d):
    """BatchNorm of hidden states, (rows, tokens, width): over all positions of a micro-batch."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return super().forward(hidden.flatten(0, 1)).view_as(hidden)


def teach(asked: Asked) -> Taught:
    """Gradients of a tiny Llama, and of the same with a BatchNorm for its last RMSNorm."""
    numbers = measured(asked.seed)
    return Taught(_drawn(numbers), _said(numbers), numbers)


def measured(seed: int) -> dict[str, Any]:
    """The relative difference of accumulated gradients and the big batch's, for each way."""
    llama, normed = tiny_llama(seed), tiny_llama(seed)
    normed.model.norm = OverTokens(normed.config.hidden_size)
    ids = random_ids(llama, rows=ROWS, tokens=TOKENS + 1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, TOKENS + 1, (ROWS,), generator=generator)
    uneven = labels_of(ids, lengths)
    even = labels_of(ids, torch.full((ROWS,), TOKENS // 2))
    frozen = tiny_llama(seed)
    frozen.model.norm = OverTokens(frozen.config.hidden_size).eval()

    def differences(model: nn.Module, labels: torch.Tensor, divisor: Divisor) -> list[float]:
        whole = gradient(model, ids, labels, micro_batches=1, divisor="all tokens")
        return [
            relative(gradient(model, ids, labels, micro_batches=k, divisor=divisor), whole)
            for k in MICRO_BATCHES
        ]

    return {
        "rows": ROWS,
        "trained_tokens": int(lengths.sum()),
        "least_trained_tokens_a_row": int(lengths.min()),
        "most_trained_tokens_a_row": int(lengths.max()),
        "micro_batches": list(MICRO_BATCHES),
        "relative_gradient_difference": {
            "divided_by_all_tokens": differences(llama, uneven, "all tokens"),
            "mean_of_means": differences(llama, uneven, "own tokens"),
            "mean_of_means_equal_rows": differences(llama, even, "own tokens"),
            "batch_norm": differences(normed, uneven, "all tokens"),
            "batch_norm_frozen": differences(frozen, uneven, "all tokens"),
        },
    }


def labels_of(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """What each position of ``ids`` without its last column predicts, and nothing behind a row's
    length.

    Args:
        ids: int64 (rows, tokens + 1).
        lengths: int64 (rows,).

    Returns:
        int64 (rows, tokens), ``IGNORED`` where nothing is predicted.
    """
    behind = torch.arange(ids.shape[1] - 1) >= lengths[:, None]
    return ids[:, 1:].masked_fill(behind, IGNORED)


def gradient(
    model: nn.Module,
    ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    micro_batches: int,
    divisor: Divisor,
) -> torch.Tensor:
    """The accumulated gradient of all parameters, float32 and flat.

    Args:
        ids: int64 (rows, tokens + 1).
        labels: int64 (rows, tokens).
        micro_batches: a divisor of the rows.
        divisor: ``own tokens`` averages the means of the micro-batches.
    """
    model.zero_grad()
    total = count_trained(labels)
    pairs = zip(ids[:, :-1].chunk(micro_batches), labels.chunk(micro_batches), strict=True)
    for some_ids, some_labels in pairs:
        logits = model(some_ids).logits.flatten(0, 1)
        nll = token_nll(logits, some_labels.flatten()).sum()
        own = count_trained(some_labels) * micro_batches
        torch.autograd.backward(nll / (total if divisor == "all tokens" else own))
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _drawn(numbers: dict[str, Any]) -> Figure:
    figure, (axes,) = drawing.panels(1, title="Accumulated micro-batches against one big batch")
    for style, (key, label) in enumerate(
        (
            ("batch_norm", "a BatchNorm in the network, divided by all tokens"),
            ("mean_of_means", "mean of each micro-batch's own mean"),
            ("divided_by_all_tokens", "divided by the tokens of the whole batch"),
        )
    ):
        series = numbers["relative_gradient_difference"][key]
        drawing.line(axes, numbers["micro_batches"], series, label=label, style=style)
    drawing.log2_ticks(axes, numbers["micro_batches"])
    axes.set_yscale("log")
    axes.axhline(2**-23, color="#888888", linewidth=1, label="float32 rounding, $2^{-23}$")
    drawing.finish(
        axes,
        x="micro-batches that the batch is cut into",
        y="relative difference of the gradient",
        title=f"{numbers['rows']} rows of {numbers['least_trained_tokens_a_row']} to "
        f"{numbers['most_trained_tokens_a_row']} trained tokens, a Llama of two layers, float32",
    )
    drawing.legend_below(figure, axes, columns=2)
    return figure


def _said(numbers: dict[str, Any]) -> str:
    found = numbers["relative_gradient_difference"]
    worst = {key: max(series) for key, series in found.items()}
    least = {key: min(series) for key, series in found.items()}
    return (
        f"A batch of {numbers['rows']} rows with {numbers['least_trained_tokens_a_row']} to "
        f"{numbers['most_trained_tokens_a_row']} trained tokens was cut into "
        f"{numbers['micro_batches'][0]} to {numbers['micro_batches'][-1]} micro-batches. Where "
        "each is divided by the tokens of the whole batch, the accumulated gradient differs from "
        f"the big batch's by at most {number(worst['divided_by_all_tokens'])} of its length, "
        "which is rounding. Where each micro-batch's own mean is averaged, it is wrong by "
        f"{percent(least['mean_of_means'])} to {percent(worst['mean_of_means'])}, as a token of a "
        "short row then counts more than one of a long row; with rows of equal length the "
        f"difference is {number(worst['mean_of_means_equal_rows'])}. With a BatchNorm in place of "
        "Llama's last RMSNorm the right divisor does not help: the gradient differs by "
        f"{percent(least['batch_norm'])} to {percent(worst['batch_norm'])}, because each "
        "micro-batch is normalised by its own mean and variance. Only with the statistics frozen "
        f"is the difference {number(worst['batch_norm_frozen'])} again. Llama has no BatchNorm: "
        "RMSNorm looks at one token at a time, so for it accumulation is exact."
    )
