"""From a row to spans of text, each trained on or not; the loss mask falls out of them.

The prompt's bytes are made here and nowhere else: training and generation both ask a template.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

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


class Span(NamedTuple):
    """A piece of a row's text; the loss is taken on its tokens where ``trained``."""

    text: str
    trained: bool


class Prompts(Protocol):
    """Writes the prompt's bytes. ``name`` travels with the adapter; ``add_special_tokens`` is
    False where the text itself brings the BOS.
    """

    @property
    def name(self) -> str: ...

    @property
    def add_special_tokens(self) -> bool: ...

    def prompt(self, instruction: str, context: str = "") -> str:
        """What the model reads before it answers."""
        ...


class Template(Prompts, Protocol):
    """A prompt and the response to train on."""

    def spans(self, row: Row) -> list[Span]:
        """The whole row; the spans' texts join to what is tokenised."""
        ...


@dataclass(frozen=True)
class AlpacaTemplate:
    """The Alpaca prompt; the response ends with the tokenizer's EOS, which is trained."""

    eos_token: str
    name: str = "alpaca"
    add_special_tokens: bool = True

    def prompt(self, instruction: str, context: str = "") -> str:
        if context:
            return ALPACA_WITH_INPUT.format(instruction=instruction, input=context)
        return ALPACA_WITHOUT_INPUT.format(instruction=instruction)

    def spans(self, row: Row) -> list[Span]:
        return [
            Span(self.prompt(row.instruction, row.input), trained=False),
            Span(row.output + self.eos_token, trained=True),
        ]


class ChatTemplate:
    """The tokenizer's own chat template, one user turn and one assistant turn.

    Trained is the answer up to and with its EOS; what the template writes after it is left out.

    Raises:
        UserError: the tokenizer has no chat template, or it writes no EOS after an answer.
    """

    name = "chat"
    add_special_tokens = False  # the template writes the BOS itself

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.chat_template:
            raise UserError.single(
                "data.template",
                "the tokenizer of this model has no chat template. Use data.template: alpaca.",
            )
        self._tokenizer = tokenizer

    def prompt(self, instruction: str, context: str = "") -> str:
        return self._render([self._user(instruction, context)], add_generation_prompt=True)

    def spans(self, row: Row) -> list[Span]:
        prompt = self.prompt(row.instruction, row.input)
        answer = {"role": "assistant", "content": row.output}
        whole = self._render([self._user(row.instruction, row.input), answer])
        eos, output = str(self._tokenizer.eos_token), row.output.strip()
        # Some templates write a space before the answer, some trim it; both are trained as written.
        rest = whole.removeprefix(prompt)
        begin, found, after = rest.partition(output)
        tail, ended, _ = after.partition(eos)
        if not whole.startswith(prompt) or begin.strip() or tail.strip() or not (found and ended):
            raise UserError.single(
                f"row {row.index}",
                f"the tokenizer's chat template does not write prompt, answer and {eos!r} in this "
                "order, so what to train on is unknown. Use data.template: alpaca.",
            )
        return [Span(prompt, trained=False), Span(begin + output + tail + eos, trained=True)]

    def _user(self, instruction: str, context: str) -> dict[str, str]:
        content = f"{instruction}\n\n{context}" if context else instruction
        return {"role": "user", "content": content}

    def _render(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
    ) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )


@dataclass(frozen=True)
class RawText:
    """The prompt as it is, for a base model without a chat template; nothing is trained so."""

    name: str = "raw"
    add_special_tokens: bool = True

    def prompt(self, instruction: str, context: str = "") -> str:
        return f"{instruction}\n\n{context}" if context else instruction


def build_template(name: str, tokenizer: "PreTrainedTokenizerBase") -> Template:
    """The template of that name for this tokenizer: ``alpaca`` or ``chat``."""
    if name == "alpaca":
        return AlpacaTemplate(eos_token=str(tokenizer.eos_token))
    return ChatTemplate(tokenizer)
