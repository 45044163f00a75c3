"""From a row to spans of text, each trained on or not; the loss mask falls out of them.

The prompt's bytes are made here and nowhere else: training and generation both ask a template.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from recipe.data.formats import Message
from recipe.data.rows import Row
from recipe.settings import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stanford Alpaca's wording (github.com/tatsu-lab/stanford_alpaca, train.py). The newline after
# "### Response:" is ours to choose: projects end it in three ways, and without the newline BPE
# tokenizers merge the colon with a response that begins with punctuation.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
# A template that asks for today's date (Llama 3.2's does) would write other tokens tomorrow than
# the adapter was trained on. It gets the date that Llama 3's templates fall back to.
_DATE = datetime(2024, 7, 26)
_ANOTHER = (
    "Name a base with a usable one, or write one into chat_template.jinja of a local copy; rows of "
    "one question and one answer can take data.template: alpaca."
)
_TODAY = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")


class Span(NamedTuple):
    """A piece of a row's text; the loss is taken on its tokens where ``trained``."""

    text: str
    trained: bool


class UnfitRowError(Exception):
    """A row that a template cannot write; the message says why and what to do."""


class Template(Protocol):
    """A prompt and the responses to train on.

    ``name`` travels with the adapter; ``add_special_tokens`` is False where the text itself brings
    the BOS; ``source`` is whatever the bytes depend on.
    """

    @property
    def name(self) -> str: ...

    @property
    def add_special_tokens(self) -> bool: ...

    @property
    def source(self) -> str: ...

    @property
    def writes_turns(self) -> bool:
        """Whether ``before`` may hold turns."""
        ...

    def prompt(self, instruction: str, context: str = "", before: Sequence[Message] = ()) -> str:
        """What the model reads before it answers; ``before`` are the turns so far.

        Raises:
            UnfitRowError: this template cannot write such turns.
        """
        ...

    def spans(self, row: Row) -> list[Span]:
        """The whole row; the spans' texts join to what is tokenised.

        Raises:
            UnfitRowError: this template cannot write such a row.
        """
        ...


@dataclass(frozen=True)
class RawTemplate:
    """Prompt and response as they are, and the tokenizer's EOS, which is trained, behind them."""

    eos_token: str
    name: str = "raw"
    add_special_tokens: bool = True
    source: str = ""
    writes_turns: bool = False

    def prompt(self, instruction: str, context: str = "", before: Sequence[Message] = ()) -> str:
        _check_no_turns(before, self.name)
        return f"{instruction}\n\n{context}" if context else instruction

    def spans(self, row: Row) -> list[Span]:
        question, answer = _single_turn(row, self.name)
        return [
            Span(self.prompt(question.content, question.context), trained=False),
            Span(answer.content + self.eos_token, trained=True),
        ]


@dataclass(frozen=True)
class AlpacaTemplate(RawTemplate):
    """The Alpaca prompt; the rest is as in ``RawTemplate``."""

    name: str = "alpaca"
    source: str = ALPACA_WITH_INPUT + ALPACA_WITHOUT_INPUT

    def prompt(self, instruction: str, context: str = "", before: Sequence[Message] = ()) -> str:
        _check_no_turns(before, self.name)
        if context:
            return ALPACA_WITH_INPUT.format(instruction=instruction, input=context)
        return ALPACA_WITHOUT_INPUT.format(instruction=instruction)


class ChatTemplate:
    """The tokenizer's own chat template.

    Trained is each answer up to and with its EOS, and nothing else. Each prompt is written as
    generation will write it, and must be how the whole conversation begins.

    Raises:
        UserError: the tokenizer has no chat template, or one that cannot be rendered.
    """

    name = "chat"
    add_special_tokens = False  # the template writes the BOS itself
    writes_turns = True

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.chat_template:
            raise UserError.single(
                "data.template",
                f"the tokenizer of this model has no chat template. {_ANOTHER}",
            )
        self._tokenizer = tokenizer
        try:
            self.source = _TODAY.sub(_that_day, tokenizer.get_chat_template())
            if re.search(r"\bstrftime_now\b(?!\s+is\s+defined)", self.source):
                raise UnfitRowError("it writes today's date, which is another one tomorrow.")
            self.prompt("Hello")
        except UnfitRowError as error:
            raise UserError.single(
                "data.template",
                f"the tokenizer's chat template cannot be used: {error} {_ANOTHER}",
            ) from error

    def prompt(self, instruction: str, context: str = "", before: Sequence[Message] = ()) -> str:
        turns = [*before, Message("user", instruction, context)]
        return self._render(turns, add_generation_prompt=True)

    def spans(self, row: Row) -> list[Span]:
        whole = self._render(row.messages)
        spans: list[Span] = []
        written = ""
        for number, message in enumerate(row.messages):
            if message.role != "assistant":
                continue
            prompt = self._render(row.messages[:number], add_generation_prompt=True)
            response = self._response(whole, prompt, message.content)
            if response is None or not prompt.startswith(written):
                raise UnfitRowError(
                    "the tokenizer's chat template does not write prompt, answer and "
                    f"{str(self._tokenizer.eos_token)!r} in this order (turn {number}), so what to "
                    f"train on is unknown. {_ANOTHER}"
                )
            _check_nothing_dropped(row.messages[:number], prompt)
            spans += [Span(prompt.removeprefix(written), False), Span(response, True)]
            written = prompt + response
        return spans

    def _response(self, whole: str, prompt: str, answer: str) -> str | None:
        """What ``whole`` writes behind ``prompt``, up to and with the EOS."""
        eos, output = str(self._tokenizer.eos_token), answer.strip()
        # Some templates write a space before the answer, some trim it; both are trained as written.
        begin, found, after = whole.removeprefix(prompt).partition(output)
        tail, ended, _ = after.partition(eos)
        if not whole.startswith(prompt) or begin.strip() or tail.strip() or not (found and ended):
            return None
        return begin + output + tail + eos

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        turns = [{"role": message.role, "content": _joined(message)} for message in messages]
        try:
            text: Any = self._tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=self.source,
            )
        except Exception as error:  # a template is a program, and can raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UnfitRowError(f"the chat template refuses it ({reason}).") from error
        return str(text)


def _check_nothing_dropped(messages: Sequence[Message], prompt: str) -> None:
    """Some templates leave out a system turn, or cut what they are given, without a word."""
    at = 0
    for number, message in enumerate(messages):
        for text in (message.content.strip(), message.context.strip()):
            found = prompt.find(text, at)
            if found < 0:
                raise UnfitRowError(
                    f"the tokenizer's chat template leaves out what the {message.role} says (turn "
                    f"{number}). Remove that turn, or use another base."
                )
            at = found + len(text)


def _check_no_turns(before: Sequence[Message], template: str) -> None:
    if before:
        raise UnfitRowError(f"the {template} template writes no earlier turns.")


def _that_day(call: re.Match[str]) -> str:
    return repr(_DATE.strftime(call[2]))


def _joined(message: Message) -> str:
    return f"{message.content}\n\n{message.context}" if message.context else message.content


def _single_turn(row: Row, template: str) -> tuple[Message, Message]:
    if [message.role for message in row.messages] != ["user", "assistant"]:
        turns = ", ".join(message.role for message in row.messages[:4])
        more = ", …" if len(row.messages) > 4 else ""
        raise UnfitRowError(
            f"has the turns {turns}{more}; the {template} template writes one question and one "
            "answer. Use data.template: chat, with a base whose tokenizer has a chat template."
        )
    question, answer = row.messages
    return question, answer


def build_template(name: str, tokenizer: "PreTrainedTokenizerBase") -> Template:
    """The template of that name for this tokenizer: ``alpaca``, ``chat`` or ``raw``."""
    if name == "chat":
        return ChatTemplate(tokenizer)
    eos = str(tokenizer.eos_token)
    return AlpacaTemplate(eos) if name == "alpaca" else RawTemplate(eos)
