"""The table of figures: base beside tuned for each part, with intervals and what was tested."""

import math
from collections.abc import Mapping
from typing import Any

from recipe.judging.page_chart import interval_chart
from recipe.judging.page_figures import (
    DASH,
    FIGURES,
    PARTS,
    Figure,
    compact,
    minus,
    p_text,
    value_of,
)
from recipe.judging.page_markup import Markup, element, joined, scrolling_table

# Differences with a smaller p are bold.
_SURE = 0.05
_UNITS = {"nll": " nats a token", "rougeL": ""}


def figures_table(parts: Mapping[str, Any]) -> Markup:
    """A group of rows for each part, in it those figures that base or tuned model has."""
    bodies = [_part(name, parts[name]) for name in PARTS if parts.get(name)]
    if not bodies:
        return element("p", "Nothing was measured.", class_="note")
    return scrolling_table(
        "Figures of base and tuned model",
        ["Figure", "Base", "Tuned", "Tuned minus base", "From zero"],
        bodies,
        name="figures",
        class_="figures",
    )


def _part(name: str, part: Mapping[str, Any]) -> Markup:
    units = {"rows": "row" if name != "neutral" else "window", "tokens": "token"}
    counts = [
        f"{part[key]:,} {unit}{'' if part[key] == 1 else 's'}"
        for key, unit in units.items()
        if part.get(key) is not None
    ]
    heading = joined([PARTS[name], element("span", ", ".join(counts))], " ")
    head = element("tr", element("th", heading, colspan=5, scope="rowgroup"), class_="part")
    shown = [
        figure
        for figure in FIGURES
        if figure.name in (part.get("base") or {}) or figure.name in (part.get("tuned") or {})
    ]
    return element("tbody", head, *[_row(figure, part) for figure in shown])


def _row(figure: Figure, part: Mapping[str, Any]) -> Markup:
    both = [(part.get(model) or {}).get(figure.name) for model in ("base", "tuned")]
    top = None if figure.form == "number" else 1.0
    return element(
        "tr",
        element("th", figure.label, scope="row"),
        *[element("td", _value(figure, one)) for one in both],
        element("td", _difference(figure, part)),
        element("td", interval_chart(both, top=top)),
    )


def _value(figure: Figure, found: Mapping[str, Any] | None) -> Markup:
    """The value, and its interval under it."""
    found = found or {}
    low, high = found.get("low"), found.get("high")
    interval = None
    if low is not None and high is not None:
        interval = element("small", f"{figure.text(low)} to {figure.text(high)}")
    return joined([figure.text(found.get("value")), interval or ""])


def _difference(figure: Figure, part: Mapping[str, Any]) -> Markup:
    """What was tested, in bold where p says that it is no chance; else a plain subtraction."""
    tested = (part.get("difference") or {}).get(figure.tested) if figure.tested else None
    if not tested or tested.get("value") is None:
        values = [value_of(part, model, figure.name) for model in ("base", "tuned")]
        return element("span", figure.difference(*values), class_="untested")
    low, high = tested.get("low"), tested.get("high")
    value = _signed(tested["value"]) + _UNITS[str(figure.tested)]
    p = tested.get("p")
    found = [p_text(p)]
    if low is not None and high is not None:
        found.insert(0, f"{_signed(low)} to {_signed(high)}")
    return joined(
        [
            element("strong", value) if p is not None and p < _SURE else value,
            element("small", ", ".join(filter(None, found))),
        ]
    )


def _signed(value: float) -> str:
    if not math.isfinite(value):
        return DASH
    return minus(f"{value:+.3f}") if abs(value) < 1000 else compact(value)
