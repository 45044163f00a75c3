"""The per-token negative log-likelihood, and the Trainer's loss made of it.

``recipe.training.head`` computes the same in chunks.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from recipe.data.batch import IGNORED


def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each label in nats, computed in float32.

    Args:
        logits: (K, vocabulary), any float dtype; row k predicts ``labels[k]``.
        labels: int64 (K,); ``IGNORED`` where nothing is predicted.

    Returns:
        float32 (K,), zero where ignored.
    """
    nll: torch.Tensor = _TokenNLL.apply(logits, labels)  # type: ignore[no-untyped-call]
    return nll


class _TokenNLL(torch.autograd.Function):
    """(K, vocabulary) → (K,)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        softmax = LabelSoftmax(labels)
        others, _, _ = softmax.add(logits.to(torch.float32, copy=True))
        if ctx.needs_input_grad[0]:
            slope = others.div_(softmax.total)
            slope.scatter_(1, labels.clamp(min=0)[:, None], -softmax.missing)
            ctx.save_for_backward(slope.masked_fill_((labels == IGNORED)[:, None], 0))
            ctx.dtype = logits.dtype
        return softmax.nll()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Here the fp16 scaler's factor arrives: nothing was rounded to 16 bits without it.
        (slope,) = ctx.saved_tensors
        return (slope * outer[:, None]).to(ctx.dtype), None


class LabelSoftmax:
    """The softmax at K positions, float32, of logits that come in pieces of the vocabulary.

    Numerators are relative to the largest logit so far (Milakov and Gimelshein 2018, arXiv
    1805.02867), and the label's is kept out of them: what a likely token lacks to 1 is then a sum
    of small numbers, not a difference of large ones. torch takes exp(log_softmax) for the softmax,
    and the log-sum's rounding, 1e-5 of it, is in all entries of a row alike: they do not sum to 1,
    and every hidden state is pushed along the mean of the head's weights. Quotients sum to 1. What
    that means for LoRA's gradients: ``make bench-exactness``.

    Args:
        labels: int64 (K,).
    """

    def __init__(self, labels: torch.Tensor) -> None:
        self._labels = labels
        nothing = torch.zeros(len(labels), 1, dtype=torch.float32, device=labels.device)
        self._top = nothing - math.inf
        self._own = self._top.clone()
        self._others = nothing

    def add(
        self, logits: torch.Tensor, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take the logits of the vocabulary from ``first`` on.

        Args:
            logits: float32 (K, tokens of the piece), overwritten.

        Returns:
            The numerators of all but the label, in the memory of ``logits``; their sum (K, 1); the
            factor that takes those of earlier pieces to the same largest logit (K, 1).
        """
        places = (self._labels - first)[:, None]
        here = (places >= 0) & (places < logits.shape[1])
        places = places.clamp(0, logits.shape[1] - 1)
        top = torch.maximum(self._top, logits.amax(-1, keepdim=True))
        own = logits.gather(1, places)
        self._own = torch.where(here, own, self._own)
        others = logits.scatter_(1, places, own.masked_fill(here, -math.inf)).sub_(top).exp_()
        total, earlier = others.sum(-1, keepdim=True), (self._top - top).exp()
        self._others, self._top = self._others * earlier + total, top
        return others, total, earlier

    @property
    def total(self) -> torch.Tensor:
        """The denominators (K, 1)."""
        return self._others + (self._own - self._top).exp()

    @property
    def missing(self) -> torch.Tensor:
        """What the label's probability lacks to 1, (K, 1)."""
        return self._others / self.total

    def nll(self) -> torch.Tensor:
        """(K,), zero where ignored."""
        nll = (self.total.log() + (self._top - self._own)).squeeze(1)
        return nll.masked_fill_(self._labels == IGNORED, 0)


def count_trained(labels: torch.Tensor) -> torch.Tensor:
    """How many labels are not ignored, as a tensor on their device, so nothing waits for it."""
    return labels.ne(IGNORED).sum()


class TokenLoss:
    """``compute_loss_func`` of the Trainer: the mean over the trained tokens of the whole
    accumulated batch, so that 1x8, 2x4 and 8x1 rows give the same gradient.

    It also keeps the exact token-weighted mean since ``take`` was last called; the sums stay on
    the device, so nothing waits for it.

    Args:
        nll: ``token_nll`` of the model's output at the kept positions and their labels.
    """

    def __init__(
        self, nll: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = token_nll
    ) -> None:
        self._nll = nll
        self._sums: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []
        self._before = (0.0, 0)

    def __call__(
        self,
        outputs: Any,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        total, tokens = self._nll(outputs.logits[0], labels).sum(), count_trained(labels)
        self._sums.append(total.detach())
        self._counts.append(tokens)
        return total / (tokens if num_items_in_batch is None else num_items_in_batch)

    def last(self, micro_batches: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The newest micro-batches of this process.

        Returns:
            The sums of NLL, float32 (micro_batches,), and the trained tokens, int64 of the same
            shape, on their device, so nothing waits for them.
        """
        return torch.stack(self._sums[-micro_batches:]), torch.stack(self._counts[-micro_batches:])

    def take(self, device: torch.device) -> tuple[float, int]:
        """Return (sum of NLL in nats, trained tokens) of all processes since the last call."""
        totals = self.totals(device)
        self._sums, self._counts = [], []
        self._before = (0.0, 0)
        return totals

    def totals(self, device: torch.device) -> tuple[float, int]:
        """The same, and go on counting."""
        total = math.fsum(torch.stack(self._sums).tolist()) if self._sums else 0.0
        tokens = sum(torch.stack(self._counts).tolist()) if self._counts else 0
        before_total, before_tokens = self._before
        return sum_over_processes((before_total + total, before_tokens + tokens), device)

    def restore(self, total: float, tokens: int) -> None:
        """Count on from the totals of a run that was stopped."""
        self._before = (total, tokens)


def distributed() -> bool:
    """Whether other processes train the same adapter."""
    return dist.is_available() and dist.is_initialized()


def sum_over_processes(pair: tuple[float, int], device: torch.device) -> tuple[float, int]:
    """Add a (sum of NLL, tokens) pair over all processes; alone, the pair itself."""
    if not distributed():
        return pair
    totals = torch.tensor(pair, dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return totals[0].item(), round(totals[1].item())
