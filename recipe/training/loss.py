"""The per-token negative log-likelihood, and the Trainer's loss made of it.

``recipe.training.head`` computes the same in chunks, and gives its gradient in closed form.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from recipe.data.batch import IGNORED


def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each label in nats, computed in float32.

    Args:
        logits: (K, vocabulary), any float dtype; row k predicts ``labels[k]``.
        labels: int64 (K,); ``IGNORED`` where nothing is predicted.

    Returns:
        float32 (K,), zero where ignored.
    """
    return F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORED)


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
