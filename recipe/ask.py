"""Prompts in, answers out: on the screen as they come, or as JSON lines."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from recipe.answerer import Answerer, load_assistant
from recipe.data.prompts import Prompt, Shot
from recipe.decoding.decode import Decoder
from recipe.decoding.stopping import Interruption
from recipe.decoding.stream import Stream
from recipe.decoding.task import Answer, Encoded
from recipe.settings import GenerationSettings, UserError

_Show = Callable[[list[Answer]], None]


@dataclass
class _Pace:
    """How much was written, and how quickly."""

    prompts: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return f"{self.tokens} tokens in {self.seconds:.1f} s, {rate:.1f} tokens/s"


class OutputFile:
    """A file that appears with its first line, so that nothing is left of a run without answers."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: TextIO | None = sys.stdout if path == "-" else None

    def write(self, record: dict[str, Any]) -> None:
        """Append one JSON line.

        Raises:
            UserError: the file cannot be made, or is there already.
        """
        if self._file is None:
            try:
                self._file = Path(self._path).open("x", encoding="utf-8")  # noqa: SIM115
            except OSError as error:
                raise UserError.single(
                    "--output", f"{self._path} cannot be written: {error.strerror}. Name another."
                ) from error
        unicode = self._file.encoding.lower().replace("-", "") == "utf8"
        self._file.write(json.dumps(record, ensure_ascii=not unicode) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close it, if it was made."""
        if self._file is not None and self._file is not sys.stdout:
            self._file.close()


def ask(
    answerer: Answerer,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    *,
    who: Sequence[str],
    shots: Sequence[Shot],
    output: str | None,
    batch_size: int,
) -> None:
    """Answer every prompt, by each of ``who`` (``base``, ``adapter``; nobody: as loaded).

    Raises:
        UserError: a prompt does not fit, or the settings do not fit the model.
        RunFailed: no answer can be as asked; those before it are written.
        KeyboardInterrupt: Ctrl-C was pressed; what was there is written by then.
    """
    assistant = None
    if settings.assistant_model:
        assistant = load_assistant(settings.assistant_model, answerer)
    encoded = answerer.encode(prompts, shots=shots)
    answerer.decoder(settings).check(encoded)
    interruption = Interruption()
    file = OutputFile(output) if output else None
    try:
        with interruption.listening():
            for name in who or [answerer.name]:
                with _speaking(answerer, name) as speaker:
                    decoder = speaker.decoder(
                        settings, assistant=assistant, interruption=interruption
                    )
                    print(f"{speaker.described}, {settings.described}\n", file=sys.stderr)
                    if file:
                        _to_file(file, speaker, decoder, prompts, encoded, shots, batch_size)
                    else:
                        _to_screen(decoder, prompts, encoded, batch_size)
                if interruption.happened:
                    raise KeyboardInterrupt
    finally:
        if file:
            file.close()


@contextmanager
def _speaking(answerer: Answerer, name: str) -> Iterator[Answerer]:
    if name == answerer.name:
        yield answerer
        return
    with answerer.as_base() as base:
        yield base


def _to_screen(
    decoder: Decoder, prompts: Sequence[Prompt], encoded: Sequence[Encoded], batch_size: int
) -> None:
    single = len(prompts) == 1
    stream = decoder.stream_to(_write_now) if single else None
    pace = _Pace()

    def show(answers: list[Answer]) -> None:
        for answer in answers:
            if not single and not answer.number:
                print(f"[{answer.index}] {_first_line(prompts[answer.index].instruction)}")
            print("" if stream else answer.text, flush=True)
            count = str(pace) if single else f"{len(answer.ids)} tokens"
            print(f"({answer.finish_reason} · {count})\n", file=sys.stderr, flush=True)

    _answer(decoder, encoded, show, pace, batch_size=batch_size, stream=stream)
    if not single:
        print(f"{pace.prompts} prompts · {pace}", file=sys.stderr)


def _to_file(
    file: OutputFile,
    speaker: Answerer,
    decoder: Decoder,
    prompts: Sequence[Prompt],
    encoded: Sequence[Encoded],
    shots: Sequence[Shot],
    batch_size: int,
) -> None:
    by_index = {prompt.index: prompt for prompt in prompts}
    settings = decoder.settings
    bar = tqdm(total=len(prompts), desc="answering", unit="prompt", leave=False, disable=None)

    def show(answers: list[Answer]) -> None:
        bar.update()
        for answer in answers:
            prompt = by_index[answer.index]
            record = {
                "index": answer.index,
                "prompt": prompt.instruction,
                "input": prompt.context or None,
                "shots": [list(shot) for shot in shots] or None,
                "model": speaker.name,
                **speaker.identity,
                "number": answer.number,
                "text": answer.text,
                "ids": answer.ids,
                "finish_reason": answer.finish_reason,
                "score": answer.score,
                "seed": settings.seed if settings.samples else None,
                "settings": settings.recorded,
            }
            file.write({key: value for key, value in record.items() if value is not None})

    pace = _Pace()
    with bar:
        _answer(decoder, encoded, show, pace, batch_size=batch_size)
    print(f"{pace.prompts} prompts · {pace}", file=sys.stderr)


def _answer(
    decoder: Decoder,
    encoded: Sequence[Encoded],
    show: _Show,
    pace: _Pace,
    *,
    batch_size: int,
    stream: Stream | None = None,
) -> None:
    asked = decoder.values.get("num_return_sequences", 1)
    fewer = 0
    started = time.perf_counter()
    for answers in decoder.answers(encoded, batch_size=batch_size, stream=stream):
        pace.prompts += 1
        pace.tokens += sum(len(answer.ids) for answer in answers)
        pace.seconds = time.perf_counter() - started
        fewer += len(answers) < asked
        show(answers)
    if fewer:
        print(f"{fewer} prompts have fewer than {asked} different answers", file=sys.stderr)


def _write_now(piece: str) -> None:
    """A piece of an answer, on the screen at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def _first_line(text: str) -> str:
    line = text.strip().split("\n")[0]
    return line if len(line) <= 80 else f"{line[:79]}…"
