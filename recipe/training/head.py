"""The projection onto the vocabulary, in chunks: neither the logits of a whole micro-batch nor
their gradient ever exist.

While the model runs, a frozen head hands on what it is given, so that ``outputs.logits`` are the
hidden states at the kept positions. The loss then projects a chunk of them, and takes that chunk's
gradient at once: with frozen weights all that a backward pass needs of the head is the gradient of
the hidden states, as in Liger (arXiv 2410.10989, section 3.2).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.autograd.function import once_differentiable

from recipe.data.batch import IGNORED, KEPT_MULTIPLE
from recipe.model.lora_linear import hooked
from recipe.model.shards import whole
from recipe.training.loss import logit_gradient, nll_in_place, token_nll

# Logits of one chunk. Fewer would starve the matrix product, more take memory for nothing.
_LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**25}


class OutputHead:
    """The head of a run's model, as the loss uses it.

    A head that is trained, adapted, quantized or hooked needs its own forward and backward pass:
    the model then applies it as ever, to all kept positions at once.

    Args:
        autocast: the dtype that mixed precision computes in; None where the weights' own is used.
        device: ``cpu`` or ``cuda`` decides on the size of a chunk; None is where it computes.
        whole: let the model apply a frozen head as ever, too.
    """

    def __init__(
        self,
        model: PeftModel,
        autocast: torch.dtype | None = None,
        device: str | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self._model = model.get_base_model()
        head = self._model.get_output_embeddings()
        self._frozen = head if _applies_alone(head) and not whole else None
        self._dtype = autocast
        self._device = device
        self._scale: float | None = None

    def assume_unscaled(self) -> None:
        """Do not look at the weights for what scales their gradient: they may have no values."""
        self._scale = 1.0

    @property
    def chunked(self) -> bool:
        """Whether the model gives hidden states under ``apart``, and ``nll`` projects them."""
        return self._frozen is not None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let the model give hidden states in place of logits.

        The head stays where it is, as engines that shard it count on its being called.
        """
        if self._frozen is None:
            yield
            return
        self._frozen.forward = _as_it_is
        try:
            yield
        finally:
            del self._frozen.forward

    def nll(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """``token_nll`` of what the model gave under ``apart``.

        Args:
            output: (K, hidden) where ``chunked``, else (K, vocabulary).
            labels: int64 (K,).

        Returns:
            float32 (K,).
        """
        if self._frozen is None:
            return token_nll(output, labels)
        # The backward pass needs neither.
        with whole((self._frozen.weight, self._frozen.bias)) as (weight, bias):
            assert weight is not None
            dtype = self._dtype or weight.dtype
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            if self._scale is None:  # once: it waits for the device
                self._scale = _scale(weight)
            nll: torch.Tensor = _ChunkedNLL.apply(  # type: ignore[no-untyped-call]
                output, weight, bias, labels, self._scale, self._chunk_rows(len(weight), output)
            )
        return nll

    def _chunk_rows(self, vocabulary: int, output: torch.Tensor) -> int:
        device = self._device or output.device.type
        at_once = _LOGITS_AT_ONCE.get(device, _LOGITS_AT_ONCE["cuda"])
        return max(at_once // vocabulary // KEPT_MULTIPLE, 1) * KEPT_MULTIPLE


def _as_it_is(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _applies_alone(head: nn.Module) -> bool:
    trained = any(parameter.requires_grad for parameter in head.parameters())
    return type(head) is nn.Linear and not trained and not hooked(head)


class _ChunkedNLL(torch.autograd.Function):
    """(K, hidden) → (K,); the forward pass leaves only the gradient of the hidden states behind."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        scale: float,
        rows: int,
    ) -> torch.Tensor:
        nll = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        needed = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden, dtype=torch.float32) if needed else None
        rows = _even(len(labels), rows)
        space = torch.empty(rows, len(weight), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(labels), rows):
            chunk = slice(start, start + rows)
            logits = _project(hidden[chunk], weight, bias, space)
            nll[chunk], likely, total = nll_in_place(logits, labels[chunk])
            if gradient is not None:
                slope = logit_gradient(likely, total, labels[chunk], scale).to(weight.dtype)
                gradient[chunk] = slope @ weight
                gradient[chunk].masked_fill_((labels[chunk] == IGNORED)[:, None], 0)
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(scale))
            ctx.dtype = hidden.dtype
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Here the fp16 scaler's factor arrives: nothing was rounded to 16 bits without it.
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[:, None]).to(ctx.dtype), None, None, None, None, None


def _even(positions: int, most: int) -> int:
    """Positions of a chunk, so that the last one is not much shorter than the others."""
    chunks = max(-(-positions // most), 1)
    return -(-positions // (chunks * KEPT_MULTIPLE)) * KEPT_MULTIPLE


def _project(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, space: torch.Tensor
) -> torch.Tensor:
    """Logits, float32 (rows, vocabulary), in the memory of ``space``, which has as many rows or
    more.
    """
    logits = space[: len(hidden)]
    if weight.dtype != torch.float32:
        return logits.copy_(F.linear(hidden.to(weight.dtype), weight, bias))
    torch.mm(hidden.to(weight.dtype), weight.T, out=logits)
    return logits if bias is None else logits.add_(bias)


def _scale(weight: torch.Tensor) -> float:
    """What keeps the gradient of unlikely tokens from vanishing in float16, and overflows nothing.

    The gradient of one position's logits sums to 2 in absolute value at most, so that of its hidden
    state is at most twice the largest weight.
    """
    if weight.dtype != torch.float16:
        return 1.0
    largest = max(float(torch.linalg.vector_norm(weight, math.inf)), 1.0)
    if not math.isfinite(largest):
        return 1.0  # the loss will tell
    return float(2 ** math.floor(math.log2(torch.finfo(torch.float16).max / (2 * largest))))
