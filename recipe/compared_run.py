"""A finished run as it is compared: its settings, and the rows that it saw and did not see."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.data.rows import Row
from recipe.data.tokens import TokenizedRow
from recipe.judging.parts import Part, choose, part_of
from recipe.run_data import Data, load_data
from recipe.sealed import damage
from recipe.settings import Problem, Settings, UserError, load_settings
from recipe.sharing.adapter_folder import newest_adapter
from recipe.sharing.tensors import read_tensors
from recipe.training.checkpoints import OF_ANOTHER_SHAPE, checkpoints
from recipe.training.run_log import read_metrics

_CHECKPOINTS = 10


@dataclass(frozen=True)
class ComparedRun:
    """``data`` are the rows that it was trained on, ``records`` those of metrics.jsonl."""

    folder: Path
    settings: Settings
    manifest: dict[str, Any]
    data: Data
    records: list[dict[str, Any]]

    @property
    def losses(self) -> list[dict[str, Any]]:
        """``step``, ``epoch`` and ``loss`` of each record of the training loss."""
        return [
            {key: record[key] for key in ("step", "epoch", "loss")}
            for record in self.records
            if "loss" in record
        ]

    @property
    def end(self) -> tuple[float, int]:
        """Epoch and step of its last record."""
        last = [record for record in self.records if "epoch" in record][-1:]
        return next(((record["epoch"], record["step"]) for record in last), (0.0, 0))

    @property
    def cut(self) -> frozenset[int]:
        """Rows that were truncated, whose last answer may be missing."""
        return frozenset([*self.data.train.truncated, *self.data.held_out.truncated])

    @property
    def texts(self) -> list[Row]:
        """Of the rows that it was trained on."""
        kept = {row.index for row in self.data.train.rows}
        return [row for row in self.data.rows.train if row.index in kept]


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
        try:
            named = str(newest_adapter(runs).parent)
        except UserError:
            raise UserError.single(
                "--run", f"no finished run in {runs}/ yet. Run `make train`, or name a folder."
            ) from None
    # os.path, because Path's own raise where a name is too long for any file system.
    if not all(os.path.isfile(f"{named}/{name}") for name in ("settings.yaml", "manifest.json")):  # noqa: PTH113
        raise UserError.single(
            "--run",
            f"{named or 'an empty name'} is no run: it holds no settings.yaml and manifest.json, "
            "which say what was seen in training. Name a folder such as runs/starter-001.",
        )
    folder = Path(named)
    if not (folder / "adapter").is_dir():
        raise UserError.single("--run", f"{named} is not finished: it holds no adapter. Finish it.")
    return folder


def read_run(folder: Path) -> ComparedRun:
    """What a run was made of.

    Raises:
        UserError: its rows are no longer what they were, or changed on the way.
    """
    settings = load_settings(str(folder / "settings.yaml"))
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        began_with = manifest["data"]["tokens_sha256"]
        records = read_metrics(folder / "metrics.jsonl")
        changes = [line for change in manifest.get("changed", []) for line in change["what"]]
    except (OSError, ValueError, *OF_ANOTHER_SHAPE) as error:
        raise UserError.single(
            "--run",
            f"manifest.json or metrics.jsonl of {folder} cannot be read "
            f"({type(error).__name__}), so nothing tells which rows were seen. Train anew.",
        ) from error
    if any("rows" in line or line.startswith("data.") for line in changes):
        raise UserError.single(
            "--run",
            f"{folder} went on with other rows than it began with (--allow-changed), so nothing "
            "tells which it saw. Compare a run that was trained on the same rows throughout.",
        )
    data = load_data(settings)
    if data.tokens_sha256 != began_with:
        raise UserError.single(
            "data.path",
            f"the rows of {settings.data.path} are others than {folder} was trained on, so nothing "
            "tells which were seen. Bring the file back.",
        )
    return ComparedRun(folder, settings, manifest, data, records)


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
        parts = {"seen": choose(data.train.rows, data.rows.train, count=rows)}
    else:
        parts = {"seen": _named("--seen", seen, data.train.rows, data.rows.train)}
    if unseen is not None:
        parts["unseen"] = _named("--unseen", unseen, *_untrained(run, unseen))
    elif data.held_out.rows:
        parts["unseen"] = choose(data.held_out.rows, data.rows.held_out, count=rows)
    return parts


def _untrained(run: ComparedRun, indices: Sequence[int]) -> tuple[list[TokenizedRow], list[Row]]:
    """Rows of the same source, read as the held-out rows of a run are: none that was trained on."""
    # A range is not walked through: it may be of any length.
    ends = (indices[0], indices[-1]) if isinstance(indices, range) else indices
    span = f"{min(ends)}:{max(ends) + 1}"
    section = run.settings.data.model_copy(update={"held_out": span})
    try:
        data = load_data(run.settings.model_copy(update={"data": section}))
    except UserError as error:
        raise UserError(
            Problem("--unseen", f"{one.where}: {one.message}") for one in error.problems
        ) from error
    return data.held_out.rows, data.rows.held_out


def _named(
    flag: str, indices: Sequence[int], rows: Sequence[TokenizedRow], texts: Sequence[Row]
) -> Part:
    by_index = {row.index: row for row in rows}
    missing = next((index for index in indices if index not in by_index), None)
    if missing is not None:
        what = "was not trained on" if flag == "--seen" else "was trained on, or is not there"
        raise UserError.single(flag, f"row {missing} {what}. Name others.")
    return part_of([by_index[index] for index in indices], texts)


def saved_on_the_way(run: ComparedRun) -> tuple[list[Saved], list[str]]:
    """Its whole checkpoints, oldest first, at most ten that are spread over the run, and its
    adapter; nothing where there are none, or none that fits the unchanged base (PiSSA, OLoRA).

    The second list says which are left out because they are damaged.
    """
    adapter = read_tensors(run.folder / "adapter")
    found: list[Saved] = []
    left_out: list[str] = []
    for folder in reversed(checkpoints(run.folder)):
        if problems := damage(folder):
            left_out.append(f"{folder.name} is left out: {problems[0]}.")
            continue
        tensors = read_tensors(folder)
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in adapter.items()}:
            continue
        state = json.loads((folder / "trainer_state.json").read_text())
        same = all(tensors[name].equal(tensor) for name, tensor in adapter.items())
        found.append(Saved(folder, state["epoch"], state["global_step"], is_adapter=same))
    if found and not any(one.is_adapter for one in found):
        found.append(Saved(run.folder / "adapter", *run.end, is_adapter=True))
    return _spread(found), left_out


def _spread(found: list[Saved]) -> list[Saved]:
    if len(found) <= _CHECKPOINTS:
        return found
    kept = {round(n * (len(found) - 1) / (_CHECKPOINTS - 1)) for n in range(_CHECKPOINTS)}
    return [one for n, one in enumerate(found) if n in kept or one.is_adapter]
