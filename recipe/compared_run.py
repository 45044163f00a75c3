"""A finished run as it is compared: its settings, and the rows that it saw and did not see."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.data.rows import Row
from recipe.data.tokens import TokenizedRow
from recipe.judging.parts import Part, choose, part_of
from recipe.run_data import Data, load_data
from recipe.sealed import damage
from recipe.settings import Settings, UserError, load_settings
from recipe.sharing.adapter_folder import newest_adapter
from recipe.sharing.tensors import read_tensors
from recipe.training.checkpoints import checkpoints
from recipe.training.run_log import read_metrics

_CHECKPOINTS = 10


@dataclass(frozen=True)
class ComparedRun:
    """``data`` are its rows, which are those that it was trained on."""

    folder: Path
    settings: Settings
    manifest: dict[str, Any]
    data: Data

    @property
    def losses(self) -> list[dict[str, Any]]:
        """``step``, ``epoch`` and ``loss`` of each record of the training loss."""
        return [
            {key: record[key] for key in ("step", "epoch", "loss")}
            for record in self._records
            if "loss" in record
        ]

    @property
    def end(self) -> tuple[float, int]:
        """Epoch and step of its last record."""
        last = self._records[-1] if self._records else {}
        return float(last.get("epoch", 0)), int(last.get("step", 0))

    @property
    def _records(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")


@dataclass(frozen=True)
class Saved:
    """Weights that a run saved on its way; ``is_adapter`` where it ended with these."""

    folder: Path
    epoch: float
    step: int
    is_adapter: bool


def find_run(named: str | None, runs: Path) -> Path:
    """The folder of a finished run; None for the newest.

    Raises:
        UserError: there is none, or it is not finished.
    """
    if named is None:
        return newest_adapter(runs).parent
    folder = Path(named)
    if not (folder / "settings.yaml").is_file() or not (folder / "manifest.json").is_file():
        raise UserError.single(
            "--run",
            f"{named} is no run: it holds no settings.yaml and manifest.json, which say what was "
            "seen in training. Name a folder such as runs/starter-001.",
        )
    if not (folder / "adapter").is_dir():
        raise UserError.single("--run", f"{named} is not finished: it holds no adapter. Finish it.")
    return folder


def read_run(folder: Path) -> ComparedRun:
    """What a run was made of.

    Raises:
        UserError: its rows are no longer what they were.
    """
    settings = load_settings(str(folder / "settings.yaml"))
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        began_with = manifest["data"]["tokens_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError.single(
            f"{folder / 'manifest.json'}", "does not say which rows were seen. Train anew."
        ) from error
    data = load_data(settings)
    if data.tokens_sha256 != began_with:
        raise UserError.single(
            "data.path",
            f"the rows of {settings.data.path} are others than {folder} was trained on, so nothing "
            "tells which were seen. Bring the file back.",
        )
    return ComparedRun(folder, settings, manifest, data)


def parts_of(
    run: ComparedRun, *, rows: int, seen: Sequence[int] | None, unseen: Sequence[int] | None
) -> dict[str, Part]:
    """``seen`` rows, and ``unseen`` ones where some are held out or named.

    Args:
        rows: the most of each, where they are not named.
        seen: places in the source; ``unseen`` likewise.

    Raises:
        UserError: a row that is named is not there, or of the other kind.
    """
    data = run.data
    if seen is None:
        parts = {"seen": choose(data.train.rows, data.rows.train, rows)}
    else:
        parts = {"seen": _named("--seen", seen, data.train.rows, data.rows.train)}
    if unseen is not None:
        parts["unseen"] = _named("--unseen", unseen, *_untrained(run, unseen))
    elif data.held_out.rows:
        parts["unseen"] = choose(data.held_out.rows, data.rows.held_out, rows)
    return parts


def _untrained(run: ComparedRun, indices: Sequence[int]) -> tuple[list[TokenizedRow], list[Row]]:
    """Rows of the same source, read as the held-out rows of a run are: none that was trained on."""
    span = f"{min(indices)}:{max(indices) + 1}"
    section = run.settings.data.model_copy(update={"held_out": span})
    try:
        data = load_data(run.settings.model_copy(update={"data": section}))
    except UserError as error:
        said = " ".join(problem.message for problem in error.problems)
        raise UserError.single("--unseen", said) from error
    return data.held_out.rows, data.rows.held_out


def _named(
    flag: str, indices: Sequence[int], rows: Sequence[TokenizedRow], texts: Sequence[Row]
) -> Part:
    by_index = {row.index: row for row in rows}
    missing = [index for index in indices if index not in by_index]
    if missing:
        what = "was not trained on" if flag == "--seen" else "was trained on, or is not there"
        raise UserError.single(flag, f"row {missing[0]} {what}. Name others.")
    return part_of([by_index[index] for index in indices], texts)


def saved_on_the_way(run: ComparedRun) -> list[Saved]:
    """Its whole checkpoints, oldest first, at most ten that are spread over the run, and its
    adapter; nothing where there are none, or none that fits the unchanged base (PiSSA, OLoRA).
    """
    adapter = read_tensors(run.folder / "adapter")
    found = []
    for folder in reversed(checkpoints(run.folder)):
        if damage(folder):
            continue
        tensors = read_tensors(folder)
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in adapter.items()}:
            continue
        state = json.loads((folder / "trainer_state.json").read_text())
        same = all(tensors[name].equal(tensor) for name, tensor in adapter.items())
        found.append(Saved(folder, state["epoch"], state["global_step"], is_adapter=same))
    if not found:
        return []
    if not any(one.is_adapter for one in found):
        found.append(Saved(run.folder / "adapter", *run.end, is_adapter=True))
    return _spread(found)


def _spread(found: list[Saved]) -> list[Saved]:
    if len(found) <= _CHECKPOINTS:
        return found
    kept = {round(n * (len(found) - 1) / (_CHECKPOINTS - 1)) for n in range(_CHECKPOINTS)}
    return [one for n, one in enumerate(found) if n in kept or one.is_adapter]
