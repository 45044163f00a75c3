"""SIGTERM, SIGUSR1 and Ctrl-C: the step is finished and saved, and the run ends where it can go on.

transformers' own (``enable_jit_checkpoint``) saves inside a step and exits with 0, as if the run
had come to its end.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipe.settings import Stopped
from recipe.training.faults import how_to_continue
from recipe.training.loss import distributed

_LAUNCHERS = ("accelerate", "torchrun")
_LAUNCHER_MODULES = ("accelerate.commands", "torch.distributed")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopOnSignal(TrainerCallback):
    """Between ``listening``'s begin and end, a signal asks for a checkpoint behind the step that
    runs, and for no further step. A Ctrl-C after it stops at once.

    Raises:
        Stopped: once that checkpoint is whole; on every process, at the same step.
    """

    def __init__(self) -> None:
        self._received = 0
        self._agreed = 0
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Only a main thread hears signals; where SIGINT is ignored, as in a shell's background, it
        stays so.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [
            number
            for number in (signal.SIGTERM, signal.SIGINT)
            if signal.getsignal(number) is not signal.SIG_IGN
        ]
        # SLURM's warning before the time is up; what starts this process may ignore it.
        heard.append(signal.SIGUSR1)
        before = {number: signal.signal(number, self._hear) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker, which inherits this
            return
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._received and os.environ.get("RANK", "0") == "0":
            said = "finishing the step and saving; Ctrl-C stops at once, unsaved"
            with suppress(OSError):  # a terminal's Ctrl-C kills what reads the screen, too
                os.write(2, f"\n{signal.Signals(number).name}: {said}\n".encode())
        self._received = self._received or number

    def stop_if_received(self, finished: str) -> None:
        """For a signal behind the last step, which nothing was left to do about.

        Raises:
            Stopped: saying what is ``finished``.
        """
        if self._received:
            name = signal.Signals(self._received).name
            raise Stopped(
                f"{name} came behind the last step. {finished}", signal_number=self._received
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._agreed = self._received
        if distributed():  # they hear it at different steps
            heard = torch.tensor(self._received, device=args.device)
            dist.all_reduce(heard, op=dist.ReduceOp.MAX)
            self._agreed = int(heard)
        if self._agreed:
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._agreed:
            if distributed():  # who ends first makes the launcher end the others, sealed or not
                dist.barrier()
            said = (
                f"stopped by {signal.Signals(self._agreed).name} after step {state.global_step} of "
                f"{state.max_steps}, and saved. To go on: {how_to_continue(Path(args.output_dir))}"
            )
            raise Stopped(said if state.is_world_process_zero else "", signal_number=self._agreed)


def quiet_worker(initialise: Callable[[int], None] | None, worker_id: int) -> None:
    """``worker_init_fn`` of a data loader: signals to a whole group of processes are the trainer's
    affair. Without its workers it could not finish the step, nor an evaluation before it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _unless_alone
    if initialise:
        initialise(worker_id)


def _unless_alone(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What a worker computes goes to the trainer, errors too; but its thread that hands tensors
    over would print when nobody takes them any more.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def kill_workers() -> None:
    """At exit: multiprocessing would send a SIGTERM and wait for those who do not hear it."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def follow_launcher() -> None:
    """Get a SIGTERM when the launcher that started this process dies.

    A SIGTERM to ``accelerate launch`` kills the launcher alone, and the training goes on as an
    orphan. Linux only; elsewhere nothing is changed.
    """
    parent = os.getppid()
    if sys.platform != "linux" or not _is_launcher(parent):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(pid: int) -> bool:
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    return any(
        Path(word).name in _LAUNCHERS or word.startswith(_LAUNCHER_MODULES) for word in words[:4]
    )
