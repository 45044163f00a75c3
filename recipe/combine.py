"""Several adapters of one base become one, through peft, and the result is verified like any."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

import recipe
from recipe.answerer import Answerer, adapter_folder
from recipe.sealed import seal, whole_folder
from recipe.settings import RunFailed, UserError
from recipe.sharing.adapter_folder import write_receipt
from recipe.sharing.probes import Probe, encode_probes, make_probes, next_token_logits
from recipe.sharing.receipt import Receipt
from recipe.sharing.verification import NotVerified, Verification
from recipe.verify import verified

_NAME = "combined"
_ROUNDING = 1e-4


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
        try:
            receipts.append(_load_beside(first, receipts[0], adapter, number))
        except NotVerified as error:
            raise RunFailed(f"{adapter}: {error}") from error
        names.append(f"number_{number}")
    _check_kinds(first.model, asked.adapters)
    _add(first.model, names, asked)
    distance = _distance_from_sum(first.model, names, asked.weights)
    if asked.combination_type == "cat" and not distance < _ROUNDING:
        raise RunFailed(
            f"peft's cat is {distance:.2%} away from the weighted sum of these adapters, and "
            "should not be. Nothing was written; use svd."
        )
    with whole_folder(output) as staged:
        _save(first, staged, receipts, asked)
        seal(staged)  # as it will lie there
        verified(str(staged), model=model, runs=runs)
    parts = " + ".join(f"{w:g}·{a}" for w, a in zip(asked.weights, asked.adapters, strict=True))
    return [
        f"combined   {parts} → {output} · {asked.combination_type}, "
        f"r={first.model.peft_config[_NAME].r}",
        f"ΔW         differs from the weighted sum of the adapters' ΔW by {distance:.2%}"
        + _why(asked.combination_type, distance),
        "verified   the folder, loaded anew, answers the probes as when it was made",
    ]


def _why(combination_type: str, distance: float) -> str:
    if distance < _ROUNDING:
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


def _load_beside(first: Answerer, its: Receipt, adapter: str, number: int) -> Receipt:
    """Put another adapter on the first one's base, through every check."""
    verification = Verification(adapter_folder(adapter))
    lora = verification.files()
    receipt = _receipt(verification)
    _check_same(its, receipt, adapter)
    verification.tensors(first.model.get_base_model().config, lora)
    first.model.load_adapter(str(verification.folder), adapter_name=f"number_{number}")
    first.model.set_adapter(f"number_{number}")
    verification.answers(first.model, first.tokenizer, first.template)
    return receipt


def _check_kinds(model: PeftModel, adapters: Sequence[str]) -> None:
    """What peft would leave out of the sum without a word."""
    for adapter, config in zip(adapters, model.peft_config.values(), strict=True):
        for key in ("use_dora", "lora_bias", "trainable_token_indices", "modules_to_save"):
            if getattr(config, key, None):
                raise UserError.single(
                    "adapter",
                    f"{adapter} has {key}, which a sum of B·A does not hold. Merge it into the "
                    "base instead.",
                )


def _check_same(first: Receipt, other: Receipt, adapter: str) -> None:
    assert first.proof is not None
    assert other.proof is not None
    for what in ("base", "tokenizer", "template"):
        one, two = (getattr(proof, f"{what}_sha256") for proof in (first.proof, other.proof))
        if one != two:
            raise UserError.single(
                "adapter",
                f"{adapter} was trained with another {what} than the first adapter. Combine "
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
            f"peft refuses {asked.combination_type}: {reason}. Choose another.",
        ) from error
    config = model.peft_config[_NAME]
    if config.use_rslora:
        # peft takes the setting over, but has the scale of each adapter in the sum already.
        config.use_rslora = False
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and _NAME in layer.scaling:
                layer.scaling[_NAME] = config.lora_alpha / layer.r[_NAME]
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


def _save(first: Answerer, folder: Path, receipts: Sequence[Receipt], asked: Combination) -> None:
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
    probes = make_probes(texts, rows, base=base, tuned=tuned)
    write_receipt(folder, _combined_receipt(receipts, asked, probes))


def _combined_receipt(
    receipts: Sequence[Receipt], asked: Combination, probes: Sequence[Probe]
) -> dict[str, Any]:
    """The parts by the hashes of their tensors: where they lay is nobody else's business."""
    parts = [
        {"weights_sha256": receipt.proof.weights_sha256, "weight": weight}
        for receipt, weight in zip(receipts, asked.weights, strict=True)
        if receipt.proof
    ]
    first = receipts[0]
    assert first.proof is not None
    kept = {"base_sha256", "config", "tokenizer_sha256", "template_sha256"}
    return {
        "recipe": recipe.__version__,
        "base": first.base.model_dump(exclude={"attn_implementation"}),
        "template": first.template,
        "combination_type": asked.combination_type,
        "combined": parts,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "proof": {
            **first.proof.model_dump(include=kept),
            "probes": [probe.model_dump() for probe in probes],
        },
    }
