"""The folder of a run: a fresh one each time, with what is needed to repeat it."""

import fcntl
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from recipe.settings import Settings, UserError, dump
from recipe.training.arguments import world_size
from recipe.training.same_run import Beginning

_PATIENCE = 10  # seconds
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")


def check_output_dir(settings: Settings) -> None:
    """Nothing is overwritten, and that is told before anything is loaded.

    Raises:
        UserError: the folder that was asked for is not empty.
    """
    asked = settings.training.get("output_dir")
    if not asked:
        return
    folder = Path(asked)
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        under_a_file = any(parent.is_file() for parent in folder.parents)
    except OSError as error:  # such as a name of 5000 letters
        raise UserError.single(
            "training.output_dir", f"{folder}: {error.strerror}. Correct the path."
        ) from error
    if under_a_file:
        raise UserError.single(
            "training.output_dir", f"{folder} would lie in a file. Correct the path."
        )
    if taken:
        raise UserError.single(
            "training.output_dir",
            f"{folder} is not empty, and nothing is overwritten. Name another folder, or leave "
            "it out for a fresh one.",
        )


def make_run_folder(settings: Settings) -> Path:
    """Make ``training.output_dir``, or a fresh ``runs/<config>-001``, ``-002``…

    With several processes the first makes it and the others learn its name.

    Raises:
        UserError: the folder that was asked for is not empty.
    """
    if world_size() == 1:
        return _make(settings)
    from accelerate import PartialState  # not before the launcher's variables are known good

    state = PartialState(cpu=bool(settings.training.get("use_cpu")))
    made: list[Any] = [None]
    if state.is_main_process:
        try:
            made = [_make(settings)]
        except UserError as error:
            made = [error]
    broadcast_object_list(made)
    if isinstance(made[0], UserError):
        raise made[0]
    return Path(made[0])


def planned_folder(settings: Settings) -> Path:
    """The run's folder, or one beside it; nothing is made."""
    return Path(settings.training.get("output_dir") or Path("runs") / settings.name)


def _make(settings: Settings) -> Path:
    check_output_dir(settings)
    try:
        folder = _fresh(settings)
        # Whether a folder that is there may be written into, only this tells.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError.single(
            "training.output_dir",
            f"{planned_folder(settings)} cannot be written to ({error.strerror}). Name another.",
        ) from error
    return folder


def _fresh(settings: Settings) -> Path:
    asked = settings.training.get("output_dir")
    if asked:
        folder = Path(asked)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for number in range(1, 1000):
        folder = Path("runs") / f"{settings.name}-{number:03d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise UserError.single("runs", f"{settings.name}-001 to -999 are taken. Remove some.")


def write_settings(folder: Path, settings: Settings) -> None:
    """``settings.yaml``: give it to ``--config`` and the run is repeated beside itself."""
    _replace(folder / "settings.yaml", dump(settings))


def write_manifest(folder: Path, **facts: Any) -> None:
    """``manifest.json``: what the run was made of."""
    manifest = {
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "git": _git_state(),
        "processes": world_size(),
        **facts,
    }
    _replace(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def note_in_manifest(folder: Path, **facts: Any) -> None:
    """Add to ``manifest.json`` what is known only later."""
    file = folder / "manifest.json"
    _replace(file, json.dumps({**json.loads(file.read_text()), **facts}, indent=1) + "\n")


def note_changes(folder: Path, now: Beginning, changed: Sequence[str], *, step: int) -> None:
    """Into ``manifest.json``: what a run that goes on after ``step`` does otherwise."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["data"] |= {
        "tokens_sha256": now.tokens_sha256,
        "share_openings": now.share_openings,
        "layout": now.layout,
    }
    manifest.setdefault("changed", []).append({"after_step": step, "what": list(changed)})
    _replace(file, json.dumps(manifest, indent=1) + "\n")


@contextmanager
def alone(folder: Path, *, needed: bool) -> Iterator[None]:
    """No other process may write a run at the same time, such as one that is still saving.

    Raises:
        UserError: one does, and goes on doing so.
    """
    if not needed:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(folder, descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, descriptor: int) -> None:
    for left in range(_PATIENCE, -1, -1):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:  # data workers of a killed run take some seconds to notice
            time.sleep(1 if left else 0)
        except OSError:  # a file system that knows no locks
            return
    raise UserError.single(
        "training.output_dir", f"another process writes {folder}. Wait for it, or end it."
    )


def _replace(file: Path, text: str) -> None:
    """Whole or as it was: a run whose settings are half written could not be continued."""
    staged = file.with_name(f".{file.name}.partial")
    staged.write_text(text)
    staged.replace(file)


def _git_state() -> dict[str, Any] | None:
    """Commit of the recipe and whether files differ from it; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "changed": bool(changed)}
