"""A run continues with the settings, the data and the base it began with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from recipe.settings import Problem, Settings, UserError, dump
from recipe.training.checkpoints import OF_ANOTHER_SHAPE

# With --allow-changed.
_ALLOWED = {
    "tokens_sha256": "the rows are others than it began with",
    "share_openings": "openings are shared otherwise than it began with",
    "layout": "micro-batches hold other tokens than those of the version that it began with",
}
_BATCH = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
# A checkpoint's optimizer and scheduler bring these back, whatever the settings say.
_IN_THE_STATES = (
    "training.optim",
    "training.optim_args",
    "training.learning_rate",
    "training.lr_scheduler_type",
    "training.lr_scheduler_kwargs",
    "training.weight_decay",
    "training.adam_beta1",
    "training.adam_beta2",
    "training.adam_epsilon",
    "training.fp16",
    "training.bf16",
    "training.seed",
    "training.data_seed",
    "training.metric_for_best_model",
    "training.greater_is_better",
    "data.held_out",
)


@dataclass(frozen=True)
class Beginning:
    """What a run began with, settings aside.

    ``base_sha256`` is explained in ``recipe.model.fingerprint``; ``share_openings`` is what
    ``data.share_openings`` comes to, and ``layout`` that of ``recipe.data.batch``. Both are None
    for runs from before they were written down.
    """

    tokens_sha256: str
    base_sha256: str
    share_openings: bool | None
    layout: int | None
    processes: int
    engine: str


def check_same_run(
    settings: Settings, run: Path, now: Beginning, *, allow_changed: bool = False
) -> list[str]:
    """A run continues with the settings, the data and the base it began with, or not at all.

    Args:
        allow_changed: other settings and other rows are meant. What a checkpoint's tensors and
            states belong to stays: adapter, base, optimizer, learning rate, seed, processes.

    Returns:
        What is allowed to differ, a line each.

    Raises:
        UserError: naming each difference that is not allowed.
    """
    began, beginning = _began(run)
    asked = flat(yaml.safe_load(dump(settings)))
    differing = [
        key
        for key in sorted(began.keys() | asked.keys())
        # What is done with the adapter in the end changes nothing of it.
        if began.get(key) != asked.get(key)
        and key != "name"
        and not key.startswith(("hub.", "judging.", "study."))
    ]
    if beginning.share_openings is None:  # its layout is another, which says it all
        beginning = replace(beginning, share_openings=now.share_openings)
    changed = [f.name for f in fields(now) if getattr(beginning, f.name) != getattr(now, f.name)]
    may = {*_ALLOWED, *(key for key in differing if not _in_the_states(key))}
    if _rows_a_step(began) != _rows_a_step(asked):  # the place in the epoch would be another
        may -= set(_BATCH)
    problems = [
        Problem(
            key,
            f"is {asked.get(key)!r}, but {run} began with {began.get(key)!r}. Change it back"
            + (", or add --allow-changed." if key in may else "."),
        )
        for key in differing
        if not (allow_changed and key in may)
    ]
    said = _said(run, beginning, now)
    problems += [said[name] for name in changed if not (allow_changed and name in may)]
    output_dir = settings.training.get("output_dir")
    if output_dir and Path(output_dir).resolve() != run.resolve():
        problems.append(
            Problem(
                "training.output_dir", f"is {output_dir}, but {run} is continued. Leave it out."
            )
        )
    if problems:
        raise UserError(problems)
    return [
        *(f"{key} is {asked.get(key)!r}, was {began.get(key)!r}" for key in differing),
        *(_ALLOWED[name] for name in changed),
    ]


def _rows_a_step(flat: Mapping[str, Any]) -> int:
    batch, accumulation = _BATCH
    return int(flat.get(batch, 8)) * int(flat.get(accumulation, 1))


def _in_the_states(key: str) -> bool:
    """Whether what a checkpoint holds would not fit if ``key`` changed, or would overrule it."""
    if key == "lora.lora_dropout":
        return False
    return key.startswith(("model.", "lora.")) or key in _IN_THE_STATES


def _said(run: Path, began: Beginning, now: Beginning) -> dict[str, Problem]:
    return {
        "tokens_sha256": Problem(
            "data.path",
            f"its rows changed since {run} began, or the tokenizer's template did. Bring the old "
            "files back, or add --allow-changed.",
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
        ),
        "layout": Problem(
            "training.resume_from_checkpoint",
            f"{run} began with a version that drew other dropout masks. Continue it with that "
            "version, start anew, or add --allow-changed.",
        ),
        "processes": Problem(
            "accelerate launch",
            f"{now.processes} processes, but {run} began with {began.processes}, and each has its "
            "own random state. Start as many.",
        ),
        "engine": Problem(
            "accelerate launch",
            f"asks for {now.engine}, but {run} began with {began.engine}, and its checkpoints hold "
            "that engine's parts. Start with the launch file that it began with.",
        ),
    }


def _began(run: Path) -> tuple[dict[str, Any], Beginning]:
    """The settings of ``run``, flat, and what else it wrote at its start."""
    try:
        settings = flat(yaml.safe_load((run / "settings.yaml").read_text()))
        manifest = json.loads((run / "manifest.json").read_text())
        return settings, Beginning(
            manifest["data"]["tokens_sha256"],
            manifest["base_sha256"],
            manifest["data"].get("share_openings"),
            manifest["data"].get("layout"),
            manifest["processes"],
            manifest.get("engine", _before_engines(manifest["processes"])),
        )
    except (OSError, ValueError, RecursionError, yaml.YAMLError, *OF_ANOTHER_SHAPE) as error:
        raise UserError.single(
            "training.resume_from_checkpoint",
            f"settings.yaml and manifest.json of {run} do not say how it began "
            f"({type(error).__name__}). Bring them back, or start anew.",
        ) from error


def _before_engines(processes: int) -> str:
    """Of a run that a version started which had no other."""
    return "ddp" if processes > 1 else "single"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found
