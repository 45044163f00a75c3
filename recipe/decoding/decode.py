"""Prompts, as token ids, become answers by any of the strategies.

transformers' ``generate`` does beam search, beam sampling and assisted generation. The four that it
no longer has are in this room, and so are greedy search and sampling: each prompt of a batch draws
from its own random numbers there, rows that have ended leave the batch, and any of them can stream
and stop. All get their logits processors from ``generate``, so filters apply in its order.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from recipe.decoding.dola import candidate_layers
from recipe.decoding.strategies import HOW, constraints_of
from recipe.decoding.stream import Stream
from recipe.decoding.task import Answer, Encoded, Task
from recipe.settings import TOGETHER, GenerationSettings, Problem, RunFailed, UserError

_WITH_TOKENS = (
    "force_words_ids",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_eos_token_id",
)


@dataclass(frozen=True)
class Decoder(Task):
    """Answers prompts, after it has found out whether they can be answered as asked."""

    @property
    def can_stream(self) -> bool:
        """Beams change their minds about words that were already written."""
        one = self.values.get("num_return_sequences", 1) == 1
        return one and "num_beams" not in self.values

    def stream_to(self, write: Callable[[str], None]) -> Stream | None:
        """What shows one answer as it comes; None where the strategy cannot."""
        if not self.can_stream:
            return None
        drafted = self.settings.strategy == "assisted_generation"
        stops = self.stop.stop_strings
        return Stream(self.tokenizer, write, stop_strings=stops, skip_prompt=drafted)

    def check(self, prompts: Sequence[Encoded]) -> None:
        """Whatever can be known before the first token.

        Raises:
            UserError: a prompt leaves no room for the answer, or the settings do not fit the model.
        """
        check_fits(prompts, self.settings, self.model)
        check_tokens(self.values, int(self.model.config.vocab_size))
        for text in self.stop.stop_strings:
            special = [token for token in self.tokenizer.all_special_tokens if token in text]
            if special:
                raise UserError.single(
                    "stop_strings",
                    f"{special[0]} is a token of control and no text of an answer, so it would "
                    "never be found. Use other texts; an answer ends at its EOS anyway.",
                )
        if "dola_layers" in self.values:
            candidate_layers(self.values["dola_layers"], self.model.config)
        if self.settings.strategy == "constrained_beam_search":
            constraints_of(self)

    def answers(
        self, prompts: Sequence[Encoded], *, batch_size: int, stream: Stream | None = None
    ) -> Iterator[list[Answer]]:
        """Yield the answers to each prompt, in order, as soon as they are there.

        On Ctrl-C those that were being written come as they are, and then no more.

        Args:
            batch_size: prompts that are decoded together, where the strategy can.
            stream: for a single prompt, where ``can_stream``.

        Raises:
            UserError: as ``check``.
            RunFailed: the model computes NaN, memory is too small, or no answer can be as asked.
        """
        self.check(prompts)
        together = self.settings.strategy in TOGETHER and not _reads_padding(self.values)
        for batch in _batches(prompts, batch_size if together else 1):
            with torch.inference_mode(), _enough_memory():
                found = HOW[self.settings.strategy](self, batch, stream)
            for prompt in batch:
                yield [one for one in found if one.index == prompt.index]
            if self.interruption.happened:
                return


def _reads_padding(values: dict[str, Any]) -> bool:
    """Whether a processor takes the padding, which is an EOS, for text that was written."""
    if values.get("no_repeat_ngram_size") == 1:
        return True
    # transformers 5.17's repetition penalty does, 5.23's is told where a row begins.
    parameters = inspect.signature(RepetitionPenaltyLogitsProcessor.__init__).parameters
    told = "Tensor" in str(parameters["prompt_ignore_length"].annotation)
    return "repetition_penalty" in values and not told


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; on the CPU there is only this
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise RunFailed(
                "out of memory. Lower --batch-size, num_beams, num_return_sequences or "
                "max_new_tokens."
            ) from error
        raise


def check_fits(prompts: Sequence[Encoded], settings: GenerationSettings, model: Any) -> None:
    """Every prompt must leave room for the whole answer.

    Raises:
        UserError: naming the first ten that do not.
    """
    limit, new = model.config.max_position_embeddings, settings.values["max_new_tokens"]
    problems = [
        Problem(
            f"prompt {prompt.index}",
            f"{len(prompt.ids)} tokens and max_new_tokens={new} do not fit into the model's "
            f"context of {limit}. Shorten the prompt, or lower max_new_tokens.",
        )
        for prompt in prompts
        if len(prompt.ids) + new > limit
    ]
    if problems:
        raise UserError.first_of(problems)


def check_tokens(values: Mapping[str, Any], vocabulary: int) -> None:
    """Token ids of the settings must be tokens; torch would fail, or not even notice.

    Raises:
        UserError: naming each key with an id beyond the vocabulary.
    """
    problems = []
    for key in (*_WITH_TOKENS, "sequence_bias"):
        listed = values.get(key, [])
        if key == "sequence_bias":
            listed = [ids for ids, _ in listed]
        beyond = [token for token in _flat(listed) if token >= vocabulary]
        if beyond:
            problems.append(
                Problem(
                    key, f"{beyond[0]} is no token of a vocabulary of {vocabulary}. Correct it."
                )
            )
    if "penalty_alpha" in values and values["top_k"] > vocabulary:
        problems.append(
            Problem(
                "top_k", f"{values['top_k']} is above the vocabulary of {vocabulary}. Lower it."
            )
        )
    if problems:
        raise UserError(problems)


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _batches(prompts: Sequence[Encoded], size: int) -> Iterator[Sequence[Encoded]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]
