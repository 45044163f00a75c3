"""Curves as inline SVG without a library: loss by step, perplexity by epoch, and intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipe.judging.page_figures import compact
from recipe.judging.page_markup import Markup, element

_WIDTH, _HEIGHT = 480, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 392, 44, 246
# Room for two lines of text at the larger size that phones get.
_LINE = 19
# A range wider than this is drawn by its logarithm.
_WIDE = 20

SERIES = {"seen": "seen", "unseen": "held out", "neutral": "neutral"}


@dataclass(frozen=True)
class Scale:
    """Values to pixels, in proportion or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False
    whole: bool = False
    """Whether its ticks are whole numbers."""

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """At most seven round values within the range."""
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1,)):
                marks = [step * 10.0**decade for decade in decades for step in steps]
                inside = [mark for mark in marks if self.low <= mark <= self.high]
                if len(inside) <= 7:
                    return inside
            return inside[:: math.ceil(len(inside) / 7)]
        if self.high <= self.low:
            return [self.low]
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough * 0.999)
        if self.whole:
            step = max(1.0, step)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _upright(values: Sequence[float]) -> Scale:
    """From zero where the values allow, so that a small change looks small."""
    low, high = min(values), max(values)
    if low > 0 and high > _WIDE * low:
        return Scale(low * 0.8, high * 1.25, _BOTTOM, _TOP, logarithmic=True)
    return Scale(min(0.0, low * 1.05), max(high * 1.05, 1e-9), _BOTTOM, _TOP)


def loss_chart(losses: Sequence[Mapping[str, Any]], *, turned: float | None) -> Markup | None:
    """The loss of each step, and the mean of each epoch; None without any."""
    told = [one for one in losses if _is_number(one["loss"])]
    if not told:
        return None
    end = max(one["step"] for one in told)
    across = Scale(0, end, _LEFT, _RIGHT, whole=True)
    upward = _upright([one["loss"] for one in told])
    points = [(across(one["step"]), upward(one["loss"])) for one in told]
    means = _means(told)
    middle = [(across(step), upward(loss)) for step, loss in means]
    first, last = (compact(loss) for _, loss in (means[0], means[-1]))
    parts = [
        *_axes(across, upward, "step", "loss, nats a trained token"),
        *_turn(turned, across, _step_of(told, turned)),
        _line(points, "line steps"),
        _line(middle, "line means"),
        *[_marker("circle", x, y, "means") for x, y in middle],
        *_names({"mean": middle[-1][1]}, {"mean": "means"}),
    ]
    described = f"{len(told)} steps. The mean of the first epoch is {first}, of the last {last}."
    return _svg("loss", "Training loss by step", described, parts)


def _means(losses: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Of each epoch: its last step and its mean loss."""
    epochs: dict[int, list[Mapping[str, Any]]] = {}
    for one in losses:
        epochs.setdefault(math.ceil(one["epoch"] - 1e-9), []).append(one)
    return [
        (each[-1]["step"], math.fsum(one["loss"] for one in each) / len(each))
        for each in epochs.values()
    ]


def _step_of(losses: Sequence[Mapping[str, Any]], epoch: float | None) -> float:
    steps = {one["epoch"]: float(one["step"]) for one in losses}
    until = [at for at in steps if epoch is not None and at <= epoch + 1e-9]
    return steps[max(until)] if until else float(losses[0]["step"])


def perplexity_chart(epochs: Sequence[Mapping[str, Any]], *, turned: float | None) -> Markup | None:
    """Of seen, held-out and neutral text after each epoch; None without any."""
    lines = {
        key: [(one["epoch"], one[key]) for one in epochs if _is_number(one.get(key))]
        for key in SERIES
    }
    lines = {key: line for key, line in lines.items() if line}
    if not lines:
        return None
    times = [one["epoch"] for one in epochs]
    across = Scale(min(times), max(times), _LEFT, _RIGHT, whole=max(times) - min(times) >= 1)
    upward = _upright([value for line in lines.values() for _, value in line])
    scaled = " (logarithmic)" if upward.logarithmic else ""
    parts = [
        *_axes(across, upward, "epoch", f"perplexity{scaled}"),
        *_turn(turned, across, turned or 0.0),
    ]
    ends, described = {}, []
    for key, line in lines.items():
        points = [(across(epoch), upward(value)) for epoch, value in line]
        parts.append(_line(points, f"line {key}"))
        for (x, y), (epoch, value) in zip(points, line, strict=True):
            parts.append(_marker(key, x, y, key, f"epoch {epoch:g}: {compact(value)}"))
        ends[SERIES[key]] = points[-1][1]
        described.append(f"{SERIES[key]} {compact(line[0][1])} to {compact(line[-1][1])}")
    parts += _names(ends, {name: key for key, name in SERIES.items()})
    if turned is not None:
        described.append(turn_text(turned))
    return _svg("perplexity", "Perplexity by epoch", "; ".join(described) + ".", parts)


def turn_text(turned: float) -> str:
    """What is said of the epoch after which a model memorises."""
    return f"memorises after epoch {turned:g}" if turned else "memorises from the start"


def _svg(name: str, title: str, described: str, parts: Sequence[Markup]) -> Markup:
    return element(
        "svg",
        element("title", title, id=f"{name}-svg-title"),
        element("desc", described, id=f"{name}-svg-desc"),
        *parts,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        class_="chart",
        aria_labelledby=f"{name}-svg-title",
        aria_describedby=f"{name}-svg-desc",
    )


def _axes(across: Scale, upward: Scale, below: str, above: str) -> list[Markup]:
    parts = [element("text", above, x=4, y=14, class_="axis")]
    for tick in upward.ticks():
        y = upward(tick)
        parts.append(element("line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, class_="grid"))
        label = f"{tick:,.4g}" if tick < 1e5 else f"{tick:.0e}"
        parts.append(element("text", label, x=_LEFT - 7, y=y + 4, text_anchor="end"))
    for tick in across.ticks():
        label = f"{tick:g}"
        parts.append(element("text", label, x=across(tick), y=_BOTTOM + 20, text_anchor="middle"))
    middle = (_LEFT + _RIGHT) / 2
    parts.append(element("line", x1=_LEFT, x2=_RIGHT, y1=_BOTTOM, y2=_BOTTOM, class_="base-line"))
    parts.append(element("text", below, x=middle, y=_HEIGHT - 4, text_anchor="middle"))
    return parts


def _turn(turned: float | None, across: Scale, at: float) -> list[Markup]:
    if turned is None:
        return []
    x = min(max(across(at), _LEFT), _RIGHT)
    late = x > (_LEFT + _RIGHT) / 2
    place = {"x": x - 6 if late else x + 6, "y": _TOP - 8}
    return [
        element("line", x1=x, x2=x, y1=_TOP - 20, y2=_BOTTOM, class_="turn"),
        element(
            "text",
            turn_text(turned),
            **place,
            text_anchor="end" if late else "start",
            class_="turn-text",
        ),
    ]


def _line(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    return element("polyline", points=" ".join(f"{x},{y}" for x, y in points), class_=class_)


def _marker(shape: str, x: float, y: float, class_: str, title: str | None = None) -> Markup:
    """A circle; a square for held-out rows and a diamond for neutral text."""
    named = element("title", title) if title else None
    class_ = f"marker {class_}"
    if shape == "unseen":
        return element("rect", named, x=x - 4, y=y - 4, width=8, height=8, class_=class_)
    if shape == "neutral":
        path = f"M{x} {y - 5.5}L{x + 5.5} {y}L{x} {y + 5.5}L{x - 5.5} {y}Z"
        return element("path", named, d=path, class_=class_)
    return element(
        "circle", named, cx=x, cy=y, r=4 if class_ in ("base", "tuned") else 4.5, class_=class_
    )


def _names(ends: Mapping[str, float], classes: Mapping[str, str]) -> list[Markup]:
    """Each line's name where it ends; names that would lie on each other are moved apart."""
    parts, lowest = [], -math.inf
    spread = []
    for name, y in sorted(ends.items(), key=lambda item: item[1]):
        lowest = max(y, lowest + _LINE)
        spread.append((name, lowest))
    excess = max(0.0, lowest - _BOTTOM)
    for name, y in spread:
        class_ = f"name {classes[name]}"
        parts.append(
            element("text", name, x=_RIGHT + 11, y=round(y - excess + 4, 1), class_=class_)
        )
    return parts


def interval_chart(figures: Sequence[Mapping[str, Any] | None], *, top: float | None) -> Markup:
    """Base above tuned on one line from zero, each a mark within its interval.

    Args:
        top: the right end; None for the largest of what is shown.
    """
    told = [one if one and _is_number(one["value"]) else None for one in figures]
    values = [
        one[key] for one in told if one for key in ("value", "high") if _is_number(one.get(key))
    ]
    across = Scale(0.0, top or max([*values, 1e-9]) * 1.02, 5, 131)
    parts = [element("line", x1=5, x2=5, y1=2, y2=26, class_="grid")]
    for one, y, class_ in zip(told, (8, 20), ("base", "tuned"), strict=True):
        if one is None:
            continue
        if _is_number(one.get("low")) and _is_number(one.get("high")):
            ends = {"x1": across(one["low"]), "x2": across(one["high"])}
            parts.append(element("line", **ends, y1=y, y2=y, class_=f"whisker {class_}"))
        parts.append(_marker("circle", across(one["value"]), y, class_))
    return element("svg", *parts, viewBox="0 0 136 28", class_="intervals", aria_hidden="true")
