"""What git keeps only a pointer to: the pointer's text, and the objects beside a repository."""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

# The specification bounds a pointer at 1024 bytes; those written here have about 130.
LONGEST_POINTER = 1024
_TEXT = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n"
)


class WrongObject(Exception):
    """The bytes are not those that the name promised."""


@dataclass(frozen=True)
class Pointer:
    oid: str
    size: int

    def text(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {self.size}\n"
        ).encode()

    @staticmethod
    def read(blob: bytes) -> "Pointer | None":
        """The pointer that ``blob`` is, or None for any other file."""
        found = _TEXT.fullmatch(blob)
        return found and Pointer(found[1].decode(), int(found[2]))


class LargeFiles:
    """Objects under their sha256. An object is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, oid: str) -> Path:
        return self.folder / oid[:2] / oid[2:4] / oid

    def size(self, oid: str) -> int | None:
        """Bytes of the object, None where it was never uploaded."""
        file = self.file(oid)
        return file.stat().st_size if file.is_file() else None

    def put(self, oid: str, content: bytes) -> None:
        """Keep ``content``, unless its sha256 is another than ``oid``."""
        actual = hashlib.sha256(content).hexdigest()
        if actual != oid:
            raise WrongObject(f"the sha256 of what was sent is {actual}, not {oid}")
        file = self.file(oid)
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(descriptor, "wb") as half:
            half.write(content)
        Path(name).replace(file)

    def put_part(self, oid: str, number: int, content: bytes) -> str:
        """Keep one part of an object until ``join``; returns the ETag, the part's MD5 as on S3."""
        parts = self.folder / "parts" / oid
        parts.mkdir(parents=True, exist_ok=True)
        (parts / str(number)).write_bytes(content)
        return hashlib.md5(content).hexdigest()

    def join(self, oid: str, etags: dict[int, str]) -> None:
        """Make the object out of its parts, each of which must be the one that ``etags`` names."""
        parts = self.folder / "parts" / oid
        content = b""
        for number in sorted(etags):
            part = b""
            with contextlib.suppress(FileNotFoundError):
                part = (parts / str(number)).read_bytes()
            if hashlib.md5(part).hexdigest() != etags[number]:
                raise WrongObject(f"part {number} is missing or another one")
            content += part
        self.put(oid, content)
        shutil.rmtree(parts, ignore_errors=True)
