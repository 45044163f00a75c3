"""``Settings`` → YAML that ``load_settings`` reads back to equal settings."""

from typing import Any

import yaml
from pydantic import BaseModel

from recipe.settings.schema import HubSettings, JudgingSettings, Settings, StudySettings, plain
from recipe.settings.yaml_text import plain_scalar

# They belong to one run, and the file is there to start another.
_OF_ONE_RUN = ("output_dir", "resume_from_checkpoint")


def dump(settings: Settings) -> str:
    """The config that repeats this run, without its output folder and the checkpoint it resumed."""
    training = {k: v for k, v in plain(settings.training).items() if k not in _OF_ONE_RUN}
    values = {
        "name": settings.name,
        "model": _given(settings.model),
        "data": _given(settings.data),
        "lora": plain(settings.lora),
        "training": training,
    }
    if settings.judging != JudgingSettings():
        values["judging"] = _given(settings.judging)
    if settings.hub != HubSettings():
        values["hub"] = _given(settings.hub)
    if settings.study != StudySettings():
        values["study"] = _given(settings.study)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _given(section: BaseModel) -> dict[str, Any]:
    return {key: plain(value) for key, value in section if value is not None}


class _Dumper(yaml.SafeDumper):
    """Quotes what our reader would take for a number, and writes no aliases, which it refuses."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=_style(text))


def _style(text: str) -> str | None:
    if not text.isprintable():
        # Only double quotes escape; between single ones U+0085 comes back as a space.
        return '"'
    try:
        return None if plain_scalar(text) == text else "'"
    except ValueError:
        return "'"


_Dumper.add_representer(str, _represent_text)
