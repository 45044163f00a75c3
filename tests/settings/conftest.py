"""One valid config, and files that differ from it by a line."""

from collections.abc import Callable
from pathlib import Path

import pytest

BASE = {
    "model": ["name_or_path: base"],
    "data": ["path: rows.json", "rows: 0:200", "held_out: 200:250"],
    "lora": ["r: 8", "target_modules: [q_proj, v_proj]"],
    "training": ["seed: 1"],
}

WriteConfig = Callable[..., Path]


@pytest.fixture
def write_config(tmp_path: Path) -> WriteConfig:
    """Write the valid config with ``section="key: value"`` lines added or put in place."""

    def write(**extra: str) -> Path:
        text = ""
        for section, lines in BASE.items():
            added = extra.get(section, "").splitlines()
            keys = {line.partition(":")[0] for line in added if not line.startswith(" ")}
            kept = [line for line in lines if line.partition(":")[0] not in keys]
            text += f"{section}:\n" + "".join(f"  {line}\n" for line in [*kept, *added])
        path = tmp_path / "c.yaml"
        path.write_text(text + extra.get("rest", ""), encoding="utf-8")
        return path

    return write
