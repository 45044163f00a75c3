"""Follows the memory behind the results of all operations until it is freed."""

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SAVED, RECOMPUTED, LOGITS, GRADIENTS, TEMPORARY = (
    "saved activations",
    "recomputation",
    "logits and loss",
    "gradients",
    "temporaries",
)
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.mm.out,
    torch.ops.aten.addmm.default,
    torch.ops.aten.addmm.out,
    torch.ops.aten.bmm.default,
    torch.ops.aten._int_mm.default,
}
# Attention that computes half of each square; place of the query among the arguments, and products
# of a backward pass beside the two of a forward one.
_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": (0, 2.0),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (1, 5.0),
    "_varlen_attn": (0, 2.0),
    "_varlen_attn_backward": (1, 5.0),
}


@dataclass
class _Block:
    nbytes: int
    kind: str


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the memory behind the results of all operations until it is freed.

    Args:
        weights: what is there already, and is counted elsewhere.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_kind: Counter[str] = Counter()
        self.peaks: dict[str, dict[str, int]] = {}
        self.flops = self.attention_flops = self.written = 0
        self._blocks: dict[int, _Block] = {}
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self._phase = ""
        self._highest = -1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            self.flops += 2 * out.numel() * args[-2].shape[-1]  # (…, n, k) x (…, k, m)
        name = getattr(getattr(func, "_schema", None), "name", "").rpartition("::")[2]
        if name in _ATTENTION:
            self.attention_flops += _attention_flops(name, args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return out

    @property
    def now(self) -> int:
        """Bytes that live."""
        return self.by_kind.total()

    @property
    def peak(self) -> int:
        """The most bytes that lived at once in any phase."""
        return max((sum(kinds.values()) for kinds in self.peaks.values()), default=0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is made meanwhile is of this phase, and its peak is kept."""
        self._phase, self._highest = name, -1
        self._note_peak()
        yield
        self._phase = ""

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What autograd keeps of the operations meanwhile is ``SAVED``."""

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            self._move(tensor.untyped_storage()._cdata, SAVED)
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield

    def known(self, tensor: torch.Tensor | None, kind: str) -> None:
        """Say what a tensor is."""
        if tensor is not None:
            self._follow(tensor.untyped_storage())
            self._move(tensor.untyped_storage()._cdata, kind)

    def set_apart(self, tensor: torch.Tensor) -> None:
        """Count the memory behind ``tensor`` no longer."""
        self._freed(tensor.untyped_storage()._cdata)

    def _move(self, key: int, kind: str) -> None:
        block = self._blocks.get(key)
        if block is not None and block.kind != kind:
            self.by_kind[block.kind] -= block.nbytes
            self.by_kind[kind] += block.nbytes
            block.kind = kind

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._blocks or key in self._weights:
            return
        block = self._blocks[key] = _Block(storage.nbytes(), self._kind())
        self.by_kind[block.kind] += block.nbytes
        self.written += block.nbytes
        weakref.finalize(storage, self._freed, key)
        self._note_peak()

    def _kind(self) -> str:
        if self._phase == "backward":
            # Only what is computed again builds a graph there.
            return RECOMPUTED if torch.is_grad_enabled() else TEMPORARY
        return LOGITS if self._phase == "loss" else TEMPORARY

    def _note_peak(self) -> None:
        total = self.now
        if self._phase and total > self._highest:
            self._highest = total
            self.peaks[self._phase] = {kind: n for kind, n in self.by_kind.items() if n}

    def _freed(self, key: int) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:  # else it was set apart
            self.by_kind[block.kind] -= block.nbytes


def _attention_flops(name: str, args: Sequence[Any]) -> int:
    """Of queries (1, heads, T, head_dim), or (T, heads, head_dim) of rows behind one another."""
    place, products = _ATTENTION[name]
    query, key = args[place], args[place + 1]
    if query.dim() == 4:
        return int(products * query.numel() * key.shape[-2])
    longest = max((one for one in args if type(one) is int), default=len(query))
    return int(products * query.numel() * longest)
