"""The longest micro-batch of a run need not be tried again if it went through on this machine with
all as it is now: trying it is most of what a start takes.

What went through is written down under a name made of all that decides whether it would again. The
memory that others hold is no part of it, and is looked at instead.
"""

import hashlib
import json
import os
import platform
import resource
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import recipe
from recipe.memory.probe import free_memory, held, peak_memory
from recipe.settings import Settings, dump
from recipe.training.run_folder import PACKAGES

# Of the settings, what changes nothing of a step.
_ANYHOW = ("name", "hub", "judging")
_ANYHOW_OF_TRAINING = ("output_dir", "resume_from_checkpoint")
_ENVIRONMENT = ("CUDA_", "LD_PRELOAD", "MALLOC_", "MKL_", "OMP_", "PYTORCH_", "TORCH")
_LIMIT_OF_CONTAINER = Path("/sys/fs/cgroup/memory.max")


class WentThrough(BaseModel):
    """When a micro-batch did, how many tokens it had, and in bytes what autograd kept of its
    forward pass and what it took at most beyond what the process held before.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    date: str
    tokens: int = Field(ge=1)
    saved: int = Field(ge=0)
    taken: int = Field(ge=0)


def circumstances(settings: Settings, *facts: str) -> str:
    """A hash of settings, versions, this code and the machine.

    Args:
        facts: of what the settings only name, such as the hashes of rows and base.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(recipe.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    digest.update(json.dumps([_asked(settings), facts, _machine()], sort_keys=True).encode())
    return digest.hexdigest()[:32]


class Trial:
    """Of a longest micro-batch on ``device``; made before it is computed.

    Args:
        folder: where those are written down that went through.
        name: of its circumstances.
    """

    def __init__(self, folder: Path, device: str, name: str) -> None:
        self._file = folder / f"{name}.json"
        self._device = device
        self._held = held(device)

    def before(self) -> WentThrough | None:
        """The one that went through before; None also if less memory is free than it took."""
        try:
            found = WentThrough.model_validate_json(self._file.read_bytes())
        except (OSError, ValidationError):
            return None
        free = free_memory(self._device)
        return found if free is not None and found.taken <= free else None

    def note(self, tokens: int, saved: int) -> None:
        """It went through just now. Where that cannot be written, the next start tries again."""
        peak = peak_memory(self._device)
        taken = peak.get("reserved", peak.get("resident", 0)) - self._held
        found = WentThrough(
            date=f"{datetime.now(UTC):%Y-%m-%d}", tokens=tokens, saved=saved, taken=max(taken, 0)
        )
        staged = self._file.with_name(f".{self._file.name}.{os.getpid()}.partial")
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            staged.write_text(found.model_dump_json())
            staged.replace(self._file)


def _asked(settings: Settings) -> dict[str, object]:
    asked = {k: v for k, v in yaml.safe_load(dump(settings)).items() if k not in _ANYHOW}
    training = asked["training"].items()
    return {**asked, "training": {k: v for k, v in training if k not in _ANYHOW_OF_TRAINING}}


def _machine() -> list[object]:
    limit = _LIMIT_OF_CONTAINER
    return [
        platform.node(),
        psutil.virtual_memory().total,
        [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)],
        limit.read_text() if limit.is_file() else None,
        [torch.get_num_threads(), torch.cuda.is_available() and torch.cuda.get_device_name()],
        {key: value for key, value in os.environ.items() if key.startswith(_ENVIRONMENT)},
        [platform.python_version(), *map(version, PACKAGES)],
    ]
