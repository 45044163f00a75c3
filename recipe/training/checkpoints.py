"""Checkpoints carry their seal, and a run continues only from a whole one of the same run."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from recipe.sealed import damage, seal
from recipe.settings import Problem, Settings, UserError, dump
from recipe.training.run_log import RunLog

LOG_STATE = "run_log.json"
_TRAINER_STATE = "trainer_state.json"
_ADAPTER = "adapter_model.safetensors"
_NEEDED = (_ADAPTER, "adapter_config.json", "optimizer.pt", "scheduler.pt", LOG_STATE)
_PICKLES = re.compile(r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth")
_STATES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".safetensors"}
# Written by the Trainer, read by nothing: it is a pickle that torch would have to run.
_NEVER_READ = "training_args.bin"
# What a JSON or YAML document of the wrong shape raises when a key is looked up in it.
_OF_ANOTHER_SHAPE = (AttributeError, KeyError, TypeError)


class SealCheckpoints(TrainerCallback):
    """Adds the log's sums to each checkpoint that the Trainer wrote, and seals it."""

    def __init__(self, log: RunLog) -> None:
        self._log = log

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        log_state = self._log.state(args, state)  # on every process: it adds their sums
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # the others write their random states into the same folder
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / LOG_STATE).write_text(json.dumps(log_state))
            seal(folder)


def find_checkpoint(asked: str, *, best_needed: bool = False) -> Path:
    """The checkpoint that ``training.resume_from_checkpoint`` names: itself, or a run's newest.

    Args:
        best_needed: the run will end with its best checkpoint, so that one must be there too; the
            Trainer would take the last instead.

    Raises:
        UserError: there is none, a file of it is missing or changed since it was written, or the
            Trainer would read something that this recipe did not write.
    """
    where = "training.resume_from_checkpoint"
    folder = Path(asked)
    # os.path, because Path's own raise where a name is too long for any file system.
    if not os.path.isfile(folder / _TRAINER_STATE):  # noqa: PTH113
        numbers = [
            int(path.name.removeprefix("checkpoint-"))
            for path in (folder.glob("checkpoint-*") if os.path.isdir(folder) else ())  # noqa: PTH112
            if path.name.removeprefix("checkpoint-").isdecimal()
        ]
        if not numbers:
            raise UserError.single(
                where, f"{asked} is no checkpoint and no run that holds one. Correct the path."
            )
        folder = folder / f"checkpoint-{max(numbers)}"
    if (folder.parent / "adapter").exists():
        raise UserError.single(
            where, f"{folder.parent} is finished: its adapter is there. Start a new run instead."
        )
    # The seal is proof against accidents, and anyone can write a new one.
    problems = damage(folder) or _strange(folder, best_needed=best_needed)
    if problems:
        remedy = "Name an older checkpoint, or start anew."
        raise UserError([Problem(where, f"{problem}. {remedy}") for problem in problems])
    return folder


def _strange(folder: Path, *, best_needed: bool) -> list[str]:
    """What the Trainer would take up from ``folder`` that no run of this recipe puts there."""
    problems = [f"{folder / name}: missing" for name in _NEEDED if not (folder / name).is_file()]
    if not any(folder.glob("rng_state*.pth")):
        problems.append(f"{folder}/rng_state.pth: missing")
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if _PICKLES.fullmatch(name):
            problems += _unsafe(file)
        elif file.suffix in _STATES and name not in (_ADAPTER, _NEVER_READ):
            problems.append(f"{file}: no file of a checkpoint that this recipe writes")
    return problems + _unlike_a_state(folder, best_needed=best_needed)


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
    except (OSError, ValueError, RecursionError, *_OF_ANOTHER_SHAPE):
        return [f"{file}: no state of a Trainer"]
    if not whole:
        return [f"{file}: step {state.global_step} of {state.max_steps}"]
    if foreign:
        return [f"{file}: names {best}, which is not of this run, as the best checkpoint"]
    if best_needed and not there:
        return [f"{file}: names {best} as the best checkpoint, which is not there"]
    return []


@dataclass(frozen=True)
class Beginning:
    """What a run began with, settings aside.

    ``base_sha256`` is explained in ``recipe.model.fingerprint``; ``share_openings`` is what
    ``data.share_openings`` comes to, and None for runs from before it was written down.
    """

    tokens_sha256: str
    base_sha256: str
    share_openings: bool | None
    processes: int


def check_same_run(settings: Settings, run: Path, now: Beginning) -> None:
    """A run continues with the settings, the data and the base it began with, or not at all.

    Raises:
        UserError: naming each difference.
    """
    began, beginning = _began(run)
    asked = _flat(yaml.safe_load(dump(settings)))
    problems = [
        Problem(
            key, f"is {asked.get(key)!r}, but {run} began with {began.get(key)!r}. Change it back."
        )
        for key in sorted(began.keys() | asked.keys())
        # Where the adapter goes in the end changes nothing of it.
        if began.get(key) != asked.get(key) and key != "name" and not key.startswith("hub.")
    ]
    problems += _changed(run, beginning, now)
    output_dir = settings.training.get("output_dir")
    if output_dir and Path(output_dir).resolve() != run.resolve():
        problems.append(
            Problem(
                "training.output_dir", f"is {output_dir}, but {run} is continued. Leave it out."
            )
        )
    if problems:
        raise UserError(problems)


def _changed(run: Path, began: Beginning, now: Beginning) -> list[Problem]:
    said = {
        "tokens_sha256": Problem(
            "data.path",
            f"its rows changed since {run} began, or the tokenizer's template did. Bring the old "
            "files back.",
        ),
        "base_sha256": Problem(
            "model.name_or_path",
            f"its weights are others than {run} began with. Bring the old ones back; for a hub id, "
            "name their model.revision.",
        ),
        "share_openings": Problem(
            "data.share_openings",
            f"comes to {now.share_openings}, but to {began.share_openings} when {run} began. "
            f"Set it to {str(began.share_openings).lower()}.",
        )
        if began.share_openings is not None
        else Problem(
            "training.resume_from_checkpoint",
            f"{run} began with a version that drew other dropout masks. Continue it with that "
            "version, or start anew.",
        ),
        "processes": Problem(
            "accelerate launch",
            f"{now.processes} processes, but {run} began with {began.processes}, and each has its "
            "own random state. Start as many.",
        ),
    }
    return [problem for name, problem in said.items() if getattr(began, name) != getattr(now, name)]


def _began(run: Path) -> tuple[dict[str, Any], Beginning]:
    """The settings of ``run``, flat, and what else it wrote at its start."""
    try:
        settings = _flat(yaml.safe_load((run / "settings.yaml").read_text()))
        manifest = json.loads((run / "manifest.json").read_text())
        return settings, Beginning(
            manifest["data"]["tokens_sha256"],
            manifest["base_sha256"],
            manifest["data"].get("share_openings"),
            manifest["processes"],
        )
    except (OSError, ValueError, RecursionError, yaml.YAMLError, *_OF_ANOTHER_SHAPE) as error:
        raise UserError.single(
            "training.resume_from_checkpoint",
            f"settings.yaml and manifest.json of {run} do not say how it began "
            f"({type(error).__name__}). Bring them back, or start anew.",
        ) from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
