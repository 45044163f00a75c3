"""A fork server for the whole session, and what its runs train."""

import dataclasses
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROWS
from tests.faults.jobs import Server
from tests.faults.scenarios import BY_NAME
from tests.faults.torment import Reference, Tormentor

Prepared = tuple[Tormentor, Reference]


_NAMESPACE = ["unshare", "--map-root-user", "--mount"]


@pytest.fixture(scope="session")
def no_mount() -> str:
    """Why no disk can be mounted for the runs alone; empty if it can."""
    trial = [*_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        tried = subprocess.run(trial, capture_output=True, text=True, timeout=60)
    except OSError as error:
        return f"no unshare here ({error.strerror})"
    return f"this system lets nobody mount: {tried.stderr.strip()}" if tried.returncode else ""


@pytest.fixture(scope="session")
def server(no_mount: str) -> Iterator[Server]:
    """In a mount namespace of its own, where that is permitted."""
    with Server(prefix=() if no_mount else _NAMESPACE) as server:
        yield server


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    file.write_text(json.dumps(ROWS))
    return file


@pytest.fixture
def write_scenario(tmp_path: Path, tiny_checkpoint: Path, rows: Path) -> Callable[..., Path]:
    """Write the config of a scenario, with some of its fields replaced."""

    def write(name: str, *, rows: Path = rows, **fields: Any) -> Path:
        scenario = dataclasses.replace(BY_NAME[name], **fields)
        return scenario.write_config(tmp_path, model=str(tiny_checkpoint), rows=rows)

    return write


@pytest.fixture(scope="session")
def prepare(
    server: Server,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Path,
    rows: Path,
) -> Callable[[str], Prepared]:
    """A scenario, shortened, with its uninterrupted run; each is run once."""
    kept: dict[str, Prepared] = {}

    def prepare(name: str) -> Prepared:
        if name not in kept:
            folder = tmp_path_factory.mktemp(name)
            scenario = dataclasses.replace(BY_NAME[name], epochs=3)
            config = scenario.write_config(folder, model=str(tiny_checkpoint), rows=rows)
            tormentor = Tormentor(server, config)
            kept[name] = tormentor, tormentor.reference(folder / "reference")
        return kept[name]

    return prepare
