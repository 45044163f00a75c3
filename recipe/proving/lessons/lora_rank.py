"""How many bytes of gradients and of Adam's state does a rank cost?

Hu et al. 2021, arXiv 2106.09685: beside a frozen weight of (out, in), LoRA trains r·(in + out)
numbers. Adam (Kingma and Ba 2014, arXiv 1412.6980) keeps two more for each, and a step count for
each tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from recipe.model.lora import add_lora, closed_form
from recipe.proving.lessons import drawing
from recipe.proving.lessons.lesson import Asked, Taught
from recipe.proving.lessons.models import given_model, random_ids, seeded, tiny_llama
from recipe.proving.lessons.wording import size, three_digits

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
TARGETS = ("q_proj", "v_proj")
_TOKENS = 8
_SAID = 16
_MIB = 2**20
_STEP_BYTES = 4


def teach(asked: Asked) -> Taught:
    """Of ``asked.model`` in float32, else of a tiny Llama."""
    if asked.model is None:
        model, name = tiny_llama(asked.seed), "a Llama of two layers"
    else:
        model, name = given_model(asked.model_folder, dtype="float32"), asked.model_folder.name
    numbers = {"model": name, **measured(model, seed=asked.seed, ranks=RANKS)}
    return Taught(_drawn(numbers), _said(numbers), numbers)


def measured(model: Any, *, seed: int, ranks: Sequence[int]) -> dict[str, Any]:
    """Bytes after one AdamW step at each rank, and in full fine-tuning, which changes ``model``."""
    ids = random_ids(model, rows=1, tokens=_TOKENS, seed=seed)
    found: dict[str, list[int]] = {
        name: [] for name in ("gradient_bytes", "adam_bytes", "closed_form_gradient_bytes")
    }
    tensors = 0
    for r in ranks:
        with seeded(seed):
            lora = {"r": r, "lora_alpha": 2 * r, "target_modules": list(TARGETS)}
            adapted = add_lora(model, lora)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        gradients, adam = after_one_step(adapted, trained, ids)
        found["gradient_bytes"].append(gradients)
        found["adam_bytes"].append(adam)
        found["closed_form_gradient_bytes"].append(closed_form(adapted) * trained[0].element_size())
        tensors = len(trained)
        model = adapted.unload()
    gradients, adam = full_fine_tuning(model, ids)
    return {
        "targets": list(TARGETS),
        "r": list(ranks),
        **found,
        "closed_form_adam_bytes": [
            2 * count + _STEP_BYTES * tensors for count in found["closed_form_gradient_bytes"]
        ],
        "full_gradient_bytes": gradients,
        "full_adam_bytes": adam,
        "full_parameters": sum(p.numel() for p in model.parameters()),
    }


def after_one_step(
    model: Any, trained: Sequence[torch.nn.Parameter], ids: torch.Tensor
) -> tuple[int, int]:
    """Bytes of the gradients and of AdamW's state of ``trained``, after one step on int64 (1,
    tokens).
    """
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    return sum(_bytes(p.grad) for p in trained if p.grad is not None), _state_bytes(optimizer)


def full_fine_tuning(model: Any, ids: torch.Tensor) -> tuple[int, int]:
    """The same of all parameters of ``model``, one tensor at a time: each takes its step as soon as
    its gradient is there, and what was counted is freed, so the whole need not fit into memory.
    """
    found = {"gradients": 0, "adam": 0}

    def step(parameter: torch.nn.Parameter) -> None:
        optimizer = torch.optim.AdamW([parameter])
        optimizer.step()
        assert parameter.grad is not None
        found["gradients"] += _bytes(parameter.grad)
        found["adam"] += _state_bytes(optimizer)
        parameter.grad = None

    model.requires_grad_(True)
    hooks = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for hook in hooks:
        hook.remove()
    return found["gradients"], found["adam"]


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        _bytes(value)
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _drawn(numbers: dict[str, Any]) -> Figure:
    figure, (axes,) = drawing.panels(
        1, title=f"What a rank costs in memory: LoRA on {numbers['model']}"
    )
    ranks = numbers["r"]

    def in_mib(name: str) -> list[float]:
        return [count / _MIB for count in numbers[name]]

    label = "closed form: 4·r·Σ(in + out) bytes, and twice that"
    drawing.closed_form(axes, ranks, in_mib("closed_form_gradient_bytes"), label=label)
    drawing.closed_form(axes, ranks, in_mib("closed_form_adam_bytes"), label=None)
    drawing.line(axes, ranks, in_mib("adam_bytes"), label="LoRA: Adam's state", style=1)
    drawing.line(axes, ranks, in_mib("gradient_bytes"), label="LoRA: gradients", style=0)
    for name, label, style in (
        ("full_adam_bytes", "full fine-tuning: Adam's state", 4),
        ("full_gradient_bytes", "full fine-tuning: gradients", 3),
    ):
        level = [numbers[name] / _MIB] * len(ranks)
        drawing.line(axes, ranks, level, label=label, style=style, markersize=3)
    drawing.log2_ticks(axes, ranks)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    drawing.finish(
        axes,
        x="rank r",
        y="bytes after one step (MiB)",
        title=f"on {' and '.join(numbers['targets'])}, float32, one AdamW step",
    )
    drawing.legend_below(figure, axes, columns=2)
    return figure


def _said(numbers: dict[str, Any]) -> str:
    ranks = numbers["r"]
    at = ranks.index(_SAID) if _SAID in ranks else len(ranks) - 1
    gradients, adam = numbers["gradient_bytes"], numbers["adam_bytes"]
    exact = gradients == numbers["closed_form_gradient_bytes"]
    exact = exact and adam == numbers["closed_form_adam_bytes"]
    full, full_adam = numbers["full_gradient_bytes"], numbers["full_adam_bytes"]
    saved = (full + full_adam) / (gradients[at] + adam[at])
    return (
        f"After one real AdamW step of LoRA r={ranks[at]} on {' and '.join(numbers['targets'])} of "
        f"{numbers['model']}, gradients take {size(gradients[at])} and Adam's state "
        f"{size(adam[at])} in float32. From r={ranks[0]} to r={ranks[-1]} they go from "
        f"{size(gradients[0] + adam[0])} to {size(gradients[-1] + adam[-1])}; "
        f"{'each is' if exact else 'not each is'} to the byte what r·(in + out) numbers a matrix "
        "come to, four bytes a number, twice that for Adam and four more for the count of steps "
        "of each tensor. Full fine-tuning of the same model, counted one tensor at a time, takes "
        f"{size(full)} and {size(full_adam)}, {three_digits(saved)} times as much as "
        f"r={ranks[at]}. The weights themselves, {size(4 * numbers['full_parameters'])} here, are "
        "needed in both."
    )
