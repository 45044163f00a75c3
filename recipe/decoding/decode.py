"""Prompts, as token ids, become answers by any of the strategies.

transformers' ``generate`` does beam search, beam sampling and assisted generation. The four that it
no longer has are in this room, and so are greedy search and sampling: each prompt of a batch draws
from its own random numbers there, rows that have ended leave the batch, and any of them can stream
and stop. All get their logits processors from ``generate``, so filters apply in its order.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from recipe.decoding.beams import Ended, Search, constrained_beam_search, group_beam_search
from recipe.decoding.constraints import Constraints, Phrase
from recipe.decoding.contrastive import contrastive_search
from recipe.decoding.dola import candidate_layers, dola_scores
from recipe.decoding.sampling import Draw, argmax, decode_rows, generator_of, nothing_left
from recipe.decoding.steps import Steps
from recipe.decoding.stopping import FinishReason, Interruption, Stop, StopStrings
from recipe.decoding.stream import Stream
from recipe.settings import TOGETHER, GenerationSettings, Problem, RunFailed, UserError, plain

# Of GenerationConfig, those that only choose or steer a strategy which is done here.
_STEERING = frozenset(
    [
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "penalty_alpha",
        "dola_layers",
        "force_words_ids",
        "num_return_sequences",
        "length_penalty",
        "early_stopping",
        "stop_strings",
        "use_cache",
    ]
)

_WITH_TOKENS = (
    "force_words_ids",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_eos_token_id",
)
_OF_DRAFTS = (
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
)
# transformers fills up with texts of this score where there are fewer than were asked for.
_PLACEHOLDER = -1e8


@dataclass(frozen=True)
class Encoded:
    """A prompt's place among all prompts, and its token ids."""

    index: int
    ids: list[int]


@dataclass(frozen=True)
class Answer:
    """``ids`` are the new tokens, the EOS among them; ``text`` has neither it nor a stop string.

    ``number`` counts the answers to one prompt. ``score`` is what beams were ranked by.
    """

    index: int
    number: int
    ids: list[int]
    text: str
    finish_reason: FinishReason
    score: float | None = None


@dataclass(frozen=True)
class Decoder:
    """A model with one set of generation settings.

    Args:
        model: a LlamaForCausalLM, an adapter on it or not.
        assistant: the draft model of assisted generation.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    settings: GenerationSettings
    assistant: Any = None
    interruption: Interruption = field(default_factory=Interruption)

    @property
    def values(self) -> dict[str, Any]:
        """Fields of GenerationConfig, as plain values."""
        return dict(plain(self.settings.values))

    @property
    def stop(self) -> Stop:
        """When an answer of this model ends."""
        strings = self.values.get("stop_strings", [])
        return Stop(
            self.tokenizer,
            eos_token_ids=eos_token_ids(self.model, self.tokenizer),
            stop_strings=[strings] if isinstance(strings, str) else strings,
            max_new_tokens=self.values["max_new_tokens"],
        )

    @property
    def can_stream(self) -> bool:
        """Beams change their minds about words that were already written."""
        one = self.values.get("num_return_sequences", 1) == 1
        return one and "num_beams" not in self.values

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
                found = _HOW[self.settings.strategy](self, batch, stream)
            for prompt in batch:
                yield [one for one in found if one.index == prompt.index]
            if self.interruption.happened:
                return

    def _processors(self, ids: torch.Tensor, mask: torch.Tensor) -> LogitsProcessorList:
        """Those that ``generate`` makes of the settings, in its order."""
        found: list[LogitsProcessorList] = []

        def keep(_model: Any, input_ids: torch.Tensor, logits_processor: Any, **_: Any) -> Any:
            found.append(logits_processor)
            return input_ids

        values = {key: value for key, value in self.values.items() if key not in _STEERING}
        if self.settings.strategy == "contrastive_search":
            del values["top_k"]  # the number of candidates, no filter
        self.model.generate(
            ids,
            attention_mask=mask,
            generation_config=self.config(values),
            custom_generate=keep,
        )
        return found[0]

    def config(self, values: dict[str, Any]) -> GenerationConfig:
        """``generate`` fills what is not set from the model's own config, so that is emptied."""
        eos = sorted(eos_token_ids(self.model, self.tokenizer))
        # generate would sample from the 50 likeliest tokens where nothing is said.
        values = {"top_k": 0, **values} if values.get("do_sample") else values
        config = GenerationConfig(**_as_library(values), eos_token_id=eos, pad_token_id=eos[0])
        self.model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos[0])
        return config

    def steps(self, batch: Sequence[Encoded], **named: Any) -> tuple[Steps, LogitsProcessorList]:
        """The model in front of left-padded prompts, and what changes its scores."""
        ids, mask = left_padded(batch, pad=self.pad, device=self.model.device)
        processors = self._processors(ids, mask)
        use_cache = self.values.get("use_cache", True)
        whole = None if mask.all() else mask
        return Steps(self.model, ids, whole, use_cache=use_cache, **named), processors

    @property
    def pad(self) -> int:
        """What fills the left of shorter rows; masked, so any token does."""
        return min(eos_token_ids(self.model, self.tokenizer))

    def answer(
        self, prompt: Encoded, number: int, ids: list[int], reason: FinishReason, **named: Any
    ) -> Answer:
        """One answer, its text decoded."""
        return Answer(prompt.index, number, ids, self.stop.text(ids), reason, **named)


def eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokenizer's EOS, and whatever else the checkpoint's generation config ends at.

    Llama 3's chat models end a turn with one token and a text with another.
    """
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return {tokenizer.eos_token_id, *(token for token in listed if token is not None)}


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


def left_padded(
    batch: Sequence[Encoded], *, pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 (rows, tokens of the longest) ids and mask; shorter rows begin with ``pad``."""
    longest = max(len(prompt.ids) for prompt in batch)
    ids = [[pad] * (longest - len(prompt.ids)) + prompt.ids for prompt in batch]
    mask = [[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _batches(prompts: Sequence[Encoded], size: int) -> Iterator[Sequence[Encoded]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def _by_rows(decoder: Decoder, batch: Sequence[Encoded], stream: Stream | None) -> list[Answer]:
    """Greedy search, sampling and DoLa."""
    settings, values = decoder.settings, decoder.values
    copies = values.get("num_return_sequences", 1)
    rows = [prompt for prompt in batch for _ in range(copies)]
    numbers = [number for _ in batch for number in range(copies)]
    layers = values.get("dola_layers")
    steps, processors = decoder.steps(rows, hidden_states=layers is not None)
    scores_of = None
    if layers is not None:
        candidates = candidate_layers(layers, decoder.model.config)

        def scores_of(_logits: torch.Tensor, output: Any) -> torch.Tensor:
            return dola_scores(output, decoder.model, candidates)

    keys = [_key(settings, row.index, number) for row, number in zip(rows, numbers, strict=True)]
    found = decode_rows(
        steps,
        processors,
        decoder.stop,
        decoder.interruption,
        choose=Draw(keys) if settings.samples else argmax,
        scores_of=scores_of,
        stream=stream,
    )
    return [
        decoder.answer(row, number, ids, reason)
        for row, number, (ids, reason) in zip(rows, numbers, found, strict=True)
    ]


def _contrastive(decoder: Decoder, batch: Sequence[Encoded], stream: Stream | None) -> list[Answer]:
    steps, processors = decoder.steps(batch, hidden_states=True)
    ids, reason = contrastive_search(
        steps,
        processors,
        decoder.stop,
        decoder.interruption,
        top_k=decoder.values["top_k"],
        penalty_alpha=decoder.values["penalty_alpha"],
        stream=stream,
    )
    return [decoder.answer(batch[0], 0, ids, reason)]


def _by_beams(decoder: Decoder, batch: Sequence[Encoded], _stream: Stream | None) -> list[Answer]:
    """Group and constrained beam search."""
    values = decoder.values
    steps, processors = decoder.steps(batch)
    search = Search(steps, processors, decoder.stop, decoder.interruption)
    shared = {
        "num_beams": values["num_beams"],
        "length_penalty": values.get("length_penalty", 1.0),
        "early_stopping": values.get("early_stopping", False),
    }
    ended: list[Ended]
    constrained = decoder.settings.strategy == "constrained_beam_search"
    if decoder.settings.strategy == "group_beam_search":
        ended = group_beam_search(
            search,
            num_beam_groups=values["num_beam_groups"],
            diversity_penalty=values["diversity_penalty"],
            **shared,
        )
    else:
        ended = constrained_beam_search(search, constraints_of(decoder), **shared)
    if not ended:
        what = "contains all of force_words" if constrained else "can be written"
        raise RunFailed(
            f"prompt {batch[0].index}: no answer {what} within "
            f"max_new_tokens={values['max_new_tokens']} and what else the settings forbid. Raise "
            "it, or forbid less."
        )
    return [
        decoder.answer(batch[0], number, one.ids, one.reason, score=one.score)
        for number, one in enumerate(ended[: values.get("num_return_sequences", 1)])
    ]


def constraints_of(decoder: Decoder) -> Constraints:
    """``force_words_ids`` as they are, and ``force_words`` as the tokenizer writes them in a text.

    A word has other tokens at the beginning of a text than behind a space, so both will do.

    Raises:
        UserError: they need more tokens than the answer may have.
    """
    ids = decoder.values.get("force_words_ids", [])
    stated: list[list[Phrase]] = [
        [tuple(phrase) for phrase in (one if isinstance(one[0], list) else [one])] for one in ids
    ]
    for one in decoder.settings.force_words:
        words = [one] if isinstance(one, str) else list(one)
        stated.append([phrase for word in words for phrase in _spellings(decoder.tokenizer, word)])
    key = "force_words" if decoder.settings.force_words else "force_words_ids"
    ends = eos_token_ids(decoder.model, decoder.tokenizer)
    for phrases in stated:
        if all(ends.intersection(phrase) for phrase in phrases):
            raise UserError.single(key, "holds an EOS, behind which nothing is. Leave it out.")
        texts = [str(decoder.tokenizer.decode(list(phrase))) for phrase in phrases]
        stops = [s for s in decoder.stop.stop_strings if all(s in text for text in texts)]
        if stops:
            said = f"{texts[0]!r} holds {stops[0]!r}, which ends the answer. Leave one out."
            raise UserError.single(key, said)
    constraints = Constraints(stated)
    most = decoder.values["max_new_tokens"]
    if constraints.fewest_tokens > most:
        raise UserError.single(
            key,
            f"they are {constraints.fewest_tokens} tokens, beyond max_new_tokens={most}. Raise it.",
        )
    return constraints


def _spellings(tokenizer: PreTrainedTokenizerBase, word: str) -> list[Phrase]:
    encoded = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f" {word}", word)
    )
    return list(dict.fromkeys(tuple(ids) for ids in encoded))


class _Finite(LogitsProcessor):
    """transformers' own loops go on with NaN."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise RunFailed("the model's logits are NaN. Use bf16 or fp32, or another checkpoint.")
        return scores


def _by_library(decoder: Decoder, batch: Sequence[Encoded], stream: Stream | None) -> list[Answer]:
    """Beam search, beam sampling and assisted generation, by transformers."""
    settings, model = decoder.settings, decoder.model
    ids, mask = left_padded(batch, pad=decoder.pad, device=model.device)
    named: dict[str, Any] = {}
    scored = settings.strategy != "assisted_generation"
    values = {**decoder.values, "return_dict_in_generate": True, "output_scores": scored}
    values.pop("stop_strings", None)
    config = decoder.config(values)
    if settings.strategy == "assisted_generation":
        named = {"streamer": stream, "assistant_model": decoder.assistant}
    if decoder.assistant is not None:
        # There, and nowhere else, generate looks for how much to draft; and it writes back to it.
        drafts = {key: value for key, value in values.items() if key in _OF_DRAFTS}
        decoder.assistant.generation_config = GenerationConfig(
            **drafts, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
    criteria = [decoder.interruption]
    if decoder.stop.stop_strings:
        criteria.append(StopStrings(decoder.stop, ids.shape[1]))
    with _seeded(settings, batch[0].index, model.device):
        output = model.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([_Finite()]),
            stopping_criteria=StoppingCriteriaList(criteria),
            **{key: value for key, value in named.items() if value is not None},
        )
    copies = len(output.sequences) // len(batch)
    answers = []
    for row, tokens in enumerate(output.sequences[:, ids.shape[1] :].tolist()):
        written, reason = decoder.stop.ended(tokens)
        score = float(output.sequences_scores[row]) if scored else None
        if score is not None and score < _PLACEHOLDER:
            continue
        prompt = batch[row // copies]
        answers.append(decoder.answer(prompt, row % copies, written, reason, score=score))
    if not answers:
        raise nothing_left()
    return answers


@contextmanager
def _seeded(settings: GenerationSettings, index: int, device: torch.device) -> Iterator[None]:
    """transformers draws from the global generator; what it draws here is the prompt's own."""
    if not settings.samples:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(generator_of(_key(settings, index, 0)).initial_seed())
        yield


def _key(settings: GenerationSettings, index: int, number: int) -> str:
    return f"{settings.seed}:{index}" if number == 0 else f"{settings.seed}:{index}:{number}"


def _as_library(values: dict[str, Any]) -> dict[str, Any]:
    """GenerationConfig's own types where YAML has none: a mapping with tuples as keys."""
    changed = dict(values)
    if "sequence_bias" in values:
        changed["sequence_bias"] = [[ids, float(bias)] for ids, bias in values["sequence_bias"]]
    if "exponential_decay_length_penalty" in values:
        begin, factor = values["exponential_decay_length_penalty"]
        changed["exponential_decay_length_penalty"] = (int(begin), float(factor))
    return changed


_HOW = {
    "greedy_search": _by_rows,
    "sample": _by_rows,
    "dola_generation": _by_rows,
    "contrastive_search": _contrastive,
    "group_beam_search": _by_beams,
    "constrained_beam_search": _by_beams,
    "beam_search": _by_library,
    "beam_sample": _by_library,
    "assisted_generation": _by_library,
}
