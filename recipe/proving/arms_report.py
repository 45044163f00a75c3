"""What the arms of a study came to: a table of ratios, the ladder, and memory against speed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Arms = Mapping[str, Mapping[str, Any]]

KINDS = ("weights", "gradients", "optimizer", "activations")
_REST = "logits, temporaries"
_HATCHES = {"weights": "", "gradients": "//", "optimizer": "..", "activations": "xx", _REST: ""}
_COLOURS = {
    "weights": "#7f8c9b",
    "gradients": "#d95f02",
    "optimizer": "#e6ab02",
    "activations": "#1b7fa8",
    _REST: "#d9d9d9",
}
# What an arm does that the one it is held against does not, by how its override begins.
_EVERYTHING = "study.train=everything"
_ADAPTER = (
    "gradients and optimizer state are of the adapter alone; the frozen weights need none, but "
    "activations stay, as gradients flow through all layers"
)
_REASONS = {
    "training.gradient_accumulation_steps=": "a smaller micro-batch keeps fewer activations; the "
    "sum of gradients, and with it what is learned, is the same; gradients live longer",
    "training.gradient_checkpointing=true": "activations within a layer are computed again instead "
    "of kept; gradients are as large as before, though the reports say that it saves these",
    "study.checkpoint=feed_forward": "the same for the feed-forward part alone, as the reports did "
    "it: attention's activations stay",
    "training.optim=adamw_bnb_8bit": "Adam's two moments take a byte a parameter each, with a "
    "scale a block; transformers keeps those of the embedding in float32",
    "model.dtype=bfloat16": "weights, gradients and activations take half; without master weights "
    "small updates are lost; a CPU without such units is slow",
    "study.logits=chunked": "the logits of all positions, and their gradient, never exist at once",
    "data.share_openings=true": "what rows begin with alike is computed and kept once",
    "model.quantization={load_in_8bit": "a byte a weight; the layers' inputs are kept once more "
    "in 16 bit",
    "model.quantization={load_in_4bit": "half a byte a weight and its scales; weights are made "
    "whole for each product",
}


def base_of(name: str) -> str | None:
    """The arm that ``name`` changes in one thing; None for the first one."""
    before, comma, _ = name.rpartition(", ")
    if comma:
        return before
    return "full" if name == "lora" else None


def table(arms: Arms) -> list[str]:
    """Markdown: bytes of each arm, and then each technique against the arm that lacks it."""
    sizes = ("weights, MiB", *KINDS[1:], "peak")
    rows: list[tuple[str, ...]] = [("arm", *sizes, "ms a token", "tokens", "held-out loss")]
    for name, arm in arms.items():
        loss = arm["held_out_loss"]
        rows.append(
            (
                name,
                *(_mib(arm["bytes"][kind]) for kind in (*KINDS, "allocated")),
                f"{1000 * _token_seconds(arm):.2f}",
                f"{arm['tokens']:,}",
                f"{loss['before']:.3f} → {loss['after']:.3f}",
            )
        )
    return [*_markdown(rows), "", *_markdown(_ratios(arms))]


def _ratios(arms: Arms) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("technique, alone", *KINDS, "peak", "time a token", "held-out loss", "because"),
    ]
    for name, arm in arms.items():
        base = arms.get(base_of(name) or "")
        if base is None:
            continue
        ratios = (_ratio(arm["bytes"][kind], base["bytes"][kind]) for kind in (*KINDS, "allocated"))
        time = _token_seconds(arm) / _token_seconds(base)
        rows.append((name, *ratios, f"×{time:.2f}", _learned(arm, base), _reason(arm, base)))
    return rows


def _learned(arm: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Held-out loss beside the base's, after as many tokens."""
    if arm["tokens"] != base["tokens"]:
        return "other tokens"
    more = round(arm["held_out_loss"]["after"] - base["held_out_loss"]["after"], 3)
    return f"{more + 0.0:+.3f}"  # no -0.000


def _reason(arm: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    given, before = arm["overrides"], base["overrides"]
    found = [_ADAPTER] if _EVERYTHING in before and _EVERYTHING not in given else []
    new = [one for one in given if one not in before]
    found += [why for start, why in _REASONS.items() if any(one.startswith(start) for one in new)]
    return "; ".join(found)


def _ratio(bytes_of_arm: int, bytes_of_base: int) -> str:
    return f"×{bytes_of_arm / bytes_of_base:.2f}" if bytes_of_base else "–"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def ladder(arms: Arms, rungs: Sequence[str]) -> Figure:
    """Stacked bars, MiB, of the arms that build on one another."""
    there = [name for name in rungs if name in arms]
    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    axes = figure.subplots()
    bottom = [0.0] * len(there)
    for kind in (*KINDS, _REST):
        heights = [_part(arms[name]["bytes"], kind) / 2**20 for name in there]
        axes.barh(
            there,
            heights,
            left=bottom,
            label=kind,
            color=_COLOURS[kind],
            hatch=_HATCHES[kind],
            edgecolor="white",
            linewidth=0.5,
        )
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for place, total in enumerate(bottom):
        axes.text(total, place, f" {total:,.0f}", va="center")
    axes.invert_yaxis()
    axes.set(xlabel="MiB allocated at the peak of a step", title="Each rung adds to the one above")
    axes.set_xlim(right=1.1 * max(bottom, default=1))
    axes.legend(loc="lower right")
    return figure


def memory_against_speed(arms: Arms) -> Figure:
    """A point an arm, both axes from zero."""
    figure = Figure(figsize=(9, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    for number, (name, arm) in enumerate(arms.items(), start=1):
        x, y = 1000 * _token_seconds(arm), arm["bytes"]["allocated"] / 2**20
        marker = "s" if name.startswith("full") else "^" if name.startswith("+") else "o"
        axes.scatter(x, y, marker=marker, label=f"{number} {name}", s=40)
        axes.annotate(str(number), (x, y), textcoords="offset points", xytext=(6, 4))
    axes.set(
        xlabel="ms a token", ylabel="MiB allocated at the peak of a step", xlim=(0, None),
        ylim=(0, None), title="Memory against time: down and left is better",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def write(arms: Arms, rungs: Sequence[str], folder: Path) -> list[Path]:
    """The table and both figures."""
    files = [folder / "study.md", folder / "ladder.png", folder / "memory_speed.png"]
    files[0].write_text("\n".join(table(arms)) + "\n")
    ladder(arms, rungs).savefig(files[1])
    memory_against_speed(arms).savefig(files[2])
    return files


def _part(sizes: Mapping[str, int], kind: str) -> float:
    """Of the peak. Gradients are not all there while activations are, where they do not accumulate:
    what the parts sum to beyond the peak is taken from them.
    """
    parts = sum(sizes[name] for name in KINDS)
    beyond = max(parts - sizes["allocated"], 0)
    if kind == _REST:
        return max(sizes["allocated"] - parts, 0)
    return sizes[kind] - (beyond if kind == "gradients" else 0)


def _token_seconds(arm: Mapping[str, Any]) -> float:
    return float(arm["seconds"] / arm["tokens"])


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"
