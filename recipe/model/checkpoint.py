"""A checkpoint becomes a tokenizer and a base model; nothing is repaired on the way."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from recipe.model import attention
from recipe.model.onednn import keep_few_products
from recipe.model.quantization import keep_layout
from recipe.settings import ModelSettings, Problem, UserError, plain

_WHERE = "model.name_or_path"
GENERATION = "generation_config.json"
_INDEX = "model.safetensors.index.json"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_SHOWN_CHARACTERS = 240


def load_config(settings: ModelSettings) -> LlamaConfig:
    """The checkpoint's config.

    Raises:
        UserError: it cannot be loaded, is not that of a Llama-architecture model, or says that
            the weights are quantised otherwise than the settings do.
    """
    check_folder(settings)
    with _loading(settings, "config"):
        config = AutoConfig.from_pretrained(
            settings.name_or_path, revision=settings.revision, trust_remote_code=False
        )
    if not isinstance(config, LlamaConfig):
        raise UserError.single(
            _WHERE,
            f"{settings.name_or_path} is a {config.model_type!r} model; this recipe trains "
            "LlamaForCausalLM checkpoints. Name one of those.",
        )
    _check_quantization(settings, getattr(config, "quantization_config", None))
    return config


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        UserError: it cannot be loaded, or it has no EOS token to train.
    """
    check_folder(settings)
    with _loading(settings, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            settings.name_or_path, revision=settings.revision, trust_remote_code=False
        )
    if tokenizer.eos_token_id is None:
        raise UserError.single(
            _WHERE,
            f"the tokenizer of {settings.name_or_path} has no EOS token, so no model trained with "
            "it would learn to stop. Set eos_token in its tokenizer_config.json.",
        )
    return tokenizer


def load_base(settings: ModelSettings, *, weights: bool = True) -> LlamaForCausalLM:
    """The frozen base in ``settings.dtype``, from safetensors alone, quantised where asked.

    Its generation config holds the special ids and nothing else, see ``generation_config_notes``.

    Args:
        weights: False leaves them on the meta device, for a process that is given its part of them
            by another one. transformers 5.23 would load them in every process of a host, whatever
            fsdp_cpu_ram_efficient_loading says.

    Raises:
        UserError: no such checkpoint, no Llama architecture, or no safetensors weights.
    """
    keep_few_products()
    config = load_config(settings)
    _check_index(settings)
    stored = stored_generation_config(settings)  # transformers passes over a broken one
    if settings.attn_implementation == attention.PER_ROW_SDPA:
        attention.register()
    model = _loaded(settings, config) if weights else _without_weights(settings, config)
    keep_layout(model)
    # A cache would be filled and thrown away at each training step.
    model.config.use_cache = False
    held = stored or model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(held, name) for name in SPECIAL})
    return model


def _without_weights(settings: ModelSettings, config: LlamaConfig) -> LlamaForCausalLM:
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(
            config,
            dtype=getattr(torch, settings.dtype),
            attn_implementation=settings.attn_implementation,
        )
    # Its frequencies are computed, not loaded.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def _loaded(settings: ModelSettings, config: LlamaConfig) -> LlamaForCausalLM:
    quantization = settings.quantization
    if getattr(config, "quantization_config", None):
        quantization = None  # it is the same, and transformers would warn that it is given twice
    with _loading(settings, "weights"):
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
    _check_all_loaded(settings, loading)
    return model


def loaded_commit(settings: ModelSettings) -> str | None:
    """The commit of a hub id, which transformers no longer keeps; None for a folder."""
    if os.path.isdir(settings.name_or_path):  # noqa: PTH112
        return None
    file = _file(settings, "config.json")
    return file.parent.name if file else None


def generation_config_notes(settings: ModelSettings) -> list[str]:
    """What of the checkpoint's generation config contradicts itself, one line each for the screen.

    Raises:
        UserError: there is such a file and it cannot be loaded.
    """
    config = stored_generation_config(settings)
    if config is None:
        return []
    try:
        config.validate(strict=True)
    except ValueError as error:
        # The library lists each as "- `name`: why. …"; one that is worse is the whole text.
        listed = re.findall(r"^- `(\w+)`: (.+?)\.(?: |$)", str(error), re.MULTILINE)
        if not listed:
            return [f"{GENERATION} is not taken over: {_reason(error)}"]
        return [
            f"{GENERATION}: {name} {getattr(config, name)} is not taken over, because "
            f"{why.replace('`', '')}; with it, a changed copy could not be saved"
            for name, why in listed
            if name not in SPECIAL
        ]
    return []


def check_folder(settings: ModelSettings) -> None:
    """A path that is no folder must not be asked of the hub: that would be a network call."""
    name = settings.name_or_path
    prefixes = ("models/", "runs/", "./", "../", "/", "~")
    looks_local = name.startswith(prefixes) or name.count("/") > 1
    # os.path, because Path.is_dir raises where a name is too long for any file system.
    is_folder = os.path.isdir(name)  # noqa: PTH112
    if looks_local and not is_folder:
        raise UserError.single(
            _WHERE,
            f"no folder {name} (looked from {Path.cwd()}). Correct the path; the starter model "
            "comes from `make setup`.",
        )
    if settings.revision and is_folder:
        raise UserError.single(
            "model.revision",
            f"{settings.revision} is of a hub id, but {name} is a folder. Leave it out.",
        )


def _file(settings: ModelSettings, name: str) -> Path | None:
    """A file of the checkpoint, downloaded if need be; None if the checkpoint has none."""
    folder = Path(settings.name_or_path)
    if os.path.isdir(folder):  # noqa: PTH112
        return folder / name if (folder / name).is_file() else None
    with _loading(settings, name):
        try:
            return Path(hf_hub_download(settings.name_or_path, name, revision=settings.revision))
        except EntryNotFoundError:
            return None


def stored_generation_config(settings: ModelSettings) -> GenerationConfig | None:
    """The checkpoint's own, None where it has none.

    Raises:
        UserError: there is such a file and it cannot be loaded.
    """
    if _file(settings, GENERATION) is None:
        return None
    with _loading(settings, GENERATION):
        return GenerationConfig.from_pretrained(
            settings.name_or_path, revision=settings.revision or "main"
        )


def _check_index(settings: ModelSettings) -> None:
    """The index says which files hold the weights: those of its folder, or any on the machine."""
    file = _file(settings, _INDEX)
    if file is None:
        return
    with _loading(settings, _INDEX):
        index = json.loads(file.read_bytes())
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError.single(
            _WHERE,
            f"{_INDEX} of {settings.name_or_path} has no table weight_map. Use another copy.",
        )
    foreign = [name for name in names.values() if not _is_weights_file(name)]
    if foreign:
        raise UserError.single(
            _WHERE,
            f"{_INDEX} of {settings.name_or_path} names {foreign[0]!r}, which is no safetensors "
            "file of that folder. Use another copy; this one is not to be trusted.",
        )


def _is_weights_file(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.isprintable()
        and "\\" not in name
        and PurePosixPath(name).parts == (name,)
        and name.endswith(".safetensors")
    )


def _check_quantization(settings: ModelSettings, stored: Any) -> None:
    """transformers takes the checkpoint's quantisation over the one that was asked for."""
    if stored is None:
        return
    where, name = "model.quantization", settings.name_or_path
    method = stored.get("quant_method")  # old bitsandbytes checkpoints do not name it
    bitsandbytes = stored.get("load_in_4bit") or stored.get("load_in_8bit")
    if not bitsandbytes or method not in (None, "bitsandbytes"):
        raise UserError.single(
            _WHERE,
            f"config.json of {name} has a quantization_config of quant_method {method!r}; this "
            "version takes 4 and 8 bit bitsandbytes and unquantised weights. Name such a model.",
        )
    with _loading(settings, "quantization_config"):
        held = BitsAndBytesConfig.from_dict(stored).to_dict()
        asked = BitsAndBytesConfig(**plain(settings.quantization or {})).to_dict()
    default = BitsAndBytesConfig().to_dict()
    options = {k: v for k, v in held.items() if k[0] != "_" and v != default.get(k)}
    if settings.quantization is None:
        raise UserError.single(
            where,
            f"null, but {name} is quantised already. Say so: {json.dumps(options)}.",
        )
    problems = [
        Problem(
            f"{where}.{key}",
            f"is {asked[key]!r}, but {name} is quantised with {held[key]!r}, and weights are not "
            f"quantised twice. Write {json.dumps(held[key])}, or name the unquantised model.",
        )
        for key in ("load_in_4bit", "load_in_8bit", *sorted(asked))
        if asked[key] != held[key] and key[0] != "_"
    ]
    if problems:
        raise UserError(dict.fromkeys(problems))


def _check_all_loaded(settings: ModelSettings, loading: dict[str, Any]) -> None:
    """transformers fills what is missing with random values, and only warns."""
    problems = [
        Problem(_WHERE, f"{settings.name_or_path} {what}: {', '.join(names)}.")
        for what, key in (
            ("lacks weights of a LlamaForCausalLM", "missing_keys"),
            ("holds weights that no LlamaForCausalLM has", "unexpected_keys"),
            ("holds weights of another shape than its config says", "mismatched_keys"),
        )
        if (names := sorted(map(str, loading[key]))[:5])
    ]
    if problems:
        raise UserError(problems)


@contextmanager
def _loading(settings: ModelSettings, what: str) -> Iterator[None]:
    """For one call of a library that reads the checkpoint: what it raises becomes one line.

    Which exceptions broken files raise is documented nowhere, and a panic in a library written in
    Rust is no ``Exception``.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError.single(
            _WHERE,
            f"the {what} of {settings.name_or_path} could not be loaded ({_reason(error)}). "
            "Correct the name, the path or the file; a gated model needs `hf auth login` and its "
            "licence accepted.",
        ) from error


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).split("\n") if line.strip()] or [""]
    # A line that ends so announces the next.
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    kind = "" if isinstance(error, OSError | ValueError) and said else f"{type(error).__name__}: "
    return f"{kind}{said}"[:_SHOWN_CHARACTERS].removesuffix(": ")
