"""Several adapters of one base become one, through peft, and the result is verified like any."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

import recipe
from recipe.answerer import Answerer, adapter_folder
from recipe.data.fingerprint import template_sha256, tokenizer_sha256
from recipe.sealed import whole_folder
from recipe.settings import UserError
from recipe.sharing.adapter_folder import write_receipt
from recipe.sharing.probes import encode_probes, make_probes, next_token_logits
from recipe.sharing.receipt import Receipt
from recipe.sharing.verification import Verification
from recipe.verify import verified

COMBINATIONS = ("linear", "cat", "svd")
_NAME = "combined"


@dataclass(frozen=True)
class Combination:
    """What to make: ``combination_type`` and ``svd_rank`` are peft's."""

    adapters: Sequence[str]
    weights: Sequence[float]
    combination_type: str
    svd_rank: int | None = None


def combine(asked: Combination, output: Path, *, model: str | None, runs: Path) -> list[str]:
    """Write the combined adapter to ``output``; return lines for the screen.

    Raises:
        UserError: ``output`` is taken, an adapter is of another base or template, or peft refuses.
        RunFailed: one of the adapters, or the result, fails a check.
    """
    if output.exists():
        raise UserError.single("--output", f"{output} exists already. Name another folder.")
    first = verified(asked.adapters[0], model=model, runs=runs)
    receipts = [_proven(first)]
    names = ["default"]
    for number, adapter in enumerate(asked.adapters[1:], start=1):
        receipts.append(_load_beside(first.model, adapter, number))
        names.append(f"number_{number}")
    _check_same(receipts, asked.adapters)
    _add(first.model, names, asked)
    error = _distance_from_sum(first.model, names, asked.weights)
    with whole_folder(output) as staged:
        _save(first, staged, receipts[0], asked)
    verified(str(output), model=model, runs=runs)
    parts = " + ".join(f"{w:g}·{a}" for w, a in zip(asked.weights, asked.adapters, strict=True))
    return [
        f"combined   {parts} → {output} · {asked.combination_type}, "
        f"r={first.model.peft_config[_NAME].r}",
        f"ΔW         differs from the weighted sum of the adapters' ΔW by {error:.2%}"
        + _why(asked.combination_type, error),
        "verified   the folder, loaded anew, answers the probes as when it was made",
    ]


def _why(combination_type: str, error: float) -> str:
    if error < 1e-4:
        return ""
    if combination_type == "linear":
        return ": peft's linear adds A's and B's, whose product has cross terms; cat has none"
    return ": what the lower rank cannot hold; cat loses nothing"


def _proven(answerer: Answerer) -> Receipt:
    assert answerer.verification is not None
    return _receipt(answerer.verification)


def _receipt(verification: Verification) -> Receipt:
    if verification.unproven or verification.receipt is None:
        raise UserError.single(
            "adapter",
            f"{verification.folder} is unproven ({verification.unproven}), so nothing says which "
            "base and template the result would belong to. Combine adapters of this recipe.",
        )
    return verification.receipt


def _load_beside(model: PeftModel, adapter: str, number: int) -> Receipt:
    verification = Verification(adapter_folder(adapter))
    lora = verification.files()
    verification.tensors(model.get_base_model().config, lora)
    receipt = _receipt(verification)
    model.load_adapter(str(verification.folder), adapter_name=f"number_{number}")
    return receipt


def _check_same(receipts: Sequence[Receipt], adapters: Sequence[str]) -> None:
    def identity(receipt: Receipt) -> dict[str, str]:
        assert receipt.proof is not None
        return {
            "base": receipt.proof.base_sha256,
            "tokenizer": receipt.proof.tokenizer_sha256,
            "template": receipt.proof.template_sha256,
        }

    for adapter, receipt in zip(adapters[1:], receipts[1:], strict=True):
        for what, sha256 in identity(receipt).items():
            if sha256 != identity(receipts[0])[what]:
                raise UserError.single(
                    "adapter",
                    f"{adapter} was trained with another {what} than {adapters[0]}. Combine "
                    "adapters of one base and template.",
                )


def _add(model: PeftModel, names: Sequence[str], asked: Combination) -> None:
    try:
        model.base_model.add_weighted_adapter(
            list(names),
            list(asked.weights),
            _NAME,
            combination_type=asked.combination_type,
            svd_rank=asked.svd_rank,
        )
    except (ValueError, NotImplementedError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError.single(
            "--combination-type",
            f"peft refuses {asked.combination_type}: {reason}. Try cat or svd.",
        ) from error
    model.set_adapter(_NAME)


def _distance_from_sum(model: PeftModel, names: Sequence[str], weights: Sequence[float]) -> float:
    """||ΔW - Σ w·ΔW|| / ||Σ w·ΔW|| over all modules, one at a time, in float32."""
    wrong, whole = 0.0, 0.0
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or _NAME not in {
            *layer.lora_A,
            *layer.lora_embedding_A,
        }:
            continue
        there = [(n, w) for n, w in zip(names, weights, strict=True) if n in layer.scaling]
        with torch.no_grad():
            wanted = sum(weight * layer.get_delta_weight(name) for name, weight in there)
            wrong += float((layer.get_delta_weight(_NAME) - wanted).square().sum())
            whole += float(wanted.square().sum())
    return float((wrong / whole) ** 0.5) if whole else 0.0


def _save(first: Answerer, folder: Path, receipt: Receipt, asked: Combination) -> None:
    """As plain PEFT files; peft puts an adapter that is not called default into a subfolder."""
    model = first.model
    model.save_pretrained(
        str(folder), selected_adapters=[_NAME], save_embedding_layers=False, safe_serialization=True
    )
    for file in (folder / _NAME).iterdir():
        file.rename(folder / file.name)
    (folder / _NAME).rmdir()
    texts, rows = encode_probes(first.template, first.tokenizer)
    tuned = next_token_logits(model, rows)
    with model.disable_adapter():
        base = next_token_logits(model, rows)
    assert receipt.proof is not None
    write_receipt(
        folder,
        _combined_receipt(first, receipt, asked, make_probes(texts, rows, base=base, tuned=tuned)),
    )


def _combined_receipt(
    first: Answerer, receipt: Receipt, asked: Combination, probes: Sequence[Any]
) -> dict[str, Any]:
    assert receipt.proof is not None
    return {
        "recipe": recipe.__version__,
        "base": receipt.base.model_dump(
            include={"name_or_path", "revision", "dtype", "quantization"}
        ),
        "template": receipt.template,
        "combined": [
            {"adapter": adapter, "weight": weight, "combination_type": asked.combination_type}
            for adapter, weight in zip(asked.adapters, asked.weights, strict=True)
        ],
        "versions": receipt.versions,
        "proof": {
            "base_sha256": receipt.proof.base_sha256,
            "tokenizer_sha256": tokenizer_sha256(first.tokenizer),
            "template_sha256": template_sha256(first.template),
            "probes": [probe.model_dump() for probe in probes],
        },
    }
