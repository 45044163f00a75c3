"""What went wrong, in one line: where, what was found, what was expected, what to do."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SHOWN = 10


@dataclass(frozen=True)
class Problem:
    """One mistake. ``where`` is a file, a key or an override; ``message`` is one line."""

    where: str
    message: str

    def __str__(self) -> str:
        return "".join(map(_printable, f"{self.where}: {self.message}"))


def _printable(letter: str) -> str:
    """A line end in a file's or a column's name, say, must not break the line."""
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")


class UserError(Exception):
    """The user can put it right and nothing has been changed. Commands print it and exit with 2."""

    problems: tuple[Problem, ...]
    told_here = True  # not by each of several processes

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    @classmethod
    def single(cls, where: str, message: str) -> "UserError":
        """The usual case: one problem."""
        return cls([Problem(where, message)])

    @classmethod
    def first_of(cls, problems: Sequence[Problem]) -> "UserError":
        """Of rows there can be thousands: the first ten are told, and how many there are."""
        if len(problems) <= _SHOWN:
            return cls(problems)
        rest = Problem("and", f"{len(problems) - _SHOWN} more of {len(problems)} in all.")
        return cls([*problems[:_SHOWN], rest])

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class RunFailed(Exception):
    """It ran, and the answer is no. Commands print the message and exit with 3."""


class Stopped(Exception):
    """A signal ended it, and what was earned is saved. Commands print the message and exit with 128
    and the signal's number.
    """

    def __init__(self, message: str, *, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(message)
