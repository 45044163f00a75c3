"""Several decoding strategies on the same prompts: one table, and JSON beside it."""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recipe.answerer import Answerer, load_assistant
from recipe.data.prompts import Prompt, Shot
from recipe.decoding.stopping import Interruption
from recipe.decoding.task import Answer, Encoded
from recipe.judging.answers import distinct, log_probability, repetition
from recipe.settings import GenerationSettings, UserError

_COLUMNS = (
    ("tokens/s", "tokens_per_second", "{:.1f}"),
    ("tokens", "mean_tokens", "{:.1f}"),
    ("stopped", "stop_rate", "{:.0%}"),
    ("distinct-1", "distinct_1", "{:.3f}"),
    ("distinct-2", "distinct_2", "{:.3f}"),
    ("rep-4", "repetition_4", "{:.3f}"),
    ("log p/token", "log_probability_per_token", "{:.3f}"),
)


def run_lab(
    answerer: Answerer,
    prompts: Sequence[Prompt],
    strategies: Mapping[str, GenerationSettings],
    *,
    shots: Sequence[Shot],
    output: str | None,
) -> None:
    """Answer all prompts by each strategy, one prompt at a time, and print the table.

    Raises:
        UserError: a prompt does not fit, or a strategy does not fit the model.
        KeyboardInterrupt: Ctrl-C was pressed; the table has what was done until then.
    """
    encoded = answerer.encode(prompts, shots=shots)
    assistants = {}
    for label, settings in strategies.items():
        answerer.decoder(settings).check(encoded)
        if settings.assistant_model:
            assistants[label] = load_assistant(settings.assistant_model, answerer)
    print(f"{answerer.described}, {len(prompts)} prompts\n", file=sys.stderr, flush=True)
    interruption = Interruption()
    rows: dict[str, dict[str, Any]] = {}
    with interruption.listening():
        for number, (label, settings) in enumerate(strategies.items(), start=1):
            print(f"{number} of {len(strategies)}: {settings.described}", file=sys.stderr)
            decoder = answerer.decoder(
                settings, assistant=assistants.get(label), interruption=interruption
            )
            if number == 1:  # so that the first strategy does not pay for what is loaded lazily
                for _ in decoder.answers(encoded[:1], batch_size=1):
                    pass
            started = time.perf_counter()
            answers = [one for found in decoder.answers(encoded, batch_size=1) for one in found]
            seconds = time.perf_counter() - started
            cut = interruption.happened
            rows[f"{label} (cut short)" if cut else label] = {
                "settings": settings.recorded,
                **_measured(answerer, encoded, answers, seconds),
                "answers": [_recorded(answer) for answer in answers],
            }
            if cut:
                break
    table = "\n".join(_table(rows))
    if output != "-":
        print(table)
    if output:
        _write(output, answerer, prompts, shots, rows)
    if interruption.happened:
        raise KeyboardInterrupt


def _measured(
    answerer: Answerer, encoded: Sequence[Encoded], answers: Sequence[Answer], seconds: float
) -> dict[str, Any]:
    prompts = {prompt.index: prompt.ids for prompt in encoded}
    ids = [answer.ids for answer in answers]
    tokens = sum(map(len, ids))
    likely = sum(
        log_probability(answerer.model, prompts[answer.index], answer.ids)
        for answer in answers
        if answer.ids
    )
    ended = sum(answer.finish_reason in ("eos", "stop") for answer in answers)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mean_tokens": tokens / len(answers),
        "stop_rate": ended / len(answers),
        "distinct_1": distinct(ids, 1),
        "distinct_2": distinct(ids, 2),
        "repetition_4": repetition(ids),
        "log_probability_per_token": likely / tokens if tokens else math.nan,
    }


def _recorded(answer: Answer) -> dict[str, Any]:
    return {
        "index": answer.index,
        "number": answer.number,
        "text": answer.text,
        "ids": answer.ids,
        "finish_reason": answer.finish_reason,
    }


def _table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    width = max([len("strategy"), *map(len, rows)])
    lines = ["  ".join(["strategy".ljust(width), *(name for name, _, _ in _COLUMNS)])]
    for label, row in rows.items():
        cells = [form.format(row[key]).rjust(len(name)) for name, key, form in _COLUMNS]
        lines.append("  ".join([label.ljust(width), *cells]))
    return lines


def _write(
    output: str,
    answerer: Answerer,
    prompts: Sequence[Prompt],
    shots: Sequence[Shot],
    rows: Mapping[str, Mapping[str, Any]],
) -> None:
    device = str(answerer.model.device)
    content = {
        "model": answerer.name,
        **answerer.identity,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "prompts": [asdict(prompt) for prompt in prompts],
        "shots": [list(shot) for shot in shots],
        "strategies": {
            # JSON has no nan: a measure that needs more tokens than there are is null.
            label: {k: None if v != v else v for k, v in row.items()}
            for label, row in rows.items()
        },
    }
    text = json.dumps(content, indent=1, ensure_ascii=output == "-", allow_nan=False) + "\n"
    if output == "-":
        sys.stdout.write(text)
        return
    try:
        with Path(output).open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError.single(
            "--output", f"{output} cannot be written: {error.strerror}. The table stands above."
        ) from error
