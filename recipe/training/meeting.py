"""Before several processes are connected: who has not come, and who has left, with which word.

A process that ends on one host ends nothing on another: there the others would wait, without a
word, for as long as training.ddp_timeout says and longer.
"""

import atexit
import hashlib
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from recipe.settings import RunFailed, UserError
from recipe.training.arguments import of_other_processes, world_size

_PATIENCE = 10.0  # seconds until it is said who is waited for
_GRACE = 5.0  # seconds for a process to find by itself what has ended another
_TOLD_SOON = 3.0  # seconds that processes of one host may be apart
_SHOWN_CHARACTERS = 400


def meet(timeout: float) -> None:
    """Wait until every process has come this far; from then on, end when another one has left.

    Only where torchrun's own store is there to meet at, as under ``accelerate launch``.

    Args:
        timeout: seconds, ``training.ddp_timeout``.

    Raises:
        RunFailed: one has left, or does not come.
    """
    store = _torchruns_store()
    if store is None:
        return
    store.set(_key("came", _rank()), socket.gethostname())
    began, told = time.monotonic(), False
    while absent := [r for r in range(world_size()) if not store.check([_key("came", r)])]:
        if found := _left(store):
            raise RunFailed(found)
        waited = time.monotonic() - began
        names = ", ".join(f"rank {rank}" for rank in absent)
        if waited > timeout:
            raise RunFailed(f"{names} did not start within {timeout:.0f} s. Start every host.")
        if waited > _PATIENCE and not told and os.environ.get("LOCAL_RANK", "0") == "0":
            said = f"waiting   for {names} of {world_size()}, since {waited:.0f} s"
            print(said, file=sys.stderr, flush=True)
            told = True
        time.sleep(0.1)
    over = threading.Event()
    watch = threading.Thread(target=_end_with_others, args=(store, over), daemon=True)
    watch.start()
    atexit.register(stop_watching, watch, over)


def stop_watching(watch: threading.Thread, over: threading.Event) -> None:
    """At exit: Python would take a thread that asks the store out of the middle of C++, which ends
    the process with SIGABRT.
    """
    over.set()
    watch.join(_PATIENCE)


def end_by_itself() -> None:
    """torchrun sends SIGTERM as soon as another process has ended, and gives 30 s to end: from here
    on, this one ends with what it has found and its own exit code.
    """
    with suppress(ValueError):  # heard by a main thread only
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def explained(error: Exception) -> Exception:
    """What a process ends with, once the others know it; where it is only that another one has
    ended, what that one said.
    """
    end_by_itself()
    if of_other_processes(error):
        return RunFailed(word_of_others() or f"another process no longer answers ({error}).")
    _say_left(error)
    if isinstance(error, UserError):
        error.told_here = _tells(str(error))
    return error


def _tells(text: str) -> bool:
    """Whether this process tells a mistake: the first of its host does, and another one what that
    one does not find.
    """
    name = f"recipe/mistake/{os.environ.get('GROUP_RANK', '0')}/{_hash(text)}"
    with suppress(Exception):  # the store may be gone
        store = _torchruns_store()
        if store is not None and os.environ.get("LOCAL_RANK", "0") == "0":
            store.set(name, "told")
            return True
        until = time.monotonic() + _TOLD_SOON
        while store is not None and time.monotonic() < until:
            if store.check([name]):
                return False
            time.sleep(0.1)
    return True


def word_of_others() -> str | None:
    """What another process has ended with, if it says so within seconds."""
    with suppress(Exception):  # the store may be gone as well
        store = _torchruns_store()
        until = time.monotonic() + _GRACE
        while store is not None and time.monotonic() < until:
            if found := _left(store):
                return found
            time.sleep(0.1)
    return None


def _say_left(error: Exception) -> None:
    with suppress(Exception):  # they may be gone themselves
        store = _torchruns_store()
        if store is not None and str(error):
            ours = isinstance(error, RunFailed | UserError)
            kind = "" if ours else f"{type(error).__name__}: "
            said = f"rank {_rank()} on {socket.gethostname()} has ended. {kind}{error}".rstrip(".")
            store.set("recipe/left", f"{said[:_SHOWN_CHARACTERS]}.")


def _end_with_others(store: Store, over: threading.Event) -> None:
    with suppress(Exception):  # with the store gone, collective operations fail anyway
        while (found := _left(store)) is None:
            if over.wait(1):
                return
        if over.wait(2 * _GRACE):
            return
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, f"{found}\n".encode())
        os._exit(3)


def _left(store: Store) -> str | None:
    return str(store.get("recipe/left").decode()) if store.check(["recipe/left"]) else None


def _torchruns_store() -> Store | None:
    """Of the launcher, which is there before and after the processes."""
    if world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_PATIENCE))
    return PrefixStore(f"try-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _key(kind: str, rank: int) -> str:
    return f"recipe/{kind}/{rank}"
