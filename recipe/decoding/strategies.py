"""Every strategy: a batch of prompts in, their answers out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from recipe.decoding.beams import Ended, Search, constrained_beam_search, group_beam_search
from recipe.decoding.constraints import Constraints, Phrase
from recipe.decoding.contrastive import contrastive_search
from recipe.decoding.dola import candidate_layers, dola_scores
from recipe.decoding.sampling import Draw, argmax, decode_rows, generator_of, nothing_left
from recipe.decoding.stopping import StopStrings
from recipe.decoding.stream import Stream
from recipe.decoding.task import Answer, Encoded, Task, eos_token_ids, left_padded
from recipe.settings import GenerationSettings, RunFailed, UserError

_OF_DRAFTS = (
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
)
# transformers fills up with texts of this score where there are fewer than were asked for.
_PLACEHOLDER = -1e8


def _by_rows(task: Task, batch: Sequence[Encoded], stream: Stream | None) -> list[Answer]:
    """Greedy search, sampling and DoLa."""
    settings, values = task.settings, task.values
    copies = values.get("num_return_sequences", 1)
    rows = [prompt for prompt in batch for _ in range(copies)]
    numbers = [number for _ in batch for number in range(copies)]
    layers = values.get("dola_layers")
    steps, processors = task.steps(rows, hidden_states=layers is not None)
    scores_of = None
    if layers is not None:
        candidates = candidate_layers(layers, task.model.config)

        def scores_of(_logits: torch.Tensor, output: Any) -> torch.Tensor:
            return dola_scores(output, task.model, candidates)

    keys = [_key(settings, row.index, number) for row, number in zip(rows, numbers, strict=True)]
    found = decode_rows(
        steps,
        processors,
        task.stop,
        task.interruption,
        choose=Draw(keys) if settings.samples else argmax,
        scores_of=scores_of,
        stream=stream,
    )
    return [
        task.answer(row, number, ids, reason)
        for row, number, (ids, reason) in zip(rows, numbers, found, strict=True)
    ]


def _contrastive(task: Task, batch: Sequence[Encoded], stream: Stream | None) -> list[Answer]:
    steps, processors = task.steps(batch, hidden_states=True)
    ids, reason = contrastive_search(
        steps,
        processors,
        task.stop,
        task.interruption,
        top_k=task.values["top_k"],
        penalty_alpha=task.values["penalty_alpha"],
        stream=stream,
    )
    return [task.answer(batch[0], 0, ids, reason)]


def _by_beams(task: Task, batch: Sequence[Encoded], _stream: Stream | None) -> list[Answer]:
    """Group and constrained beam search."""
    values = task.values
    steps, processors = task.steps(batch)
    search = Search(steps, processors, task.stop, task.interruption)
    shared = {
        "num_beams": values["num_beams"],
        "length_penalty": values.get("length_penalty", 1.0),
        "early_stopping": values.get("early_stopping", False),
    }
    ended: list[Ended]
    constrained = task.settings.strategy == "constrained_beam_search"
    if task.settings.strategy == "group_beam_search":
        ended = group_beam_search(
            search,
            num_beam_groups=values["num_beam_groups"],
            diversity_penalty=values["diversity_penalty"],
            **shared,
        )
    else:
        ended = constrained_beam_search(search, constraints_of(task), **shared)
    if not ended:
        what = "contains all of force_words" if constrained else "can be written"
        raise RunFailed(
            f"prompt {batch[0].index}: no answer {what} within "
            f"max_new_tokens={values['max_new_tokens']} and what else the settings forbid. Raise "
            "it, or forbid less."
        )
    return [
        task.answer(batch[0], number, one.ids, one.reason, score=one.score)
        for number, one in enumerate(ended[: values.get("num_return_sequences", 1)])
    ]


def constraints_of(task: Task) -> Constraints:
    """``force_words_ids`` as they are, and ``force_words`` as the tokenizer writes them in a text.

    A word has other tokens at the beginning of a text than behind a space, so both will do.

    Raises:
        UserError: they need more tokens than the answer may have.
    """
    ids = task.values.get("force_words_ids", [])
    stated: list[list[Phrase]] = [
        [tuple(phrase) for phrase in (one if isinstance(one[0], list) else [one])] for one in ids
    ]
    for one in task.settings.force_words:
        words = [one] if isinstance(one, str) else list(one)
        stated.append([phrase for word in words for phrase in _spellings(task.tokenizer, word)])
    key = "force_words" if task.settings.force_words else "force_words_ids"
    ends = eos_token_ids(task.model, task.tokenizer)
    for phrases in stated:
        if all(ends.intersection(phrase) for phrase in phrases):
            raise UserError.single(key, "holds an EOS, behind which nothing is. Leave it out.")
        texts = [str(task.tokenizer.decode(list(phrase))) for phrase in phrases]
        stops = [s for s in task.stop.stop_strings if all(s in text for text in texts)]
        if stops:
            said = f"{texts[0]!r} holds {stops[0]!r}, which ends the answer. Leave one out."
            raise UserError.single(key, said)
    constraints = Constraints(stated)
    most = task.values["max_new_tokens"]
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


def _by_library(task: Task, batch: Sequence[Encoded], stream: Stream | None) -> list[Answer]:
    """Beam search, beam sampling and assisted generation, by transformers."""
    settings, model = task.settings, task.model
    ids, mask = left_padded(batch, pad=task.pad, device=model.device)
    named: dict[str, Any] = {}
    scored = settings.strategy != "assisted_generation"
    values = {**task.values, "return_dict_in_generate": True, "output_scores": scored}
    values.pop("stop_strings", None)
    config = task.config(values)
    if settings.strategy == "assisted_generation":
        named = {"streamer": stream, "assistant_model": task.assistant}
    if task.assistant is not None:
        # There, and nowhere else, generate looks for how much to draft; and it writes back to it.
        drafts = {key: value for key, value in values.items() if key in _OF_DRAFTS}
        task.assistant.generation_config = GenerationConfig(
            **drafts, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
    criteria = [task.interruption]
    if task.stop.stop_strings:
        criteria.append(StopStrings(task.stop, ids.shape[1]))
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
        written, reason = task.stop.ended(tokens)
        score = float(output.sequences_scores[row]) if scored else None
        if score is not None and score < _PLACEHOLDER:
            continue
        prompt = batch[row // copies]
        answers.append(task.answer(prompt, row % copies, written, reason, score=score))
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


Strategy = Callable[[Task, Sequence[Encoded], Stream | None], list[Answer]]
HOW: dict[str, Strategy] = {
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
