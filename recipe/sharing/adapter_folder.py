"""An adapter is saved whole, reopened and checked before a run says that it succeeded."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from recipe.model.lora import save_portable
from recipe.sealed import damage, whole_folder
from recipe.settings import ModelSettings, RunFailed, UserError

RECEIPT = "recipe.json"
WEIGHTS = "adapter_model.safetensors"
_TEMPLATES = ("alpaca", "chat", "raw")


def save_adapter(
    model: PeftModel, folder: Path, receipt: dict[str, Any], *, initial: Path | None
) -> None:
    """Write the PEFT files and ``recipe.json``; the folder appears only if they reopen well.

    Args:
        receipt: what a later load needs, ``base`` and ``template`` among it.
        initial: see ``recipe.model.lora.save_portable``.

    Raises:
        RunFailed: the files differ from the model, or hold an adapter that does nothing.
    """
    with whole_folder(folder) as staged:
        save_portable(model, staged, initial)
        (staged / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n")
        problems = broken(model, staged, converted=initial is not None)
        if problems:
            raise RunFailed("the saved adapter is not usable:\n" + "\n".join(problems))


def broken(model: PeftModel, folder: Path, *, converted: bool) -> list[str]:
    """Say what is wrong with the adapter in ``folder``, which should be ``model``'s.

    Args:
        converted: PiSSA and OLoRA are saved with twice the rank, so values are not compared.
    """
    PeftConfig.from_pretrained(str(folder))
    saved = load_file(folder / WEIGHTS)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    problems = [f"{name}: missing" for name in expected.keys() - saved.keys()]
    problems += [f"{name}: not part of the model" for name in saved.keys() - expected.keys()]
    for name, tensor in saved.items():
        if not torch.isfinite(tensor).all():
            problems.append(f"{name}: holds NaN or infinity")
        elif not converted and name in expected and not torch.equal(tensor, expected[name].cpu()):
            problems.append(f"{name}: differs from the trained values")
    zero = [
        name
        for name, tensor in saved.items()
        if (other := saved.get(_partner(name))) is not None and _product_is_zero(tensor, other)
    ]
    if zero:
        problems.append(
            f"{zero[0]} and {len(zero) - 1} more: B·A is zero, so it changes nothing. Was the "
            "learning rate 0 in every step, as in a run shorter than training.warmup_steps?"
        )
    return sorted(problems)


def _partner(name: str) -> str:
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


def read_receipt(folder: Path) -> dict[str, Any]:
    """``recipe.json`` of an adapter whose files are whole.

    Raises:
        UserError: no adapter of this recipe is there, a file of it changed, or it does not say
            which base and template it belongs to.
    """
    if not (folder / RECEIPT).is_file():
        found = f"holds no {RECEIPT}" if folder.is_dir() else "is no folder"
        raise UserError.single(
            "adapter", f"{folder} {found}. Name a run that was finished, or its adapter folder."
        )
    problems = damage(folder)
    if problems:
        raise UserError.single("adapter", f"{'; '.join(problems)}. Use another copy.")
    try:
        receipt: dict[str, Any] = json.loads((folder / RECEIPT).read_text())
        ModelSettings(**receipt["base"])
        template = receipt["template"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError.single(
            "adapter",
            f"{folder / RECEIPT} does not say which base and template the adapter belongs to "
            f"({type(error).__name__}). Use another copy.",
        ) from error
    if template not in _TEMPLATES:
        raise UserError.single(
            "adapter",
            f"{folder / RECEIPT} names the template {template!r}, expected one of "
            f"{', '.join(_TEMPLATES)}. Use another copy.",
        )
    return receipt


def load_adapter(base: Any, folder: Path) -> PeftModel:
    """Put the adapter in ``folder`` on ``base``.

    Raises:
        UserError: it is no LoRA adapter in safetensors that peft can put on this base.
    """
    if not (folder / WEIGHTS).is_file():
        raise UserError.single(
            "adapter", f"{folder} holds no {WEIGHTS}, and nothing else is read. Use another copy."
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # what broken files raise is documented nowhere
        raise _unloadable(folder, error) from error
    if not isinstance(config, LoraConfig) or config.megatron_config:
        raise UserError.single(
            "adapter",
            f"adapter_config.json of {folder} is not of a LoRA adapter, or names modules to import "
            "(megatron_config). Use another copy.",
        )
    try:
        return PeftModel.from_pretrained(base, str(folder), config=config)
    except Exception as error:
        raise _unloadable(folder, error) from error


def _unloadable(folder: Path, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:240]
    return UserError.single(
        "adapter", f"{folder} could not be loaded ({reason}). Use another copy."
    )


def newest_adapter(runs: Path) -> Path:
    """The adapter that was finished last under ``runs``.

    Raises:
        UserError: there is none.
    """
    finished = sorted(runs.glob(f"*/adapter/{RECEIPT}"), key=lambda file: file.stat().st_mtime_ns)
    if not finished:
        raise UserError.single(
            "adapter",
            f"no adapter under {runs}/ yet. Run `make train`, name one with ADAPTER=path, or ask "
            "the base with ADAPTER=none.",
        )
    return finished[-1].parent
