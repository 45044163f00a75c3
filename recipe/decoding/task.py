"""A model, what is asked of it, and what a strategy needs of both."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from recipe.decoding.steps import Steps
from recipe.decoding.stopping import FinishReason, Interruption, Stop
from recipe.settings import GenerationSettings, plain

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
class Task:
    """A model and one set of generation settings: what every strategy needs to know.

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


def left_padded(
    batch: Sequence[Encoded], *, pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 (rows, tokens of the longest) ids and mask; shorter rows begin with ``pad``."""
    longest = max(len(prompt.ids) for prompt in batch)
    ids = [[pad] * (longest - len(prompt.ids)) + prompt.ids for prompt in batch]
    mask = [[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _as_library(values: dict[str, Any]) -> dict[str, Any]:
    """GenerationConfig's own types where YAML has none: a mapping with tuples as keys."""
    changed = dict(values)
    if "sequence_bias" in values:
        changed["sequence_bias"] = [[ids, float(bias)] for ids, bias in values["sequence_bias"]]
    if "exponential_decay_length_penalty" in values:
        begin, factor = values["exponential_decay_length_penalty"]
        changed["exponential_decay_length_penalty"] = (int(begin), float(factor))
    return changed
