"""What the tensors of an adapter must be: those its base needs, finite, and not without effect."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

WEIGHTS = "adapter_model.safetensors"
_COPIED = tuple(
    f"{module}.{layer}weight"
    for module in ("embed_tokens", "lm_head")
    for layer in ("", "base_layer.")
)
_SHOWN = 3

Shapes = dict[str, tuple[int, ...]]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the adapter in ``folder``, by name, on the CPU.

    Raises:
        ValueError: they cannot be read as safetensors.
    """
    try:
        return dict(sorted(load_file(folder / WEIGHTS).items()))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{WEIGHTS} cannot be read ({error})") from error


def expected_shapes(config: LlamaConfig, lora: LoraConfig) -> Shapes:
    """Name and shape of each tensor that stock peft saves for ``lora`` on such a base.

    Made on the meta device, so it needs no weights and no memory.

    Raises:
        ValueError: peft refuses ``lora`` for this base.
    """
    lora = copy.deepcopy(lora)
    lora.init_lora_weights = False  # values do not matter, and some ways look for data
    try:
        with torch.device("meta"):
            model = PeftModel(LlamaForCausalLM(copy.deepcopy(config)), lora)
    except Exception as error:  # what a configuration from elsewhere can do is documented nowhere
        raise ValueError(" ".join(str(error).split()).rstrip(".")[:240]) from error
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def base_copies(
    tensors: Mapping[str, torch.Tensor], expected: Shapes, config: LlamaConfig
) -> list[str]:
    """Embeddings and heads of the base that stock peft saves along where they are targets."""
    shape = (config.vocab_size, config.hidden_size)
    return sorted(
        name
        for name in tensors.keys() - expected.keys()
        if name.endswith(_COPIED) and tuple(tensors[name].shape) == shape
    )


def wrong_names(tensors: Mapping[str, torch.Tensor], expected: Shapes) -> list[str]:
    """What is missing and what nothing of the base takes; peft only warns, or says nothing."""
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    return [
        f"{len(names)} tensor{'s'[: len(names) > 1]} {what}: {_some(names)}"
        for names, what in ((missing, "missing"), (unknown, "that nothing of the base takes"))
        if names
    ]


def wrong_shapes(tensors: Mapping[str, torch.Tensor], expected: Shapes) -> list[str]:
    """Tensors of another shape than the base and the rank need, told apart from A for B."""
    wrong = [
        name
        for name in sorted(tensors.keys() & expected.keys())
        if tuple(tensors[name].shape) != expected[name]
    ]
    if not wrong:
        return []
    swapped = [
        name
        for name in wrong
        if (other := partner(name)) in tensors
        and tuple(tensors[name].shape) == expected.get(other)
        and tuple(tensors[other].shape) == expected[name]
    ]
    if swapped:
        return [f"lora_A and lora_B are swapped in {_counted(swapped)}"]
    first = wrong[0]
    return [
        f"{_counted(wrong)} of another shape than needed: {tuple(tensors[first].shape)} where "
        f"{expected[first]} was expected"
    ]


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Tensors that hold NaN or infinity."""
    names = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    return [f"NaN or infinity in {_counted(names)}"] if names else []


def without_effect(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Modules whose product B·A is zero, so that they leave the base as it is."""
    names = [
        name
        for name, tensor in tensors.items()
        if (other := tensors.get(partner(name))) is not None
        and tensor.ndim == other.ndim == 2
        and tensor.shape[0] == other.shape[1]  # other shapes are told by wrong_shapes
        and _product_is_zero(tensor, other)
    ]
    return [f"B·A is zero for {_counted(names)}, so it changes nothing there"] if names else []


def partner(name: str) -> str:
    """The B that belongs to an A; nothing for every other tensor."""
    for kind in (".lora_A.", ".lora_embedding_A"):
        if kind in name:
            return name.replace(kind, kind.replace("A", "B"))
    return ""


def _product_is_zero(a: torch.Tensor, b: torch.Tensor) -> bool:
    """||B·A|| against ||B||·||A||, from (r, r) products: the full matrix is never made.

    An untrained adapter has B = 0; an untrained PiSSA, converted, has B·A = 0 up to rounding.
    """
    a, b = a.double(), b.double()
    left, right = b.T @ b, a @ a.T
    return bool((left * right.T).sum() <= 1e-12 * left.trace() * right.trace())


def _counted(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
