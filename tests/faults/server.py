"""A fork server: it imports torch and the recipe once, then each run is a fork of it.

    python -m tests.faults.server SOCKET

A run begins where the first line of recipe/train.py does, with the arguments, the environment and
the signals that a shell would give it, in a session of its own. One connection is one run: a line
of JSON comes in, the process id goes out, and at the end its exit status. The server and its runs
end when standard input is closed.
"""

import json
import os
import runpy
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]

Runs = dict[int, socket.socket]


def serve(path: str) -> dict[str, Any] | None:
    """Fork for whoever connects to ``path``; return the run in the child, None at the end."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the client's Ctrl-C; it closes our input
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    for source in (listener.fileno(), reader, sys.stdin.fileno()):
        selector.register(source, selectors.EVENT_READ)
    runs: Runs = {}
    print("ready", flush=True)
    while True:
        ready = {key.fd for key, _ in selector.select()}
        if sys.stdin.fileno() in ready:
            _kill(runs)
            return None
        if reader in ready:
            os.read(reader, 4096)
            _tell_ends(runs)
        if listener.fileno() in ready:
            connection, _ = listener.accept()
            run = json.loads(connection.makefile().readline())
            process = os.fork()
            if not process:
                _forget([listener, *runs.values(), connection], descriptors=(reader, writer))
                return run
            runs[process] = connection
            connection.sendall(f"{process}\n".encode())


def _tell_ends(runs: Runs) -> None:
    for process in list(runs):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            connection = runs.pop(process)
            try:
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            except OSError:  # nobody waits for it any more
                continue
            finally:
                connection.close()


def _kill(runs: Runs) -> None:
    for process in runs:
        try:
            os.killpg(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _forget(sockets: list[socket.socket], *, descriptors: tuple[int, int]) -> None:
    """Leave nothing of the server in its child."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for connection in sockets:
        connection.close()
    for descriptor in descriptors:
        os.close(descriptor)


def begin(run: dict[str, Any]) -> None:
    """Become ``run``; the call ends as the command does, with SystemExit."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(run["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    for descriptor in (nothing, log):
        os.close(descriptor)
    os.chdir(run["folder"])
    os.environ.update(run["environment"])
    if run["program"]:
        os.execvp(run["program"][0], run["program"])
    from tests.faults.board import Board
    from tests.faults.watched import watch

    watch(Board(Path(run["board"])))
    sys.argv = ["recipe/train.py", *run["arguments"]]
    runpy.run_path(str(REPOSITORY / "recipe/train.py"), run_name="__main__")


def preload() -> None:
    """Import what a run imports; nothing here computes, so no thread is started."""
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    import bitsandbytes  # noqa: F401
    import matplotlib
    import transformers.models.llama.modeling_llama  # noqa: F401
    from matplotlib import pyplot  # noqa: F401

    import recipe.finetune  # noqa: F401
    import tests.faults.watched  # noqa: F401

    matplotlib.use("Agg")


def main() -> None:
    preload()
    run = serve(sys.argv[1])
    if run is not None:
        begin(run)


if __name__ == "__main__":
    main()
