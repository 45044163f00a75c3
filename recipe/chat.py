"""A conversation in a terminal."""

import contextlib
import itertools
import sys
import time
from collections.abc import Sequence

from recipe.answerer import Answerer, load_assistant
from recipe.data.formats import Message
from recipe.data.prompts import Prompt, Shot, sound_prompt
from recipe.decoding.stopping import Interruption
from recipe.settings import GenerationSettings, UserError

_HELP = "/reset forgets the conversation, /exit ends it (so does Ctrl-D); Ctrl-C stops an answer."


def chat(answerer: Answerer, settings: GenerationSettings, *, shots: Sequence[Shot]) -> None:
    """Read a line, answer it, and so on, until the end of input or /exit.

    Where the template writes conversations the model sees all turns so far.

    Raises:
        UserError: the settings do not fit the model.
    """
    _line_editing()
    assistant = None
    if settings.assistant_model:
        assistant = load_assistant(settings.assistant_model, answerer)
    answerer.decoder(settings, assistant=assistant).check([])
    print(f"{answerer.described}, {settings.described}\n{_HELP}")
    if not answerer.template.writes_turns:
        print(f"The {answerer.template.name} template has no turns: each line is answered alone.")
    before: list[Message] = []
    turns = itertools.count()  # so that saying the same twice does not draw the same
    while (line := _line()) is not None:
        if line == "/reset":
            before = []
        elif line.startswith("/"):
            print(_HELP)
        elif line:
            try:
                prompt = sound_prompt("this line", next(turns), line)
                text = _reply(answerer, settings, assistant, prompt, shots=shots, before=before)
            except UserError as error:
                print(f"{error}\n/reset forgets the conversation.")
                continue
            if answerer.template.writes_turns:
                before += [Message("user", line), Message("assistant", text)]


def _reply(
    answerer: Answerer,
    settings: GenerationSettings,
    assistant: object,
    prompt: Prompt,
    *,
    shots: Sequence[Shot],
    before: Sequence[Message],
) -> str:
    interruption = Interruption()
    decoder = answerer.decoder(settings, assistant=assistant, interruption=interruption)
    encoded = answerer.encode([prompt], shots=shots, before=before)
    stream = decoder.stream_to(_write)
    started = time.perf_counter()
    with interruption.listening():
        ((answer,),) = decoder.answers(encoded, batch_size=1, stream=stream)
    print("" if stream else answer.text)
    rate = len(answer.ids) / (time.perf_counter() - started)
    print(f"({answer.finish_reason} · {len(answer.ids)} tokens, {rate:.1f} tokens/s)\n")
    return answer.text


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _line() -> str | None:
    try:
        line = input("> ").strip()
    except EOFError:
        print()
        return None
    return None if line == "/exit" else line


def _line_editing() -> None:
    with contextlib.suppress(ImportError):  # not on every platform
        import readline  # noqa: F401, input() uses it once it is there
