"""Checkpoints carry their seal, and a run continues only from a whole one of the same run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipe.sealed import damage, seal
from recipe.settings import Problem, Settings, UserError, dump
from recipe.training.arguments import world_size
from recipe.training.run_log import RunLog

LOG_STATE = "run_log.json"
_TRAINER_STATE = "trainer_state.json"


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


def find_checkpoint(asked: str) -> Path:
    """The checkpoint that ``training.resume_from_checkpoint`` names: itself, or a run's newest.

    Raises:
        UserError: there is none, or a file of it is missing or changed since it was written.
    """
    where = "training.resume_from_checkpoint"
    folder = Path(asked)
    if not (folder / _TRAINER_STATE).is_file():
        numbers = [
            int(path.name.removeprefix("checkpoint-"))
            for path in folder.glob("checkpoint-*")
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
    problems = damage(folder)
    if problems:
        remedy = "Name an older checkpoint, or start anew."
        raise UserError([Problem(where, f"{problem}. {remedy}") for problem in problems])
    return folder


def check_same_run(settings: Settings, data_sha256: str, run: Path) -> None:
    """A run continues with the settings and the data it began with, or not at all.

    Raises:
        UserError: naming each difference.
    """
    began = _flat(yaml.safe_load((run / "settings.yaml").read_text()))
    now = _flat(yaml.safe_load(dump(settings)))
    problems = [
        Problem(
            key, f"is {now.get(key)!r}, but {run} began with {began.get(key)!r}. Change it back."
        )
        for key in sorted(began.keys() | now.keys())
        if began.get(key) != now.get(key) and key != "name"
    ]
    manifest = json.loads((run / "manifest.json").read_text())
    if manifest["data"]["sha256"] != data_sha256:
        problems.append(
            Problem("data.path", f"its rows changed since {run} began. Bring the old file back.")
        )
    if manifest["processes"] != world_size():
        problems.append(
            Problem(
                "accelerate launch",
                f"{world_size()} processes, but {run} began with {manifest['processes']}, and each "
                "has its own random state. Start as many.",
            )
        )
    asked = settings.training.get("output_dir")
    if asked and Path(asked).resolve() != run.resolve():
        problems.append(
            Problem("training.output_dir", f"is {asked}, but {run} is continued. Leave it out.")
        )
    if problems:
        raise UserError(problems)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
