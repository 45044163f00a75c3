"""How much an adapter changed each weight, and how many directions the change has.

The change of a module under LoRA is ΔW = s·B·A with B of (out, r), A of (r, in) and s = alpha/r, or
alpha/sqrt(r) with rsLoRA (Hu et al. 2021, arXiv 2106.09685). Its singular values are those of an
(r, r) matrix: with B = Q·R and Aᵀ = P·T, ΔW = Q·(s·R·Tᵀ)·Pᵀ, and Q and P keep lengths. By Eckart
and Young (1936) the best approximation of rank k keeps the k largest; energy is their squares.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from recipe.settings import UserError

PERCENTS = (90, 95, 99)
# Their forward and merge are those of plain LoRA; of what else peft has, ΔW is not s·B·A.
_PLAIN_VARIANTS = {
    "ALoraLinearVariant",
    "VeloraLinearVariant",
    "MiCALinearVariant",
    "MiCAEmbeddingVariant",
}
# These move part of W into B·A at the start, so s·B·A is not what training changed.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_BLOCK = 1 << 22  # numbers that are float64 at a time
_ROUNDING = 1e-12
_EPS = torch.finfo(torch.float64).eps

Method = Literal["LoRA", "DoRA", "whole", "tokens"]


@dataclass(frozen=True)
class ModuleChange:
    """What the adapter did to one weight.

    Attributes:
        name: in the base model, as in ``model.layers.0.self_attn.q_proj``.
        layer: the first number in the name; None outside the layers.
        kind: the last part of the name.
        shape: of the base weight as it is stored.
        r: the rank that was trained; None where rows or the whole weight were trained.
        ratio: ||W' - W||_F / ||W||_F, where W' is what the adapted model computes with. For DoRA
            that includes the rescaling by the magnitudes; infinite if W is zero and W' is not.
        singular_values: of s·B·A for LoRA and for DoRA, of W' - W otherwise; largest first,
            min(r, \\*shape) of them, and all zero where the product is zero up to rounding.
        effective_rank: exp of the Shannon entropy of the singular values divided by their sum
            (Roy and Vetterli 2007, "The effective rank"); 0 for no change.
        rank_for: percent to the smallest rank that keeps so much of the energy; 0 for no change.
        method: LoRA, DoRA, ``whole`` for modules_to_save, ``tokens`` for trainable_token_indices.
    """

    name: str
    layer: int | None
    kind: str
    shape: tuple[int, ...]
    r: int | None
    ratio: float
    singular_values: tuple[float, ...]
    effective_rank: float
    rank_for: Mapping[int, int]
    method: Method = "LoRA"

    @property
    def rank(self) -> int:
        """Numerical rank in float64, with the tolerance of ``torch.linalg.matrix_rank``.

        Of ``whole`` and ``tokens`` only what is above about 1e-6 of the largest is seen at all.
        """
        least = self.singular_values[0] * max(self.shape) * _EPS
        return sum(value > least for value in self.singular_values)

    @property
    def unchanged(self) -> bool:
        """No direction, and no more change than rounding (DoRA's stored norms) leaves."""
        return self.rank == 0 and self.ratio <= 1e-6

    @property
    def energy(self) -> tuple[float, ...]:
        """The share of the energy that rank 1, 2, ... keeps; empty for no change."""
        return tuple(_energy(self.singular_values))


def inspect_adapter(model: PeftModel, adapter: str = "default") -> list[ModuleChange]:
    """Measure what ``adapter`` changes in its base, one module at a time and in model order.

    The factors are float64 on the CPU whatever their dtype; norms of base weights add up in
    float64, and a bitsandbytes weight is dequantised for as long as it is measured. A module of
    modules_to_save costs a float64 Gram matrix of its shorter side. Biases that lora_bias or
    LoraConfig.bias train are not weighed.

    Raises:
        UserError: it is no LoRA adapter of this model, its ΔW is not s·B·A on the given base, it
            is merged, a weight is not in memory, or a number in it is not finite.
    """
    _check_config(model, adapter)
    changes: list[ModuleChange] = []
    with torch.no_grad():
        for path, module in model.get_base_model().named_modules():
            name = re.sub(r"\.(token_adapter|base_layer)(?=\.|$)", "", path)
            if isinstance(module, LoraLayer) and adapter in module.r:
                changes.append(_lora(name, module, adapter))
            elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
                changes += _whole(name, module.original_module, module.modules_to_save[adapter])
            elif isinstance(module, TrainableTokensLayer) and adapter in module.token_indices:
                changes.append(_tokens(name, module, adapter))
    return changes


def _check_config(model: PeftModel, adapter: str) -> None:
    """Refuse what the sums below would describe wrongly."""
    config = model.peft_config.get(adapter)
    if config is None:
        known = ", ".join(model.peft_config)
        raise _refused(adapter, f"is not on this model, expected one of {known}. Load it first.")
    if not isinstance(config, LoraConfig):
        raise _refused(adapter, f"is {type(config).__name__}, expected LoRA. Name another one.")
    start = str(config.init_lora_weights).lower()
    if start.startswith(_CHANGES_BASE):
        raise _refused(
            adapter,
            f"was saved with init_lora_weights={start}, which moved part of the base into it, so "
            "its B·A is not what training changed. Convert it: save_pretrained with "
            "path_initial_model_for_weight_conversion, as this recipe does.",
        )


def _refused(name: str, message: str) -> UserError:
    return UserError.single("adapter", f"{name} {message}")


def _lora(name: str, layer: Any, adapter: str) -> ModuleChange:
    """LoRA or DoRA on a Linear, an Embedding or a parameter of two dimensions."""
    embedded = adapter in layer.lora_embedding_A
    variant = layer.lora_variant.get(adapter)
    dora = isinstance(variant, DoraLinearVariant)
    known = variant is None or dora or type(variant).__name__ in _PLAIN_VARIANTS
    linear = embedded or (
        isinstance(layer.lora_A[adapter], nn.Linear) and hasattr(layer.get_base_layer(), "weight")
    )
    if not known or not linear or getattr(layer, "num_experts", 1) > 1:
        what = type(layer if known else variant).__name__
        raise _refused(name, f"is adapted by {what}, whose ΔW is not s·B·A. Nothing to do here.")
    if layer.merged:
        raise _refused(name, "has the adapter merged into it. Call unmerge_adapter() first.")
    if embedded:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if a.is_meta or not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise _refused(name, "holds NaN or infinity, or is not in memory. Use another copy.")
    weight = (
        layer.get_param()
        if isinstance(layer, ParamWrapper)
        else dequantize_module_weight(layer.get_base_layer())
    )
    size = _norm(name, weight)
    scaling = float(layer.scaling[adapter])
    values = product_spectrum(a, b, scaling=scaling)
    change = math.hypot(*values)
    if dora:
        # An embedding is stored as (in, out) and peft takes its norms down the vocabulary.
        stored = weight.T if embedded or layer.fan_in_fan_out else weight
        magnitude = layer.lora_magnitude_vector[adapter].weight
        change = _dora_change(stored, a, b, scaling=scaling, magnitude=magnitude)
    return _change(
        name,
        tuple(weight.shape),
        values,
        r=int(layer.r[adapter]),
        ratio=_ratio(change, size),
        method="DoRA" if dora else "LoRA",
    )


def product_spectrum(a: Tensor, b: Tensor, *, scaling: float) -> list[float]:
    """Singular values of scaling·B·A, largest first, without making it.

    A product below 1e-6 of ||B||·||A|| is zero: what is left then is the rounding of float32, as
    in an untrained PiSSA that was converted. ``broken`` in ``adapter_folder`` has the same rule.

    Args:
        a: (r, in), any floating dtype.
        b: (out, r), any floating dtype.
    """
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    core = torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
    if torch.linalg.norm(core) <= 1e-6 * torch.linalg.norm(a) * torch.linalg.norm(b):
        return [0.0] * min(core.shape)
    values: list[float] = (abs(scaling) * torch.linalg.svdvals(core)).tolist()
    return values


def _dora_change(
    weight: Tensor, a: Tensor, b: Tensor, *, scaling: float, magnitude: Tensor
) -> float:
    """||W' - W||_F of W' = m·(W + s·B·A)/||W + s·B·A||, norms along each row of (out, in).

    Liu et al. 2024, arXiv 2402.09353, equation 5, as peft's DoraLinearVariant merges it; its blocks
    of rows are float64.
    """
    total, start = 0.0, 0
    a, b, magnitude = (_double(each.to(weight.device)) for each in (a, b, magnitude))
    for block in _blocks(weight):
        rows = slice(start, start + len(block))
        start = rows.stop
        adapted = block + scaling * b[rows] @ a
        factor = magnitude.flatten()[rows] / torch.linalg.norm(adapted, dim=1)
        total += float((factor[:, None] * adapted - block).square().sum())
    return math.sqrt(total)


def _whole(name: str, before: nn.Module, after: nn.Module) -> Iterator[ModuleChange]:
    """Each parameter of a module that was trained whole: its weight, and a bias where it has one.

    Singular values are square roots of the eigenvalues of ΔᵀΔ in float64, so that one below about
    1e-6 of the largest cannot be told from rounding; it is 0.
    """
    for (path, old), new in zip(before.named_modules(), after.modules(), strict=True):
        for parameter, _ in new.named_parameters(recurse=False):
            parts = [name, path, "" if parameter == "weight" else parameter]
            full = ".".join(part for part in parts if part)
            was, now = _parameter(old, parameter), _parameter(new, parameter)
            size = _norm(full, was)
            values = _difference_spectrum(_flat(was), _flat(now))
            ratio = _ratio(math.hypot(*values), size)
            yield _change(full, tuple(was.shape), values, r=None, ratio=ratio, method="whole")


def _tokens(name: str, layer: Any, adapter: str) -> ModuleChange:
    """Rows of an embedding that trainable_token_indices replaced."""
    if layer.merged:
        raise _refused(name, "has the adapter merged into it. Call unmerge_adapter() first.")
    weight = dequantize_module_weight(layer.get_base_layer())
    size = _norm(name, weight)
    rows = torch.tensor(layer.token_indices[adapter], device=weight.device)
    values = _difference_spectrum(weight[rows], layer.trainable_tokens_delta[adapter])
    ratio = _ratio(math.hypot(*values), size)
    return _change(name, tuple(weight.shape), values, r=None, ratio=ratio, method="tokens")


def _parameter(module: nn.Module, name: str) -> Tensor:
    return dequantize_module_weight(module) if name == "weight" else module.get_parameter(name)


def _flat(weight: Tensor) -> Tensor:
    """As a matrix: a vector is one row."""
    return weight[None] if weight.ndim < 2 else weight.flatten(1)


def _difference_spectrum(before: Tensor, after: Tensor) -> list[float]:
    """Singular values of after - before, both (m, n), from the Gram matrix of the shorter side."""
    after = after.to(before.device)
    if before.shape[0] < before.shape[1]:
        before, after = before.T, after.T
    side = before.shape[1]
    gram, start = _double(before.new_zeros(side, side)), 0
    for block in _blocks(before):
        difference = _double(after[start : start + len(block)]) - block
        start += len(block)
        gram += difference.T @ difference
    if not torch.isfinite(gram).all():
        return [math.nan] * side
    squares = torch.linalg.eigvalsh(gram).flip(0)
    noise = squares[0].clamp(min=0) * max(before.shape) * _EPS
    values: list[float] = torch.where(squares > noise, squares, 0).sqrt().tolist()
    return values


def _blocks(matrix: Tensor) -> Iterator[Tensor]:
    """Some rows of (m, n) at a time, in float64: a copy of the whole could be gigabytes."""
    rows = max(1, _BLOCK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), rows):
        yield _double(matrix[start : start + rows])


def _double(tensor: Tensor) -> Tensor:
    """float64, where the tensor is or, of a device that has none, on the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _norm(name: str, weight: Tensor) -> float:
    """||W||_F."""
    if weight.is_meta:
        raise _refused(name, "has no base weight in memory. Load the base on one device.")
    return math.sqrt(sum(float(block.square().sum()) for block in _blocks(_flat(weight))))


def _ratio(change: float, size: float) -> float:
    if change == 0:
        return 0.0
    return change / size if size else math.inf


def _change(
    name: str,
    shape: tuple[int, ...],
    values: Sequence[float],
    *,
    r: int | None,
    ratio: float,
    method: Method,
) -> ModuleChange:
    """Everything that follows from the singular values."""
    if math.isnan(ratio) or not all(map(math.isfinite, values)):
        raise _refused(name, "holds NaN or infinity. Use another copy.")
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    parts = name.split(".")
    kind = ".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]
    total = sum(values)
    shares = [value / total for value in values if value > 0]
    return ModuleChange(
        name=name,
        layer=int(number[1]) if number else None,
        kind=kind,
        shape=shape,
        r=r,
        ratio=ratio,
        singular_values=tuple(values),
        effective_rank=math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0,
        rank_for={percent: _rank_for(values, percent) for percent in PERCENTS},
        method=method,
    )


def _energy(values: Sequence[float]) -> list[float]:
    """Cumulative share of the squares; nothing if all are zero."""
    squares = list(accumulate(value * value for value in values))
    return [square / squares[-1] for square in squares if squares[-1] > 0]


def _rank_for(values: Sequence[float], percent: int) -> int:
    """The smallest k whose k largest values keep so much energy; 0 if there is none to keep."""
    kept = _energy(values)
    return 1 + sum(share < percent / 100 - _ROUNDING for share in kept) if kept else 0
