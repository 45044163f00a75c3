"""How all figures of the lessons look; pyplot, which keeps global state, is not imported."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito 2008, without the yellow that vanishes on white; markers and dashes tell what
# colours do not.
_STYLES = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    {"color": "#000000", "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
)


def panels(count: int, *, title: str) -> tuple[Figure, Sequence[Any]]:
    """A figure of 900 by 460 pixels with ``count`` axes side by side."""
    figure = Figure(figsize=(9, 4.6), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def line(
    axes: Any, x: Sequence[float], y: Sequence[float], *, label: str, style: int, **other: Any
) -> None:
    """One measured series, in the colour, marker and dashes of number ``style``."""
    look = {**_STYLES[style % len(_STYLES)], "markersize": 5, "linewidth": 1.5}
    axes.plot(x, y, label=label, **{**look, **other})


def closed_form(axes: Any, x: Sequence[float], y: Sequence[float], *, label: str | None) -> None:
    """What theory says, as a broad grey line below the measured series."""
    axes.plot(x, y, label=label, color="#bbbbbb", linewidth=5, solid_capstyle="round", zorder=1)


def log2_ticks(axes: Any, values: Sequence[float], *, as_powers: bool = False) -> None:
    """An x axis that doubles, with a tick at each of ``values``."""
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    labels = [
        f"$2^{{{round(math.log2(value))}}}$" if as_powers else f"{value:,}" for value in values
    ]
    axes.set_xticks(values, labels)


def finish(axes: Any, *, x: str, y: str, title: str, legend: Any = None) -> None:
    """Labels with their units, a grid, and a legend there, as ``loc`` of matplotlib."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if legend is not None:
        axes.legend(fontsize=8, loc=legend)


def legend_below(figure: Figure, axes: Any, *, columns: int) -> None:
    """The legend of ``axes`` below all of them, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
