"""What hosts print, shortened to what a reader needs."""

import re
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from tests.hosts.launches import Part

_CHATTER = re.compile(
    r"epoch \d|.*socket\.cpp|.*real_accelerator|.*find_unused_parameters|.*elastic/|\s*$"
)
_PLACES = re.compile(r"^\[rank\d+\]: |\[/\S+\.cc:\d+\] ")
_TELLING = ("run ", "step ", "resumed ", "result ")
_WIDTH = 100


def telling(said: Sequence[str]) -> list[str]:
    """The lines that place a run and say how it ended."""
    return [line for line in said if line.startswith(_TELLING)]


def last_words(said: Sequence[str], count: int = 3) -> list[str]:
    """The last lines, a traceback as its last one, the launcher's summary left out."""
    kept: list[str] = []
    trace = summary = False
    for raw in said:
        line = _PLACES.sub("", raw)
        if re.fullmatch("=+", line):
            summary = not summary
        elif line.startswith("Traceback"):
            trace = True
        elif trace and not line.startswith(" "):
            trace = False
            kept.append(f"traceback, {line}")
        elif not (trace or summary or _CHATTER.match(line)):
            kept.append(line)
    return [line for line in kept if "ChildFailedError" not in line][-count:]


class Story:
    """Prints a line at a time, with the seconds since the start and who speaks."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._began = time.monotonic()

    def tell(self, line: str, who: str = "") -> None:
        line = line.replace(self._folder, "")
        head = f"{time.monotonic() - self._began:6.1f} s  {who:<5} {'|' if who else ' '} "
        for part in textwrap.wrap(line, _WIDTH, replace_whitespace=False, break_on_hyphens=False):
            print(head + part, flush=True)
            head = f"{'':<8}  {'':<5} {'|' if who else ' '} "

    def title(self, line: str) -> None:
        print(f"\n{line}", flush=True)

    def quote(self, part: Part, lines: Sequence[str]) -> None:
        for line in lines:
            self.tell(line, part.host.name)
        if not lines:
            self.tell("(warnings of the libraries, nothing else)", part.host.name)
