"""A file of decoding strategies to be compared, as ``configs/lab/decoding.yaml``.

generation: {max_new_tokens: 64}     # keys for all of them
strategies:
  nucleus: {strategy: sample, top_p: 0.9}
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from recipe.settings.generation import GenerationSettings, generation_settings
from recipe.settings.load import find_config, text_of
from recipe.settings.problem import Problem, UserError
from recipe.settings.yaml_text import Document, KeyPath, dotted, one_line, read

_SECTIONS = ("generation", "strategies")


def load_lab(config: str, overrides: Mapping[str, Any]) -> dict[str, GenerationSettings]:
    """The settings under each name, in the file's order.

    Args:
        overrides: keys of the command line, for all of them, over those of the file.

    Raises:
        UserError: with every problem of every strategy.
    """
    if "strategy" in overrides:
        raise UserError.single("strategy", "does not go with --lab, whose file has several.")
    path = find_config(config, flag="--lab", inside="lab")
    name = one_line(path.name)
    document = read(text_of(path, name), name=name)
    problems = list(document.problems) or _shape_problems(document, name)
    found: dict[str, GenerationSettings] = {}
    if not problems:
        shared = document.values.get("generation") or {}
        for label, own in document.values["strategies"].items():
            where = partial(_where, document, name, label, frozenset(overrides))
            try:
                found[label] = generation_settings({**shared, **own, **overrides}, where=where)
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(dict.fromkeys(problems))
    return found


def _shape_problems(document: Document, name: str) -> list[Problem]:
    values = document.values
    problems = [
        Problem(
            _place(document, name, (key,)),
            f"unknown section. Choose among {', '.join(_SECTIONS)}.",
        )
        for key in values
        if key not in _SECTIONS
    ]
    strategies = values.get("strategies")
    if not isinstance(strategies, dict) or not strategies:
        problems.append(
            Problem(f"{name}: strategies", "expected names, and below each its keys, found none.")
        )
        strategies = {}
    problems += [
        Problem(
            _place(document, name, ("strategies", label)),
            "expected keys, such as {strategy: greedy_search}.",
        )
        for label, own in strategies.items()
        if not isinstance(own, dict)
    ]
    if not isinstance(values.get("generation") or {}, dict):
        problems.append(Problem(f"{name}: generation", "expected keys below it. Indent them."))
    return problems


def _where(document: Document, name: str, label: str, overridden: frozenset[str], key: str) -> str:
    if key in overridden:
        return key
    for path in (("strategies", label, key), ("generation", key), ("strategies", label)):
        if path in document.lines:
            missing = () if path[-1] == key else (key,)
            return _place(document, name, path) + "".join(f".{one_line(part)}" for part in missing)
    return f"{name}: {dotted(('strategies', label, key))}"


def _place(document: Document, name: str, path: KeyPath) -> str:
    line = f":{document.lines[path]}" if path in document.lines else ""
    return f"{name}{line}: {dotted(path)}"
