"""Rows are tokenised once: their ids lie in a sealed folder named after all that they depend on."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from recipe.data.rows import Row
from recipe.data.templates import Template
from recipe.data.tokens import TokenizedRow, tokenize_rows
from recipe.sealed import SEAL, damage, whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS = "tokens.safetensors"


def recipe_cache() -> Path:
    """``recipe`` in the Hugging Face cache, which ``HF_HOME`` moves to another disk."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return Path(home).expanduser() / "recipe"


def cached_rows(
    rows: Sequence[Row], template: Template, tokenizer: "PreTrainedTokenizerBase", *, source: str
) -> tuple[list[TokenizedRow], str]:
    """As ``tokenize_rows``, and where the ids come from, for the screen: "" if made just now.

    A second process that wants the same rows waits for the first, and reads what it wrote. A folder
    that changed since it was written is made again. Without a fast tokenizer, whose state can be
    hashed, or a place to write to, rows are tokenised each time.

    Raises:
        UserError: as ``tokenize_rows``; nothing is kept then.
    """
    if not rows or not tokenizer.is_fast:
        return tokenize_rows(rows, template, tokenizer, source=source), ""
    folder = recipe_cache() / "tokens" / _key(rows, template, tokenizer)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        made = tokenize_rows(rows, template, tokenizer, source=source)
        return made, f"not kept: {folder.parent} cannot be written ({error.strerror})"
    try:
        kept = _read(folder, rows)
        if kept is not None:
            return kept, f"read from {folder}"
        made = tokenize_rows(rows, template, tokenizer, source=source)
        return made, _write(folder, made)
    finally:
        lock.release()


def _write(folder: Path, rows: Sequence[TokenizedRow]) -> str:
    """Keep ``rows``; why that failed, or ""."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with whole_folder(folder) as staged:
            save_file(_arrays(rows), staged / _TOKENS)
    except (OSError, SafetensorError) as error:  # a full disk is the latter
        return f"not kept: {folder} cannot be written ({error})"
    return ""


def _key(rows: Sequence[Row], template: Template, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A hash of everything that decides over the ids; the code of this room is part of it."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    settings = {
        "versions": [version(name) for name in ("tokenizers", "transformers", "jinja2")],
        "template": [template.name, template.add_special_tokens, template.source],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, str(tokenizer.eos_token)],
        "init": repr(sorted(tokenizer.init_kwargs.items(), key=lambda item: item[0])),
    }
    digest.update(json.dumps(settings).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for row in rows:
        digest.update(json.dumps(row.messages).encode())
    return digest.hexdigest()[:32]


def _arrays(rows: Sequence[TokenizedRow]) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.concatenate([row.input_ids for row in rows]),
        "trained": np.concatenate([row.trained for row in rows]),
        "lengths": np.array([len(row) for row in rows], dtype=np.int64),
    }


def _read(folder: Path, rows: Sequence[Row]) -> list[TokenizedRow] | None:
    """What ``_write`` kept; None if there is nothing whole."""
    try:
        if not (folder / SEAL).is_file() or damage(folder):
            return None
        arrays = load_file(folder / _TOKENS)
        borders = np.cumsum(arrays["lengths"])[:-1]
        ids = np.split(arrays["input_ids"], borders)
        pairs = list(zip(rows, ids, np.split(arrays["trained"], borders), strict=True))
    except (OSError, SafetensorError, KeyError, ValueError):  # sealed, but not by us
        return None
    return [TokenizedRow(row.index, ids, trained) for row, ids, trained in pairs]
