"""What was found of one claim, as a line of the screen and as a record of the JSON file."""

import math
from dataclasses import asdict, dataclass
from typing import Any

_CLAIM, _NUMBER = 47, 11
HEADING = f"{'claim':<{_CLAIM}}{'measured':>{_NUMBER}}{'tolerance':>{_NUMBER}}"


@dataclass(frozen=True)
class Finding:
    """``measured`` must not be above ``tolerance``: relative differences are floats, counts ints.

    ``passed`` is None where the claim is not applicable, and ``note`` then holds the reason;
    otherwise what was compared, or why it failed. ``measured`` is None where nothing could be.
    """

    claim: str
    measured: float | None
    tolerance: float | None
    passed: bool | None
    note: str

    @property
    def line(self) -> str:
        """One line in the columns of ``HEADING``."""
        if self.passed is None:
            verdict = f"not applicable: {self.note}"
        else:
            verdict = f"{'pass' if self.passed else 'FAIL'}  {self.note}"
        numbers = "".join(f"{number(n):>{_NUMBER}}" for n in (self.measured, self.tolerance))
        return f"{self.claim:<{_CLAIM}}{numbers}  {verdict}".rstrip()

    def record(self) -> dict[str, Any]:
        """For JSON, which knows neither NaN nor infinity: those are text."""
        return {name: _as_json(value) for name, value in asdict(self).items()}


def compared(claim: str, measured: float, *, tolerance: float, note: str) -> Finding:
    """Passed if ``measured`` is at most ``tolerance``; NaN is not."""
    return Finding(claim, measured, tolerance, measured <= tolerance, note)


def not_applicable(claim: str, reason: str) -> Finding:
    """Nothing was compared."""
    return Finding(claim, None, None, None, reason)


def number(value: float | None) -> str:
    """A count as it is, a difference with two digits, nothing as a dash."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return str(value) if isinstance(value, int) else f"{value:.1e}"


def _as_json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
