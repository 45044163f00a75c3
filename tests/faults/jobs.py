"""The client of the fork server: start runs, wait for them, kill them."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from tests.faults.board import Board

REPOSITORY = Path(__file__).parents[2]
# A hung run must not hang the suite; nothing that is measured ends by it.
PATIENCE = 300.0


class Job:
    """A run that the server forked, with its session and its board."""

    def __init__(self, connection: socket.socket, board: Path, log: Path) -> None:
        self._connection = connection
        self._lines = connection.makefile()
        self.process = int(self._lines.readline())
        self.board = Board(board)
        self.log = log
        self._code: int | None = None

    def ended(self, seconds: float) -> bool:
        """Wait for the end, so long at most."""
        if self._code is None and select.select([self._connection], [], [], max(seconds, 0))[0]:
            self._code = int(self._lines.readline())
            self._connection.close()
        return self._code is not None

    def wait(self) -> int:
        """The exit code; of a killed process, minus its signal."""
        if not self.ended(PATIENCE):
            self.kill()
            raise TimeoutError(f"{self.log}: the run was still on after {PATIENCE:.0f} s")
        assert self._code is not None
        return self._code

    def kill(self) -> int:
        """SIGKILL to the whole group at once; its data workers too."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def signal(self, number: int) -> None:
        try:
            os.killpg(self.process, number)
        except ProcessLookupError:
            return

    def wait_until_held(self) -> bool:
        """Wait until the run is where its board holds it; False if it ended before."""
        while not self.board.held:
            if self.ended(0.0005):
                return False
        return True

    def said(self) -> str:
        return self.log.read_text()

    def left_over(self) -> list[int]:
        """Processes of its session that live; the dead need a moment to leave."""
        for _ in range(100):
            alive = [p for p, session in _sessions() if session == self.process]
            if not alive:
                break
            time.sleep(0.02)
        return alive


def _sessions() -> list[tuple[int, int]]:
    """(process, session) of all that are no zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            state, *fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state not in "ZX":
            found.append((int(entry.name), int(fields[2])))
    return found


class Server:
    """Starts ``tests.faults.server``, in a ``with`` block; one thread a run may use it."""

    def __init__(self, *, prefix: Sequence[str] = ()) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self._numbers = count(1)
        self._socket = str(self.folder / "socket")
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.faults.server", self._socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> "Server":
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("the fork server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def root(self) -> Path:
        """The file system as the server sees it, mounts of its own namespace included."""
        return Path(f"/proc/{self._process.pid}/root")

    def start(
        self,
        arguments: Sequence[str] = (),
        *,
        log: Path,
        hold: tuple[str, int, int] | None = None,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = (),
    ) -> Job:
        """Start recipe/train.py with ``arguments``, or another ``program``.

        Args:
            hold: phase, entry and operation where the run is to wait; see ``Board.hold``.
        """
        board = self.folder / f"board-{next(self._numbers)}"
        if hold:
            Board(board).hold(*hold)
        else:
            Board(board)
        run = {
            "arguments": list(arguments),
            "log": str(log),
            "folder": str(REPOSITORY),
            "environment": dict(environment or {}),
            "program": list(program),
            "board": str(board),
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._socket)
        connection.sendall((json.dumps(run) + "\n").encode())
        return Job(connection, board, log)

    def run(self, program: Sequence[str]) -> str:
        """Run another program beside the runs, in their namespaces; what it said."""
        log = self.folder / f"program-{next(self._numbers)}.log"
        job = self.start(program=program, log=log)
        code = job.wait()
        said = log.read_text()
        if code:
            raise RuntimeError(f"{' '.join(program)} exited with {code}: {said}")
        return said
