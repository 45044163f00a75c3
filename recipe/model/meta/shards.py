"""The tensors of consolidated.*.pth, read one at a time: a shard is never in memory as a whole."""

import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from recipe.settings import UserError

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Shard:
    """One file: what it holds is known from its index, and its bytes are read when asked for.

    Raises:
        UserError: it is no file of tensors alone, in an uncompressed zip as torch 1.6 and later
            write it; nothing in it is executed.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with _reading(file):
            records = _records(file)
            with FakeTensorMode():
                held = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(held, Mapping) or not held:
            raise UserError.single(str(file), "is no table of tensors. Use another copy.")
        self._places = {name: self._place(name, tensor, records) for name, tensor in held.items()}

    def _place(self, name: object, tensor: object, records: Mapping[int, int]) -> _Place:
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError.single(f"{self.file}: {name}", "is no tensor. Use another copy.")
        if tensor.dtype not in _DTYPES:
            raise UserError.single(
                f"{self.file}: {name}",
                f"is of {tensor.dtype}; only float32, float16 and bfloat16 weights can be "
                "converted. Use the checkpoint that is not quantised.",
            )
        plain = tensor.layout is torch.strided and tensor.is_contiguous() and not tensor.is_neg()
        storage = tensor.untyped_storage() if plain else None
        offset = getattr(storage, "_checkpoint_offset", None)
        if storage is None or offset is None:
            raise UserError.single(f"{self.file}: {name}", "is no plain tensor. Use another copy.")
        begin = tensor.storage_offset() * tensor.dtype.itemsize
        place = _Place(tensor.dtype, tuple(tensor.shape), offset + begin)
        if records.get(offset) != storage.nbytes() or begin + place.nbytes > storage.nbytes():
            raise UserError.single(
                f"{self.file}: {name}",
                "does not lie where torch writes it: the file is cut off, or packed anew. Fetch it "
                "again.",
            )
        return place

    @property
    def names(self) -> Sequence[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype

    def nbytes(self) -> int:
        return self.file.stat().st_size

    def read(self, name: str) -> torch.Tensor:
        """The tensor, as it is stored."""
        place = self._places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        # Only bytes have a buffer in each dtype.
        buffer = tensor.view(-1).view(torch.uint8).numpy()
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(place.offset)
            _fill(stream, memoryview(buffer.data), self.file)
        return tensor


def _fill(stream: FileIO, left: memoryview, file: Path) -> None:
    while left:
        count = stream.readinto(left)
        if not count:
            raise UserError.single(str(file), "ended before its last tensor. Fetch it again.")
        left = left[count:]


def open_shards(folder: Path) -> list[Shard]:
    """All of ``folder``, in their order.

    Raises:
        UserError: there is none, one is missing between others, or one cannot be read.
    """
    files = sorted(folder.glob("consolidated.*.pth"))
    expected = [folder / f"consolidated.{n:02d}.pth" for n in range(len(files))]
    if not files:
        raise UserError.single(str(folder), "has no consolidated.00.pth. Name Meta's own folder.")
    missing = [file.name for file in expected if file not in files]
    if missing:
        raise UserError.single(
            str(folder), f"has {len(files)} shards, but no {missing[0]}. Fetch what is missing."
        )
    return [Shard(file) for file in files]


def _records(file: Path) -> dict[int, int]:
    """Where in the file each record of its zip begins, and of how many bytes it is.

    They are read where they lie, so a compressed one, or numbers in the other order of bytes, would
    be other numbers. Where ``.format_version`` is among them, torch does not look up where they
    lie, but counts it together: right in its own order alone.
    """
    records: dict[int, int] = {}
    counted, numbers = False, []
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        for one in sorted(archive.infolist(), key=lambda one: one.header_offset):
            folder, _, name = one.filename.rpartition("/")
            if one.compress_type:
                raise ValueError(f"{one.filename} is compressed")
            if name == "byteorder" and archive.read(one) != b"little":
                raise ValueError("the bytes of its numbers are not in little-endian order")
            stream.seek(one.header_offset + 26)
            begin = one.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4)))
            records[begin] = min(one.file_size, file.stat().st_size - begin)
            counted |= name == ".format_version"
            if folder.endswith("/data"):
                numbers.append(name)
    if counted and numbers != [str(n) for n in range(len(numbers))]:
        raise ValueError("its tensors are not in the order in which torch writes them")
    return records


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """For what reads the file: whatever it raises becomes one line, see ``model.checkpoint``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError.single(
            str(file),
            f"not readable as a file of tensors alone ({reason}). Use Meta's own; nothing in this "
            "one was executed.",
        ) from error
