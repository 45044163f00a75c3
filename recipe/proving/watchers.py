"""What looks into the runs of a proof while they go, or ends them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback

from recipe.data.batch import IGNORED, KEPT_MULTIPLE
from recipe.data.tokens import TokenizedRow
from recipe.model.fingerprint import tensors_sha256
from recipe.sharing.probes import as_generation_sees
from recipe.training import head as head_module
from recipe.training.head import OutputHead
from recipe.training.loss import token_nll

# Of peft's modules, whose tensors are not the base's.
_ADAPTER = (".lora_", ".modules_to_save.", ".token_adapter.", ".trainable_tokens_")


class StoppedHere(Exception):
    """Ends a run as a crash would."""


class Checkpointing(TrainerCallback):
    """Whether the model recomputes its layers, or would keep them though it was told not to."""

    def __init__(self) -> None:
        self.on = False

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.on = bool(model.get_base_model().is_gradient_checkpointing)


class StopWithin(TrainerCallback):
    """Ends the run within the step after ``step``, behind its first backward pass."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            raise StoppedHere

    # A window of one micro-batch has no end of a substep.
    on_pre_optimizer_step = on_substep_end


class Progress(TrainerCallback):
    """Calls back at every micro-batch, so that a waiting person sees it go on."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tick()

    on_step_end = on_train_begin = on_train_end = on_substep_end


class BaseHashes(TrainerCallback):
    """sha256 of each tensor of the base, before the first step and behind the last."""

    def __init__(self) -> None:
        self.before: dict[str, str] = {}
        self.after: dict[str, str] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.before = base_hashes(model)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.after = base_hashes(model)


def base_hashes(model: nn.Module) -> dict[str, str]:
    """By the names that the tensors have in the checkpoint, with peft around the model or not."""
    return {
        name.removeprefix("base_model.model.")
        .replace(".base_layer.", ".")
        .replace(".original_module.", "."): tensors_sha256({"": tensor})
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor) and not any(part in name for part in _ADAPTER)
    }


class LastLogits(TrainerCallback):
    """The logits of each of ``rows`` alone, as generation gets them from the trained model in
    memory: float32 (tokens, vocabulary) on the CPU.
    """

    def __init__(self, rows: Sequence[TokenizedRow]) -> None:
        self.logits: list[torch.Tensor] = []
        self._rows = rows

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        # Below PeftModel, whose forward the Trainer wraps in autocast.
        base = model.get_base_model()
        with as_generation_sees(base):
            self.logits = row_logits(base, self._rows)


def row_logits(model: Any, rows: Sequence[TokenizedRow]) -> list[torch.Tensor]:
    """float32 (tokens, vocabulary) of each row alone, on the CPU."""
    ids = [torch.from_numpy(row.input_ids.astype("int64"))[None] for row in rows]
    with torch.no_grad():
        outputs = [model(one.to(model.device), use_cache=False) for one in ids]
    return [output.logits[0].float().cpu() for output in outputs]


class FirstMicroBatch(TrainerCallback):
    """The loss of the first rows as one micro-batch of the run, before its first step.

    ``nll`` is float64 (trained tokens,), row by row. ``chunked`` is the largest relative difference
    between the loss in chunks of a few positions and the plain one, the same from torch's in
    float64; of each the NLLs and the gradient of the hidden states. None where this head has no
    loss in chunks. ``positions`` and ``chunks`` say how many there were.
    """

    def __init__(self, rows: int) -> None:
        self.nll = torch.empty(0)
        self.chunked: tuple[float, float] | None = None
        self.positions = self.chunks = 0
        self._rows = rows

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        rows = train_dataloader.dataset[: self._rows]
        inputs = on_device(train_dataloader.collate_fn(rows), model.device)
        labels = inputs.pop("labels")
        del inputs["row_indices"]
        head = OutputHead(model)
        with head.apart(), torch.no_grad():
            output = model(**inputs).logits[0]
        # Without a loss in chunks, these are the logits.
        self.nll = head.nll(output, labels)[labels != IGNORED].detach().double().cpu()
        self.positions = len(labels)
        if head.chunked:
            self.chunked = self._in_chunks(model, output, labels)

    def _in_chunks(
        self, model: Any, hidden: torch.Tensor, labels: torch.Tensor
    ) -> tuple[float, float]:
        hidden = hidden.detach().requires_grad_()
        weight = model.get_output_embeddings()
        count = (labels != IGNORED).sum()

        def with_gradient(nll: torch.Tensor, mean: torch.Tensor) -> list[torch.Tensor]:
            return [nll.detach(), *torch.autograd.grad(mean, hidden)]

        with small_chunks() as size:
            nll = OutputHead(model).nll(hidden, labels)
            chunked = with_gradient(nll, nll.sum() / count)
            self.chunks = -(-len(labels) // size)
        nll = token_nll(weight(hidden), labels)
        plain = with_gradient(nll, nll.sum() / count)
        # transformers' own loss is float32, whose gradient misses this by more than we do.
        nll = F.cross_entropy(weight(hidden).double(), labels, reduction="none")
        exact = with_gradient(nll, nll.sum() / count)
        return _largest(chunked, plain), _largest(chunked, exact)


def _largest(ours: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    return max(float(relative(a, b)) for a, b in zip(ours, others, strict=True))


def relative(ours: torch.Tensor, other: torch.Tensor) -> float:
    """||ours - other|| / ||other|| in float64."""
    other = other.double()
    return float((ours.double() - other).norm() / other.norm())


@contextmanager
def small_chunks() -> Iterator[int]:
    """Chunks of as few positions as there can be, whose number is yielded."""
    table = head_module._LOGITS_AT_ONCE
    kept = dict(table)
    table.update(dict.fromkeys(kept, 1))
    try:
        yield KEPT_MULTIPLE
    finally:
        table.update(kept)


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A copy of the batch with its tensors there."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
