"""Every problem of a config's values, found in one pass."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recipe.settings.option import Absent, Option, found
from recipe.settings.problem import Problem
from recipe.settings.refused import refusal
from recipe.settings.relations import RELATIONS, Relation
from recipe.settings.sections import SECTIONS, options, top_level_option, unknown_key
from recipe.settings.yaml_text import KeyPath, dotted

_MISSING_SECTION = {
    "model": "missing. Write 'model:' with name_or_path below it.",
    "data": "missing. Write 'data:' with path below it.",
    "lora": "missing. This recipe trains adapters: write 'lora:' with r and target_modules below.",
}


@dataclass(frozen=True)
class Origin:
    """Where each value came from: a line of the file called ``name``, or an override."""

    name: str
    lines: Mapping[KeyPath, int]
    overridden: frozenset[KeyPath]

    def where(self, path: KeyPath) -> str:
        for override in self.overridden:
            if path[: len(override)] == override:
                return f"override {dotted(path)}"
            if path not in self.lines and override[: len(path)] == path:
                return f"override {dotted(override)}"
        line = f":{self.lines[path]}" if path in self.lines else ""
        return f"{self.name}{line}: {dotted(path)}"


@dataclass
class Findings:
    """Problems so far. ``faulty`` are the keys that have one; they get no second one."""

    origin: Origin
    faulty: set[KeyPath]
    problems: list[Problem] = field(default_factory=list)

    def add(self, path: KeyPath, message: str) -> None:
        self.problems.append(Problem(self.origin.where(path), message))
        self.faulty.add(path)

    def covers(self, path: KeyPath) -> bool:
        """Whether the key, one around it or one inside it has a problem."""
        return any(
            known[: len(path)] == path or path[: len(known)] == known for known in self.faulty
        )


def check(values: Mapping[str, Any], findings: Findings) -> None:
    """Add everything that is wrong with a whole config to ``findings``."""
    for key, value in values.items():
        if key == "name":
            _check_name(value, findings)
        elif key not in SECTIONS:
            findings.add((key,), unknown_key((), key, SECTIONS))
    for section in SECTIONS:
        path = (section,)
        if section not in values and section in _MISSING_SECTION:
            if not findings.covers(path):
                findings.add(path, _MISSING_SECTION[section])
        elif isinstance(values.get(section, {}), Mapping | None):
            _check_keys(values.get(section) or {}, options(section), path, findings)
        else:
            findings.add(
                path, f"expected keys below it, found {found(values[section])}. Indent them."
            )
    for relation in RELATIONS:
        _check_relation(relation, values, findings)


def _check_name(value: object, findings: Findings) -> None:
    objection = top_level_option().objection(value)
    if objection is None and isinstance(value, str) and not _is_folder_name(value):
        objection = (
            f"{value!r} cannot name the run folder. Add a line such as 'name: my-run', of letters, "
            "digits, '-', '_' and '.'."
        )
    if objection:
        findings.add(("name",), objection)


def _is_folder_name(text: str) -> bool:
    """Whether ``text`` can stand in ``runs/<name>-001`` on every file system."""
    return not text.startswith(".") and all(
        letter.isascii() and (letter.isalnum() or letter in "-_.") for letter in text
    )


def _check_keys(
    values: Mapping[str, Any], known: Mapping[str, Option], prefix: KeyPath, findings: Findings
) -> None:
    for key, value in values.items():
        path = (*prefix, key)
        option = known.get(key)
        if option is None:
            findings.add(path, unknown_key(prefix, key, known))
            continue
        objection = refusal(prefix[0], option, value) if len(prefix) == 1 else None
        objection = objection or option.objection(value)
        if objection:
            findings.add(path, objection)
        elif option.inner is not None and isinstance(value, Mapping):
            _check_keys(value, option.inner, path, findings)
    for key, option in known.items():
        path = (*prefix, key)
        if option.default is Absent.REQUIRED and key not in values and path not in findings.faulty:
            findings.add(path, f"missing, expected {option.expected}. {option.help}")


def _check_relation(relation: Relation, values: Mapping[str, Any], findings: Findings) -> None:
    paths = [tuple(key.split(".")) for key in relation.keys]
    if any(findings.covers(path) for path in paths):
        return
    objection = relation.objection(*(_value(values, *path) for path in paths))
    if objection:
        findings.add(paths[0], objection)


def _value(values: Mapping[str, Any], section: str, key: str) -> object:
    """As written, or else the default; None for a key that this library version lacks."""
    given = values.get(section) or {}
    if key in given:
        return given[key]
    option = options(section).get(key)
    return None if option is None or isinstance(option.default, Absent) else option.default
