"""Where a run is killed: the instants, how they are drawn, and the hand that waits for them."""

import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults.board import Board
from tests.faults.jobs import Job


@dataclass(frozen=True)
class Measured:
    """Of a run that nobody killed: from the first step to the end of the last, and by phase."""

    seconds: float
    entries: dict[str, int]
    mean_seconds: dict[str, float]
    operations: dict[str, int]

    @classmethod
    def of(cls, board: Board) -> "Measured":
        phases = ("between", "save", "evaluation", "adapter")
        return cls(
            board.trained_seconds,
            {phase: board.entries(phase) for phase in phases},
            {phase: board.mean_seconds(phase) for phase in phases},
            {phase: board.most_operations(phase) for phase in phases},
        )


@dataclass(frozen=True)
class Aim:
    """An instant of a run.

    ``phase`` None: ``fraction`` of the training seconds behind the first step. ``operation`` None:
    ``fraction`` of the phase's mean seconds behind its ``entry``-th entry. Otherwise the run waits
    where it enters the phase (0), or just before its n-th touch of the disk there.
    """

    phase: str | None
    entry: int = 1
    fraction: float = 0.0
    operation: int | None = None

    def __str__(self) -> str:
        if self.phase is None:
            return f"{self.fraction:.3f} of the training time"
        where = f"{self.phase} {self.entry}"
        if self.operation is not None:
            return f"{where}, disk {self.operation}" if self.operation else where
        return f"{where} + {self.fraction:.2f} of its time"

    @property
    def hold(self) -> tuple[str, int, int] | None:
        if self.phase is None or self.operation is None:
            return None
        return self.phase, self.entry, self.operation


def draw(chance: random.Random, measured: Measured, *, left: float = 1.0) -> Aim:
    """Any instant of a run, more than half of them in saves.

    Args:
        left: of a resumed run, how much of the whole is to come, about.
    """
    kinds = {"save": 50, "time": 22, "between": 10, "evaluation": 14, "adapter": 8}
    possible = [kind for kind in kinds if kind == "time" or measured.entries[kind]]
    (kind,) = chance.choices(possible, [kinds[kind] for kind in possible])
    if kind == "time":
        return Aim(None, fraction=chance.random() * left)
    # The first evaluation is before the first step.
    lowest = 2 if kind == "evaluation" else 1
    entry = chance.randint(lowest, max(lowest, int(measured.entries[kind] * left)))
    if kind == "between":  # too short to be hit from outside
        return Aim(kind, entry, operation=0)
    operations = measured.operations[kind]
    if operations and chance.random() < 0.5:
        return Aim(kind, entry, operation=chance.randint(1, operations))
    return Aim(kind, entry, fraction=chance.random())


def strike(jobs: Sequence[Job], aim: Aim, *, measured: Measured) -> str | None:
    """Kill all ``jobs`` of one run at the instant; the phase of the first then, None if too late.

    The run was started with the aim's ``hold``.
    """
    first = jobs[0]
    if aim.hold:
        if not first.wait_until_held():
            return None
    elif not _wait(first, aim, measured=measured):
        return None
    for job in jobs:
        job.signal(signal.SIGKILL)
    for job in jobs:
        job.wait()
    return first.board.phase


def _wait(job: Job, aim: Aim, *, measured: Measured) -> bool:
    while True:
        if aim.phase is None:
            begun, span = job.board.first, measured.seconds
        else:
            there = job.board.entries(aim.phase) >= aim.entry
            begun = job.board.entered(aim.phase) if there else 0.0
            span = measured.mean_seconds[aim.phase]
        left = begun + aim.fraction * span - time.monotonic()
        if begun and left <= 0:
            return not job.ended(0)
        if job.ended(min(left, 0.0005) if begun else 0.0005):
            return False
