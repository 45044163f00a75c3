"""What a run is doing this moment, in memory that another process reads and that outlives a kill.

The board is a file of doubles, mapped by the run and by whoever kills it: the phase, how often each
was entered and since when, and where the run is to wait for its end.
"""

import mmap
import time
from pathlib import Path

PHASES = ("other", "step", "between", "save", "evaluation", "adapter")

_PHASE, _SINCE, _STEPS, _FIRST, _LAST, _HELD = range(6)
_HOLD_PHASE, _HOLD_ENTRY, _HOLD_OPERATION = range(6, 9)
_PER_PHASE = 9
# Of each phase, from _PER_PHASE on.
_ENTRIES, _ENTERED, _SECONDS, _OPERATIONS, _MOST_OPERATIONS = range(5)
_WIDTH = 5
_DOUBLES = _PER_PHASE + _WIDTH * len(PHASES)


class Board:
    """One run's board; times are those of CLOCK_MONOTONIC, which all processes share."""

    def __init__(self, file: Path) -> None:
        if not file.exists():
            file.write_bytes(bytes(8 * _DOUBLES))
        with file.open("r+b") as stream:
            self._map = mmap.mmap(stream.fileno(), 8 * _DOUBLES)
        self._values = memoryview(self._map).cast("d")

    # What the run writes.

    def turn(self, phase: str, *, enters: bool = True) -> str:
        """Say that ``phase`` is on from now; return the one before, to ``turn`` back to."""
        now, before = time.monotonic(), self.phase
        self._values[self._at(before, _SECONDS)] += now - self._values[_SINCE]
        self._values[_SINCE] = now
        if enters:
            self._values[self._at(phase, _OPERATIONS)] = 0
            self._values[self._at(phase, _ENTRIES)] += 1
            self._values[self._at(phase, _ENTERED)] = now
        self._values[_PHASE] = PHASES.index(phase)
        if enters:
            self._wait_if_held(operation=0)
        return before

    def operate(self) -> None:
        """Say that the phase is about to touch the disk."""
        now, most = (self._at(self.phase, at) for at in (_OPERATIONS, _MOST_OPERATIONS))
        self._values[now] += 1
        self._values[most] = max(self._values[most], self._values[now])
        self._wait_if_held(operation=int(self._values[now]))

    def begin_step(self) -> None:
        self._values[_FIRST] = self._values[_FIRST] or time.monotonic()

    def end_step(self) -> None:
        self._values[_STEPS] += 1
        self._values[_LAST] = time.monotonic()

    def _wait_if_held(self, *, operation: int) -> None:
        here = (PHASES.index(self.phase) + 1, self.entries(self.phase), operation)
        if here != tuple(map(int, self._values[_HOLD_PHASE:_PER_PHASE])):
            return
        self._values[_HELD] = 1
        while self._values[_HOLD_PHASE]:
            time.sleep(0.001)
        self._values[_HELD] = 0

    # What the killer reads and writes.

    @property
    def phase(self) -> str:
        return PHASES[int(self._values[_PHASE])]

    @property
    def steps(self) -> int:
        return int(self._values[_STEPS])

    @property
    def first(self) -> float:
        """When the first step began; 0 before."""
        return self._values[_FIRST]

    @property
    def trained_seconds(self) -> float:
        return self._values[_LAST] - self._values[_FIRST]

    @property
    def held(self) -> bool:
        return bool(self._values[_HELD])

    def entries(self, phase: str) -> int:
        return int(self._values[self._at(phase, _ENTRIES)])

    def entered(self, phase: str) -> float:
        """When ``phase`` was entered last."""
        return self._values[self._at(phase, _ENTERED)]

    def mean_seconds(self, phase: str) -> float:
        return self._values[self._at(phase, _SECONDS)] / max(self.entries(phase), 1)

    def most_operations(self, phase: str) -> int:
        return int(self._values[self._at(phase, _MOST_OPERATIONS)])

    def hold(self, phase: str, entry: int, operation: int = 0) -> None:
        """Let the run wait where it enters ``phase`` for the ``entry``-th time, or before its
        ``operation``-th touch of the disk there."""
        self._values[_HOLD_ENTRY], self._values[_HOLD_OPERATION] = entry, operation
        self._values[_HOLD_PHASE] = PHASES.index(phase) + 1

    def release(self) -> None:
        self._values[_HOLD_PHASE] = 0

    @staticmethod
    def _at(phase: str, field: int) -> int:
        return _PER_PHASE + _WIDTH * PHASES.index(phase) + field
