"""The genuine client, in a process of its own that lives as long as the tests.

``huggingface_hub`` reads its endpoint and whether it is offline when it is imported, so the process
of pytest, which is offline, cannot be that client.
"""

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).parents[2]
# Of a user or a machine, and none of the tests' business.
_FOREIGN = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass(frozen=True)
class Answer:
    """How a call ended; ``code`` is -N where signal N killed the process, as subprocess has it."""

    code: int
    out: str
    err: str
    seconds: float


class TimedOut(AssertionError):
    """No answer in time; the process is killed and the next call starts another."""


class Client:
    """Started by the first call, and again by the first after it died."""

    def __init__(self, endpoint: str, *, timeouts: int = 3) -> None:
        self.endpoint = endpoint
        self._timeouts = timeouts
        self._folder = Path(tempfile.mkdtemp(prefix="recipe-client-"))
        self._out, self._err = self._folder / "out", self._folder / "err"
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.Queue[str] = queue.Queue()

    @property
    def home(self) -> Path:
        """HF_HOME: the client's cache is in its ``hub``."""
        return self._folder / "home"

    @property
    def environment(self) -> dict[str, str]:
        """For other processes that should meet the same hub, too."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith(_FOREIGN)
        }
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home),
            # With xet the client has another protocol, and no way back from it.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": str(self._timeouts),
            "HF_HUB_ETAG_TIMEOUT": str(self._timeouts),
            "PYTHONUTF8": "1",
        }

    def call(
        self,
        module: str,
        argv: Sequence[str],
        *,
        token: str | None = None,
        cwd: Path | None = None,
        timeout: float = 120,
    ) -> Answer:
        """What ``module.main(argv)`` does as a command; ``token`` is its HF_TOKEN."""
        request = {"module": module, "argv": [str(argument) for argument in argv]}
        return self._ask(request, token, cwd, timeout)

    def run(
        self,
        file: Path,
        argv: Sequence[str] = (),
        *,
        token: str | None = None,
        cwd: Path | None = None,
        timeout: float = 120,
    ) -> Answer:
        """What the Python file does, as ``__main__``."""
        request = {"file": str(file), "argv": [str(argument) for argument in argv]}
        return self._ask(request, token, cwd, timeout)

    def _ask(
        self, request: dict[str, Any], token: str | None, cwd: Path | None, timeout: float
    ) -> Answer:
        self._out.write_bytes(b"")
        self._err.write_bytes(b"")
        process = self.ready()
        assert process.stdin is not None
        line = json.dumps({**request, "token": token, "cwd": str(cwd or self._folder)})
        print(line, file=process.stdin, flush=True)
        try:
            reply = self._replies.get(timeout=timeout)
        except queue.Empty:
            self.close_process()
            said = self._text(self._out) + self._text(self._err)
            raise TimedOut(f"no answer in {timeout} s to {line}\n{said}") from None
        if not reply:
            code = process.wait()
            return Answer(code, self._text(self._out), self._text(self._err), float("nan"))
        return Answer(out=self._text(self._out), err=self._text(self._err), **json.loads(reply))

    def _text(self, file: Path) -> str:
        return file.read_text(errors="backslashreplace")

    def ready(self) -> "subprocess.Popen[str]":
        """The process, which has made the requests by now that it makes once in its life."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
            assert self._replies.get(timeout=120) == "ready\n"
        return self._process

    def _start(self) -> "subprocess.Popen[str]":
        self.home.mkdir(exist_ok=True)
        program = Path(__file__).with_name("client_process.py")
        # -P: this folder is not on the path of what runs there.
        process = subprocess.Popen(
            [sys.executable, "-P", str(program), str(self._out), str(self._err), str(_REPOSITORY)],
            env=self.environment,
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._replies = queue.Queue()
        threading.Thread(target=_read, args=(process, self._replies), daemon=True).start()
        return process

    def forget(self) -> None:
        """An empty cache and no login, as on a new machine."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()

    def close_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.close_process()
        shutil.rmtree(self._folder, ignore_errors=True)


def _read(process: "subprocess.Popen[str]", replies: "queue.Queue[str]") -> None:
    """Each line of the process, and an empty one when it has gone."""
    assert process.stdout is not None
    for line in process.stdout:
        replies.put(line)
    replies.put("")
