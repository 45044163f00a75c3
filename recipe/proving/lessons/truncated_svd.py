"""How well does a low rank approximate a weight, and the change that LoRA trained?

Eckart and Young 1936 ("The approximation of one matrix by another of lower rank"): of all matrices
of rank k, the one that keeps the k largest singular values is nearest in the Frobenius norm, and
its distance is the root of the sum of the squares of the others.
"""

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from recipe.proving.finding import number
from recipe.proving.lessons import drawing
from recipe.proving.lessons.lesson import Asked, Taught
from recipe.proving.lessons.models import adapted_model, of_option
from recipe.proving.lessons.wording import listed, percent
from recipe.settings import UserError
from recipe.sharing.inspection import ModuleChange, inspect_adapter

_ADAPTER = "default"
_ERROR = 0.1
_ZERO = 1e-12  # of the norm, in float64: rounding


@dataclass(frozen=True)
class Adapted:
    """A weight and what LoRA changed in it, both float64 and of one shape, with B·A's rank."""

    name: str
    weight: Tensor
    update: Tensor
    r: int


@dataclass(frozen=True)
class Spectrum:
    """``errors[k]`` is what the best approximation of rank k leaves, relative to the norm, by the
    closed form; ``apart`` is how far it lies from that of matrices that were really made.
    """

    errors: list[float]
    apart: float

    def rank_for(self, error: float) -> int:
        """The smallest rank that leaves at most so much."""
        return next(k for k, left in enumerate(self.errors) if left <= error)


def teach(asked: Asked) -> Taught:
    """A middle q_proj of ``asked.model``, what ``asked.adapter`` changed in it, and noise.

    Raises:
        UserError: the adapter changes no linear layer by plain LoRA.
    """
    adapted = chosen(adapted_model(asked.model_folder, asked.adapter_folder))
    numbers = measured(adapted, seed=asked.seed)
    return Taught(_drawn(numbers), _said(numbers), numbers)


def chosen(model: Any) -> Adapted:
    """The adapted q_proj in the middle; where there is none, the adapted matrix in the middle."""
    with of_option("--adapter"):
        changes = inspect_adapter(model, _ADAPTER)
    plain = [
        change
        for change in changes
        if change.method == "LoRA" and change.rank and _has_linear_factors(model, change)
    ]
    if not plain:
        raise UserError.single(
            "--adapter",
            "it changes no linear layer by plain LoRA, so no ΔW is s·B·A. Name another one.",
        )
    wanted = [change for change in plain if change.kind == "q_proj"] or plain
    change = wanted[len(wanted) // 2]
    layer = model.get_base_model().get_submodule(change.name)
    a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    with torch.no_grad():
        update = layer.scaling[_ADAPTER] * b.double() @ a.double()
        weight = layer.get_base_layer().weight.double()
    return Adapted(change.name, weight, update, len(a))


def _has_linear_factors(model: Any, change: ModuleChange) -> bool:
    layer = model.get_base_model().get_submodule(change.name)
    return isinstance(layer.get_base_layer(), torch.nn.Linear) and _ADAPTER in layer.lora_A


def spectrum(matrix: Tensor, made: list[int]) -> Spectrum:
    """Of float64 (m, n).

    Args:
        made: ranks whose best approximation is made, to measure what it leaves.
    """
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    squares = values.square()
    # Summed from the smallest, or nothing but rounding would be left at high ranks.
    left = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    norm = float(left[0].sqrt())
    errors: list[float] = (left.sqrt() / norm).tolist()
    apart = max(
        abs(float((matrix - (u[:, :k] * values[:k]) @ v[:k]).norm()) / norm - errors[k])
        for k in made
    )
    return Spectrum(errors, apart)


def measured(adapted: Adapted, *, seed: int) -> dict[str, Any]:
    """Errors of all ranks from 1 on, of the weight, its change and a random matrix."""
    most, r = min(adapted.weight.shape), adapted.r
    made = sorted({k for k in (1, r // 2, r, most // 4, most // 2) if 0 < k <= most})
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(adapted.weight.shape, generator=generator, dtype=torch.float64)
    found = {
        "weight": spectrum(adapted.weight, made),
        "update": spectrum(adapted.update, made),
        "gaussian": spectrum(noise, made),
    }
    few = sorted({1, max(1, r // 4), max(1, r // 2)})
    return {
        "module": adapted.name,
        "shape": list(adapted.weight.shape),
        "r": r,
        "rank": list(range(1, most + 1)),
        "relative_error": {name: one.errors[1:] for name, one in found.items()},
        "relative_error_at_r": {name: one.errors[min(r, most)] for name, one in found.items()},
        "rank_for_ten_percent_error": {name: one.rank_for(_ERROR) for name, one in found.items()},
        "numerical_rank_of_update": found["update"].rank_for(_ZERO),
        "energy_share_of_update": {str(k): 1 - found["update"].errors[k] ** 2 for k in few},
        "ranks_really_made": made,
        "closed_form_apart": max(one.apart for one in found.values()),
    }


def _drawn(numbers: dict[str, Any]) -> Figure:
    rows, columns = numbers["shape"]
    figure, (axes,) = drawing.panels(1, title=f"Best rank-k approximation: {numbers['module']}")
    for style, (name, label) in enumerate(
        (
            ("gaussian", f"random Gaussian matrix, {rows} × {columns}"),
            ("weight", "the weight W"),
            ("update", f"its trained change ΔW = s·B·A, r = {numbers['r']}"),
        )
    ):
        errors = numbers["relative_error"][name]
        shown = [k for k in numbers["rank"] if k == len(errors) or _is_marked(k)]
        percents = [100 * errors[k - 1] for k in shown]
        drawing.line(axes, shown, percents, label=label, style=style)
    axes.axvline(numbers["r"], color="#888888", linewidth=1, label=f"k = r = {numbers['r']}")
    powers = [2**e for e in range(len(numbers["rank"]).bit_length())]
    drawing.log2_ticks(axes, powers)
    axes.set_ylim(-3, 103)
    drawing.finish(
        axes,
        x="rank k that is kept",
        y="||M - M_k|| / ||M||, Frobenius (%)",
        title="Eckart and Young: no matrix of rank k comes nearer",
    )
    drawing.legend_below(figure, axes, columns=4)
    return figure


def _is_marked(k: int) -> bool:
    """Eight points an octave are enough to see."""
    return k % (1 << max(0, k.bit_length() - 4)) == 0


def _said(numbers: dict[str, Any]) -> str:
    at_r, ranks = numbers["relative_error_at_r"], numbers["rank_for_ten_percent_error"]
    r, (rows, columns) = numbers["r"], numbers["shape"]
    energy = numbers["energy_share_of_update"]
    few, held = listed(list(energy)), listed([percent(share) for share in energy.values()])
    return (
        f"{numbers['module']} is a weight of {rows} × {columns}. The best matrix of rank {r} "
        f"misses {percent(at_r['weight'])} of it in the Frobenius norm, and of a random Gaussian "
        f"matrix of that shape {percent(at_r['gaussian'])}; to miss no more than {_ERROR:.0%}, the "
        f"weight needs rank {ranks['weight']} and the random matrix {ranks['gaussian']} of "
        f"{min(rows, columns)}. Its trained change ΔW = s·B·A is different because it was made so: "
        f"at k = r = {r} the error is {number(at_r['update'])}, its numerical rank is "
        f"{numbers['numerical_rank_of_update']}, and rank {ranks['update']} misses no more than "
        f"{_ERROR:.0%}. Its first {few} directions of {r} hold {held} of its energy, the sum of "
        "the squared singular values. The errors are Eckart and Young's closed form; those of "
        "matrices that were really cut to rank "
        f"{listed(list(map(str, numbers['ranks_really_made'])))} lie within "
        f"{number(numbers['closed_form_apart'])} of it. So LoRA asks for a change of low rank, and "
        f"not for a weight of low rank: cut to rank {r} itself, this one would lose "
        f"{percent(at_r['weight'])}."
    )
