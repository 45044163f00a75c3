"""A run's tuned model beside its base: measured, judged, and written as a page and as JSON."""

import gc
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recipe.answerer import Answerer, load_answerer
from recipe.compared_run import ComparedRun, parts_of, read_run
from recipe.judging.page import page
from recipe.judging.report import MODELS, report
from recipe.measuring import compared
from recipe.settings import GenerationSettings, RunFailed, UserError, dump
from recipe.training.faults import out_of_memory

PAGE, CONTENT = "report.html", "report.json"
_SHOWN = {
    "perplexity": "{:.2f}",
    "rouge1": "{:.3f}",
    "rouge2": "{:.3f}",
    "rougeL": "{:.3f}",
    "exact_answer": "{:.0%}",
    "near_copy": "{:.0%}",
    "stop_rate": "{:.0%}",
    "mean_tokens": "{:.1f}",
    "repetition": "{:.3f}",
}


@dataclass(frozen=True)
class Asked:
    """``seen`` and ``unseen`` are places in the source; None leaves the choice to ``rows``, the
    most of each. Without ``generation`` no answers are written.
    """

    rows: int
    generation: GenerationSettings | None
    seen: Sequence[int] | None = None
    unseen: Sequence[int] | None = None
    command: Sequence[str] = ()


def compare_run(folder: Path, asked: Asked) -> str:
    """Measure, print, and write ``report.html`` and ``report.json`` into the run; return the label
    of the verdict.

    Raises:
        UserError: the run's rows are no longer what they were, or rows are asked for that are not
            there.
        NotVerified: the adapter or its base is not what it was.
        RunFailed: the files could not be written.
    """
    if not os.access(folder, os.W_OK):
        raise UserError.single(
            "--run", f"{folder} cannot be written to, and the report goes there. Copy the run."
        )
    run = read_run(folder)
    parts = parts_of(run, rows=asked.rows, seen=asked.seen, unseen=asked.unseen)
    answerer = load_answerer(
        adapter=str(folder / "adapter"), model=None, template=None, runs=folder.parent
    )
    _say(answerer.described)
    try:
        found = compared(run, answerer, parts, asked.generation)
    except RuntimeError as error:
        if out_of_memory(error):
            raise RunFailed(
                "out of memory. Compare on a larger machine, or rows that are shorter: name them "
                "with --seen and --unseen."
            ) from error
        raise
    content = {**_origin(run, answerer, asked), **report(found)}
    _print(content)
    _write(folder, content)
    return str(content["verdict"]["label"])


def compare_at_end(folder: Path, asked: Asked) -> None:
    """As ``compare_run``. Whatever goes wrong is told, and the run stays a success."""
    gc.collect()  # what was trained is still in memory, and is loaded anew
    said = "the comparison was stopped"
    try:
        compare_run(folder, asked)
        return
    except KeyboardInterrupt:
        pass
    except Exception as error:  # the adapter is safe; nothing that happens here may fail the run
        known = isinstance(error, UserError | RunFailed)
        said = str(error) if known else f"{type(error).__name__}: {error}"
    _say(f"warning   {said}")
    _say(
        f"          The adapter is in {folder / 'adapter'}; to compare: {shlex.join(asked.command)}"
    )


def _origin(run: ComparedRun, answerer: Answerer, asked: Asked) -> dict[str, Any]:
    device = answerer.model.device
    trained = shlex.join(["python", *map(str, run.manifest.get("command", []))])
    return {
        "run": str(run.folder),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "commands": [trained, shlex.join(asked.command)],
        "generation": asked.generation.described if asked.generation else "",
        "settings": dump(run.settings),
        "manifest": run.manifest,
        "loss": run.losses,
    }


def _print(content: Mapping[str, Any]) -> None:
    """The verdict, and a table of base → tuned."""
    found = content["verdict"]
    _say(f"\n{found['label'].upper()}. {found['summary']}")
    for line in (*found["evidence"], *found["notes"]):
        _say(f"  {line}")
    parts = content["parts"]
    _say("\n" + "".join(f"{cell:>22}" for cell in ("", *(_head(name, parts) for name in parts))))
    for kind, form in _SHOWN.items():
        cells = [_cell(part, kind, form) for part in parts.values()]
        if any(cells):
            _say("".join(f"{cell:>22}" for cell in (kind, *cells)))
    for one in content["epochs"]:
        figures = [one["seen"], one["unseen"], one["neutral"]]
        shown = "".join(f"{'' if value is None else f'{value:.2f}':>22}" for value in figures)
        _say(f"{'epoch ' + format(one['epoch'], 'g'):>22}{shown}")


def _head(name: str, parts: Mapping[str, Any]) -> str:
    kind = {"seen": "seen rows", "unseen": "held-out rows"}.get(name)
    return f"{parts[name]['rows']} {kind}" if kind else name


def _cell(part: Mapping[str, Any], kind: str, form: str) -> str:
    if kind not in part["base"]:
        return ""
    values = (part[model][kind]["value"] for model in MODELS)
    return " → ".join("–" if value is None else form.format(value) for value in values)


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    """What is there of an older comparison is replaced."""
    texts = {
        CONTENT: json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False) + "\n",
        PAGE: page(content),
    }
    staged = {name: folder / f".{name}.partial" for name in texts}
    try:
        for name, text in texts.items():
            staged[name].write_text(text, encoding="utf-8")
        for name in texts:
            staged[name].replace(folder / name)
    except OSError as error:
        raise RunFailed(
            f"{folder / PAGE} could not be written: {error.strerror}. The figures stand above."
        ) from error
    finally:
        for file in staged.values():
            file.unlink(missing_ok=True)
    _say(f"\nreport    {folder / PAGE} (open it in a browser), {folder / CONTENT}")


def _say(line: str) -> None:
    print(line, flush=True)
