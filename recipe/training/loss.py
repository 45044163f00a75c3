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
        nll, likely, total = nll_in_place(logits.to(torch.float32, copy=True), labels)
        if ctx.needs_input_grad[0]:
            slope = logit_gradient(likely, total, labels)
            ctx.save_for_backward(slope.masked_fill_((labels == IGNORED)[:, None], 0))
            ctx.dtype = logits.dtype
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Here the fp16 scaler's factor arrives: nothing was rounded to 16 bits without it.
        (slope,) = ctx.saved_tensors
        return (slope * outer[:, None]).to(ctx.dtype), None


def nll_in_place(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """NLL, and what ``logit_gradient`` needs.

    Args:
        logits: float32 (K, vocabulary), overwritten.
        labels: int64 (K,).

    Returns:
        float32: the NLL (K,), zero where ignored; the numerators of the softmax (K, vocabulary), in
        the memory of ``logits``; its denominators (K, 1).
    """
    top = logits.amax(-1, keepdim=True)
    own = logits.gather(1, labels.clamp(min=0)[:, None])
    likely = logits.sub_(top).exp_()
    total = likely.sum(-1, keepdim=True)
    nll = (total.log() + (top - own)).squeeze(1)
    return nll.masked_fill_(labels == IGNORED, 0), likely, total


def logit_gradient(
    likely: torch.Tensor, total: torch.Tensor, labels: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """Gradient of the summed NLL, (softmax - one-hot) · scale, in the memory of ``likely``.

    torch takes exp(log_softmax) for the softmax, and the log-sum's rounding, 1e-5 of it, is in all
    entries of a row alike: they do not sum to 1, and every hidden state is pushed along the mean of
    the head's weights. A quotient sums to 1. What that means for LoRA's gradients: ``make
    bench-exactness``.

    Returns:
        float32 (K, vocabulary); of ignored rows it means nothing.
    """
    places = labels.clamp(min=0)[:, None]
    slope = likely.mul_(scale / total)
    return slope.scatter_add_(1, places, slope.new_full(places.shape, -scale))


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
