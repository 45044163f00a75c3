"""One prompt, two answers of one loaded model: without its adapter, and with it.

What a visitor of ``recipe/live.py``'s page typed, checked as the command line is, and the states
that the page then goes through.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

from recipe.answerer import Answerer
from recipe.data.prompts import Prompt, sound_prompt
from recipe.decoding.stopping import Interruption
from recipe.settings import (
    GenerationSettings,
    Problem,
    RunFailed,
    UserError,
    generation_keys,
    generation_settings,
)
from recipe.settings.strategies import EITHER
from recipe.settings.yaml_text import read_value

# The keys that have a field of their own on the page; all others can be typed below them.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "greedy_search": ("max_new_tokens",),
    "sample": ("max_new_tokens", "temperature", "top_p", "top_k", "seed"),
    "beam_search": ("max_new_tokens", "num_beams", "length_penalty"),
    "beam_sample": ("max_new_tokens", "num_beams", "temperature", "top_p", "seed"),
    "group_beam_search": ("max_new_tokens", "num_beams", "num_beam_groups", "diversity_penalty"),
    "constrained_beam_search": ("max_new_tokens", "num_beams", "force_words"),
    "contrastive_search": ("max_new_tokens", "penalty_alpha", "top_k"),
    "dola_generation": ("max_new_tokens", "dola_layers"),
    "assisted_generation": ("max_new_tokens", "prompt_lookup_num_tokens"),
}


@dataclass(frozen=True)
class Said:
    """An answer so far, and what stands below it once it has ended."""

    text: str = ""
    end: str = ""


@dataclass(frozen=True)
class Shown:
    """What the page shows; ``status`` is one line, or a line for each problem."""

    base: Said = Said()
    tuned: Said = Said()
    status: str = ""


@dataclass(frozen=True)
class Asked:
    """What was typed, all of it text: ``fields`` by key, ``further`` has one key=value a line."""

    instruction: str
    context: str = ""
    strategy: str = "greedy_search"
    fields: Mapping[str, str] = field(default_factory=dict)
    further: str = ""

    @classmethod
    def as_given(cls, settings: GenerationSettings) -> "Asked":
        """The page before anything is typed: it would answer with ``settings``."""
        strategy, fields, further = settings.strategy, {}, []
        follows = {"strategy"} if strategy in EITHER else {"strategy", "do_sample"}
        for key, value in settings.recorded.items():
            if key in FIELDS[strategy]:
                fields[key] = _typed(value)
            elif key not in follows:
                further.append(f"{key}={_typed(value)}")
        return cls("", strategy=strategy, fields=fields, further="\n".join(further))

    def settings(self) -> GenerationSettings:
        """Fields that the strategy does not have are not looked at: the page hides them.

        Raises:
            UserError: with every problem.
        """
        typed = [(key, self.fields.get(key, "").strip()) for key in FIELDS.get(self.strategy, ())]
        lines = [line.strip() for line in self.further.splitlines()]
        given = generation_keys(
            [f"{key}={text}" for key, text in typed if text] + [line for line in lines if line]
        )
        if "strategy" in given:
            raise UserError.single("strategy", "has a field of its own. Leave it out here.")
        settings = generation_settings({"strategy": self.strategy, **given})
        if "num_return_sequences" in settings.values:
            said = "each model shows one answer here. Leave it out."
            raise UserError.single("num_return_sequences", said)
        return settings

    def prompt(self) -> Prompt:
        """Raises UserError where it can be none."""
        prompt = sound_prompt("prompt", 0, self.instruction)
        if not self.context.strip():
            return prompt
        return replace(prompt, context=sound_prompt("input", 0, self.context).instruction)


def _typed(value: Any) -> str:
    """As one types it so that it is read back: without quotes where none are needed."""
    with suppress(UserError):
        if isinstance(value, str) and value.strip() and read_value(value, where="") == value:
            return value
    return json.dumps(value, ensure_ascii=False)


class Comparer:
    """One model, which answers for everybody in turn.

    The adapter is switched off in the model itself, so no two answers may be computed at once.

    Args:
        assistant: the draft model, of ``assistant_model``, that was loaded; others cannot be named.
    """

    def __init__(
        self, answerer: Answerer, *, assistant: Any = None, assistant_model: str | None = None
    ) -> None:
        self._answerer = answerer
        self._assistant = assistant
        self._assistant_model = assistant_model
        self._model = threading.Lock()
        self._running: set[tuple[str, Interruption]] = set()

    def compare(self, asked: Asked, *, visitor: str) -> Iterator[Shown]:
        """Answer without the adapter, then with it; each state is all that the page shows.

        What cannot be done becomes a status. Whoever leaves the iterator stops the model after its
        present token; so does ``stop``, and then the last state says what there was.
        """
        try:
            settings, prompt = self._sound(asked)
        except UserError as error:
            yield Shown(status=str(error))
            return
        interruption = Interruption()
        running = (visitor, interruption)
        news: SimpleQueue[Shown | BaseException | None] = SimpleQueue()

        def work() -> None:
            try:
                self._answer_both(prompt, settings, interruption, news.put)
            except BaseException as error:
                news.put(error)
            finally:
                news.put(None)

        self.stop(visitor)
        self._running.add(running)
        threading.Thread(target=work, daemon=True).start()
        shown = Shown()
        try:
            for item in iter(news.get, None):
                if isinstance(item, Shown):
                    shown = item
                elif isinstance(item, UserError | RunFailed):
                    shown = replace(shown, status=str(item))
                elif isinstance(item, BaseException):
                    raise item
                if news.empty():
                    yield shown
            yield shown
        finally:
            interruption.happened = True
            self._running.discard(running)

    def stop(self, visitor: str | None = None) -> None:
        """Stop what this visitor waits for; without one, everybody's."""
        for who, interruption in tuple(self._running):
            if visitor in (None, who):
                interruption.happened = True

    def _sound(self, asked: Asked) -> tuple[GenerationSettings, Prompt]:
        problems: list[Problem] = []
        settings = prompt = None
        try:
            settings = asked.settings()
            if settings.assistant_model not in (None, self._assistant_model):
                said = "is loaded once, at the start. Name it on the command line."
                problems.append(Problem("assistant_model", said))
        except UserError as error:
            problems += error.problems
        try:
            prompt = asked.prompt()
        except UserError as error:
            problems += error.problems
        if problems or settings is None or prompt is None:
            raise UserError(problems)
        return settings, prompt

    def _answer_both(
        self,
        prompt: Prompt,
        settings: GenerationSettings,
        interruption: Interruption,
        show: Callable[[Shown], None],
    ) -> None:
        if self._model.locked():
            show(Shown(status="Somebody else's answers are being written; yours come next."))
        while not self._model.acquire(timeout=0.1):
            if interruption.happened:
                show(Shown(status="stopped"))
                return
        try:
            self._answer_in_turn(prompt, settings, interruption, show)
        finally:
            self._model.release()

    def _answer_in_turn(
        self,
        prompt: Prompt,
        settings: GenerationSettings,
        interruption: Interruption,
        show: Callable[[Shown], None],
    ) -> None:
        shown = Shown()
        how = settings.described

        def base_said(said: Said) -> None:
            nonlocal shown
            shown = replace(shown, base=said, status=f"The base answers: {how}")
            show(shown)

        def tuned_said(said: Said) -> None:
            nonlocal shown
            shown = replace(shown, tuned=said, status=f"The tuned model answers: {how}")
            show(shown)

        with self._answerer.as_base() as base:
            self._answer(base, prompt, settings, interruption, base_said)
        if not interruption.happened:
            self._answer(self._answerer, prompt, settings, interruption, tuned_said)
        show(replace(shown, status=f"Stopped: {how}" if interruption.happened else how))

    def _answer(
        self,
        speaker: Answerer,
        prompt: Prompt,
        settings: GenerationSettings,
        interruption: Interruption,
        tell: Callable[[Said], None],
    ) -> None:
        text = ""

        def write(piece: str) -> None:
            nonlocal text
            text += piece
            tell(Said(text))

        tell(Said())
        decoder = speaker.decoder(settings, assistant=self._assistant, interruption=interruption)
        encoded = speaker.encode([prompt])
        started = time.perf_counter()
        ((answer,),) = decoder.answers(encoded, batch_size=1, stream=decoder.stream_to(write))
        rate = len(answer.ids) / (time.perf_counter() - started)
        end = f"{answer.finish_reason} · {len(answer.ids)} tokens, {rate:.1f} tokens/s"
        tell(Said(answer.text, end))
