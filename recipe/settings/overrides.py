"""``lora.r=8`` on the command line: the same keys as in the file, the same YAML values."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipe.settings.problem import Problem, UserError
from recipe.settings.sections import SECTIONS
from recipe.settings.yaml_text import KeyPath, dotted, one_line, read_value


@dataclass(frozen=True)
class Overridden:
    """The values after all overrides, which keys they set, and what was wrong with the others."""

    values: dict[str, Any]
    paths: frozenset[KeyPath]
    problems: tuple[Problem, ...]


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> Overridden:
    """Set each override in a copy of ``values``, in order. A later one must not undo an earlier."""
    result = copy.deepcopy(dict(values))
    paths: list[KeyPath] = []
    problems: list[Problem] = []
    for text in overrides:
        try:
            path, value = _parsed(text)
            _set(result, path, value, earlier=paths)
        except UserError as error:
            problems += error.problems
        else:
            paths.append(path)
    return Overridden(result, frozenset(paths), tuple(problems))


def _parsed(text: str) -> tuple[KeyPath, Any]:
    key, equals, value = text.partition("=")
    where = f"override {one_line(key)}"
    if text.startswith("-"):
        # The value is not repeated: it may be a token.
        bare = one_line(key.lstrip("-"))
        raise UserError.single(where, f"no such flag. Write keys without dashes: {bare}=VALUE.")
    if not equals:
        raise UserError.single(where, "no value. Write section.key=value, such as lora.r=8.")
    path = tuple(key.split("."))
    if not all(part and part == part.strip() for part in path):
        raise UserError.single(where, "no key. Write section.key=value, such as lora.r=8.")
    if not value.strip():
        raise UserError.single(where, f"nothing after '='. Write {key}=null to say none.")
    return path, read_value(value, where=where)


def _set(values: dict[str, Any], path: KeyPath, value: Any, *, earlier: Sequence[KeyPath]) -> None:
    where = f"override {dotted(path)}"
    if any(other[: len(path)] == path for other in earlier):
        raise UserError.single(where, "given after an override that it undoes. Keep one.")
    if path in [(section,) for section in SECTIONS] and not isinstance(value, dict):
        key = f"{path[0]}.KEY"
        raise UserError.single(where, f"a section. Write {key}=value, or {path[0]}={{key: value}}.")
    for depth, part in enumerate(path[:-1], start=1):
        inner = values.get(part)
        if inner is not None and not isinstance(inner, dict):
            outer = dotted(path[:depth])
            raise UserError.single(where, f"{outer} holds no keys. Write {outer}=value.")
        values = values.setdefault(part, {}) if inner is not None else _emptied(values, part)
    values[path[-1]] = value


def _emptied(values: dict[str, Any], key: str) -> dict[str, Any]:
    """``key:`` without anything, or no such key, is a mapping to fill."""
    values[key] = {}
    created: dict[str, Any] = values[key]
    return created
