"""A run's tuned model beside its base: measured, judged, and written as a page and as JSON."""

import gc
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from tqdm import tqdm

from recipe.answerer import Answerer, load_answerer
from recipe.compared_run import ComparedRun, parts_of, read_run, saved_on_the_way
from recipe.data.neutral import neutral_ids
from recipe.data.tokens import TokenizedRow
from recipe.decoding.task import Answer
from recipe.judging.page import page
from recipe.judging.parts import Part, behind_others, last_answers
from recipe.judging.perplexity import Likelihood, perplexity, rows_nll, window_nll
from recipe.judging.report import MODELS, Compared, Measured, report
from recipe.judging.verdict import Epoch
from recipe.settings import GenerationSettings, RunFailed, UserError, dump
from recipe.sharing.tensors import read_tensors

PAGE, CONTENT = "report.html", "report.json"
_BATCH = 16
# Of the neutral text: each token has at least half a window before it, the first ones aside.
_WINDOW, _STRIDE = 256, 128
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
    run = read_run(folder)
    parts = parts_of(run, rows=asked.rows, seen=asked.seen, unseen=asked.unseen)
    answerer = load_answerer(
        adapter=str(folder / "adapter"), model=None, template=None, runs=folder.parent
    )
    _say(f"{answerer.described}")
    compared = _compared(run, answerer, parts, asked)
    content = {**_origin(run, answerer, asked), **report(compared)}
    _print(content)
    _write(folder, content)
    return str(content["verdict"]["label"])


def compare_at_end(folder: Path, asked: Asked) -> None:
    """As ``compare_run``. Whatever goes wrong is told, and the run stays a success."""
    gc.collect()  # what was trained is still in memory, and is loaded anew
    try:
        compare_run(folder, asked)
    except Exception as error:  # the adapter is safe; nothing that happens here may fail the run
        known = isinstance(error, UserError | RunFailed)
        _say(f"warning   {error if known else f'{type(error).__name__}: {error}'}")
        command = shlex.join(["python", "recipe/compare.py", "--run", str(folder)])
        _say(f"          The adapter is in {folder / 'adapter'}; to compare it: {command}")


def _compared(
    run: ComparedRun, answerer: Answerer, parts: dict[str, Part], asked: Asked
) -> Compared:
    neutral = neutral_ids(answerer.tokenizer)
    context = int(answerer.model.config.max_position_embeddings)
    measured: dict[str, dict[str, Measured]] = {name: {} for name in (*parts, "neutral")}
    own, others = ([], []) if "unseen" not in parts else _prompt_swap(parts["unseen"], context)
    for model in MODELS:
        with _speaking(answerer, model) as speaker:
            for name, part in parts.items():
                with _bar(f"{model}, {name}: likelihood", len(part.rows)) as bar:
                    nll = rows_nll(speaker.model, part.rows, done=bar.update)
                answers = _answers(speaker, part, asked.generation, f"{model}, {name}: answers")
                measured[name][model] = Measured(nll, answers)
            measured["neutral"][model] = Measured(_neutral_nll(speaker.model, neutral))
    with _bar("tuned: prompts swapped", len(own) + len(others)) as bar:
        behind_own = rows_nll(answerer.model, own, done=bar.update)
        behind = rows_nll(answerer.model, others, done=bar.update)
    epochs = _epochs(run, answerer, parts, measured, neutral)
    return Compared(parts, measured, run.data.rows.train, epochs, behind_own, behind)


def _prompt_swap(part: Part, context: int) -> tuple[list[TokenizedRow], list[TokenizedRow]]:
    """Last answers behind their own prompts, and behind others; of rows that have both."""
    swapped = behind_others(part.rows, context=context)
    pairs = [
        (own, other)
        for own, other in zip(last_answers(part.rows), swapped, strict=True)
        if other is not None
    ]
    return [own for own, _ in pairs], [other for _, other in pairs]


@contextmanager
def _speaking(answerer: Answerer, model: str) -> Iterator[Answerer]:
    if model == "tuned":
        yield answerer
        return
    with answerer.as_base() as base:
        yield base


def _answers(
    speaker: Answerer, part: Part, generation: GenerationSettings | None, doing: str
) -> dict[int, Answer]:
    if generation is None:
        return {}
    room = speaker.model.config.max_position_embeddings - generation.values["max_new_tokens"]
    prompts = part.prompts(int(room))
    found = {}
    with _bar(doing, len(prompts)) as bar:
        # Of like length together, so that little is padded.
        ordered = sorted(prompts, key=lambda prompt: len(prompt.ids))
        for answers in speaker.decoder(generation).answers(ordered, batch_size=_BATCH):
            found[answers[0].index] = answers[0]
            bar.update()
    return found


def _neutral_nll(model: Any, ids: Sequence[int]) -> list[Likelihood]:
    window = min(_WINDOW, int(model.config.max_position_embeddings))
    return list(window_nll(model, ids, window=window, stride=min(_STRIDE, window)))


def _epochs(
    run: ComparedRun,
    answerer: Answerer,
    parts: Mapping[str, Part],
    measured: Mapping[str, Mapping[str, Measured]],
    neutral: Sequence[int],
) -> list[Epoch]:
    """Perplexities of the base, of the run's checkpoints and of its adapter."""
    saved = saved_on_the_way(run)
    if not saved:
        return []
    names = (*parts, "neutral")
    found = [_epoch("base", 0, 0, {name: measured[name]["base"].nll for name in names})]
    rows = sum(len(part.rows) for part in parts.values())
    with _bar("checkpoints", rows * sum(not one.is_adapter for one in saved)) as bar:
        for one in saved:
            nll: dict[str, Sequence[Likelihood]]
            if one.is_adapter:
                nll = {name: measured[name]["tuned"].nll for name in names}
            else:
                set_peft_model_state_dict(answerer.model, read_tensors(one.folder))
                nll = {
                    name: rows_nll(answerer.model, part.rows, done=bar.update)
                    for name, part in parts.items()
                }
                nll["neutral"] = _neutral_nll(answerer.model, neutral)
            found.append(
                _epoch(one.folder.name, one.epoch, one.step, nll, is_adapter=one.is_adapter)
            )
    set_peft_model_state_dict(answerer.model, read_tensors(run.folder / "adapter"))
    return found


def _epoch(
    name: str,
    epoch: float,
    step: int,
    nll: Mapping[str, Sequence[Likelihood]],
    *,
    is_adapter: bool = False,
) -> Epoch:
    unseen = perplexity(nll["unseen"]) if "unseen" in nll else None
    seen, neutral = perplexity(nll["seen"]), perplexity(nll["neutral"])
    return Epoch(epoch, step, name, seen, unseen, neutral, is_adapter=is_adapter)


def _origin(run: ComparedRun, answerer: Answerer, asked: Asked) -> dict[str, Any]:
    device = answerer.model.device
    trained = shlex.join(map(str, run.manifest.get("command", [])))
    return {
        "run": str(run.folder),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "commands": [line for line in (trained, shlex.join(asked.command)) if line],
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
    return name if name == "neutral" else f"{parts[name]['rows']} {name} rows"


def _cell(part: Mapping[str, Any], kind: str, form: str) -> str:
    if kind not in part["base"]:
        return ""
    values = (part[model][kind]["value"] for model in MODELS)
    return " → ".join("–" if value is None else form.format(value) for value in values)


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    """Both files or none new: what is there of an older comparison is replaced."""
    texts = {
        CONTENT: json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False) + "\n",
        PAGE: page(content),
    }
    try:
        for name, text in texts.items():
            (folder / f".{name}.partial").write_text(text, encoding="utf-8")
        for name in texts:
            (folder / f".{name}.partial").replace(folder / name)
    except OSError as error:
        for name in texts:
            (folder / f".{name}.partial").unlink(missing_ok=True)
        raise RunFailed(
            f"{folder / PAGE} could not be written: {error.strerror}. The figures stand above."
        ) from error
    _say(f"\nreport    {folder / PAGE} (open it in a browser), {folder / CONTENT}")


@contextmanager
def _bar(doing: str, total: int) -> Iterator["tqdm[Any]"]:
    """On a terminal, from the third second on."""
    with tqdm(total=total, desc=doing, delay=2, leave=False, disable=None) as bar:
        yield bar


def _say(line: str) -> None:
    print(line, flush=True)
