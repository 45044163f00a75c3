"""What does fp16 lose without master weights and without loss scaling?

Micikevicius et al. 2017, arXiv 1710.03740: an update below half the gap between two fp16 numbers is
rounded away (section 3.1), and gradients below 2^-25 become zero unless the loss is scaled (3.2).
Here each number of an fp32 backward pass is converted once; one in fp16 rounds on its way too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

from recipe.data.neutral import neutral_ids
from recipe.model.checkpoint import load_tokenizer
from recipe.proving.finding import number
from recipe.proving.lessons import drawing
from recipe.proving.lessons.lesson import Asked, Taught
from recipe.proving.lessons.models import given_model, random_ids, tiny_llama
from recipe.proving.lessons.wording import percent
from recipe.settings import ModelSettings

TOKENS = 64
RATIO_EXPONENTS = tuple(-27 + half / 2 for half in range(45))
SCALE_EXPONENTS = tuple(range(17))
MORE_TOKENS = 128
LEARNING_RATE = 2e-5
STEPS = 100
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Passed:
    """What one backward pass in float32 left.

    Attributes:
        weights: the matrices of a middle layer, flat.
        gradients: flat, by what they are of: ``weights``, in the same order; ``activations``, which
            each layer gives to the next; ``logits``.
    """

    weights: torch.Tensor
    gradients: Mapping[str, torch.Tensor]


def teach(asked: Asked) -> Taught:
    """Of ``asked.model`` on a short text, else of a tiny Llama with random weights and tokens."""
    if asked.model is None:
        model = tiny_llama(asked.seed)
        ids = random_ids(model, rows=1, tokens=TOKENS, seed=asked.seed)
        name = "a Llama of two layers with random weights"
    else:
        folder = asked.model_folder
        model = given_model(folder, dtype="float32")
        tokenizer = load_tokenizer(ModelSettings(name_or_path=str(folder)))
        ids = torch.tensor([neutral_ids(tokenizer)[:TOKENS]])
        name = folder.name
    numbers = {"model": name, "tokens": ids.shape[1], **measured(backward(model, ids))}
    return Taught(_drawn(numbers), _said(numbers), numbers)


def backward(model: Any, ids: torch.Tensor) -> Passed:
    """Predict each token of int64 (1, tokens) from those before it, in float32."""
    model.requires_grad_(False)
    layers = model.model.layers
    middle = [p for p in layers[len(layers) // 2].parameters() if p.ndim == 2]
    given: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.retain_grad()
        given.append(hidden)

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    for parameter in middle:
        parameter.requires_grad_()
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    output = model(inputs_embeds=embedded, labels=ids, use_cache=False)
    output.logits.retain_grad()
    output.loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = {
        "weights": torch.cat([p.grad.flatten() for p in middle]),
        "activations": torch.cat([h.grad.flatten() for h in given if h.grad is not None]),
        "logits": output.logits.grad.flatten(),
    }
    return Passed(torch.cat([p.detach().flatten() for p in middle]), gradients)


def measured(passed: Passed) -> dict[str, Any]:
    """Shares of numbers that an update leaves as they are, and that a conversion makes zero."""
    signs = -passed.gradients["weights"].sign()
    moved = (passed.weights != 0) & (signs != 0)
    weights, signs = passed.weights[moved], signs[moved]
    ratios = [2.0**exponent for exponent in RATIO_EXPONENTS]
    step = LEARNING_RATE * signs
    half, brain = torch.float16, torch.bfloat16
    return {
        "update_to_weight_ratio": ratios,
        "unchanged_share": {
            name: [unchanged(weights, weights.abs() * signs * ratio, dtype) for ratio in ratios]
            for name, dtype in _DTYPES.items()
        },
        "learning_rate": LEARNING_RATE,
        "median_update_to_weight_ratio": float((LEARNING_RATE / weights.abs()).median()),
        "unchanged_share_at_learning_rate": {
            name: unchanged(weights, step, dtype) for name, dtype in _DTYPES.items()
        },
        "steps": STEPS,
        "way_gone_share": {
            "float16": way_gone(weights, step, half, held_in=half),
            "bfloat16": way_gone(weights, step, brain, held_in=brain),
            "float16_of_float32_master": way_gone(weights, step, half, held_in=torch.float32),
        },
        "loss_scale": [2**exponent for exponent in SCALE_EXPONENTS],
        "flushed_share": _by_scale(passed, flushed),
        "infinite_share": _by_scale(passed, infinite),
        "flushed_length_share": {
            kind: flushed_length(values) for kind, values in passed.gradients.items()
        },
        "more_tokens": MORE_TOKENS,
        "flushed_share_with_more_tokens": {
            kind: flushed(values, 1 / MORE_TOKENS, half)
            for kind, values in passed.gradients.items()
        },
    }


def _by_scale(
    passed: Passed, share: Callable[[torch.Tensor, float, torch.dtype], float]
) -> dict[str, dict[str, list[float]]]:
    return {
        name: {
            kind: [share(values, 2.0**exponent, _DTYPES[name]) for exponent in SCALE_EXPONENTS]
            for kind, values in passed.gradients.items()
        }
        for name in ("float16", "bfloat16")
    }


def unchanged(weights: torch.Tensor, update: torch.Tensor, dtype: torch.dtype) -> float:
    """Share of ``weights``, converted to ``dtype``, that are the same after adding ``update``."""
    held = weights.to(dtype)
    return float((held + update.to(dtype) == held).double().mean())


def way_gone(
    weights: torch.Tensor, step: torch.Tensor, dtype: torch.dtype, *, held_in: torch.dtype
) -> float:
    """How far the ``dtype`` copy of weights held in another has come after ``STEPS`` equal steps:
    1 is the sum of all steps.
    """
    held, start = weights.to(held_in), weights.to(held_in).to(dtype).double()
    for _ in range(STEPS):
        held = held + step.to(held_in)
    gone = (held.to(dtype).double() - start) * step.sign()
    return float(gone.sum() / (STEPS * step.double().abs().sum()))


def flushed(values: torch.Tensor, scale: float, dtype: torch.dtype) -> float:
    """Share of the float32 ``values`` that are not zero and become it in ``dtype``."""
    there = values[values != 0]
    return float(((there * scale).to(dtype) == 0).double().mean())


def flushed_length(values: torch.Tensor) -> float:
    """The length of what becomes zero in fp16 without scaling, of the length of float32
    ``values``.
    """
    return float(values[values.half() == 0].double().norm() / values.double().norm())


def infinite(values: torch.Tensor, scale: float, dtype: torch.dtype) -> float:
    """Share of the float32 ``values`` that are not zero and too large for ``dtype``."""
    there = values[values != 0]
    return float((there * scale).to(dtype).isinf().double().mean())


def _drawn(numbers: dict[str, Any]) -> Figure:
    figure, (left, right) = drawing.panels(2, title=f"What low precision loses: {numbers['model']}")
    for style, (name, label) in enumerate(
        (
            ("float16", "fp16 weights"),
            ("bfloat16", "bf16 weights"),
            ("float32", "fp32 master weights"),
        )
    ):
        shares = [100 * share for share in numbers["unchanged_share"][name]]
        ratios = numbers["update_to_weight_ratio"]
        drawing.line(left, ratios, shares, label=label, style=style, markevery=2)
    drawing.log2_ticks(left, [2.0**exponent for exponent in range(-27, -4, 4)], as_powers=True)
    flush = numbers["flushed_share"]
    worst = [max(shares) for shares in zip(*flush["bfloat16"].values(), strict=True)]
    for style, (series, label) in enumerate(
        (
            (flush["float16"]["logits"], "fp16, gradients of logits"),
            (flush["float16"]["activations"], "fp16, gradients of activations"),
            (flush["float16"]["weights"], "fp16, gradients of weights"),
            (worst, "bf16, the most of the three"),
        )
    ):
        shares = [100 * share for share in series]
        drawing.line(right, numbers["loss_scale"], shares, label=label, style=style)
    drawing.log2_ticks(right, [2.0**e for e in SCALE_EXPONENTS[::2]], as_powers=True)
    right.set_yscale("symlog", linthresh=1e-3)
    right.set_yticks(
        [0, 1e-3, 1e-2, 0.1, 1, 10, 100], ["0", "0.001", "0.01", "0.1", "1", "10", "100"]
    )
    right.set_ylim(-2e-4, 200)
    drawing.finish(
        left,
        x="|update| / |weight|",
        y="weights that an update leaves unchanged (%)",
        title="Updates that are rounded away",
        legend=(0.2, 0.4),
    )
    drawing.finish(
        right,
        x="loss scale",
        y="gradients that become zero (%)",
        title="Gradients that are flushed to zero",
        legend="center right",
    )
    return figure


def _said(numbers: dict[str, Any]) -> str:
    lost = numbers["unchanged_share_at_learning_rate"]
    gone = numbers["way_gone_share"]
    flush = numbers["flushed_share"]["float16"]
    more = numbers["flushed_share_with_more_tokens"]
    largest = numbers["loss_scale"][-1]
    overflow = max(shares[-1] for shares in numbers["infinite_share"]["float16"].values())
    brain = max(shares[0] for shares in numbers["flushed_share"]["bfloat16"].values())
    lengths = numbers["flushed_length_share"]

    def three(shares: Mapping[str, float]) -> str:
        parts = [percent(shares[kind]) for kind in ("logits", "activations", "weights")]
        return "{} of the logits', {} of the activations' and {} of the weights'".format(*parts)

    return (
        f"In {numbers['model']} an update of {LEARNING_RATE:g}, which is about what AdamW makes at "
        f"that learning rate, is {numbers['median_update_to_weight_ratio']:.1e} of the median "
        f"weight of a middle layer: it leaves {percent(lost['float16'])} of the weights unchanged "
        f"in fp16, {percent(lost['bfloat16'])} in bf16 and {percent(lost['float32'])} in fp32. "
        f"After {STEPS} such updates fp16 weights have gone {percent(gone['float16'])} of the way "
        f"and bf16 weights {percent(gone['bfloat16'])}, but the fp16 copy of fp32 master weights "
        f"{percent(gone['float16_of_float32_master'])}. Of the gradients of a real backward pass "
        f"over {numbers['tokens']} tokens, each converted from fp32, "
        f"{three({kind: shares[0] for kind, shares in flush.items()})} become zero in fp16 without "
        f"loss scaling. A scale of {largest:,} brings that down to "
        f"{three({kind: shares[-1] for kind, shares in flush.items()})}, and {percent(overflow)} "
        f"are then too large for fp16. What is lost without scaling is {number(lengths['logits'])} "
        f"of the logits' gradient in length; the mean over {MORE_TOKENS} times as many tokens "
        f"divides all gradients by {MORE_TOKENS}, and then {three(more)} would be lost. bf16 has "
        f"the range of fp32 and loses {percent(brain)} without a scale; it keeps fewer digits, so "
        "it needs master weights more."
    )
