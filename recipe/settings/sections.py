"""The sections of a config, their keys, and what to say about a key that is none of them."""

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping

from recipe.settings.library import lora_options, quantization_options, training_options
from recipe.settings.option import Option
from recipe.settings.refused import TRAINING
from recipe.settings.renamed import REMOVED, RENAMED
from recipe.settings.schema import (
    DataSettings,
    HubSettings,
    JudgingSettings,
    ModelSettings,
    NonEmpty,
    Settings,
    StudySettings,
    options_of,
)

SECTIONS = ("model", "data", "lora", "training", "judging", "hub", "study")
_LISTED_KEYS = 12
_SECRETS = ("token", "api_key")


@functools.cache
def options(section: str) -> Mapping[str, Option]:
    """The keys of a section in the order in which they are declared."""
    match section:
        case "model":
            keys = options_of(ModelSettings)
            inner = dataclasses.replace(keys["quantization"], inner=quantization_options())
            return {**keys, "quantization": inner}
        case "data":
            return options_of(DataSettings)
        case "lora":
            return lora_options()
        case "training":
            return training_options()
        case "judging":
            return options_of(JudgingSettings)
        case "hub":
            return options_of(HubSettings)
        case "study":
            return options_of(StudySettings)
    raise KeyError(section)


def top_level_option() -> Option:
    """``name``, the only key outside the sections."""
    help_text = Settings.model_fields["name"].description or ""
    return Option("name", NonEmpty, help=help_text)


def unknown_key(prefix: tuple[str, ...], key: str, siblings: Iterable[str]) -> str:
    """What is meant instead: today's name, the right section, the nearest name, or the list."""
    section = ".".join(prefix)
    kind = "key" if prefix else "section"
    if key.endswith(_SECRETS):
        return TRAINING["hub_token"].because
    for place in (section, *_other_places(section)):
        if key in REMOVED.get(place, {}):
            return REMOVED[place][key]
        if key in RENAMED.get(place, {}):
            return f"unknown {kind}. Use {RENAMED[place][key]}."
        if place != section and key in _keys(place):
            return f"unknown {kind}. {key} belongs to {place}: write {place}.{key}."
    for place, names, cutoff in _guesses(section, siblings):
        if near := difflib.get_close_matches(_normal(key), names, n=1, cutoff=cutoff):
            return f"unknown {kind}. Did you mean {'.'.join(filter(None, (place, *near)))}?"
    return f"unknown {kind}. {_listed(section, list(siblings))}"


def _other_places(section: str) -> Iterator[str]:
    for place in (*SECTIONS, "model.quantization", ""):
        if place != section:
            yield place


def _keys(place: str) -> Iterable[str]:
    if place == "model.quantization":
        return quantization_options()
    return options(place) if place else ()


def _guesses(section: str, siblings: Iterable[str]) -> Iterator[tuple[str, list[str], float]]:
    yield section, list(siblings), 0.6
    for place in _other_places(section):
        yield place, list(_keys(place)), 0.85


def _normal(key: str) -> str:
    return key.lower().replace("-", "_").replace(" ", "_")


def _listed(section: str, siblings: list[str]) -> str:
    if len(siblings) > _LISTED_KEYS:
        return f"configs/OPTIONS.md lists the keys of {section}."
    return f"Choose among {', '.join(siblings)}."
