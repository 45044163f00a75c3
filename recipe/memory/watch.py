"""Watches a run's memory, to say at its end what was forecast and what was measured."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipe.data.tokens import TokenizedRow
from recipe.memory.account import Measured, live_bytes
from recipe.memory.probe import peak_memory, resident
from recipe.model.quantization import scales


class MemoryWatch(TrainerCallback):
    """Made before anything is loaded.

    ``rows`` are those of the micro-batch that ``saving`` saw, the one that needs the most tokens;
    ``imported`` are the bytes that the process held before.
    """

    def __init__(self) -> None:
        self.imported = resident()
        self.rows: Sequence[TokenizedRow] = ()
        self._saved = self._gradients = self._optimizer = 0
        self._stepped = False

    @contextmanager
    def saving(self, rows: Sequence[TokenizedRow], model: PeftModel) -> Iterator[None]:
        """Count what autograd keeps of a forward pass over ``rows``, weights aside."""
        self.rows = rows
        weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        kept: dict[int, tuple[int, StorageWeakRef]] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage.nbytes(), StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            # A result that held its own node would live until the next garbage collection.
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        # A part of the graph may be gone already, such as the norm that DoRA detaches.
        alive = [n for n, one in kept.values() if not one.expired()]  # type: ignore[no-untyped-call]
        self._saved = sum(alive)

    @property
    def saved(self) -> int:
        """Bytes that ``saving`` counted."""
        return self._saved

    def recall(self, rows: Sequence[TokenizedRow], saved: int) -> None:
        """As ``saving`` with what an earlier start counted of the same rows."""
        self.rows, self._saved = rows, saved

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PeftModel = None,
        **_: Any,
    ) -> None:
        self._stepped = True
        if not self._gradients:
            self._gradients = live_bytes([p.grad for p in model.parameters() if p.grad is not None])

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        states = getattr(optimizer, "optimizer", optimizer).state  # accelerate's is a shell
        self._optimizer = live_bytes(
            [
                tensor
                for kept in states.values()
                for name, tensor in kept.items()
                if isinstance(tensor, torch.Tensor) and tensor.ndim and "qmap" not in name
            ]
        )

    def measured(self, model: PeftModel) -> Measured | None:
        """None where nothing was trained, as by a run that was taken up behind its last step, or
        nothing was rehearsed.
        """
        if not self.rows or not self._stepped:
            return None
        frozen = [p for p in (*model.parameters(), *model.buffers()) if not p.requires_grad]
        frozen += scales(model)
        peak = peak_memory(next(model.parameters()).device.type)
        return Measured(
            weights=live_bytes(frozen),
            adapter=live_bytes([p for p in model.parameters() if p.requires_grad]),
            gradients=self._gradients or None,
            optimizer=self._optimizer,
            saved=self._saved,
            peak=peak.get("allocated", peak.get("resident", 0)),
            reserved=peak.get("reserved"),
        )
