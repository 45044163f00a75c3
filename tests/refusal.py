"""What a refused command looks like: exit 2, one line a problem, no traceback, nothing written."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from recipe import train
from recipe.exit_codes import run_command
from recipe.settings import UserError

Listing = dict[str, tuple[int, int]]
Refused = Callable[[Sequence[str]], list[str]]


def listing(folder: Path) -> Listing:
    """Every file and folder below ``folder``, with size and time of change."""
    stats = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def refused(
    arguments: Sequence[str], capsys: pytest.CaptureFixture[str], folder: Path
) -> list[str]:
    """Run the training command, which must refuse; return what it said, a line a problem.

    Args:
        folder: everything that the command could write to.
    """
    before = listing(folder)
    capsys.readouterr()
    code = run_command(lambda: train.main(list(arguments)))
    said = capsys.readouterr()
    assert code == 2, said.err
    assert listing(folder) == before
    assert said.out == ""
    return whole_lines(said.err.removesuffix("\n"))


def problems(error: UserError) -> list[str]:
    """The lines of an error, as they would be printed: one for each of its problems."""
    lines = whole_lines(str(error))
    assert len(lines) == len(error.problems)
    return lines


def whole_lines(text: str) -> list[str]:
    lines = text.split("\n")
    for line in lines:
        assert line.isprintable(), repr(line)
        where, colon, message = line.partition(": ")
        assert where, line
        assert colon, line
        assert message.endswith((".", "?")), line
    assert "Traceback" not in text
    return lines
