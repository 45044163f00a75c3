"""LoRA on a base model: any field of ``peft.LoraConfig``, counted against the closed form."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from recipe.model.cpu_attention import attend_at_once
from recipe.model.dropout import quicken
from recipe.model.last_layer import end_where_nothing_is_predicted
from recipe.model.lora_linear import join_adapters
from recipe.model.quantization import kind_of
from recipe.model.rms_norm import shorten_norms
from recipe.model.swiglu import keep_two_factors
from recipe.settings import UserError, plain

# These write part of the base's weights into the adapter at its start and change the base.
_CHANGES_BASE = ("pissa", "olora")


def add_lora(
    base: PreTrainedModel,
    lora: Mapping[str, Any],
    *,
    mixed_precision: bool = False,
    revision: str | None = None,
) -> PeftModel:
    """Wrap ``base`` with a fresh adapter; the base is frozen.

    The LoRA matrices are float32. A module that is trained whole keeps the base's dtype, unless
    ``mixed_precision``: a gradient scaler refuses 16-bit weights, and autocast casts float32 ones.

    Args:
        revision: the base's commit for adapter_config.json; without it AutoPeftModel would put the
            adapter on whatever the main branch is then.

    Raises:
        UserError: a value that LoraConfig or the base refuses; an unknown target module is told
            with the modules that could be meant.
    """
    targets = lora.get("target_modules")
    if isinstance(targets, str) and "," in targets and "[" not in targets and "(" not in targets:
        raise UserError.single(
            "lora.target_modules", f"{targets} is one text. Write a list: [{targets}]."
        )
    for key in ("target_modules", "modules_to_save"):
        _check_names(base, key, lora.get(key))
    try:
        config = LoraConfig(**{"task_type": "CAUSAL_LM", **plain(lora)})
        model = get_peft_model(base, config, revision=revision)
    except (ValueError, TypeError, re.error, NotImplementedError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError.single(
            "lora", f"peft refuses it: {reason}. Correct the value or leave it out."
        ) from error
    if mixed_precision:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    quicken(model)
    join_adapters(model)
    attend_at_once(model)
    keep_two_factors(model)
    shorten_norms(model)
    end_where_nothing_is_predicted(model)
    # "auto" would ask the hub for the base's vocabulary size at every checkpoint.
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    check_closed_form(model)
    return model


def give_memory(model: PeftModel) -> None:
    """To an adapter on a base without weights, which has no values either.

    FSDP2 hands it those of the process that has them; but accelerate tells an optimizer's
    parameters by where they lie in memory, and all that lie nowhere would be one.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter.is_meta:
                values = torch.zeros_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(values))


def _check_names(base: PreTrainedModel, key: str, asked: object) -> None:
    """peft is content when one name of a list matches, and trains only that one."""
    names = {name for name, _ in base.named_modules() if name}
    possible = sorted(
        {name.split(".")[-1] for name, m in base.named_modules() if isinstance(m, nn.Linear)}
    )
    missing = [
        str(one)
        for one in (asked if isinstance(asked, Sequence) and not isinstance(asked, str) else ())
        if not any(name == one or name.endswith(f".{one}") for name in names)
    ]
    if missing:
        raise UserError.single(
            f"lora.{key}",
            f"{', '.join(missing)} matches no module of this model. Choose among "
            f"{', '.join(possible)}"
            + (", or write all-linear." if key == "target_modules" else "."),
        )


def trainable_parameters(model: nn.Module) -> int:
    """How many parameters get a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def total_parameters(model: nn.Module) -> int:
    """Parameters of the base; a 4-bit weight, stored two to a byte, counts what it stands for."""
    return sum(
        p.numel() * (2 if type(p).__name__ == "Params4bit" and p.dtype == torch.uint8 else 1)
        for name, p in model.named_parameters()
        if ".lora_" not in name and ".modules_to_save." not in name
    )


def closed_form(model: nn.Module) -> int:
    """Parameters that plain LoRA adds: the sum of r·(in + out) over the target matrices.

    Hu et al. 2021, arXiv 2106.09685, section 4.1: ΔW = BA with B of (out, r) and A of (r, in).
    """
    return sum(
        rank * (layer.in_features + layer.out_features)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for rank in layer.r.values()
    )


def check_closed_form(model: PeftModel) -> None:
    """Count the LoRA matrices that were made and compare them with the closed form."""
    kinds = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    made = sum(
        p.numel()
        for name, p in model.named_parameters()
        if any(f".{kind}." in name for kind in kinds) and not name.endswith(".bias")
    )
    if made != closed_form(model):
        raise AssertionError(f"{made} LoRA parameters, but r·(in + out) gives {closed_form(model)}")


def save_portable(
    model: PeftModel,
    folder: Path,
    initial: Path | None,
    *,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapter as plain PEFT files that work on the unchanged base.

    Args:
        state: ``whole_adapter`` of a model whose weights are sharded.
        initial: what ``save_initial`` wrote; PiSSA and OLoRA trained on a changed base, so their
            start is subtracted and the adapter becomes a plain LoRA of twice the rank.
    """
    model.save_pretrained(
        str(folder),
        safe_serialization=True,
        path_initial_model_for_weight_conversion=str(initial) if initial else None,
        **({"state_dict": state} if state else {}),
    )


def save_initial(model: PeftModel) -> tempfile.TemporaryDirectory[str] | None:
    """Keep the start of an adapter whose initialisation changed the base; None for all others.

    Raises:
        UserError: peft could not turn such an adapter into a plain LoRA when it is trained.
    """
    config = model.peft_config["default"]
    kind = config.init_lora_weights
    if not isinstance(kind, str) or not kind.startswith(_CHANGES_BASE):
        return None
    if config.use_dora or config.modules_to_save or config.trainable_token_indices:
        raise UserError.single(
            "lora.init_lora_weights",
            f"{kind} changes the base, and together with use_dora, modules_to_save or "
            "trainable_token_indices peft cannot make it a plain adapter. Leave one out.",
        )
    kept = tempfile.TemporaryDirectory(prefix="recipe-initial-")
    # peft subtracts the start only if it is labelled as an ordinary adapter.
    config.init_lora_weights = True
    model.save_pretrained(kept.name, safe_serialization=True)
    config.init_lora_weights = kind
    _rehearse_conversion(model, Path(kept.name), kind)
    return kept


def _rehearse_conversion(model: PeftModel, initial: Path, kind: str) -> None:
    """Convert once before training: what peft refuses must not be found out after it."""
    with tempfile.TemporaryDirectory(prefix="recipe-rehearsal-") as folder:
        try:
            save_portable(model, Path(folder), initial)
        except (ValueError, KeyError, RuntimeError) as error:
            raise UserError.single(
                "lora.init_lora_weights",
                f"{kind} with these settings: peft refuses: {error}. Leave one out.",
            ) from error
        saved = set(load_file(Path(folder) / "adapter_model.safetensors"))
    if saved != set(get_peft_model_state_dict(model, save_embedding_layers=False)):
        raise UserError.single(
            "lora.init_lora_weights",
            f"{kind} changes the base, and with these lora.target_modules peft cannot make it a "
            "plain adapter. Leave one out.",
        )


def dtype_plan(model: PeftModel, *, fp16: bool, bf16: bool) -> dict[str, str]:
    """Which dtype holds the base, the adapter and the computation, for the screen and manifest."""

    def dtypes(trainable: bool) -> str:
        found = {kind_of(p) for p in model.parameters() if p.requires_grad == trainable}
        return ", ".join(sorted(found))

    base = dtypes(trainable=False)
    compute = "float16 autocast" if fp16 else "bfloat16 autocast" if bf16 else f"as stored ({base})"
    asked = getattr(model.get_base_model().config, "quantization_config", None)
    if asked is not None and asked.load_in_4bit:
        in_layers = str(asked.bnb_4bit_compute_dtype).removeprefix("torch.")
        compute = f"{in_layers} in the 4-bit layers, else {compute}"
    return {"base": base, "adapter": dtypes(trainable=True), "compute": compute}
