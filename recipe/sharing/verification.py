"""Whether an adapter still is what it was when it was trained, check by check.

The cheap checks run at every load: files, configuration, names, shapes and values of the tensors,
and the hashes of base, tokenizer and template. ``verify`` adds the probes: what base and tuned
model answer to fixed prompts, against what they answered when the adapter was saved.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import LlamaConfig, PreTrainedTokenizerBase

from recipe.data.fingerprint import template_sha256, tokenizer_sha256
from recipe.data.templates import Template
from recipe.model.fingerprint import computing_config, tensors_sha256, weights_sha256
from recipe.sealed import SEAL, damage
from recipe.settings import ModelSettings, Problem, UserError
from recipe.sharing.adapter_folder import read_config
from recipe.sharing.probes import (
    Difference,
    compare_probes,
    encode_probes,
    next_token_logits,
    tolerance,
    tuned_tolerance,
)
from recipe.sharing.receipt import (
    ADAPTER_CONFIG,
    RECEIPT,
    Receipt,
    lora_fields,
    read_receipt,
)
from recipe.sharing.tensors import (
    WEIGHTS,
    base_copies,
    expected_shapes,
    not_finite,
    read_tensors,
    without_effect,
    wrong_names,
    wrong_shapes,
)

# Reading one of these can run what it holds.
PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
_ESSENTIAL = {"lora_alpha", "r", "target_modules", "use_dora", "use_rslora"}
_REMEDY = "Use another copy, or train it anew."
# An adapter that moves the probes by less than this many tolerances could be changed unnoticed.
_SEEN = 10


class NotVerified(UserError):
    """An adapter failed a check; ``where`` of each problem is the name of the check."""


@dataclass
class Verification:
    """The checks of one adapter, in the order of the methods.

    ``passed`` are (check, what was found) pairs for the screen; ``told_apart`` is False where the
    adapter moves the probes so little that they could not tell it from another. Each method raises
    ``NotVerified`` with every problem of its stage, because the next stage needs it to be sound.
    """

    folder: Path
    receipt: Receipt | None = None
    passed: list[tuple[str, str]] = field(default_factory=list)
    told_apart: bool = True
    _problems: list[Problem] = field(default_factory=list)

    @property
    def unproven(self) -> str | None:
        """Why nothing says what the adapter should be; None where its receipt does."""
        if self.receipt is None:
            return f"it has no {RECEIPT}, as adapters saved by plain peft"
        return None if self.receipt.proof else f"its {RECEIPT} holds no proof"

    def files(self) -> LoraConfig:
        """Whole as sealed, no pickle, a configuration of LoRA, and the one that was trained.

        Raises:
            UserError: there is no adapter; that is no answer to whether it is sound.
        """
        # os.path, because Path's own raise where a name is too long for any file system.
        if not os.path.isfile(self.folder / ADAPTER_CONFIG):  # noqa: PTH113
            is_folder = os.path.isdir(self.folder)  # noqa: PTH112
            found = f"holds no {ADAPTER_CONFIG}" if is_folder else "is no folder"
            raise UserError.single(
                "adapter",
                f"{self.folder} {found}. Name a run that was finished, or its adapter folder.",
            )
        if any((self.folder / name).is_file() for name in (SEAL, RECEIPT)):
            self._check("whole", damage(self.folder), "every file as it was sealed")
        self._check("files", _unsafe_files(self.folder), "")
        self._stop()
        if (self.folder / RECEIPT).is_file():
            try:
                self.receipt = read_receipt(self.folder)
            except UserError as error:
                raise NotVerified(Problem("receipt", p.message) for p in error.problems) from error
        try:
            lora = read_config(self.folder)
        except ValueError as error:
            raise self._failed("config", str(error)) from error
        self._check("config", _not_finite_scaling(lora), "")
        self._stop()
        if self.receipt and self.receipt.proof:
            now, then = lora_fields(self.folder), self.receipt.proof.lora
            self._check("config", _differences(now, then), f"LoRA {_in_words(lora)}, as trained")
            self._stop()
        return lora

    def tensors(self, config: LlamaConfig, lora: LoraConfig) -> None:
        """Those that ``lora`` needs on such a base: names, shapes, finite, not without effect."""
        try:
            expected = expected_shapes(config, lora)
        except ValueError as error:
            raise self._failed("config", f"peft refuses it for this base: {error}") from error
        try:
            tensors = read_tensors(self.folder)
        except ValueError as error:
            raise self._failed("files", str(error)) from error
        copies = base_copies(tensors, expected, config)
        found = f"{len(tensors) - len(copies)} tensors, those the base needs"
        if copies:
            found += f", and peft's own copy of {', '.join(copies)}"
        tensors = {name: tensor for name, tensor in tensors.items() if name not in copies}
        self._check("keys", wrong_names(tensors, expected), found)
        self._check("shapes", wrong_shapes(tensors, expected), "as base and rank need them")
        self._check("finite", not_finite(tensors), "no NaN, no infinity")
        self._check("effect", without_effect(tensors), "B·A is zero nowhere")
        self._stop()
        if self.receipt and self.receipt.proof:
            found, saved = tensors_sha256(tensors), self.receipt.proof.weights_sha256
            wrong = "the tensors are not those that were saved: somebody changed or converted them"
            self._check("weights", [wrong] * (found != saved), f"as saved, sha256 {saved[:12]}…")
            self._stop()

    def base(self, base: Any, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        """The very weights, tokenizer and template that the adapter was trained with.

        Args:
            base: without the adapter, in the dtype and quantisation that the receipt names.
        """
        if self.receipt is None or self.receipt.proof is None:
            return
        proof = self.receipt.proof
        name = self.receipt.base.name_or_path
        self._check("base", _other_config(computing_config(base.config), proof.config), "")
        for check, found, trained, what in (
            ("base", weights_sha256(base), proof.base_sha256, "set of weights"),
            ("tokenizer", tokenizer_sha256(tokenizer), proof.tokenizer_sha256, "tokenizer"),
            (
                "template",
                template_sha256(template),
                proof.template_sha256,
                f"{template.name} template",
            ),
        ):
            wrong = (
                f"{tokenizer.name_or_path} has another {what} than the adapter was trained with "
                f"({name}): sha256 {found[:12]}… instead of {trained[:12]}…"
            )
            self._check(check, [wrong] * (found != trained), f"as trained, sha256 {trained[:12]}…")
        self._stop("Use the base it was trained with: name it with --model.")

    def answers(self, model: Any, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        """The probes' token ids, and their logits under the base and under the tuned model."""
        if self.receipt is None or self.receipt.proof is None:
            return
        probes = self.receipt.proof.probes
        texts, rows = encode_probes(template, tokenizer)
        same = texts == [p.prompt for p in probes] and rows == [p.input_ids for p in probes]
        wrong = "the prompts become other text or other token ids than when the adapter was saved"
        self._check("probes", [] if same else [wrong], "")
        self._stop()
        tuned = next_token_logits(model, rows)
        with model.disable_adapter():
            base = next_token_logits(model, rows)
        outside = any(not 0 <= i < base.shape[-1] for p in probes for i in p.token_ids)
        self._check("probes", ["they name tokens that this base does not have"] * outside, "")
        self._stop()
        found, base_limit = compare_probes(probes, base=base, tuned=tuned), tolerance(model)
        limit = tuned_tolerance(base_limit, found.base)
        self._check("probes", _disagreements(found, base_limit, limit), "")
        self._stop()
        self.told_apart = found.effect >= _SEEN * limit
        self.passed.append(
            (
                "probes",
                f"the logits of {len(probes)} prompts are the stored ones within {found.tuned:.1e} "
                f"(tolerance {limit:.2g}), without the adapter within {found.base:.1e} "
                f"({base_limit:g}), in standard deviations; the adapter moves them by up to "
                f"{found.effect:.2g}",
            )
        )

    def _check(self, check: str, wrong: Iterable[str], passed: str) -> None:
        problems = [Problem(check, line) for line in wrong]
        self._problems += problems
        if passed and not problems:
            self.passed.append((check, passed))

    def _stop(self, remedy: str = _REMEDY) -> None:
        if self._problems:
            raise NotVerified(
                Problem(one.where, f"{one.message}. {remedy}") for one in self._problems
            )

    def _failed(self, check: str, line: str) -> NotVerified:
        self._check(check, [line], "")
        return NotVerified(Problem(p.where, f"{p.message}. {_REMEDY}") for p in self._problems)


def base_settings(verification: Verification, lora: LoraConfig, model: str | None) -> ModelSettings:
    """The base that the adapter names, or the same one lying at ``model``.

    Raises:
        UserError: nothing names a base.
    """
    receipt = verification.receipt
    if receipt is None:
        named = model or lora.base_model_name_or_path
        if not named:
            raise UserError.single(
                "--model", f"{ADAPTER_CONFIG} of {verification.folder} names no base. Name it."
            )
        try:
            return ModelSettings(name_or_path=named, revision=None if model else lora.revision)
        except ValueError as error:
            raise NotVerified(
                [Problem("config", f"{ADAPTER_CONFIG} names no base that could be one. {_REMEDY}")]
            ) from error
    if model is None:
        return receipt.base
    return receipt.base.model_copy(update={"name_or_path": model, "revision": None})


def _unsafe_files(folder: Path) -> list[str]:
    wrong = [
        f"{file.relative_to(folder)} is a pickle, which can run code when it is read"
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in PICKLES
    ]
    if not (folder / WEIGHTS).is_file():
        wrong.append(f"{WEIGHTS} is missing, and nothing else is read")
    return wrong


def _differences(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """A field that one of the two lacks has peft's default, as another version of it may write."""
    if missing := _ESSENTIAL - then.keys():
        return [f"{RECEIPT} does not say with which {', '.join(sorted(missing))} it was trained"]
    usual = LoraConfig().to_dict()
    return [
        f"{ADAPTER_CONFIG}: {key} is {_shown(now, key, usual)}, but the adapter was trained with "
        f"{_shown(then, key, usual)}"
        for key in sorted(then.keys() | now.keys())
        if now.get(key, usual.get(key)) != then.get(key, usual.get(key))
    ]


def _other_config(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    return [
        f"config.json of the base: {key} is {now.get(key)!r}, but the adapter was trained with "
        f"{value!r}"
        for key, value in then.items()
        if now.get(key) != value
    ]


def _shown(fields: dict[str, Any], key: str, usual: dict[str, Any]) -> str:
    return repr(fields.get(key, usual.get(key)))[:60]


def _not_finite_scaling(lora: LoraConfig) -> list[str]:
    alphas = {"lora_alpha": lora.lora_alpha, **(lora.alpha_pattern or {})}
    return [
        f"{ADAPTER_CONFIG}: the alpha of {name} is {alpha!r}, which is no finite number"
        for name, alpha in alphas.items()
        if not isinstance(alpha, int | float) or not math.isfinite(alpha)
    ]


def _disagreements(found: Difference, base_limit: float, limit: float) -> list[str]:
    """``not <=``, because NaN is no agreement."""
    if not found.base <= base_limit:
        return [
            f"without the adapter the logits differ by {found.base:.2g} from the stored ones "
            f"(tolerance {base_limit:g}), so this base computes something else than the one it was "
            "trained on"
        ]
    if not found.tuned <= limit:
        return [
            f"the tuned logits differ by {found.tuned:.2g} from the stored ones (tolerance "
            f"{limit:.2g}), though the base's agree: this is not the adapter that was trained"
        ]
    return []


def _in_words(lora: LoraConfig) -> str:
    return f"r={lora.r} alpha={lora.lora_alpha}{' DoRA' if lora.use_dora else ''}"
