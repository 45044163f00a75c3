"""A plain model out of base and adapter, with a certificate of what that lost."""

import gc
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from recipe.answerer import Answerer, load_full_precision, load_model
from recipe.data.neutral import neutral_windows
from recipe.sealed import whole_folder
from recipe.settings import RunFailed, UserError
from recipe.sharing.certificate import (
    CERTIFICATE,
    Certificate,
    certify,
    limits_for,
    rebatching_difference,
    window_logits,
)
from recipe.sharing.merging import merge_for_good
from recipe.sharing.tensors import WEIGHTS
from recipe.verify import verified

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def merge(
    adapter: str | None, output: Path, *, dtype: str | None, model: str | None, runs: Path
) -> list[str]:
    """Write the merged model to ``output`` and return the certificate, as lines for the screen.

    The adapter is verified first. The folder appears only if the merged model, loaded from its
    files, is as good as base and adapter within the limits for its dtype.

    Raises:
        UserError: ``output`` is taken, or there is no such adapter or base.
        RunFailed: the adapter is not what it was, or the merged model differs too much.
    """
    if output.exists():
        raise UserError.single("--output", f"{output} exists already. Name another folder.")
    answerer = verified(adapter, model=model, runs=runs)
    dtype = dtype or _dtype_of(answerer.model)
    windows = neutral_windows(answerer.tokenizer)
    trained = window_logits(answerer.model, windows)
    quantized = bool(getattr(answerer.model.get_base_model(), "is_quantized", False))
    if quantized:
        answerer = load_full_precision(answerer, model)
    before = window_logits(answerer.model, windows) if quantized else trained
    with answerer.model.disable_adapter():
        rebatched = rebatching_difference(answerer.model, windows)
    computed_in = answerer.model.get_base_model().dtype
    with whole_folder(output) as staged:
        _save(answerer, staged, DTYPES[dtype])
        answerer = replace(answerer, model=None)  # memory for what is loaded now
        gc.collect()
        after = _answers_of(staged, dtype, windows)
        certificate = certify(windows, before=before, after=after)
        lost = certify(windows, before=trained, after=after) if quantized else None
        lines = [
            f"merged     {answerer.folder} → {output} · {dtype}",
            *_unproven(answerer),
            f"against    base with adapter: {certificate.in_words()}",
            "yardstick  the base alone, in a padded batch and row by row: logits differ by at most "
            f"{rebatched:.2g}",
        ]
        if lost:
            lines.append(f"against    the quantised base it was trained on: {lost.in_words()}")
        if beyond := limits_for(computed_in, DTYPES[dtype]).exceeded(
            certificate, rebatched=rebatched
        ):
            raise RunFailed("\n".join([*lines, *_refusal(beyond, dtype)]))
        _certify_folder(staged, answerer, dtype, certificate, lost, rebatched)
    return lines


def _unproven(answerer: Answerer) -> list[str]:
    assert answerer.verification is not None
    reason = answerer.verification.unproven
    return [f"unproven   {reason}, so nothing says that this is what was trained"] if reason else []


def _dtype_of(model: PeftModel) -> str:
    """The base's own; that of its unquantised parts where it is quantised."""
    name = str(model.get_base_model().dtype).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _save(answerer: Answerer, folder: Path, dtype: torch.dtype) -> None:
    """Merge and write; the model in memory is merged too, and no longer what it was."""
    plain = merge_for_good(answerer.model, dtype)
    plain.config.use_cache = True
    plain.save_pretrained(folder, safe_serialization=True)
    answerer.tokenizer.save_pretrained(folder)


def _answers_of(folder: Path, dtype: str, windows: list[list[int]]) -> torch.Tensor:
    try:
        return window_logits(load_model(folder, dtype), windows)
    except UserError as error:  # it is our folder, and no fault of the user's
        said = str(error).replace(str(folder), "it")
        raise RunFailed(f"not merged: what was written cannot be loaded again: {said}") from error


def _refusal(beyond: list[str], dtype: str) -> list[str]:
    remedy = "Merge to float32." if dtype != "float32" else "Use the adapter on its base instead."
    return [f"not merged: {line}. {remedy}" for line in beyond]


def _certify_folder(
    folder: Path,
    answerer: Answerer,
    dtype: str,
    certificate: Certificate,
    lost: Certificate | None,
    rebatched: float,
) -> None:
    assert answerer.folder is not None
    assert answerer.verification is not None
    receipt = answerer.verification.receipt
    weights = hashlib.sha256((answerer.folder / WEIGHTS).read_bytes()).hexdigest()
    content: dict[str, Any] = {
        "template": receipt.template if receipt else None,
        "dtype": dtype,
        "adapter_sha256": weights,
        "base": receipt.base.name_or_path if receipt else None,
        "against_adapter": certificate.model_dump(),
        "against_quantized_training": lost.model_dump() if lost else None,
        "base_rebatched": rebatched,
        "versions": {"torch": torch.__version__},
    }
    (folder / CERTIFICATE).write_text(json.dumps(content, indent=1) + "\n")
