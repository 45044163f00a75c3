"""How the paragraphs write their numbers, and how fast a series grows."""

from collections.abc import Sequence

import numpy as np

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def size(count: int) -> str:
    """``7.14 GiB``, ``450 KiB``, ``12 bytes``: three digits that count."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{three_digits(count / unit)} {name}"
    return f"{count} bytes"


def three_digits(value: float) -> str:
    """``0.0123``, ``4.56``, ``78.9``, ``1,234``."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:,.{digits}f}"


def percent(share: float) -> str:
    """``61.1%``, ``0.03%``, ``none``; what is not quite all does not look as if it were."""
    if share == 0:
        return "none"
    if 0.9995 <= share < 1:
        return "over 99.9%"
    return f"{share:.1%}" if share >= 0.001 else f"{100 * share:.1g}%"


def listed(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def growth_exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The p of y = c·x^p: the least-squares slope of log y over log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def power(exponent: float) -> str:
    """``n^0.48``; a constant is n^0.00, never n^-0.00."""
    return f"n^{round(exponent, 2) + 0.0:.2f}"
