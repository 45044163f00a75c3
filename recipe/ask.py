"""Prompts in, answers out: on the screen as they come, or as JSON lines."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from recipe.answerer import Answerer, load_assistant
from recipe.data.prompts import Prompt, Shot
from recipe.decoding.decode import Answer, Decoder, Encoded
from recipe.decoding.stopping import Interruption
from recipe.decoding.stream import Stream
from recipe.settings import GenerationSettings


@dataclass
class _Tally:
    tokens: int = 0
    seconds: float = 0.0

    def said(self) -> str:
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return f"{self.tokens} tokens in {self.seconds:.1f} s, {rate:.1f} tokens/s"


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
        RunFailed: the model computes NaN.
        KeyboardInterrupt: Ctrl-C was pressed; what was there is written by then.
    """
    assistant = None
    if settings.assistant_model:
        assistant = load_assistant(settings.assistant_model, answerer)
    encoded = answerer.encode(prompts, shots=shots)
    answerer.decoder(settings).check(encoded)  # before the file is made
    interruption = Interruption()
    with ExitStack() as stack:
        stack.enter_context(interruption.listening())
        file = stack.enter_context(_written_to(output)) if output else None
        for name in who or [answerer.name]:
            with _speaking(answerer, name) as speaker:
                decoder = speaker.decoder(settings, assistant=assistant, interruption=interruption)
                said = f"{speaker.described}, {settings.described}"
                print(f"{said}\n", file=sys.stderr, flush=True)
                show = _json_lines(file, name, settings, prompts) if file else _screen(prompts)
                stream = None
                if not file and len(prompts) == 1 and decoder.can_stream:
                    stream = _stream(decoder)
                tally = _Tally()
                _answer(decoder, encoded, show, stream, tally, batch_size)
                if len(prompts) > 1 or file:
                    print(f"{len(prompts)} prompts · {tally.said()}", file=sys.stderr)
        if interruption.happened:
            raise KeyboardInterrupt


def _answer(
    decoder: Decoder,
    encoded: Sequence[Encoded],
    show: Callable[[list[Answer], bool, str], None],
    stream: Stream | None,
    tally: _Tally,
    batch_size: int,
) -> None:
    started = time.perf_counter()
    for answers in decoder.answers(encoded, batch_size=batch_size, stream=stream):
        tally.tokens += sum(len(answer.ids) for answer in answers)
        tally.seconds = time.perf_counter() - started
        show(answers, stream is not None, tally.said())


@contextmanager
def _speaking(answerer: Answerer, name: str) -> Iterator[Answerer]:
    if name == answerer.name:
        yield answerer
        return
    with answerer.as_base() as base:
        yield base


def _stream(decoder: Decoder) -> Stream:
    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    drafted = decoder.settings.strategy == "assisted_generation"
    stops = decoder.stop.stop_strings
    return Stream(decoder.tokenizer, write, stop_strings=stops, skip_prompt=drafted)


def _screen(prompts: Sequence[Prompt]) -> Callable[[list[Answer], bool, str], None]:
    def show(answers: list[Answer], streamed: bool, pace: str) -> None:
        for answer in answers:
            numbered = f"[{answer.index}] " if len(prompts) > 1 else ""
            if len(prompts) > 1 and not answer.number:
                print(f"{numbered}{_first_line(prompts[answer.index].instruction)}")
            print("" if streamed else answer.text)
            count = f"{len(answer.ids)} tokens" if len(prompts) > 1 else pace
            print(f"({answer.finish_reason} · {count})\n", file=sys.stderr, flush=True)

    return show


def _first_line(text: str) -> str:
    line = text.strip().split("\n")[0]
    return line if len(line) <= 80 else f"{line[:79]}…"


def _json_lines(
    file: TextIO, name: str, settings: GenerationSettings, prompts: Sequence[Prompt]
) -> Callable[[list[Answer], bool, str], None]:
    by_index = {prompt.index: prompt for prompt in prompts}

    def show(answers: list[Answer], _streamed: bool, _pace: str) -> None:
        for answer in answers:
            prompt = by_index[answer.index]
            record = {
                "index": answer.index,
                "prompt": prompt.instruction,
                **({"input": prompt.context} if prompt.context else {}),
                "model": name,
                "number": answer.number,
                "text": answer.text,
                "ids": answer.ids,
                "finish_reason": answer.finish_reason,
                **({} if answer.score is None else {"score": answer.score}),
                "seed": settings.seed if settings.samples else None,
                "settings": settings.recorded,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()

    return show


@contextmanager
def _written_to(output: str) -> Iterator[TextIO]:
    if output == "-":
        yield sys.stdout
        return
    with Path(output).open("x", encoding="utf-8") as file:
        yield file
