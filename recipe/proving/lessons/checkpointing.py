"""What does recomputing activations save, and what does it cost?

Chen et al. 2016, arXiv 1604.06174: with a checkpoint every √n of n layers, activations take memory
of O(√n) for one more forward pass. Storing the input alone takes O(1) memory and O(n²) layer calls.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.checkpoint import checkpoint

from recipe.memory.live_bytes import LiveBytes
from recipe.proving.finding import number
from recipe.proving.lessons import drawing
from recipe.proving.lessons.lesson import Asked, Taught
from recipe.proving.lessons.models import seeded
from recipe.proving.lessons.wording import growth_exponent, power, size, three_digits
from recipe.proving.watchers import relative

DEPTHS = (4, 9, 16, 36, 64, 100)
ROWS, WIDTH = 256, 96
_REPEATS = 3
_FITTED_FROM = 16  # layers; below, what one layer takes hides how a form grows
_MIB = 2**20


class Layer(nn.Module):
    """x + W2·gelu(W1·x), which counts how often it is called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, width) to the same."""
        self.calls += 1
        moved: torch.Tensor = self.down(nn.functional.gelu(self.up(x)))
        return x + moved


Backward = Callable[[], object]
Form = Callable[[Sequence[Layer], torch.Tensor], Backward]


def _chain(layers: Sequence[Layer], x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _loss(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def keep(layers: Sequence[Layer], x: torch.Tensor) -> Backward:
    """Autograd as it is: all activations are kept."""
    return _loss(_chain(layers, x)).backward


def every_layer(layers: Sequence[Layer], x: torch.Tensor) -> Backward:
    """Keep what goes into each layer; its inside is computed again."""
    return _in_segments(layers, x, length=1)


def every_root(layers: Sequence[Layer], x: torch.Tensor) -> Backward:
    """Keep what goes into each of about √n segments; a segment is computed again as a whole."""
    return _in_segments(layers, x, length=round(math.sqrt(len(layers))))


def _in_segments(layers: Sequence[Layer], x: torch.Tensor, *, length: int) -> Backward:
    for start in range(0, len(layers), length):
        segment = partial(_chain, layers[start : start + length])
        x = checkpoint(segment, x, use_reentrant=False, preserve_rng_state=False)
    return _loss(x).backward


def input_alone(layers: Sequence[Layer], x: torch.Tensor) -> Backward:
    """Keep the input and, once there is one, the output; for the backward pass of each layer,
    compute what goes into it from the input.
    """
    with torch.no_grad():
        output = _chain(layers, x)

    def backward() -> None:
        gradient = torch.autograd.grad(_loss(output.requires_grad_()), output)[0]
        for index in reversed(range(len(layers))):
            with torch.no_grad():
                entering = _chain(layers[:index], x)
            entering = entering.detach().requires_grad_()
            layers[index](entering).backward(gradient)
            assert entering.grad is not None
            gradient = entering.grad

    return backward


FORMS: dict[str, tuple[str, Form]] = {
    "keep_everything": ("keep everything", keep),
    "every_layer": ("checkpoint every layer", every_layer),
    "every_root_n_layers": ("checkpoint every √n layers", every_root),
    "input_alone": ("input alone, recompute all (“poor”)", input_alone),
}


def teach(asked: Asked) -> Taught:
    """Live bytes, layer calls and seconds of one step of forward and backward, for each form."""
    numbers = measured(asked.seed, depths=DEPTHS)
    return Taught(_drawn(numbers), _said(numbers), numbers)


def measured(
    seed: int, *, depths: Sequence[int], rows: int = ROWS, width: int = WIDTH
) -> dict[str, Any]:
    """Each form at each depth.

    ``peak_activation_bytes`` is the most that lived at once of all tensors that the step makes,
    the parameters' gradients apart, which ``gradient_bytes`` counts.
    """
    kinds = ("peak_activation_bytes", "held_after_forward_bytes", "gradient_bytes")
    found: dict[str, dict[str, list[Any]]] = {
        kind: {form: [] for form in FORMS} for kind in (*kinds, "layer_calls", "seconds")
    }
    apart = 0.0
    for depth in depths:
        with seeded(seed):
            layers = [Layer(width) for _ in range(depth)]
            x = torch.randn(rows, width)
        gradients = {}
        for name, (_, form) in FORMS.items():
            for kind, value in zip((*kinds, "layer_calls"), bytes_of(form, layers, x), strict=True):
                found[kind][name].append(value)
            gradients[name] = torch.cat([p.grad.flatten() for p in _parameters(layers)])
        for name, seconds in _seconds(layers, x).items():
            found["seconds"][name].append(seconds)
        apart = max(
            [apart, *(relative(g, gradients["keep_everything"]) for g in gradients.values())]
        )
    return {
        "depths_layers": list(depths),
        "rows": rows,
        "width": width,
        **found,
        "largest_relative_gradient_difference": apart,
        "growth_exponent": {
            kind: {form: _growth(depths, series) for form, series in found[kind].items()}
            for kind in ("peak_activation_bytes", "layer_calls", "seconds")
        },
    }


def _growth(depths: Sequence[int], series: Sequence[float]) -> float:
    fitted = [pair for pair in zip(depths, series, strict=True) if pair[0] >= _FITTED_FROM]
    return growth_exponent(*zip(*fitted, strict=True))


def _parameters(layers: Sequence[Layer]) -> list[Any]:
    return [parameter for layer in layers for parameter in layer.parameters()]


def bytes_of(form: Form, layers: Sequence[Layer], x: torch.Tensor) -> tuple[int, int, int, int]:
    """One step; the gradients are left in the parameters.

    Returns:
        Bytes of activations at the peak, those held between forward and backward, bytes of the
        parameters' gradients, and how many times a layer was called.
    """
    _forget_gradients(layers)
    live = LiveBytes([x, *_parameters(layers)])
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: live.set_apart(p.grad))
        for parameter in _parameters(layers)
    ]
    with live, live.phase("step"):
        # A copy, as the batch itself is one of the tensors that a step holds.
        backward = form(layers, x.clone())
        held = live.now
        backward()
    for hook in hooks:
        hook.remove()
    gradients = sum(p.grad.untyped_storage().nbytes() for p in _parameters(layers))
    return live.peak, held, gradients, sum(layer.calls for layer in layers)


def _forget_gradients(layers: Sequence[Layer]) -> None:
    for layer in layers:
        layer.calls = 0
        layer.zero_grad()


def _seconds(layers: Sequence[Layer], x: torch.Tensor) -> dict[str, float]:
    """The median of each form; they take turns, so that another program slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(_REPEATS):
        for name, (_, form) in FORMS.items():
            _forget_gradients(layers)
            start = time.perf_counter()
            form(layers, x)()
            times[name].append(time.perf_counter() - start)
    return {name: median(taken) for name, taken in times.items()}


def _drawn(numbers: dict[str, Any]) -> Figure:
    figure, (left, right) = drawing.panels(
        2, title="Recomputing activations: what is saved, and the price"
    )
    depths = numbers["depths_layers"]
    for style, (name, (label, _)) in enumerate(FORMS.items()):
        peak = [count / _MIB for count in numbers["peak_activation_bytes"][name]]
        drawing.line(left, depths, peak, label=label, style=style)
        first = numbers["seconds"]["keep_everything"][-1]
        times = [seconds / first for seconds in numbers["seconds"][name]]
        drawing.line(right, depths, times, label=label, style=style)
    gradients = [count / _MIB for count in numbers["gradient_bytes"]["keep_everything"]]
    label = "gradients, in each of the four"
    drawing.closed_form(left, depths, gradients, label=label)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.set_xticks(depths, [str(depth) for depth in depths])
    left.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_major_formatter("{x:g}")
    drawing.finish(
        left,
        x="layers",
        y="live bytes at the peak (MiB)",
        title="Memory of activations, and of gradients",
    )
    drawing.finish(
        right,
        x="layers",
        y=f"time of a step (keeping all of {depths[-1]} layers = 1)",
        title="Time",
    )
    drawing.legend_below(figure, left, columns=3)
    return figure


def _said(numbers: dict[str, Any]) -> str:
    depths = numbers["depths_layers"]
    peak = {form: series[-1] for form, series in numbers["peak_activation_bytes"].items()}
    calls = {form: series[-1] for form, series in numbers["layer_calls"].items()}
    grows = numbers["growth_exponent"]

    def of(form: str) -> str:
        return f"{size(peak[form])} (growing as {power(grows['peak_activation_bytes'][form])})"

    seconds = {form: series[-1] for form, series in numbers["seconds"].items()}
    slower = {
        form: three_digits(value / seconds["keep_everything"]) for form, value in seconds.items()
    }
    gradients = {series[-1] for series in numbers["gradient_bytes"].values()}
    apart = numbers["largest_relative_gradient_difference"]
    same = "to the bit" if apart == 0 else f"up to a relative difference of {number(apart)}"
    return (
        f"One step went through n = {depths[-1]} layers with activations of {numbers['rows']} × "
        f"{numbers['width']} numbers. At the peak {of('keep_everything')} of activations live if "
        f"all are kept, {of('every_layer')} with a checkpoint at every layer, "
        f"{of('every_root_n_layers')} with one every √n layers, and {of('input_alone')} if only "
        "the input is kept and all else is computed again for each layer. Every tensor that the "
        "step makes was counted while it lives, but for the parameters' gradients; exponents are "
        f"fitted from n = {_FITTED_FROM} on. A layer is called {calls['keep_everything']:,}, "
        f"{calls['every_layer']:,}, {calls['every_root_n_layers']:,} and {calls['input_alone']:,} "
        f"times, and a step takes {slower['every_layer']}, {slower['every_root_n_layers']} and "
        f"{slower['input_alone']} times as long as if all is kept; in the last form calls grow as "
        f"{power(grows['layer_calls']['input_alone'])} and the time as "
        f"{power(grows['seconds']['input_alone'])}. So the form that the reports call poor is poor "
        f"in time, and has the least memory of all. All four give the same gradients {same}. The "
        "reports say that checkpointing saves the memory of gradients, and it does not: they take "
        f"{' or '.join(map(size, sorted(gradients)))} in each of the four forms. What it saves is "
        "activations."
    )
