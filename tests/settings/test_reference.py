"""configs/OPTIONS.md is what `make options` writes now."""

from pathlib import Path

from recipe.settings.reference import options_markdown


def test_options_are_not_stale():
    file = Path(__file__).parents[2] / "configs/OPTIONS.md"
    assert file.read_text() == options_markdown(), "run make options"
