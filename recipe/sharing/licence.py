"""Whether the licence that was chosen for an adapter can stand beside its base's."""

from pathlib import Path

from huggingface_hub import HfApi, metadata_load

from recipe.settings import ModelSettings, UserError

# They ask for notices and forbid no other licence on what builds on them.
_PERMISSIVE = {"apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "isc", "mit", "unlicense"}


def check_license(chosen: str | None, base: ModelSettings, base_model: str | None) -> str:
    """Compare with what the base's own card says; return a line on it for the screen.

    Args:
        base_model: the base's hub id; None if it has none, and its folder's README.md is read.

    Raises:
        UserError: the base's licence holds for what builds on it, and another was chosen.
    """
    theirs = _license_of(base, base_model)
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
    if card.is_file():
        try:
            return _single((metadata_load(str(card)) or {}).get("license"))
        except Exception:  # metadata that is no YAML, or no table
            return None
    if base_model is None:
        return None
    try:
        info = HfApi().model_info(base_model)
    except Exception:  # no such repository, no network: what is unknown is said to be
        return None
    return _single(getattr(info.card_data, "license", None))


def _single(named: object) -> str | None:
    """Old cards have lists; of several nobody can say which one holds."""
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    return named if isinstance(named, str) else None
