"""A base model, with or without an adapter, that answers prompts as it was trained to.

Kept apart from ``generate.py`` because commands do not import commands, and whatever compares
models answers with them too.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from recipe.data.formats import Message
from recipe.data.prompts import Prompt, Shot, prompt_text
from recipe.data.templates import Template, build_template
from recipe.decoding.decode import Decoder
from recipe.decoding.stopping import Interruption
from recipe.decoding.task import Encoded
from recipe.model.checkpoint import load_base, load_config, load_tokenizer
from recipe.settings import GenerationSettings, ModelSettings, Problem, UserError
from recipe.sharing.adapter_folder import load_adapter, newest_adapter
from recipe.sharing.certificate import template_of_merged
from recipe.sharing.hub import names_repository
from recipe.sharing.pulled import adapter_at, shown
from recipe.sharing.receipt import read_receipt
from recipe.sharing.verification import Verification, base_settings

STARTER = "models/smollm2-135m-instruct"
# The flattened batch's attention knows no cache; decoding takes the library's.
_ATTENTION = "sdpa"


@dataclass(frozen=True)
class Answerer:
    """Holds what answers.

    ``name`` is ``adapter`` or ``base``, ``described`` says the same for the screen, ``folder`` is
    the adapter's and None for the base, ``verification`` holds the checks that it passed.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: Template
    described: str
    name: str
    folder: Path | None = None
    verification: Verification | None = None

    def encode(
        self,
        prompts: Sequence[Prompt],
        *,
        shots: Sequence[Shot] = (),
        before: Sequence[Message] = (),
    ) -> list[Encoded]:
        """The prompts in the template, behind the shots and the turns so far, as token ids.

        Raises:
            UserError: the template cannot write them.
        """
        texts = [prompt_text(self.template, one, shots=shots, before=before) for one in prompts]
        ids = self.tokenizer(
            texts, add_special_tokens=self.template.add_special_tokens, return_attention_mask=False
        )["input_ids"]
        return [Encoded(one.index, row) for one, row in zip(prompts, ids, strict=True)]

    def decoder(
        self,
        settings: GenerationSettings,
        *,
        assistant: Any = None,
        interruption: Interruption | None = None,
    ) -> Decoder:
        """What turns encoded prompts into answers, by one strategy."""
        plain = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        interruption = interruption or Interruption()
        return Decoder(plain, self.tokenizer, settings, assistant, interruption)

    @contextmanager
    def as_base(self) -> Iterator["Answerer"]:
        """The same model without its adapter, in the same template, while the block runs."""
        described = f"the base alone, {self.template.name} template"
        with self.model.disable_adapter():
            yield Answerer(self.model, self.tokenizer, self.template, described, "base")

    @property
    def identity(self) -> dict[str, Any]:
        """For JSON: which weights and which template the answers come from."""
        adapter = None if self.folder is None else str(self.folder)
        base = self.tokenizer.name_or_path
        return {"base": base, "adapter": adapter, "template": self.template.name}


def load_answerer(
    *, adapter: str | None, model: str | None, template: str | None, runs: Path
) -> Answerer:
    """Load an adapter with its base, or a base alone.

    Args:
        adapter: its folder; ``none`` for the base; None for the newest under ``runs``.
        model: where the base lies, if not where the adapter says; with ``none``, the base, and None
            for that of the newest adapter, else the starter.
        template: None for the adapter's own, which one saved by plain peft does not name; with
            ``none``, for the tokenizer's chat template, or raw text without one.

    Raises:
        UserError: nothing is there.
        NotVerified: the adapter fails one of the cheap checks.
    """
    if adapter == "none":
        return _base_alone(_base_settings(model, runs), template)
    return _tuned(adapter_folder(adapter) if adapter else newest_adapter(runs), model, template)


def _tuned(folder: Path, model: str | None, template: str | None) -> Answerer:
    verification = Verification(folder)
    lora = verification.files()
    receipt = verification.receipt
    name = template or (receipt.template if receipt else None)
    if name is None:
        raise UserError.single(
            "--template",
            f"{folder} was saved by plain peft and does not say with which template it was "
            "trained. Name it: alpaca, chat or raw.",
        )
    if receipt and name not in ("raw", receipt.template):
        raise UserError.single(
            "--template",
            f"{name}, but {folder} was trained with {receipt.template}. Leave it out.",
        )
    settings = _with_attention(base_settings(verification, lora, model))
    verification.tensors(load_config(settings), lora)
    tokenizer, base = load_tokenizer(settings), load_base(settings)
    if receipt:
        verification.base(base, tokenizer, build_template(receipt.template, tokenizer))
    tuned = load_adapter(base, folder).eval()
    chosen = _template(name, tokenizer)
    notes = f" (trained with {receipt.template})" if receipt and receipt.template != name else ""
    if verification.unproven:
        notes += f" · unproven: {verification.unproven}"
    described = f"{shown(folder)} on {settings.name_or_path}, {name} template{notes}"
    return Answerer(
        _on_device(tuned), tokenizer, chosen, described, "adapter", folder, verification
    )


def load_full_precision(answerer: Answerer, model: str | None) -> Answerer:
    """The same adapter on its base as it was before it was quantised.

    Raises:
        UserError: the checkpoint itself is quantised, so there is nothing else to load.
    """
    assert answerer.folder is not None
    assert answerer.verification is not None
    verification = answerer.verification
    quantized = base_settings(verification, verification.files(), model)
    settings = quantized.model_copy(update={"quantization": None, "dtype": "auto"})
    with _named("--model"):
        base = load_base(_with_attention(settings))
    tuned = load_adapter(base, answerer.folder).eval()
    return replace(answerer, model=_on_device(tuned))


def load_model(folder: Path, dtype: str) -> Any:
    """A plain model of a local folder, ready to compute in ``dtype``."""
    base = load_base(_settings({"name_or_path": str(folder), "dtype": dtype}))
    return _on_device(base.eval())


def load_assistant(path: str, answerer: Answerer) -> Any:
    """The draft model for assisted generation.

    Raises:
        UserError: it cannot be loaded, or reads other tokens than the model it drafts for.
    """
    settings = _settings({"name_or_path": path})
    with _named("assistant_model"):
        tokenizer, model = load_tokenizer(settings), load_base(settings).eval()
    if tokenizer.get_vocab() != answerer.tokenizer.get_vocab():
        raise UserError.single(
            "assistant_model",
            f"{path} reads other tokens than {answerer.described}. Name a smaller model of the "
            "same family.",
        )
    return _on_device(model)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """What the user said stands elsewhere than in a training config."""
    try:
        yield
    except UserError as error:
        raise UserError([Problem(where, one.message) for one in error.problems]) from error


def _template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    with _named("--template"):
        return build_template(name, tokenizer)


def adapter_folder(named: str) -> Path:
    """Where the adapter lies: in a folder, in the run of that name, or on the hub, and is fetched.

    Raises:
        UserError, RunFailed: see ``recipe.sharing.pulled``.
    """
    if names_repository(named):
        return adapter_at(named)
    inside = Path(named) / "adapter"
    return inside if os.path.isdir(inside) else Path(named)  # noqa: PTH112


def _base_alone(settings: ModelSettings, template: str | None) -> Answerer:
    tokenizer = load_tokenizer(settings)
    base = load_base(settings).eval()
    usual = "chat" if tokenizer.chat_template else "raw"
    merged_with = template_of_merged(Path(settings.name_or_path))
    chosen = _template(template or merged_with or usual, tokenizer)
    described = f"{settings.name_or_path} without adapter, {chosen.name} template"
    return Answerer(_on_device(base), tokenizer, chosen, described, "base")


def _base_settings(model: str | None, runs: Path) -> ModelSettings:
    if model:
        return _settings({"name_or_path": model})
    try:
        newest = newest_adapter(runs)
    except UserError:  # there is none
        return _settings({"name_or_path": STARTER})
    return _with_attention(read_receipt(newest).base)


def _settings(base: dict[str, Any]) -> ModelSettings:
    return _with_attention(ModelSettings(**base))


def _with_attention(base: ModelSettings) -> ModelSettings:
    return base.model_copy(update={"attn_implementation": _ATTENTION})


def _on_device(model: Any) -> Any:
    """Move to the accelerator if there is one; a quantised model is where it was loaded."""
    if not torch.accelerator.is_available() or getattr(model, "is_quantized", False):
        return model
    return model.to(torch.accelerator.current_accelerator())
