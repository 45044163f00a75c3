"""Who of several processes no longer answers: a hang ends, and with a message."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from transformers import TrainerCallback, TrainerState

from recipe.settings import RunFailed
from recipe.training.arguments import of_other_processes
from recipe.training.collective import at_once, key, leave
from recipe.training.faults import how_to_continue
from recipe.training.meeting import end_by_itself, stop_watching, word_of_others

_BEAT = 1.0  # seconds
_SILENT = 4.0  # seconds without a beat
# The engine's own timeout ends a process without a word that helps.
_BEFORE_THE_ENGINE = 0.9


class Heartbeat(TrainerCallback):
    """Ends a run in which nothing moves any more, and says who stands where.

    Collective operations wait for ``training.ddp_timeout`` seconds; then gloo raises, and NCCL
    ends the process.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._step = 0
        self._moved = 0.0
        self._ended = threading.Event()

    @contextmanager
    def watching(self, timeout: float) -> Iterator[None]:
        """From before the first step to behind the last collective operation.

        Args:
            timeout: seconds, ``training.ddp_timeout``.
        """
        self._moved = time.monotonic()
        watch = threading.Thread(
            target=self._watch, args=(timeout * _BEFORE_THE_ENGINE,), daemon=True
        )
        watch.start()
        try:
            yield
        finally:
            stop_watching(watch, self._ended)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._beat(state)

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._beat(state)

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._beat(state)

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._beat(state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._beat(state)

    def _beat(self, state: TrainerState) -> None:
        self._moved, self._step = time.monotonic(), state.global_step

    def _watch(self, patience: float) -> None:
        place, host = key("at", dist.get_rank()), socket.gethostname()
        for beat in count():
            # From here, so that who waits for others is told from who is gone.
            with suppress(Exception):  # the store may be gone with the first host
                _get_default_store().set(place, f"{self._step} {beat} {host}")
            if self._ended.wait(_BEAT):
                return
            if time.monotonic() - self._moved > patience:
                leave(
                    f"nothing has moved for {patience:.0f} s behind step {self._step}: "
                    f"{_slowest()}. training.ddp_timeout says how long is waited. To go on: "
                    f"{how_to_continue(self._folder)}"
                )


@contextmanager
def loss_told(folder: Path) -> Iterator[None]:
    """Turn an engine's error about other processes into one line with the way out.

    Raises:
        RunFailed: another process, or the network to it, is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not of_other_processes(error):
            raise
        end_by_itself()
        text = " ".join(str(error).split())
        why = word_of_others() or (
            f"another process no longer answers: {_slowest()} ({_shortened(text)})."
        )
        raise RunFailed(
            f"{why} What was saved before is whole. To go on: {how_to_continue(folder)}"
        ) from error


def _slowest() -> str:
    """Rank, host and step of those that are silent, or else of those that stand furthest back."""
    before = at_once(_beats, {})
    time.sleep(_SILENT)  # and not by the clock, which may be another on each host
    now = at_once(_beats, {})
    if not now:
        return "the first host, or the network to it, is gone too"
    silent = [
        f"rank {rank} on {host} is silent since step {step}"
        for rank, (step, beat, host) in sorted(now.items())
        # Of this process it may be the thread that beats which asks.
        if rank != dist.get_rank() and beat == before.get(rank, (step, beat, host))[1]
    ]
    least = min(step for step, _, _ in now.values())
    behind = [
        f"rank {rank} on {host} waits behind step {step}"
        for rank, (step, _, host) in sorted(now.items())
        if step == least
    ]
    return ", ".join(silent or behind)


def _beats() -> dict[int, tuple[int, str, str]]:
    """Of each rank that has begun its step, its latest beat and its host."""
    store, found = _get_default_store(), {}
    for rank in range(dist.get_world_size()):
        if store.check([key("at", rank)]):
            step, beat, host = store.get(key("at", rank)).decode().split(" ", 2)
            found[rank] = (int(step), beat, host)
    return found


def _shortened(text: str) -> str:
    """An engine's error without the place in its source."""
    return text.rpartition("] ")[2][:120] if text.startswith("[") else text[:120]
