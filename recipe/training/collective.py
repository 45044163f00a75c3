"""Several processes: whether all are there, what they agree on, and who says it."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from recipe.settings import Problem, RunFailed, UserError
from recipe.training.arguments import world_size
from recipe.training.loss import distributed
from recipe.training.meeting import end_by_itself

_PATIENCE = 10.0  # seconds
_TOLD_AGAIN = 3.0  # seconds that another process has to tell the same
_screen = [2]  # the last is where this process's errors are seen


def of_first(compute: Callable[[Any], Any], value: Any) -> Any:
    """What the first process computes of ``value``, on all: under FSDP2 it alone loads weights."""
    if not distributed():
        return compute(value)
    told = [compute(value) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def check_all_answer(device: torch.device) -> None:
    """One sum over all processes, within ten seconds.

    Raises:
        RunFailed: naming rank and host of each that does not take part.
    """
    if not distributed():
        return
    store, rank = _get_default_store(), dist.get_rank()
    store.set(key("here", rank), socket.gethostname())
    found: list[float | BaseException] = []

    def count() -> None:
        counted = torch.ones(1, device=device)
        try:
            dist.all_reduce(counted)
            found.append(counted.item())
        except RuntimeError as error:
            found.append(error)

    # NCCL connects within its first operation, which no other way leaves.
    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if not found:
        leave(f"the processes do not all answer within {_PATIENCE:.0f} s: {_missing()}")
    if isinstance(found[0], BaseException):
        raise found[0]
    if found[0] != dist.get_world_size():
        raise RunFailed(f"{dist.get_world_size()} processes add up to {found[0]}.")


def check_seen_by_all(folder: Path) -> None:
    """Every process writes into the run's folder.

    Raises:
        UserError: naming who does not see what the first one has made.
    """
    if not distributed():
        return
    mark = folder / ".seen-by-all"
    if dist.get_rank() == 0:
        mark.touch()
    dist.barrier()
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, None if _appears(mark) else this_process())
    blind = [one for one in seen if one]
    if dist.get_rank() == 0:
        mark.unlink(missing_ok=True)
        if blind:
            with suppress(OSError):  # something else is in it
                folder.rmdir()
    if blind:
        raise UserError.single(
            "training.output_dir",
            f"{folder} is not seen by {', '.join(blind)}. Name a folder on a disk that all hosts "
            "share.",
        )


def check_all_alike(facts: Mapping[str, Any]) -> None:
    """Every process trains the same: the others would follow their own settings or rows, silently.

    Args:
        facts: by what a person knows them under.

    Raises:
        UserError: naming rank, host and the facts that differ from the first process's.
    """
    if not distributed():
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (this_process(), dict(facts)))
    first = everyone[0][1]
    problems = [
        Problem(
            name,
            f"is {found.get(name)!r} for {who}, and {first.get(name)!r} for rank 0. Give every "
            "host the same config, files and packages.",
        )
        for who, found in everyone[1:]
        for name in sorted(first.keys() | found.keys())
        if first.get(name) != found.get(name)
    ]
    if problems:
        raise UserError.first_of(problems)


@contextmanager
def own_log(folder: Path) -> Iterator[None]:
    """What any but the first process says goes into ``logs/rank-1.log`` and so on, and not into
    the middle of what the first one says.
    """
    if not distributed() or dist.get_rank() == 0:
        yield
        return
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    streams = (sys.stdout, sys.stderr)
    with (logs / f"rank-{dist.get_rank()}.log").open("a") as file:
        kept = [os.dup(number) for number in (1, 2)]
        _screen.append(kept[1])
        _point(streams, [file.fileno()] * 2)
        try:
            yield
        finally:
            _screen.pop()
            _point(streams, kept)
            for one in kept:
                os.close(one)


@contextmanager
def told_once() -> Iterator[None]:
    """An error that all processes find is told by the first; one that another finds alone is told
    with its rank and host.
    """
    try:
        yield
    except RunFailed as error:
        if not distributed():
            raise
        end_by_itself()
        said = str(error)
        if dist.get_rank() == 0:
            at_once(lambda: _get_default_store().set("recipe/told", said))
            raise
        if _told() == said:
            raise RunFailed("") from error
        raise RunFailed(f"{this_process()}: {error}") from error


def at_once(ask: Callable[[], Any], default: Any = None) -> Any:
    """What ``ask`` gives of the store that the processes share, or ``default`` where it gives
    nothing within seconds: over a cut cable torch's own timeouts do not hold.
    """
    found = [default]

    def answer() -> None:
        with suppress(Exception):  # what the store raises when its host is gone
            found[0] = ask()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(2 * _TOLD_AGAIN)
    return found[0]


def leave(message: str) -> NoReturn:
    """End this process with 3. From a thread, or past an operation that never ends, no exception
    would.
    """
    if dist.get_rank() == 0 or _told() is None:
        os.write(_screen[-1], f"{this_process()}: {message}\n".encode())
    at_once(lambda: _get_default_store().set("recipe/told", message))
    os._exit(3)


def _told() -> str | None:
    def ask() -> str | None:
        store, until = _get_default_store(), time.monotonic() + _TOLD_AGAIN
        while time.monotonic() < until:
            if store.check(["recipe/told"]):
                return str(store.get("recipe/told").decode())
            time.sleep(0.1)
        return None

    told: str | None = at_once(ask)
    return told


def _missing() -> str:
    """Who has not begun the first sum."""
    store = _get_default_store()
    absent = [r for r in range(dist.get_world_size()) if not store.check([key("here", r)])]
    if not absent:
        return "all have begun, and nothing arrives. Is the network between the hosts open?"
    return ", ".join(f"rank {rank} on {_host_of(rank)}" for rank in absent)


def _host_of(rank: int) -> str:
    """By its neighbours: processes of a host are numbered in a row."""
    store, here = _get_default_store(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    first = rank // here * here
    for other in range(first, first + here):
        if store.check([key("here", other)]):
            return str(store.get(key("here", other)).decode())
    return f"host {rank // here + 1} of {max(world_size() // here, 1)}"


def _appears(file: Path) -> bool:
    """A network's file system may show it late."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        with suppress(OSError):
            if file.name in os.listdir(file.parent):  # noqa: PTH208 - asks the disk anew
                return True
        time.sleep(0.1)
    return False


def _point(streams: tuple[Any, ...], targets: list[int]) -> None:
    for number, stream, target in zip((1, 2), streams, targets, strict=True):
        stream.flush()
        os.dup2(target, number)


def this_process() -> str:
    """Its rank and host, for a message."""
    return f"rank {dist.get_rank()} on {socket.gethostname()}"


def key(kind: str, rank: int) -> str:
    """Of the store that the processes share."""
    return f"recipe/{kind}/{rank}"
