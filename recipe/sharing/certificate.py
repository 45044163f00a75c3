"""How far two models lie apart on the shipped text, and how far they may."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from recipe.training.loss import token_nll

CERTIFICATE = "certificate.json"


class Certificate(BaseModel):
    """Of one model against another, over every position of some windows of text.

    ``top_1`` is the share of positions at which both find the same token likeliest; perplexity is
    exp of the mean negative log-likelihood over all predicted tokens.
    """

    model_config = ConfigDict(frozen=True)

    tokens: int
    largest_logit_difference: float
    mean_logit_difference: float
    top_1: float
    perplexity: float
    perplexity_before: float

    @property
    def perplexity_change(self) -> float:
        """Relative."""
        return self.perplexity / self.perplexity_before - 1

    def in_words(self) -> str:
        """One line for the screen."""
        return (
            f"logits differ by at most {self.largest_logit_difference:.2g}, by "
            f"{self.mean_logit_difference:.2g} on average · the same first token at "
            f"{self.top_1:.2%} of {self.tokens:,} positions · perplexity "
            f"{self.perplexity_before:.4f} → {self.perplexity:.4f} ({self.perplexity_change:+.3%})"
        )


class Limits(BaseModel):
    """What a merged model may differ by; ``logits`` is None where rounding alone is larger, and
    they need only be finite.
    """

    model_config = ConfigDict(frozen=True)

    top_1: float
    perplexity: float
    logits: float | None = None

    def exceeded(self, certificate: Certificate, *, rebatched: float = math.inf) -> list[str]:
        """What lies beyond the limits, one line each.

        Args:
            rebatched: what the base's own logits move by when rows are computed together. Logits
                may differ by ten times as much, and by ``logits`` at most.
        """
        lines = []
        largest = certificate.largest_logit_difference
        limit = math.inf
        if self.logits is not None:
            limit = min(self.logits, max(10 * rebatched, self.logits / 10))
        if not (math.isfinite(largest) and largest <= limit):
            lines.append(f"a logit differs by {largest:.2g} (limit {limit:.2g})")
        if not certificate.top_1 >= self.top_1:
            lines.append(
                f"the first token is the same at {certificate.top_1:.2%} of the positions only "
                f"(limit {self.top_1:.1%})"
            )
        if not abs(certificate.perplexity_change) <= self.perplexity:
            lines.append(
                f"perplexity changes by {certificate.perplexity_change:+.3%} (limit "
                f"{self.perplexity:.1%})"
            )
        return lines


# By the coarser of the dtypes in which the two are computed.
LIMITS = {
    "float32": Limits(logits=1e-3, top_1=0.999, perplexity=0.001),
    "float16": Limits(top_1=0.97, perplexity=0.01),
    "bfloat16": Limits(top_1=0.94, perplexity=0.03),
}


def limits_for(*dtypes: torch.dtype) -> Limits:
    """The widest limits of these dtypes."""
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    return next(LIMITS[name] for name in ("bfloat16", "float16", "float32") if name in names)


def window_logits(model: Any, windows: Sequence[Sequence[int]]) -> torch.Tensor:
    """What ``model`` says at each position of each window, which is a sequence of its own.

    Args:
        windows: of equal length.

    Returns:
        float32 (windows, length, vocabulary) on the CPU.
    """
    return torch.cat([_logits(model, torch.tensor([list(window)])) for window in windows])


def rebatching_difference(model: Any, windows: Sequence[Sequence[int]]) -> float:
    """How far the logits of one model move when rows are computed together instead of one by one.

    What a merged model may differ by is told beside it: no user takes that for another model. The
    windows are cut to different lengths, so that the batch is padded, as batches are.
    """
    count, length = len(windows), len(windows[0])
    cut = [list(window[: length * (number + 1) // count]) for number, window in enumerate(windows)]
    padding = [length - len(row) for row in cut]
    ids = torch.tensor([[row[0]] * pad + row for row, pad in zip(cut, padding, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (length - pad) for pad in padding])
    together = _logits(
        model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
    )
    differences = [
        (_logits(model, torch.tensor([row]))[0] - batched[pad:]).abs().max()
        for row, pad, batched in zip(cut, padding, together, strict=True)
    ]
    return torch.stack(differences).max().item()


def _logits(model: Any, ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    inputs = {name: tensor.to(model.device) for name, tensor in {"input_ids": ids, **more}.items()}
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits.float().cpu()


def certify(
    windows: Sequence[Sequence[int]], *, before: torch.Tensor, after: torch.Tensor
) -> Certificate:
    """Compare what ``window_logits`` gave for two models."""
    ids = torch.tensor([list(window) for window in windows])
    # Window by window: the difference of all logits would take as much memory again.
    largest, mean, same = [], [], 0
    for one, other in zip(before, after, strict=True):
        difference = (one - other).abs()
        largest.append(difference.max())
        mean.append(difference.mean())
        same += int((one.argmax(-1) == other.argmax(-1)).sum())
    return Certificate(
        tokens=ids.numel(),
        largest_logit_difference=torch.stack(largest).max().item(),  # NaN, if one is
        mean_logit_difference=torch.stack(mean).mean().item(),
        top_1=same / ids.numel(),
        perplexity=_perplexity(after, ids),
        perplexity_before=_perplexity(before, ids),
    )


def _perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    sums = [
        token_nll(window[:-1], row[1:]).double().sum().item()
        for window, row in zip(logits, ids, strict=True)
    ]
    mean = math.fsum(sums) / (ids.numel() - len(ids))
    return math.exp(mean) if mean < 700 else math.inf


def template_of_merged(folder: Path) -> str | None:
    """The template that a merged model was trained with; None for any other model."""
    try:
        name = json.loads((folder / CERTIFICATE).read_bytes())["template"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if name in ("alpaca", "chat", "raw") else None
