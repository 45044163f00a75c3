"""A config's name and overrides → ``Settings``, or every problem at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe.settings.check import Findings, Origin, check
from recipe.settings.library import quantization_options
from recipe.settings.overrides import apply_overrides
from recipe.settings.problem import UserError
from recipe.settings.schema import (
    DataSettings,
    HubSettings,
    JudgingSettings,
    ModelSettings,
    Settings,
    StudySettings,
)
from recipe.settings.yaml_text import one_line, read

# Beside the package in a checkout, which is how the recipe is installed.
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def find_config(name: str, *, flag: str = "--config", inside: str = "") -> Path:
    """``name`` itself if there is such a file, else ``configs/name``, with or without ``.yaml``.

    Args:
        flag: what named it, for the message.
        inside: a folder of ``configs/``.

    Raises:
        UserError: none of them is there; the message lists what is.
    """
    folder = CONFIGS / inside
    candidates = [Path(name), folder / name, folder / f"{name}.yaml"]
    for path in candidates:
        if _is_file(path):
            return path
    there = ", ".join(sorted(path.name for path in folder.glob("*.yaml"))) or "nothing"
    kept = Path(name) / "settings.yaml"
    remedy = f"Use {kept}." if _is_file(kept) else f"configs/{inside} holds {there}."
    raise UserError.single(f"{flag} {name!r}", f"no such file. {remedy}")


def load_settings(config: str, overrides: Sequence[str] = ()) -> Settings:
    """Read ``config``, apply ``overrides`` such as ``lora.r=8``, and validate everything.

    Imports none of the libraries whose sections it validates, so it answers at once.

    Raises:
        UserError: with all problems of the file and of the overrides.
    """
    path = find_config(config)
    name = one_line(path.name)
    document = read(text_of(path, name), name=name)
    overridden = apply_overrides(document.values, overrides)
    problems = [*document.problems, *overridden.problems]
    if document.whole:
        overridden.values.setdefault("name", path.stem)
        origin = Origin(name, document.lines, overridden.paths)
        findings = Findings(origin, faulty=set(document.unreadable))
        check(overridden.values, findings)
        problems += findings.problems
    if problems:
        raise UserError(problems)
    return _settings(overridden.values)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # A name that no file system takes, such as one of 5000 letters.
        return False


def text_of(path: Path, name: str) -> str:
    """The text of a config file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError.single(name, f"cannot be read: {error.strerror}.") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError.single(f"{name}:{line}", "not UTF-8. Save it as UTF-8.") from error


def _settings(values: dict[str, Any]) -> Settings:
    model = dict(values["model"])
    if model.get("quantization"):
        model["quantization"] = _with_floats(model["quantization"])
    return Settings(
        name=values["name"],
        model=ModelSettings(**model),
        data=DataSettings(**values["data"]),
        lora=values["lora"] or {},
        training=values.get("training") or {},
        judging=JudgingSettings(**(values.get("judging") or {})),
        hub=HubSettings(**(values.get("hub") or {})),
        study=StudySettings(**(values.get("study") or {})),
    )


def _with_floats(quantization: dict[str, Any]) -> dict[str, Any]:
    """BitsAndBytesConfig refuses ``llm_int8_threshold: 6``; 6 and 6.0 are one number in YAML."""
    known = quantization_options()
    return {
        key: float(value) if isinstance(known[key].default, float) else value
        for key, value in quantization.items()
    }
