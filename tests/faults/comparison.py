"""Is a run that was killed and resumed the run that was not?"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from recipe.sealed import damage

WEIGHTS = "adapter/adapter_model.safetensors"
TIMES = {"epoch_seconds", "trained_tokens_per_second", "peak_memory_bytes"}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl`` without times, as tests/training/test_resume.py has it."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in r.items() if k not in TIMES and not k.endswith(("runtime", "per_second"))}
        for r in map(json.loads, lines)
    ]


def checkpoints(folder: Path) -> list[int]:
    """The steps of the checkpoints in ``folder``, whole or not."""
    names = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def differences(run: Path, reference: Path) -> list[str]:
    """What differs, a line each; an empty list means the same run."""
    if not (run / WEIGHTS).is_file():
        return [f"no {WEIGHTS}"]
    said = []
    if (run / WEIGHTS).read_bytes() != (reference / WEIGHTS).read_bytes():
        said.append(f"the adapter's bytes differ by up to {_distance(run, reference):.2g}")
    ours, theirs = metrics(run), metrics(reference)
    if ours != theirs:
        said.append(_first_difference(ours, theirs))
    hidden = sorted(path.name for path in run.rglob(".*"))  # half-written, or about to go
    if hidden:
        said.append(f"left over: {', '.join(hidden)}")
    if checkpoints(run) != checkpoints(reference):
        said.append(f"checkpoints {checkpoints(run)}, not {checkpoints(reference)}")
    for step in checkpoints(run):
        said += _checkpoint(run / f"checkpoint-{step}", reference / f"checkpoint-{step}")
    return said


def _distance(run: Path, reference: Path) -> float:
    ours, theirs = load_file(run / WEIGHTS), load_file(reference / WEIGHTS)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def _first_difference(ours: list[Any], theirs: list[Any]) -> str:
    for number, (our, their) in enumerate(zip(ours, theirs, strict=False), 1):
        if our != their:
            return f"metrics.jsonl, line {number}: {our}, not {their}"
    return f"metrics.jsonl: {len(ours)} records, not {len(theirs)}"


def _checkpoint(ours: Path, theirs: Path) -> list[str]:
    said = damage(ours)
    name = "adapter_model.safetensors"
    if not said and theirs.is_dir() and (ours / name).read_bytes() != (theirs / name).read_bytes():
        said.append(f"{ours.name}/{name} differs")
    return said
