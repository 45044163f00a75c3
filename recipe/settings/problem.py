"""What went wrong, in one line: where, what was found, what was expected, what to do."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake. ``where`` is a file, a key or an override; ``message`` is one line."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class UserError(Exception):
    """The user can put it right and nothing has been changed. Commands print it and exit with 2."""

    problems: tuple[Problem, ...]

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    @classmethod
    def single(cls, where: str, message: str) -> "UserError":
        """The usual case: one problem."""
        return cls([Problem(where, message)])

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class RunFailed(Exception):
    """It ran, and the answer is no. Commands print the message and exit with 3."""
