"""A checkpoint becomes a tokenizer and a base model; nothing is repaired on the way."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from recipe.model import attention
from recipe.settings import ModelSettings, Problem, UserError, plain


def load_config(settings: ModelSettings) -> LlamaConfig:
    """The checkpoint's config.

    Raises:
        UserError: it cannot be loaded, or is not that of a Llama-architecture model.
    """
    _check_folder(settings)
    try:
        config = AutoConfig.from_pretrained(
            settings.name_or_path, revision=settings.revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _unloadable(settings, "config", error) from error
    if not isinstance(config, LlamaConfig):
        raise UserError.single(
            "model.name_or_path",
            f"{settings.name_or_path} is a {config.model_type!r} model; this recipe trains "
            "LlamaForCausalLM checkpoints. Name one of those.",
        )
    return config


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        UserError: it cannot be loaded, or it has no EOS token to train.
    """
    _check_folder(settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            settings.name_or_path, revision=settings.revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _unloadable(settings, "tokenizer", error) from error
    if tokenizer.eos_token_id is None:
        raise UserError.single(
            "model.name_or_path",
            f"the tokenizer of {settings.name_or_path} has no EOS token, so no model trained with "
            "it would learn to stop. Set eos_token in its tokenizer_config.json.",
        )
    return tokenizer


def load_base(settings: ModelSettings) -> LlamaForCausalLM:
    """The frozen base in ``settings.dtype``, from safetensors alone, quantised where asked.

    Raises:
        UserError: no such checkpoint, no Llama architecture, or no safetensors weights.
    """
    load_config(settings)
    if settings.attn_implementation == attention.PER_ROW_SDPA:
        attention.register()
    quantization = settings.quantization
    try:
        model, loading = LlamaForCausalLM.from_pretrained(
            settings.name_or_path,
            revision=settings.revision,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            quantization_config=BitsAndBytesConfig(**plain(quantization)) if quantization else None,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _unloadable(settings, "weights", error) from error
    _check_all_loaded(settings, loading)
    # A cache would be filled and thrown away at each training step.
    model.config.use_cache = False
    return model


def _check_folder(settings: ModelSettings) -> None:
    """A path that is no folder must not be asked of the hub: that would be a network call."""
    name = settings.name_or_path
    prefixes = ("models/", "runs/", "./", "../", "/", "~")
    looks_local = name.startswith(prefixes) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise UserError.single(
            "model.name_or_path",
            f"no folder {name} (looked from {Path.cwd()}). Correct the path; the starter model "
            "comes from `make setup`.",
        )
    if settings.revision and Path(name).is_dir():
        raise UserError.single(
            "model.revision",
            f"{settings.revision} is of a hub id, but {name} is a folder. Leave it out.",
        )


def _check_all_loaded(settings: ModelSettings, loading: dict[str, Any]) -> None:
    """transformers fills what is missing with random values, and only warns."""
    problems = [
        Problem("model.name_or_path", f"{settings.name_or_path} {what}: {', '.join(names)}.")
        for what, key in (
            ("lacks weights of a LlamaForCausalLM", "missing_keys"),
            ("holds weights that no LlamaForCausalLM has", "unexpected_keys"),
            ("holds weights of another shape than its config says", "mismatched_keys"),
        )
        if (names := sorted(map(str, loading[key]))[:5])
    ]
    if problems:
        raise UserError(problems)


def _unloadable(settings: ModelSettings, what: str, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0]
    return UserError.single(
        "model.name_or_path",
        f"the {what} of {settings.name_or_path} could not be loaded ({reason}). Correct the name "
        "or path; a gated model needs `hf auth login` and its licence accepted.",
    )
