"""A folder is written beside its final place, hashed, flushed and renamed: whole or absent.

The hashes stay inside as ``sha256.json``, so that anyone can tell later whether a file changed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

SEAL = "sha256.json"
_CHUNK_BYTES = 1 << 20
_PARTIAL = ".partial"
_REPLACED = ".replaced"


@contextmanager
def whole_folder(
    path: Path, *, replace: bool = False, staged: Path | None = None
) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; when the block ends well, seal it and rename it.

    On any exception (Ctrl-C too) the staged folder is removed and ``path`` stays as it was.

    Args:
        replace: put it in the place of what is there.
        staged: where it is written, beside ``path``, if others must know it.

    Raises:
        FileExistsError: ``path`` is there already and is not to be replaced.
    """
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same parent, so the rename never crosses a file system.
    staged = staged or path.parent / f".{path.name}{_PARTIAL}-{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
        seal(staged)
        _put(staged, path)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _flush(path.parent)


def _put(staged: Path, path: Path) -> None:
    if not os.path.lexists(path):
        staged.rename(path)
        return
    old = path.parent / f".{path.name}{_REPLACED}"
    _remove(old)
    path.rename(old)
    staged.rename(path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(parent: Path) -> None:
    """Take away what ``whole_folder`` left in ``parent`` when its process was killed; no other may
    be writing there.
    """
    for kind in (_PARTIAL, _REPLACED):
        for left in parent.glob(f".*{kind}*"):
            _remove(left)


def seal(folder: Path) -> None:
    """Flush every file of ``folder`` to disk and write their sizes and hashes beside them."""
    hashes = {name: _sha256(folder / name) for name in _files(folder)}
    for name in hashes:
        _flush(folder / name)
    staged = folder / f".{SEAL}.partial"
    staged.write_text(json.dumps(hashes, indent=1) + "\n")
    _flush(staged)
    staged.rename(folder / SEAL)
    _flush(folder)


def damage(folder: Path) -> list[str]:
    """Say what differs between ``folder`` and its seal; an empty list means it is whole.

    Only files that lie in the folder are ever opened, whatever the seal names.
    """
    if not (folder / SEAL).is_file():
        return [f"{folder / SEAL}: missing, so nothing proves that the folder is whole"]
    try:
        sealed = json.loads((folder / SEAL).read_bytes())
    except (ValueError, RecursionError):
        return [f"{folder / SEAL}: not readable as JSON"]
    if not isinstance(sealed, dict) or not sealed:
        return [f"{folder / SEAL}: not a table of hashes"]
    there = set(_files(folder))
    found = ((name, _difference(folder, name, sealed[name], there)) for name in sealed)
    return [f"{folder / _shown(name)}: {said}" for name, said in found if said]


def _difference(folder: Path, name: str, sha256: object, there: set[str]) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return f"named in {SEAL}, but not inside the folder"
    if not isinstance(sha256, str):
        return f"no hash in {SEAL}"
    if name not in there:
        return "missing"
    return None if _sha256(folder / name) == sha256 else "changed since it was written"


def _shown(name: str) -> str:
    """On one line, and beneath the folder even if it begins with a slash."""
    return name.lstrip("/") if name.isprintable() else repr(name)


def _files(folder: Path) -> list[str]:
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(file.as_posix() for file in found if file.name != SEAL)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
