"""Whether the licence that was chosen for an adapter can stand beside its base's."""

from pathlib import Path

from huggingface_hub import metadata_load
from yaml import YAMLError

from recipe.settings import ModelSettings, UserError
from recipe.sharing.hub import HubError, license_of

# They ask for notices and forbid no other licence on what builds on them.
_PERMISSIVE = {"apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "isc", "mit", "unlicense"}


def check_license(chosen: str | None, base: ModelSettings, base_model: str | None) -> str:
    """Compare with what the base's own card says; return a line on it for the screen.

    Args:
        base_model: the base's hub id; None if it has none, and its folder's README.md is read.

    Raises:
        UserError: the base's licence holds for what builds on it, and another was chosen.
    """
    try:
        theirs = _license_of(base, base_model)
    except HubError as error:
        return f"licence   {chosen or 'none'}; not checked against the base's, because {error}"
    if theirs is None:
        return f"licence   {chosen or 'none'}; the base names none, so that is not checked"
    if chosen is None or chosen == theirs or theirs in _PERMISSIVE:
        return f"licence   {chosen or 'none'}; the base has {theirs}"
    raise UserError.single(
        "hub.license",
        f"{chosen}, but the base is under {theirs}, which holds for what builds on it. Choose "
        f"{theirs}, or leave the licence out.",
    )


def _license_of(base: ModelSettings, base_model: str | None) -> str | None:
    card = Path(base.name_or_path) / "README.md"
    if not card.is_file():
        return _single(license_of(base_model)) if base_model else None
    try:
        return _single((metadata_load(str(card)) or {}).get("license"))
    except (OSError, ValueError, AttributeError, YAMLError):  # metadata that is no table
        return None


def _single(named: object) -> str | None:
    """Old cards have lists; of several nobody can say which one holds."""
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    return named if isinstance(named, str) else None
