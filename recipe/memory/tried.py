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
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import recipe
from recipe.memory.probe import free_memory, held, peak_memory
from recipe.settings import Settings, dump
from recipe.training.run_folder import PACKAGES

DEVICES = ("cpu", "cuda")  # whose free memory can be asked
_OF_NO_STEP = ("name", "hub", "judging")
_ENVIRONMENT = (
    *("ACCELERATE_", "BNB_", "CUDA_", "CUBLAS_", "DNNL_", "FSDP_", "GLIBC_", "KMP_", "LD_PRELOAD"),
    *("LRU_CACHE_", "MALLOC_", "MKL_", "NVIDIA_", "OMP_", "ONEDNN_", "PYTORCH_", "TORCH_"),
)


class WentThrough(BaseModel):
    """When a micro-batch did, how many tokens it had, and in bytes what autograd kept of its
    forward pass and the process's peak when it was through: resident, or reserved on CUDA.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    date: str
    tokens: int = Field(ge=1)
    saved: int = Field(ge=0)
    peak: int = Field(ge=0)


def circumstances(settings: Settings, facts: Mapping[str, Any]) -> str:
    """A hash of settings, versions, this code and the machine.

    Args:
        facts: what settings do not say or only name, such as the hashes of rows and base.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(recipe.__file__).parent.rglob("*.py")):
        if file.is_file():  # an editor's lock is a link to nothing
            digest.update(file.read_bytes())
    asked = {k: v for k, v in yaml.safe_load(dump(settings)).items() if k not in _OF_NO_STEP}
    whole = [asked, dict(facts), _machine()]
    digest.update(json.dumps(whole, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


class Trial:
    """Of a longest micro-batch on ``device``, one of ``DEVICES``.

    Args:
        folder: where those are written down that went through.
        name: of its circumstances.
    """

    def __init__(self, folder: Path, device: str, name: str) -> None:
        self._file = folder / f"{name}.json"
        self._device = device

    def before(self) -> WentThrough | None:
        """The one that went through before. None also if what is free and what this process holds
        are less than its peak was.
        """
        try:
            found = WentThrough.model_validate_json(self._file.read_bytes())
        except (OSError, ValidationError):
            return None
        free = free_memory(self._device)
        fits = free is not None and found.peak <= free + held(self._device)
        return found if fits else None

    def note(self, tokens: int, saved: int) -> None:
        """It went through just now. Where that cannot be written, the next start tries again."""
        told = peak_memory(self._device)
        peak = told.get("reserved", told.get("resident", 0))
        date = f"{datetime.now(UTC):%Y-%m-%d}"
        found = WentThrough(date=date, tokens=tokens, saved=saved, peak=peak)
        staged = self._file.with_name(f".{self._file.name}.{os.getpid()}.partial")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            staged.write_text(found.model_dump_json())
            staged.replace(self._file)
        except OSError:
            with suppress(OSError):
                staged.unlink()


def _machine() -> list[object]:
    return [
        platform.node(),
        psutil.virtual_memory().total,
        [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)],
        [torch.get_num_threads(), torch.cuda.is_available() and torch.cuda.get_device_name()],
        {key: value for key, value in os.environ.items() if key.startswith(_ENVIRONMENT)},
        [platform.python_version(), *map(version, PACKAGES)],
    ]
