"""What ``inspect_adapter`` found: a table, a few sentences, JSON and a picture."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window, no display
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

from recipe.sharing.inspection import PERCENTS, ModuleChange

# Okabe and Ito 2008, without the yellow that vanishes on white. Markers tell what colours do not.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX*"
_NAMED = 3  # modules that a sentence names before it counts


def by_kind(changes: Sequence[ModuleChange]) -> dict[str, list[ModuleChange]]:
    """The modules of each kind, in the order in which the model first has them."""
    kinds: dict[str, list[ModuleChange]] = {}
    for change in changes:
        kinds.setdefault(change.kind, []).append(change)
    return kinds


def table(changes: Sequence[ModuleChange], *, each_layer: bool = False) -> list[str]:
    """A line for each kind and, with ``each_layer``, one for each module after them."""
    rows = [
        ["kind", "modules", "r", "mean change", "largest", "in layer", "effective rank"]
        + [f"rank for {percent} %" for percent in PERCENTS]
    ]
    for kind, members in by_kind(changes).items():
        top = _largest(members)
        rows.append(
            [kind, str(len(members)), _span(members), percent_text(_mean_ratio(members))]
            + [percent_text(top.ratio), "–" if top.layer is None else str(top.layer)]
            + [f"{_mean_effective(members):.1f}"]
            + [str(max(change.rank_for[percent] for change in members)) for percent in PERCENTS]
        )
    lines = _aligned(rows)
    lines.append(
        "change: ||W' - W|| / ||W||. Effective rank: the mean of the kind. Rank for 95 %: what "
        "keeps 95 % of the energy in each module of the kind."
    )
    if each_layer:
        head = ["module", "method", "r", "change", "numerical rank", "effective rank"]
        rows = [head + [f"rank for {percent} %" for percent in PERCENTS]]
        rows += [
            [change.name, change.method, _span([change]), percent_text(change.ratio)]
            + [str(change.rank), f"{change.effective_rank:.1f}"]
            + [str(change.rank_for[percent]) for percent in PERCENTS]
            for change in changes
        ]
        lines += ["", *_aligned(rows)]
    return lines


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns two spaces apart; the first is flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def percent_text(ratio: float) -> str:
    """Three digits that count: ``1.83 %``, ``0.00042 %``, ``240 %``."""
    if not math.isfinite(ratio):
        return "from zero"
    hundred = 100 * ratio
    if hundred == 0:
        return "0 %"
    digits = max(0, 2 - math.floor(math.log10(hundred)))
    return f"{hundred:.{digits}f} %" if digits < 8 else f"{hundred:.1e} %"


def _span(changes: Sequence[ModuleChange]) -> str:
    """``16``, or ``8–16``."""
    ranks = sorted({change.r for change in changes if change.r is not None})
    return "–".join(map(str, dict.fromkeys(ranks[:1] + ranks[-1:]))) if ranks else "–"


def _largest(changes: Sequence[ModuleChange]) -> ModuleChange:
    return max(changes, key=lambda change: change.ratio)


def _mean_ratio(changes: Sequence[ModuleChange]) -> float:
    return fmean(change.ratio for change in changes)


def _mean_effective(changes: Sequence[ModuleChange]) -> float:
    """Of those that have directions at all."""
    return fmean([change.effective_rank for change in changes if change.rank] or [0.0])


def in_words(changes: Sequence[ModuleChange]) -> list[str]:
    """Two to four paragraphs of plain words: how much, in how many directions, what to do."""
    if not changes:
        return ["The adapter changes no module.", "There is nothing to measure."]
    still = [change for change in changes if change.unchanged]
    moved = [change for change in changes if not change.unchanged]
    if not moved:
        return [
            f"The adapter changes nothing: the change is zero in {_names(still)}.",
            "A fresh adapter is like this, and one whose learning rate was 0 in every step.",
        ]
    top = _largest(moved)
    size = (
        "is from zero"
        if math.isinf(top.ratio)
        else f"is {percent_text(top.ratio)} of the size of the weights"
    )
    mean = percent_text(_mean_ratio(changes))
    words = [
        f"The adapter changes {len(moved)} of {len(changes)} matrices. The change is largest in "
        f"{_place(top)}, where it {size}; the mean of all is {mean}."
    ]
    low_rank = [change for change in moved if change.r is not None and change.rank]
    if low_rank:
        words += [_energy_words(low_rank), _advice(low_rank)]
    if remarks := " ".join(_remarks(moved, still)):
        words.append(remarks)
    return words if len(words) > 1 else [*words, "Nothing more can be said of its rank."]


def _names(changes: Sequence[ModuleChange]) -> str:
    names = [change.name for change in changes]
    if len(names) > _NAMED + 1:
        names = [*names[:_NAMED], f"{len(names) - _NAMED} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _place(change: ModuleChange) -> str:
    return change.name if change.layer is None else f"{change.kind} of layer {change.layer}"


def _energy_words(changes: Sequence[ModuleChange]) -> str:
    needs = [change.rank_for[95] for change in changes]
    most = max(needs)
    return (
        f"Rank {most} keeps at least 95 % of the change's energy (the sum of its squared singular "
        f"values) in every module, and rank {fmean(needs):.1f} on average; r is {_span(changes)}."
    )


def _advice(changes: Sequence[ModuleChange]) -> str:
    """What the spectra say of r: only ever that less would do, as more was not tried."""
    full = max(change.r or 0 for change in changes)
    need = max(change.rank_for[99] for change in changes)
    caution = "whether the answers stay as good, only an evaluation shows"
    if full == 1:
        return "r is 1, the lowest there is."
    if need < full:
        return (
            f"r could be lowered from {full} to {need} and at least 99 % of the energy would be "
            f"kept in every module; {caution}."
        )
    used = [change for change in changes if change.rank_for[99] == change.r]
    effective = f"effective rank {_mean_effective(used):.1f} of {_span(used)} on average"
    if fmean(change.effective_rank / (change.r or 1) for change in used) >= 0.75:
        says = f"the singular values are nearly even ({effective}), so r is used to the full"
    else:
        says = f"the last directions are small but count ({effective})"
    text = f"In {len(used)} of {len(changes)} modules 99 % of the energy takes all of r: {says}."
    if rest := [change for change in changes if change.rank_for[99] != change.r]:
        least = max(change.rank_for[99] for change in rest)
        return text + f" In the others rank {least} keeps 99 % (lora.rank_pattern); {caution}."
    return text + " That does not show that a higher r would help."


def _remarks(moved: Sequence[ModuleChange], still: Sequence[ModuleChange]) -> Iterator[str]:
    if still:
        yield f"The change is zero in {_names(still)}."
    if any(change.method == "DoRA" for change in moved):
        yield (
            "With DoRA the size of a change counts the rescaled weights too; the ranks are those "
            "of (alpha/r)·B·A alone."
        )
    for method, how in (("whole", "was trained whole"), ("tokens", "had rows trained")):
        for change in [change for change in moved if change.method == method][:_NAMED]:
            yield (
                f"{change.name} {how} and changed by {percent_text(change.ratio)}; rank "
                f"{change.rank_for[95]} of {len(change.singular_values)} keeps 95 % of that."
            )


def as_json(changes: Sequence[ModuleChange]) -> dict[str, Any]:
    """For ``json.dumps(..., allow_nan=False)``: ``modules`` and ``kinds``, each a list.

    A ratio that is infinite is null.
    """
    return {
        "modules": [
            {
                "name": change.name,
                "layer": change.layer,
                "kind": change.kind,
                "method": change.method,
                "shape": list(change.shape),
                "r": change.r,
                "ratio": _finite(change.ratio),
                "rank": change.rank,
                "effective_rank": change.effective_rank,
                "rank_for": {str(percent): rank for percent, rank in change.rank_for.items()},
                "singular_values": list(change.singular_values),
            }
            for change in changes
        ],
        "kinds": [
            {
                "kind": kind,
                "modules": len(members),
                "mean_ratio": _finite(_mean_ratio(members)),
                "max_ratio": _finite(_largest(members).ratio),
                "max_ratio_in": _largest(members).name,
                "mean_effective_rank": _mean_effective(members),
                "rank_for": {
                    str(percent): max(change.rank_for[percent] for change in members)
                    for percent in PERCENTS
                },
            }
            for kind, members in by_kind(changes).items()
        ],
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def plot(changes: Sequence[ModuleChange], picture: Path, *, title: str) -> None:
    """Draw the relative change by layer, and the energy that each rank keeps, by kind."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    kinds = by_kind(changes)
    for number, (kind, members) in enumerate(kinds.items()):
        style = {
            "color": _COLOURS[number % len(_COLOURS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linestyle": ("-", "--", ":")[number // len(_COLOURS) % 3],
            "markersize": 4.5,
            "linewidth": 1.4,
        }
        _draw_ratios(left, kind, members, style)
        if any(change.r for change in members) or not any(change.r for change in changes):
            _draw_energy(right, members, _shown_ranks(changes), style)
    _finish(left, right, changes)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(7, len(handles)))
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def _draw_ratios(
    axes: Any, kind: str, members: Sequence[ModuleChange], style: dict[str, Any]
) -> None:
    """By layer; what stands outside the layers is a level across them."""
    finite = [change for change in members if math.isfinite(change.ratio)]
    points = [(change.layer, 100 * change.ratio) for change in finite if change.layer is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=kind, **style)
    for change in finite:
        if change.layer is None:
            line = {**style, "linestyle": "-.", "marker": ""}
            axes.axhline(100 * change.ratio, label=f"{kind} (no layer)", **line)


def _shown_ranks(changes: Sequence[ModuleChange]) -> int:
    """Up to r. A head trained whole has hundreds of directions, and is shown only on its own."""
    ranks = [change.r for change in changes if change.r is not None]
    return max(ranks or [change.rank_for[99] for change in changes] or [1])


def _draw_energy(
    axes: Any, members: Sequence[ModuleChange], shown: int, style: dict[str, Any]
) -> None:
    """The mean of the kind, with a band from least to most. A change of zero has no energy."""
    curves = [
        [100.0 * share for share in (*change.energy, *[1.0] * shown)][:shown]
        for change in members
        if change.energy
    ]
    if not curves:
        return
    ranks = range(1, shown + 1)
    columns = list(zip(*curves, strict=True))
    every = max(1, shown // 16)
    axes.plot(ranks, list(map(fmean, columns)), **style, markevery=every)
    least, most = list(map(min, columns)), list(map(max, columns))
    fill, edge = (style["color"], 0.06), (style["color"], 0.4)
    axes.fill_between(ranks, least, most, facecolor=fill, edgecolor=edge, linewidth=0.7)


def _finish(left: Any, right: Any, changes: Sequence[ModuleChange]) -> None:
    left.set(xlabel="layer", ylabel="||W' - W|| / ||W|| (%)", title="Relative change by layer")
    ratios = [change.ratio for change in changes if math.isfinite(change.ratio)]
    if ratios and min(ratios) > 0 and max(ratios) > 50 * min(ratios):
        left.set_yscale("log")
        left.yaxis.set_major_formatter("{x:g}")
    else:
        left.set_ylim(bottom=0)
    layers = sorted({change.layer for change in changes if change.layer is not None})
    left.set_xlim(*((layers[0] - 0.5, layers[-1] + 0.5) if layers else (0, 1)))
    if not layers:
        left.set_xticks([])
    right.set(xlabel="rank kept", ylabel="energy kept (% of the squared singular values)")
    right.set_title("Energy that a rank keeps (mean, and least to most)")
    for axes in (left, right):
        axes.title.set_fontsize(10)
    right.set_xlim(0.5, _shown_ranks(changes) + 0.5)
    right.set_ylim(top=101.5)
    for percent in PERCENTS:
        right.axhline(percent, color="#888888", linewidth=0.8, linestyle=":")
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 7}
        right.annotate(f"{percent} %", (1.01, percent), color="#666666", **place)
    for axes in (left, right):
        if axes is right or layers:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
