"""An adapter is saved whole, reopened and checked before a run says that it succeeded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel

from recipe.model.fingerprint import tensors_sha256
from recipe.model.lora import save_portable
from recipe.model.shards import saved_state
from recipe.sealed import whole_folder
from recipe.settings import RunFailed, UserError
from recipe.sharing.receipt import RECEIPT, lora_fields
from recipe.sharing.tensors import WEIGHTS, not_finite, read_tensors, without_effect


def save_adapter(
    model: PeftModel,
    folder: Path,
    receipt: dict[str, Any],
    *,
    initial: Path | None,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the PEFT files and ``recipe.json``; the folder appears only if they reopen well.

    Args:
        state: see ``recipe.model.lora.save_portable``.
        receipt: the fields of ``recipe.sharing.receipt.Receipt``; what is of the saved
            files in ``proof`` is filled in here.
        initial: see ``recipe.model.lora.save_portable``.

    Raises:
        RunFailed: the files differ from the model, or hold an adapter that does nothing.
    """
    with whole_folder(folder) as staged:
        save_portable(model, staged, initial, state=state)
        write_receipt(staged, receipt)
        trained = saved_state(model, state)
        problems = broken(trained, staged, converted=initial is not None)
        if problems:
            raise RunFailed("the saved adapter is not usable:\n" + "\n".join(problems))


def write_receipt(folder: Path, receipt: dict[str, Any]) -> None:
    """``recipe.json`` beside the PEFT files, whose configuration becomes part of the proof."""
    saved = {"lora": lora_fields(folder), "weights_sha256": tensors_sha256(read_tensors(folder))}
    proof = {**receipt["proof"], **saved}
    (folder / RECEIPT).write_text(json.dumps({**receipt, "proof": proof}, indent=1) + "\n")


def broken(
    trained: Mapping[str, torch.Tensor], folder: Path, *, converted: bool = False
) -> list[str]:
    """Say what is wrong with the adapter in ``folder``, which should be ``trained``.

    Args:
        converted: PiSSA and OLoRA are saved with twice the rank, so values are not compared.
    """
    problems = unlike(trained, folder, converted=converted)
    for line in without_effect(read_tensors(folder)):
        problems.append(
            f"{line}. Was the learning rate 0 in every step, as in a run shorter than "
            "training.warmup_steps?"
        )
    return sorted(problems)


def unlike(
    expected: Mapping[str, torch.Tensor], folder: Path, *, converted: bool = False
) -> list[str]:
    """Say how the files in ``folder`` differ from an adapter's ``saved_state``, or are not
    finite.
    """
    PeftConfig.from_pretrained(str(folder))
    saved = read_tensors(folder)
    problems = [f"{name}: missing" for name in expected.keys() - saved.keys()]
    problems += [f"{name}: not part of the model" for name in saved.keys() - expected.keys()]
    problems += not_finite(saved)
    if not converted:
        problems += [
            f"{name}: differs from the trained values"
            for name in sorted(saved.keys() & expected.keys())
            if not _same(saved[name], expected[name].cpu())
        ]
    return problems


def _same(saved: torch.Tensor, trained: torch.Tensor) -> bool:
    """NaN is told once, by ``not_finite``."""
    return torch.equal(saved.nan_to_num(), trained.nan_to_num())


def read_config(folder: Path) -> LoraConfig:
    """adapter_config.json of a LoRA adapter; nothing that it names is imported.

    Raises:
        ValueError: it is not that.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # what broken files raise is documented nowhere
        raise ValueError(f"adapter_config.json cannot be read ({_reason(error)})") from error
    if not isinstance(config, LoraConfig) or config.megatron_config:
        raise ValueError(
            "adapter_config.json is not of a LoRA adapter, or names modules to import "
            "(megatron_config)"
        )
    return config


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
        return PeftModel.from_pretrained(base, str(folder), config=read_config(folder))
    except Exception as error:  # documented nowhere either
        raise UserError.single(
            "adapter", f"{folder} could not be loaded ({_reason(error)}). Use another copy."
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:240]


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
