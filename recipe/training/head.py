"""The projection onto the vocabulary, in chunks: neither the logits of a whole micro-batch nor
their gradient ever exist.

While the model runs, a frozen head hands on what it is given, so that ``outputs.logits`` are the
hidden states at the kept positions. The loss then projects a chunk of them, and takes that chunk's
gradient at once: with frozen weights all that a backward pass needs of the head is the gradient of
the hidden states, as in Liger (arXiv 2410.10989, section 3.2). On a CPU a chunk is of a piece of
the vocabulary as well, small enough for its cache, and of so many more positions.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.autograd.function import once_differentiable

from recipe.data.batch import IGNORED, KEPT_MULTIPLE
from recipe.model.lora_linear import hooked
from recipe.model.shards import whole
from recipe.training.loss import LabelSoftmax, token_nll

# Logits of one chunk. Fewer would starve the matrix product, more take memory for nothing.
_LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**25}
# Of these there are so many tokens of the vocabulary; all of it where nothing is said.
_VOCABULARY_AT_ONCE = {"cpu": 2**12}
# Such a sum of float32 numerators counts for nothing, and a quotient by it is finite.
_TINY = 1e-30


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
                output, weight, bias, labels, self._scale, self._chunk(len(weight), output)
            )
        return nll

    def _chunk(self, vocabulary: int, output: torch.Tensor) -> tuple[int, int]:
        """Positions of a chunk, and tokens of the vocabulary."""
        device = self._device or output.device.type
        at_once = _LOGITS_AT_ONCE.get(device, _LOGITS_AT_ONCE["cuda"])
        tokens = min(_VOCABULARY_AT_ONCE.get(device, vocabulary), vocabulary)
        return max(at_once // tokens // KEPT_MULTIPLE, 1) * KEPT_MULTIPLE, tokens


def _as_it_is(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _applies_alone(head: nn.Module) -> bool:
    trained = any(parameter.requires_grad for parameter in head.parameters())
    return type(head) is nn.Linear and not trained and not hooked(head)


class _ChunkedNLL(torch.autograd.Function):
    """(K, hidden) → (K,); the forward pass leaves only the gradient of the hidden states behind.

    ``chunk`` is positions and tokens of the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        scale: float,
        chunk: tuple[int, int],
    ) -> torch.Tensor:
        nll = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        needed = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(hidden, dtype=torch.float32) if needed else None
        positions = _even(len(labels), chunk[0])
        head = _Head(weight, bias, scale, (positions, chunk[1]))
        for start in range(0, len(labels), positions):
            some = slice(start, start + positions)
            slope = None if gradient is None else gradient[some]
            nll[some] = head.nll(hidden[some].to(weight.dtype), labels[some], slope)
        if gradient is not None:
            ctx.save_for_backward(gradient)
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


class _Head:
    """A frozen head, applied to a chunk at a time, always in the same memory.

    Args:
        chunk: positions and tokens of the vocabulary, at most.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        chunk: tuple[int, int],
    ) -> None:
        self._weight, self._bias, self._scale = weight, bias, scale
        self._tokens = chunk[1]
        self._space = weight.new_empty(math.prod(chunk), dtype=torch.float32)
        single = weight.dtype == torch.float32
        self._product = self._space if single else torch.empty_like(self._space, dtype=weight.dtype)

    def nll(
        self, hidden: torch.Tensor, labels: torch.Tensor, slope: torch.Tensor | None
    ) -> torch.Tensor:
        """NLL of some positions, float32 (positions,).

        Args:
            hidden: (positions, hidden), of the weights' dtype.
            slope: float32 zeros (positions, hidden) that take the gradient; None if none is needed.
        """
        softmax = LabelSoftmax(labels)
        for first in range(0, len(self._weight), self._tokens):
            piece = slice(first, first + self._tokens)
            others, total, earlier = softmax.add(self._logits(hidden, piece), first)
            if slope is not None:
                self._add(slope.mul_(earlier), others, total, self._weight[piece])
        if slope is not None:
            own = self._weight[labels.clamp(min=0)]
            slope.div_(softmax.total).addcmul_(softmax.missing, own.float(), value=-1)
            slope.masked_fill_((labels == IGNORED)[:, None], 0)
        return softmax.nll()

    def _logits(self, hidden: torch.Tensor, piece: slice) -> torch.Tensor:
        """Float32 (positions, tokens of the piece)."""
        weight = self._weight[piece]
        product = self._room(self._product, hidden, weight)
        torch.mm(hidden, weight.T, out=product)
        if self._bias is not None:
            product.add_(self._bias[piece])
        if self._product is self._space:
            return product
        return self._room(self._space, hidden, weight).copy_(product)

    @staticmethod
    def _room(space: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(positions, tokens); on a CPU transposed, which makes the product quicker."""
        space = space[: len(hidden) * len(weight)]
        if space.device.type == "cpu":
            return space.view(len(weight), len(hidden)).T
        return space.view(len(hidden), len(weight))

    def _add(
        self, slope: torch.Tensor, others: torch.Tensor, total: torch.Tensor, weight: torch.Tensor
    ) -> None:
        """Add the product of numerators, whose sum is ``total``, and weights to ``slope``."""
        if self._product is self._space:
            torch.addmm(slope, others, weight, out=slope)
            return
        # Quotients, as in float16 a sum of numerators could overflow.
        total = total.clamp_min(_TINY)
        quotients = self._room(self._product, others, weight)
        quotients.copy_(others.mul_(self._scale / total))
        slope.addcmul_((quotients @ weight).float(), total / self._scale)


def _scale(weight: torch.Tensor) -> float:
    """What keeps the gradient of unlikely tokens from vanishing in float16, and overflows nothing.

    Quotients sum to 1, so their product with the weights is at most the largest of these; half of
    the range is left to rounding.
    """
    if weight.dtype != torch.float16:
        return 1.0
    largest = max(float(torch.linalg.vector_norm(weight, math.inf)), 1.0)
    if not math.isfinite(largest):
        return 1.0  # the loss will tell
    return float(2 ** math.floor(math.log2(torch.finfo(torch.float16).max / (2 * largest))))
