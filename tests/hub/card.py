"""The YAML at the head of a README.md, and what the hub has to say about it."""

import re
from typing import Any

import yaml

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)(?:\r?\n)?^---[ \t]*(?:\r?\n|\Z)", re.S | re.M)
_REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}(?:/[\w-][\w.-]{0,95})?")
_NO_METADATA = (
    "empty or missing yaml metadata in repo card"
    " (https://huggingface.co/docs/hub/model-cards#model-card-metadata)"
)
# A part of the hub's list, enough to tell a licence from a sentence.
LICENSES = frozenset((
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "cc", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0",
    "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "agpl-3.0", "gpl", "gpl-2.0", "gpl-3.0", "lgpl",
    "lgpl-3.0", "mpl-2.0", "artistic-2.0", "odc-by", "unlicense", "gemma", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "llama4", "unknown", "other",
))  # fmt: skip


def metadata(readme: str) -> Any:
    """What the front matter says: None without one; ``yaml.YAMLError`` where it is no YAML."""
    found = _FRONT.match(readme)
    return yaml.safe_load(found[1]) if found else None


def judge(readme: str) -> tuple[list[str], list[str]]:
    """Errors, which refuse the README, and warnings, which do not."""
    try:
        said = metadata(readme)
    except yaml.YAMLError as error:
        return [" ".join(str(error).split())], []
    if said is None or said == {}:
        return [], [_NO_METADATA]
    if not isinstance(said, dict):
        return ["the metadata must be a mapping"], []
    errors = _wrong_names(said) + _wrong_types(said)
    return errors, []


def _wrong_types(said: dict[Any, Any]) -> list[str]:
    errors = [
        f'"{name}" must be a string'
        for name in ("library_name", "pipeline_tag", "license_name", "license_link")
        if name in said and not isinstance(said[name], str)
    ]
    for name in ("tags", "language", "metrics"):
        if not all(isinstance(value, str) for value in _many(said.get(name))):
            errors.append(f'"{name}" must be an array of strings')
    return errors


def _wrong_names(said: dict[Any, Any]) -> list[str]:
    errors = [
        f'"license" must be one of [{", ".join(sorted(LICENSES))}]'
        for value in _many(said.get("license"))
        if value not in LICENSES
    ]
    for name, kind in (("base_model", "model"), ("datasets", "dataset")):
        errors += [
            f'"{name}" with value "{value}" is not valid.'
            f" Use a {kind} id from https://hf.co/{kind}s."
            for value in _many(said.get(name))
            if not (isinstance(value, str) and _REPOSITORY.fullmatch(value))
        ]
    return errors


def _many(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def tags(said: Any) -> list[str]:
    """The tags that the hub shows: those written, and those it makes of other fields."""
    if not isinstance(said, dict):
        return []
    found = [said["library_name"]] if "library_name" in said else []
    found += _many(said.get("tags"))
    for name, prefix in (
        ("base_model", "base_model:"),
        ("license", "license:"),
        ("datasets", "dataset:"),
    ):
        found += [f"{prefix}{value}" for value in _many(said.get(name))]
    return list(dict.fromkeys(found))
