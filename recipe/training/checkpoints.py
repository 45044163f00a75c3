"""Checkpoints: how they are written, and which one a run continues from.

Each is a sealed folder: written beside its place, flushed and renamed, so that a kill or a full
disk at any instant leaves the older ones as they are. transformers' own are written in place, and
its resume takes the newest whatever is in it (github.com/huggingface/transformers/issues/35525).
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from recipe.sealed import damage
from recipe.settings import Problem, UserError

LOG_STATE = "run_log.json"
_WHERE = "training.resume_from_checkpoint"
_TRAINER_STATE = "trainer_state.json"
ADAPTER = "adapter_model.safetensors"
_NEEDED = (ADAPTER, "adapter_config.json", "scheduler.pt", LOG_STATE)
_NUMBERED = re.compile(r"checkpoint-(\d+)")
_PICKLES = re.compile(r"(optimizer(_\d+)?|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth")
_STATES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".safetensors"}
# Written by the Trainer, read by nothing: it is a pickle that torch would have to run.
_NEVER_READ = "training_args.bin"
# What a JSON or YAML document of the wrong shape raises when a key is looked up in it.
OF_ANOTHER_SHAPE = (AttributeError, KeyError, TypeError)


@dataclass(frozen=True)
class Checkpoint:
    """A whole one, and for each newer one of its run why it was left out."""

    folder: Path
    left_out: list[str]


def checkpoints(run: Path) -> list[Path]:
    """Those of a run, whole or not, the newest first."""
    if not os.path.isdir(run):  # noqa: PTH112 - Path's own raises where a name is too long
        return []
    found = [path for path in run.glob("checkpoint-*") if _NUMBERED.fullmatch(path.name)]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def find_checkpoint(asked: str, *, best_needed: bool = False) -> Checkpoint:
    """The checkpoint that ``training.resume_from_checkpoint`` names: itself, or a run's newest that
    is whole.

    Args:
        best_needed: the run will end with its best checkpoint, so that one must be there too; the
            Trainer would take the last instead.

    Raises:
        UserError: there is none; of the one that was named, or of all, a file is missing or changed
            since it was written, or the Trainer would read something that this recipe did not
            write.
    """
    folder = Path(asked)
    named = bool(_NUMBERED.fullmatch(folder.name)) or os.path.isfile(folder / _TRAINER_STATE)  # noqa: PTH113
    run = folder.parent if named else folder
    if os.path.isdir(run / "adapter"):  # noqa: PTH112
        raise UserError.single(
            _WHERE, f"{run} is finished: its adapter is there. Start a new run instead."
        )
    candidates = [folder] if named and os.path.isdir(folder) else checkpoints(run)  # noqa: PTH112
    if not candidates or (named and candidates != [folder]):
        raise UserError.single(_WHERE, _nothing_there(asked, run))
    problems: list[str] = []
    for candidate in candidates:
        # The seal is proof against accidents, and anyone can write a new one.
        found = damage(candidate) or _strange(candidate, best_needed=best_needed)
        if not found:
            return Checkpoint(candidate, problems)
        problems += found
    whole = _newest_whole(run, best_needed=best_needed) if named else None
    remedy = f"Name {whole}, which is whole." if whole else "Start anew."
    raise UserError([Problem(_WHERE, f"{problem}. {remedy}") for problem in problems])


def _nothing_there(asked: str, run: Path) -> str:
    settings = run / "settings.yaml"
    if os.path.isfile(settings) and not checkpoints(run):  # noqa: PTH113
        return (
            f"{run} was stopped before it saved a checkpoint. Start it anew: python "
            f"recipe/train.py --config {settings}"
        )
    return f"{asked} is no checkpoint and no run that holds one. Correct the path."


def _newest_whole(run: Path, *, best_needed: bool) -> Path | None:
    return next(
        (
            folder
            for folder in checkpoints(run)
            if not damage(folder) and not _strange(folder, best_needed=best_needed)
        ),
        None,
    )


def _strange(folder: Path, *, best_needed: bool) -> list[str]:
    """What the Trainer would take up from ``folder`` that no run of this recipe puts there."""
    problems = [f"{folder / name}: missing" for name in _NEEDED if not (folder / name).is_file()]
    problems += [f"{folder / name}: missing" for name in _of_processes(folder)]
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if _PICKLES.fullmatch(name):
            problems += _unsafe(file)
        elif file.suffix in _STATES and name not in (ADAPTER, _NEVER_READ):
            problems.append(f"{file}: no file of a checkpoint that this recipe writes")
    return problems + _unlike_a_state(folder, best_needed=best_needed)


def _of_processes(folder: Path) -> list[str]:
    """What is missing of the files that each process of the run writes; without its random state
    one would draw other dropout masks, silently.
    """
    try:
        many = int(json.loads((folder.parent / "manifest.json").read_text())["processes"])
    except (OSError, ValueError, RecursionError, *OF_ANOTHER_SHAPE):
        many = 1  # check_same_run says what is wrong with the manifest
    missing: list[str] = []
    for alone, of_each in (
        ("rng_state.pth", [f"rng_state_{n}.pth" for n in range(many)]),
        ("optimizer.pt", [f"optimizer_{n}.pt" for n in range(many)]),
    ):
        found = [name for name in of_each if (folder / name).is_file()]
        wanted = of_each if found else [alone]
        missing += [name for name in wanted if not (folder / name).is_file()]
    return missing


def _unsafe(file: Path) -> list[str]:
    """Look for code in a file of ``torch.save`` without running it."""
    try:
        with safe_globals():  # what the Trainer allows
            unsafe = get_unsafe_globals_in_checkpoint(file)
            if not unsafe:
                torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what a broken pickle raises is documented nowhere
        return [f"{file}: not readable as tensors and numbers ({type(error).__name__})"]
    return [f"{file}: would run {name} when it is read" for name in sorted(unsafe)]


def _unlike_a_state(folder: Path, *, best_needed: bool) -> list[str]:
    file = folder / _TRAINER_STATE
    try:
        state = TrainerState.load_from_json(str(file))
        whole = 0 < state.global_step <= state.max_steps
        best = Path(state.best_model_checkpoint or folder)
        there = best.exists()
        foreign = there and best.resolve().parent != folder.resolve().parent
    except (OSError, ValueError, RecursionError, *OF_ANOTHER_SHAPE):
        return [f"{file}: no state of a Trainer"]
    if not whole:
        return [f"{file}: step {state.global_step} of {state.max_steps}"]
    if foreign:
        return [f"{file}: names {best}, which is not of this run, as the best checkpoint"]
    if best_needed and not there:
        return [f"{file}: names {best} as the best checkpoint, which is not there"]
    return []
