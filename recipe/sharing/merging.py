"""An adapter added into the weights of its base: W becomes W + (alpha/r)·B·A (Hu et al. 2021, 4.1).

The sum of each module is computed in float32 by peft's own code and rounded once, to the dtype of
the merged model; one module at a time, so that no second copy of the model is needed.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import LlamaForCausalLM

from recipe.settings import RunFailed


def merge_for_good(model: PeftModel, dtype: torch.dtype) -> LlamaForCausalLM:
    """The plain model with the active adapter in its weights, all of it in ``dtype``.

    A head that shares its weights with the embedding gets its own where the adapter changed one of
    the two: the sum would reach both.

    Raises:
        RunFailed: a merged weight is NaN or infinite, or peft cannot merge this kind of adapter.
    """
    _untie(model)
    for layer in _layers(model):
        _merge(layer)
        weight = layer.get_base_layer().weight
        weight.data = weight.data.to(dtype)
    with warnings.catch_warnings(action="ignore"):
        # Nothing is left to add, it says; it takes the layers off.
        plain: LlamaForCausalLM = model.merge_and_unload()
    plain.to(dtype)
    plain.config.dtype = dtype
    return plain


@contextmanager
def merged(model: PeftModel) -> Iterator[PeftModel]:
    """The active adapter lies in the base's weights while the block runs, and then no longer.

    The weights that change are kept and put back, so the base is the same to the bit; peft's own
    ``unmerge`` subtracts, and leaves the rounding of two sums.
    """
    layers = _layers(model)
    kept = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer, weight in zip(layers, kept, strict=True):
            layer.get_base_layer().weight.data = weight.clone()
            _merge(layer)
            now = layer.get_base_layer().weight
            now.data = now.data.to(weight.dtype)
        yield model
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.merged_adapters.clear()
            layer.get_base_layer().weight.data = weight


def _merge(layer: Any) -> None:
    """In float32; ``safe_merge`` refuses NaN and infinity."""
    weight = layer.get_base_layer().weight
    weight.data = weight.data.float()
    try:
        layer.merge(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise RunFailed(f"peft cannot merge it: {' '.join(str(error).split())}") from error


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _untie(model: PeftModel) -> None:
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    changed = any(
        isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) for module in (head, embedding)
    )
    # With ensure_weight_tying peft trains and merges the two as one.
    shared = any(config.ensure_weight_tying for config in model.peft_config.values())
    if not changed or shared or not base.config.tie_word_embeddings:
        return
    base.config.tie_word_embeddings = False
    plain = _base_of(head)
    plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)


def _base_of(module: Any) -> Any:
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module
