"""A base model, with or without an adapter, that answers prompts as it was trained to.

Kept apart from ``generate.py`` because commands do not import commands, and whatever compares
models answers with them too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from recipe.data.templates import Template, build_template
from recipe.decoding.greedy import answer
from recipe.model.checkpoint import load_base, load_tokenizer
from recipe.settings import ModelSettings, UserError
from recipe.sharing.adapter_folder import load_adapter, newest_adapter, read_receipt

STARTER = "models/smollm2-135m-instruct"
# The flattened batch's attention knows no cache; decoding takes the library's.
_ATTENTION = "sdpa"


@dataclass(frozen=True)
class Answerer:
    """Holds what answers; ``described`` names it for the screen."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: Template
    described: str

    def answer(
        self, prompt: str, context: str = "", *, max_new_tokens: int, stream: bool
    ) -> tuple[str, str]:
        """See ``recipe.decoding.greedy.answer``."""
        return answer(
            self.model,
            self.tokenizer,
            self.template,
            prompt,
            context,
            max_new_tokens=max_new_tokens,
            stream=stream,
        )


def load_answerer(
    *, adapter: str | None, model: str | None, template: str | None, runs: Path
) -> Answerer:
    """Load an adapter with its base, or a base alone.

    Args:
        adapter: its folder; ``none`` for the base; None for the newest under ``runs``.
        model: with ``none``, the base; None for that of the newest adapter, else the starter.
        template: with ``none``; None for the tokenizer's chat template, or raw text without one.

    Raises:
        UserError: nothing is there, or a file of the adapter changed.
    """
    if adapter == "none":
        return _base_alone(_base_settings(model, runs), template)
    folder = _adapter_folder(Path(adapter)) if adapter else newest_adapter(runs)
    receipt = read_receipt(folder)
    settings = _settings(receipt["base"])
    tokenizer = load_tokenizer(settings)
    tuned = load_adapter(load_base(settings), folder).eval()
    template_of_run = build_template(receipt["template"], tokenizer)
    described = f"{folder} on {settings.name_or_path}, {template_of_run.name} template, greedy"
    return Answerer(_on_device(tuned), tokenizer, template_of_run, described)


def _adapter_folder(named: Path) -> Path:
    """A run's folder stands for the adapter in it."""
    return named / "adapter" if (named / "adapter").is_dir() else named


def _base_alone(settings: ModelSettings, template: str | None) -> Answerer:
    tokenizer = load_tokenizer(settings)
    base = load_base(settings).eval()
    chosen = build_template(template or ("chat" if tokenizer.chat_template else "raw"), tokenizer)
    described = f"{settings.name_or_path} without adapter, {chosen.name} template, greedy"
    return Answerer(_on_device(base), tokenizer, chosen, described)


def _base_settings(model: str | None, runs: Path) -> ModelSettings:
    if model:
        return _settings({"name_or_path": model})
    try:
        return _settings(read_receipt(newest_adapter(runs))["base"])
    except UserError:
        return _settings({"name_or_path": STARTER})


def _settings(base: dict[str, Any]) -> ModelSettings:
    return ModelSettings(**{**base, "attn_implementation": _ATTENTION})


def _on_device(model: Any) -> Any:
    """Move to the accelerator if there is one; a quantised model is where it was loaded."""
    if not torch.accelerator.is_available() or getattr(model, "is_quantized", False):
        return model
    return model.to(torch.accelerator.current_accelerator())
