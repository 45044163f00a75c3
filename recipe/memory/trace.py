"""One micro-batch, forward and backward, on tensors without memory: every byte that would live.

The run's own model, batch and loss are called, so that what they keep, compute again or leave out
is in the count. Each result of each operation is followed until it is freed, as the allocator
would; of what a kernel takes for itself inside, nothing is seen.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from recipe.data.batch import flatten
from recipe.data.tokens import TokenizedRow
from recipe.memory.live_bytes import GRADIENTS, SAVED, LiveBytes
from recipe.memory.stand_in import stand_in
from recipe.model.attention import assumed_varlen
from recipe.settings import Settings
from recipe.training.head import OutputHead
from recipe.training.loss import TokenLoss

K = TypeVar("K")
# Two depths tell any other: each layer keeps, computes and takes the same but the first, which
# hands no gradient on, and the last, which computes less. The peak can be in either.
_DEPTHS = (3, 4)


@dataclass(frozen=True)
class Trace:
    """All in bytes, but ``flops``.

    ``weights`` and ``trainable`` are by dtype; ``shapes`` counts trainable tensors,
    by the bytes of a value, and ``embeddings`` are the shapes of those that are embeddings;
    ``layer_weights`` are those of one layer. ``peaks`` holds for each phase (forward, loss,
    backward, evaluation) what lives at its peak beyond weights and optimizer state, by kind.
    ``saved`` lives between forward and backward pass. ``flops`` are those of matrix products,
    ``attention_flops`` of attention kernels, of long rows as if each were as long as the longest,
    ``written`` the bytes of all results, of a micro-batch.
    """

    weights: Mapping[str, int]
    trainable: Mapping[str, int]
    shapes: Mapping[int, Mapping[tuple[int, ...], int]]
    embeddings: Sequence[tuple[int, ...]]
    layer_weights: int
    saved: int
    flops: int
    attention_flops: int
    written: int
    peaks: Mapping[str, Mapping[str, int]]

    @property
    def peak(self) -> Mapping[str, int]:
        """Of the phase that takes most."""
        return max(self.peaks.values(), key=lambda kinds: sum(kinds.values()))


def traced(
    config: LlamaConfig,
    settings: Settings,
    rows: Sequence[TokenizedRow],
    *,
    evaluated: Sequence[TokenizedRow] = (),
    device: str,
    share_openings: bool,
) -> Trace:
    """What the micro-batch ``rows`` takes.

    Layers are alike but the first and the last, so two shallow models are followed and what a layer
    between adds is multiplied; all layers are, where the adapter is not the same in each.

    Args:
        evaluated: the largest batch of held-out rows.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: LoraConfig's fields do not fit the model.
    """
    depth = config.num_hidden_layers

    def at(layers: int) -> Trace:
        following = _Following(config, settings, device, share_openings)
        return following.traced(rows, evaluated, layers=layers)

    if depth <= _DEPTHS[-1] or _differs_by_layer(settings.lora):
        return at(depth)
    shallow, deeper = (at(layers) for layers in _DEPTHS)
    return _extrapolated(shallow, deeper, times=depth - _DEPTHS[0])


def _differs_by_layer(lora: Mapping[str, Any]) -> bool:
    keys = (
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "exclude_modules",
    )
    targets = lora.get("target_modules")
    by_name = isinstance(targets, str) and targets != "all-linear"
    listed = [] if targets is None or isinstance(targets, str) else targets
    named = any("layers." in target for target in [*listed, *(lora.get("modules_to_save") or ())])
    return by_name or named or any(lora.get(key) for key in keys)


def _extrapolated(shallow: Trace, deeper: Trace, *, times: int) -> Trace:
    def number(a: int, b: int) -> int:
        return a + (b - a) * times

    def each(a: Mapping[K, int], b: Mapping[K, int]) -> dict[K, int]:
        return {key: number(a.get(key, 0), b.get(key, 0)) for key in (*b, *(set(a) - set(b)))}

    return Trace(
        weights=each(shallow.weights, deeper.weights),
        trainable=each(shallow.trainable, deeper.trainable),
        shapes={size: each(shallow.shapes[size], deeper.shapes[size]) for size in deeper.shapes},
        embeddings=deeper.embeddings,
        layer_weights=deeper.layer_weights,
        saved=number(shallow.saved, deeper.saved),
        flops=number(shallow.flops, deeper.flops),
        attention_flops=number(shallow.attention_flops, deeper.attention_flops),
        written=number(shallow.written, deeper.written),
        peaks={name: each(shallow.peaks[name], deeper.peaks[name]) for name in deeper.peaks},
    )


@dataclass(frozen=True)
class _Following:
    config: LlamaConfig
    settings: Settings
    device: str
    share_openings: bool

    @property
    def autocast(self) -> torch.dtype | None:
        training = self.settings.training
        if training.get("fp16"):
            return torch.float16
        return torch.bfloat16 if training.get("bf16") else None

    def traced(
        self, rows: Sequence[TokenizedRow], evaluated: Sequence[TokenizedRow], *, layers: int
    ) -> Trace:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = stand_in(self.config, self.settings, mode=mode, device=self.device, layers=layers)
        whole = self.settings.study.logits == "whole"
        head = OutputHead(model, autocast=self.autocast, device=self.device, whole=whole)
        head.assume_unscaled()
        live = LiveBytes([*model.parameters(), *model.buffers()])
        accumulates = self.settings.training.get("gradient_accumulation_steps", 1) > 1
        with mode, assumed_varlen(self._has_varlen(model)):
            if accumulates:  # what the micro-batches before left
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)
                        live.known(parameter.grad, GRADIENTS)
            saved = self._step(model, head, live, self._batch(rows, mode))
            if evaluated:
                self._evaluate(model, head, live, self._batch(evaluated, mode))
        weights, trainable = _by_dtype(model, trained=False), _by_dtype(model, trained=True)
        shapes: dict[int, Counter[tuple[int, ...]]] = {}
        for one in model.parameters():
            if one.requires_grad:
                shapes.setdefault(one.element_size(), Counter())[tuple(one.shape)] += 1
        layer = sum(
            p.numel() * p.element_size()
            for p in model.get_base_model().model.layers[0].parameters()
        )
        return Trace(
            weights,
            trainable,
            shapes,
            [
                tuple(module.weight.shape)
                for module in model.modules()
                if isinstance(module, nn.Embedding) and module.weight.requires_grad
            ],
            layer,
            saved,
            flops=live.flops,
            attention_flops=live.attention_flops,
            written=live.written,
            peaks=live.peaks,
        )

    def _has_varlen(self, model: PeftModel) -> bool:
        """As ``attention`` decides on a card of Ampere or later."""
        computed = self.autocast or model.get_base_model().model.embed_tokens.weight.dtype
        head = getattr(self.config, "head_dim", None) or (
            self.config.hidden_size // self.config.num_attention_heads
        )
        fits = head % 8 == 0 and head <= 256
        return self.device == "cuda" and computed in (torch.float16, torch.bfloat16) and fits

    def _batch(self, rows: Sequence[TokenizedRow], mode: FakeTensorMode) -> dict[str, Any]:
        batch = flatten(rows, share_openings=self.share_openings)
        return {
            key: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
            if key != "row_indices"
        }

    def _step(
        self, model: PeftModel, head: OutputHead, live: "LiveBytes", batch: dict[str, Any]
    ) -> int:
        labels, loss_of = batch.pop("labels"), TokenLoss(head.nll)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter: live.known(parameter.grad, GRADIENTS)
                )
        with live, self._computing():
            with live.phase("forward"), head.apart(), live.saving():
                out = model(**batch)
            saved = live.by_kind[SAVED]
            with live.phase("loss"):
                loss = loss_of(out, labels, torch.tensor(1))
                del out
        with live, live.phase("backward"):
            torch.autograd.backward(loss)
        return saved

    def _evaluate(
        self, model: PeftModel, head: OutputHead, live: "LiveBytes", batch: dict[str, Any]
    ) -> None:
        labels = batch.pop("labels")
        for parameter in model.parameters():
            parameter.grad = None
        model.eval()
        counted = live.flops, live.attention_flops, live.written
        with live, live.phase("evaluation"), torch.no_grad(), self._computing(), head.apart():
            head.nll(model(**batch).logits[0], labels)
        live.flops, live.attention_flops, live.written = counted

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Mixed precision; a CPU's casts what a GPU's does, as far as a Llama goes."""
        with torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=bool(self.autocast)):
            yield


def _by_dtype(model: PeftModel, *, trained: bool) -> dict[str, int]:
    found: Counter[str] = Counter()
    tensors = [p for p in model.parameters() if p.requires_grad == trained]
    if not trained:
        tensors += model.buffers()
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        found[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    return dict(found)
