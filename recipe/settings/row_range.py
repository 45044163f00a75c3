"""Ranges of rows as the config writes them: ``0:200``, ``200:``, ``:200``."""

import re

_RANGE = re.compile(r"([0-9]{0,15}):([0-9]{0,15})")


def row_range(text: str) -> tuple[int, int | None]:
    """First row and the row after the last one; None where the range has no end.

    Raises:
        ValueError: no range, an empty one, or one that counts from the end.
    """
    match = _RANGE.fullmatch(text)
    if match is None or text == ":":
        raise ValueError(f"{text!r} is no range of rows")
    first, last = match.groups()
    start, stop = int(first or 0), int(last) if last else None
    if stop is not None and stop <= start:
        raise ValueError(f"{text!r} holds no row")
    return start, stop


def overlap(one: str, other: str) -> bool:
    """Whether two ranges share a row."""
    (start, stop), (other_start, other_stop) = row_range(one), row_range(other)
    return (other_stop is None or start < other_stop) and (stop is None or other_start < stop)
