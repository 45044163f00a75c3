"""Whether something can be written where the user wants it, before minutes are spent on it."""

import os
from pathlib import Path


def file_objection(path: str) -> str | None:
    """Why no file can be written there; nothing is ever overwritten."""
    if not path:
        return "empty. Name a file."
    return _taken(path) or _no_parent(path, parents=False)


def folder_objection(path: str) -> str | None:
    """Why no folder can be made there; the folders above it are made too."""
    if not path:
        return "empty. Name a folder."
    return _taken(path) or _no_parent(path, parents=True)


def _taken(path: str) -> str | None:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # such as a name of 5000 letters
        return f"{getattr(error, 'strerror', None) or error}. Correct the path."
    return f"{path} exists already, and nothing is overwritten. Name another."


def _no_parent(path: str, *, parents: bool) -> str | None:
    parent = Path(path).absolute().parent
    if not parent.exists() and not parents:
        return f"there is no folder {Path(path).parent}. Make it, or correct the path."
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        return f"{parent} is a file. Correct the path."
    if not os.access(parent, os.W_OK):
        return f"{parent} cannot be written to. Correct the path."
    return None
