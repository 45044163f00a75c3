"""The shape of a checkpoint, found without its weights and without a network."""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from transformers import LlamaConfig

from recipe.model.checkpoint import check_folder, load_config
from recipe.settings import ModelSettings, UserError

_FILE = Path(__file__).with_name("shapes.yaml")


def shape_of(settings: ModelSettings) -> tuple[LlamaConfig, str]:
    """The config of ``settings.name_or_path``, and where it comes from, in words.

    A folder's own, that of a hub id in the cache, or a published shape; the hub is not asked.

    Raises:
        UserError: none of these is there, or the folder is none of a Llama-architecture model.
    """
    name = settings.name_or_path
    check_folder(settings)
    if os.path.isdir(name):  # noqa: PTH112
        return load_config(settings), f"{name}/config.json"
    cached = cached_folder(settings, "config.json")
    if cached is not None:
        here = settings.model_copy(update={"name_or_path": str(cached), "revision": None})
        return load_config(here), "config.json in the hub's cache"
    shapes = published()
    if name in shapes:
        return config_of(shapes[name]), "the published shape in recipe/model/shapes.yaml"
    listed = ", ".join(shapes)
    raise UserError.single(
        "model.name_or_path",
        f"{name} is no folder, not in the hub's cache, and none of the published shapes. Download "
        f"its config.json into a folder and name that, or name one of {listed}.",
    )


def cached_folder(settings: ModelSettings, file: str) -> Path | None:
    """Where the hub's cache has ``file`` of the checkpoint; None where it has not."""
    try:
        found = try_to_load_from_cache(
            settings.name_or_path, file, cache_dir=HF_HUB_CACHE, revision=settings.revision
        )
    except HFValidationError:  # no name that the hub could have
        return None
    return Path(found).parent if isinstance(found, str) else None


@cache
def published() -> Mapping[str, Mapping[str, Any]]:
    """Hub id → fields of LlamaConfig, and ``parameters``, the count of the weights."""
    shapes: dict[str, dict[str, Any]] = yaml.safe_load(_FILE.read_text())
    return shapes


def config_of(shape: Mapping[str, Any]) -> LlamaConfig:
    """A published shape as a config."""
    return LlamaConfig(**{key: value for key, value in shape.items() if key != "parameters"})
