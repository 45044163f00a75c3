"""How many bytes of tensors live, and how many did at most."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts each storage that an operation inside the mode makes, from then until it is freed.

    What was there before, and views of it, is not counted, nor what a kernel takes for itself and
    gives back before it returns. On the CPU, whose backward passes run in the caller's thread.

    Attributes:
        now: bytes that live.
        peak: the most bytes that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._counted: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(output):
            if storage._cdata not in given and storage._cdata not in self._counted:
                self._count(storage)
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._counted[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, address: int) -> None:
        self.now -= self._counted.pop(address, 0)

    def set_apart(self, tensor: torch.Tensor) -> None:
        """Count the storage of ``tensor`` no longer."""
        self._forget(tensor.untyped_storage()._cdata)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
