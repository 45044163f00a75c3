"""How text is decoded: fields of ``transformers.GenerationConfig``, and which strategy uses which.

transformers ignores what a strategy does not use; here that is an error. Strategies are the values
of its ``GenerationMode``. Every field of GenerationConfig stands in one of the tables below, and a
test fails when a new version adds one.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ConfigDict

from recipe.settings.option import Option
from recipe.settings.problem import Problem, UserError
from recipe.settings.schema import Frozen, NonEmpty, plain
from recipe.settings.yaml_text import one_line, read_value

Strategy = Literal[
    "greedy_search",
    "sample",
    "beam_search",
    "beam_sample",
    "group_beam_search",
    "constrained_beam_search",
    "contrastive_search",
    "dola_generation",
    "assisted_generation",
]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
_BEAMS = ("beam_search", "beam_sample", "group_beam_search", "constrained_beam_search")
# Several prompts at once; the others take one after the other.
TOGETHER = ("greedy_search", "sample", "dola_generation", "beam_search")
# They may sample, and do where do_sample is true.
_EITHER = ("dola_generation", "assisted_generation")
_SAMPLING = ("sample", "beam_sample", *_EITHER)
_ALWAYS_SAMPLING = ("sample", "beam_sample")

# What a strategy takes where nothing is said; the screen shows it.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "sample": {"do_sample": True},
    "beam_search": {"num_beams": 4},
    "beam_sample": {"num_beams": 4, "do_sample": True},
    "group_beam_search": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constrained_beam_search": {"num_beams": 4},
    "contrastive_search": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_generation": {"dola_layers": "high"},
}
_LOOK_UP = {"prompt_lookup_num_tokens": 10}
_MAX_NEW_TOKENS = 256

_Share = Annotated[float, Gt(0), Le(1)]
_Cutoff = Annotated[float, Gt(0), Lt(1)]
_Count = Annotated[int, Ge(1)]
_Token = Annotated[int, Ge(0)]
_Tokens = Annotated[list[_Token], MinLen(1)]


class GenerationSettings(BaseModel):
    """``values`` are fields of GenerationConfig, the strategy's defaults among them.

    ``assistant_model`` and ``force_words`` are what the library takes as objects and as ids: the
    draft model's path, and texts that the answer must contain.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    strategy: str
    seed: int = 0
    assistant_model: str | None = None
    force_words: tuple[str | tuple[str, ...], ...] = ()
    values: Frozen

    @property
    def samples(self) -> bool:
        """Whether chance has a part, so that ``seed`` matters."""
        return bool(self.values.get("do_sample"))

    @property
    def described(self) -> str:
        """For the screen: ``beam_search num_beams=4 max_new_tokens=256``."""
        shown = {k: v for k, v in self.recorded.items() if k not in ("strategy", "do_sample")}
        return " ".join([self.strategy, *(f"{k}={_compact(v)}" for k, v in shown.items())])

    @property
    def recorded(self) -> dict[str, Any]:
        """Plain values, for JSON: everything that the answers depend on."""
        extra = {
            "assistant_model": self.assistant_model,
            "force_words": plain(self.force_words) or None,
            "seed": self.seed if self.samples else None,
        }
        given = {key: value for key, value in extra.items() if value is not None}
        return {"strategy": self.strategy, **plain(self.values), **given}


def _option(name: str, kind: Any, help_text: str) -> Option:
    return Option(name, kind, None, help_text)


# Keys that every strategy uses.
_COMMON = (
    _option("max_new_tokens", _Count, "Most tokens of an answer; 256 unless said."),
    _option("min_new_tokens", _Count, "No EOS before so many tokens."),
    _option(
        "stop_strings",
        NonEmpty | Annotated[list[NonEmpty], MinLen(1)],
        "Texts that end an answer; they are not part of it.",
    ),
    _option("repetition_penalty", Annotated[float, Gt(0)], "Above 1: against repetition."),
    _option("no_repeat_ngram_size", _Count, "No sequence of so many tokens comes twice."),
    _option("bad_words_ids", Annotated[list[_Tokens], MinLen(1)], "Token sequences never written."),
    _option(
        "sequence_bias",
        Annotated[list[list[Any]], MinLen(1)],
        "Pairs of a token sequence and what is added to its score: [[[12, 7], -2.0]].",
    ),
    _option(
        "exponential_decay_length_penalty",
        Annotated[list[float], MinLen(2)],
        "[begin, factor]: EOS grows likelier from that many tokens on.",
    ),
    _option("suppress_tokens", _Tokens, "Tokens never written."),
    _option("begin_suppress_tokens", _Tokens, "Tokens that no answer begins with."),
    _option("forced_eos_token_id", _Token, "The token that stands last at max_new_tokens."),
    _option("use_cache", bool, "false computes the whole text anew for each token."),
)
_SAMPLED = (
    _option(
        "temperature",
        Annotated[float, Ge(0.001), Le(1000)],
        "Below 1: sharper, above 1: flatter.",
    ),
    _option("top_h", _Share, "Keeps the tokens that hold this share of the entropy."),
    _option("top_p", _Share, "Keeps the likeliest tokens that together reach this probability."),
    _option("min_p", _Share, "Keeps tokens at least this share as likely as the likeliest."),
    _option("typical_p", _Share, "Keeps the most typical tokens up to this probability."),
    _option("epsilon_cutoff", _Cutoff, "Keeps tokens above this probability."),
    _option("eta_cutoff", _Cutoff, "As epsilon_cutoff, lower where the entropy is high."),
)
_OF_BEAMS = (
    _option("num_beams", Annotated[int, Ge(2)], "Texts followed at once; 1 is greedy_search."),
    _option("length_penalty", Annotated[float, Ge(-10), Le(10)], "Above 0: longer answers."),
    _option("early_stopping", bool | Literal["never"], "When the beams may stop."),
    _option("renormalize_logits", bool, "Normalise scores again behind all changes."),
)
_OF_GROUPS = (
    _option("num_beam_groups", Annotated[int, Ge(2)], "Groups of beams kept apart."),
    _option("diversity_penalty", Annotated[float, Gt(0)], "Against tokens of earlier groups."),
)
_OF_DRAFTS = (
    _option("assistant_model", NonEmpty, "Hub id or folder of a small draft model."),
    _option("prompt_lookup_num_tokens", _Count, "Drafts copied from the text so far."),
    _option("max_matching_ngram_size", _Count, "Longest sequence looked up for a draft."),
    _option("num_assistant_tokens", _Count, "Tokens the draft model writes ahead."),
    _option(
        "num_assistant_tokens_schedule",
        Literal["heuristic", "heuristic_transient", "constant"],
        "How that number changes.",
    ),
    _option(
        "assistant_confidence_threshold",
        Annotated[float, Ge(0), Le(1)],
        "The draft stops below this probability.",
    ),
)
_WORDS = NonEmpty | Annotated[list[NonEmpty], MinLen(1)]

# A key of a strategy, and the strategies that use it.
USES: Mapping[str, tuple[Option, tuple[str, ...]]] = {
    option.name: (option, strategies)
    for options, strategies in (
        (_COMMON, STRATEGIES),
        ((_option("do_sample", bool, "Follows from strategy; need not be said."),), STRATEGIES),
        (_SAMPLED, _SAMPLING),
        (
            (_option("seed", Annotated[int, Ge(0), Le(2**32 - 1)], "Draws the samples; 0."),),
            _SAMPLING,
        ),
        (
            (_option("top_k", _Count, "Keeps so many of the likeliest tokens."),),
            (*_SAMPLING, "contrastive_search"),
        ),
        (_OF_BEAMS, _BEAMS),
        (
            (_option("num_return_sequences", _Count, "Answers to each prompt."),),
            ("sample", *_BEAMS),
        ),
        (_OF_GROUPS, ("group_beam_search",)),
        (
            (
                _option(
                    "force_words_ids",
                    Annotated[list[_Tokens | Annotated[list[_Tokens], MinLen(1)]], MinLen(1)],
                    "Token sequences the answer must contain; a list of them: one of these.",
                ),
                _option(
                    "force_words",
                    Annotated[list[_WORDS], MinLen(1)],
                    "The same as texts; a list of texts: one of these.",
                ),
            ),
            ("constrained_beam_search",),
        ),
        (
            (_option("penalty_alpha", Annotated[float, Gt(0), Le(1)], "Against repetition."),),
            ("contrastive_search",),
        ),
        (
            (
                _option(
                    "dola_layers",
                    Literal["low", "high"] | Annotated[list[_Token], MinLen(1)],
                    "Layers contrasted with the last.",
                ),
            ),
            ("dola_generation",),
        ),
        (_OF_DRAFTS, ("assisted_generation",)),
    )
    for option in options
}

_ENCODER = "for encoder-decoder models; Llama is none. Leave it out."
_SPECIAL = "the tokenizer's and the checkpoint's own hold. Leave it out; stop_strings ends earlier."
_PROGRAMS = "for programs that call generate. Leave it out; --output keeps ids and settings."
_CACHE = "the dynamic cache is used. Leave it out; use_cache=false does without one."
_LAYER_SKIP = "needs a model trained for it. Leave it out; give assistant_model."
_NOT_OFFERED = "not tried with this recipe. Leave it out."
REFUSED: Mapping[str, str] = {
    "max_length": "counts the prompt too. Use max_new_tokens.",
    "min_length": "counts the prompt too. Use min_new_tokens.",
    "max_time": "the answer would depend on the machine's speed. Use max_new_tokens.",
    "constraints": "takes Python objects. Use force_words.",
    "encoder_repetition_penalty": _ENCODER,
    "encoder_no_repeat_ngram_size": _ENCODER,
    "decoder_start_token_id": _ENCODER,
    "forced_bos_token_id": _ENCODER,
    "remove_invalid_values": "scores that are not finite stop the command here. Leave it out.",
    "token_healing": _NOT_OFFERED,
    "guidance_scale": _NOT_OFFERED,
    "watermarking_config": _NOT_OFFERED,
    "output_attentions": _PROGRAMS,
    "output_hidden_states": _PROGRAMS,
    "output_scores": _PROGRAMS,
    "output_logits": _PROGRAMS,
    "return_dict_in_generate": _PROGRAMS,
    "continuous_batching_config": _PROGRAMS,
    "compile_config": _PROGRAMS,
    "disable_compile": _PROGRAMS,
    "pad_token_id": _SPECIAL,
    "bos_token_id": _SPECIAL,
    "eos_token_id": _SPECIAL,
    "cache_implementation": _CACHE,
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "low_memory": _CACHE,
    "prefill_chunk_size": _CACHE,
    "use_mtp": _LAYER_SKIP,
    "assistant_early_exit": _LAYER_SKIP,
    "is_assistant": _PROGRAMS,
    "assistant_lookbehind": _NOT_OFFERED,
    "target_lookbehind": _NOT_OFFERED,
    "assistant_ensemble_weight": _NOT_OFFERED,
    "speculation_type": _NOT_OFFERED,
    "transformers_version": _PROGRAMS,
}
# Beside the values of GenerationConfig, not among them.
_OURS = ("strategy", "seed", "assistant_model", "force_words")

Where = Callable[[str], str]


def generation_settings(
    given: Mapping[str, Any], *, where: Where = lambda key: key
) -> GenerationSettings:
    """Validate what was given; without ``strategy`` it follows from the other keys.

    Args:
        where: from a key to the place that the message names.

    Raises:
        UserError: with every unknown key, wrong value, key that the strategy would ignore, and
            keys that do not go together.
    """
    problems = {key: said for key, value in given.items() if (said := _objection(key, value))}
    if "strategy" not in problems:
        strategy = given.get("strategy") or _strategy_of(given)
        usable = {key: value for key, value in given.items() if key not in problems}
        values = _with_defaults(strategy, usable)
        problems |= _ignored(strategy, usable) | _contradictions(strategy, values, set(problems))
    if problems:
        raise UserError([Problem(where(key), said) for key, said in problems.items()])
    return GenerationSettings(
        strategy=strategy,
        seed=values.get("seed", 0),
        assistant_model=values.get("assistant_model"),
        force_words=tuple(
            tuple(word) if isinstance(word, list) else word
            for word in values.get("force_words", ())
        ),
        values={key: value for key, value in values.items() if key not in _OURS},
    )


def generation_keys(texts: Sequence[str]) -> dict[str, Any]:
    """``temperature=0.7`` and the like, the values written as in YAML.

    Raises:
        UserError: with every text that is none, and every key that stands twice.
    """
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    for text in texts:
        key, equals, value = text.partition("=")
        where = one_line(key)
        if not equals or not key.isidentifier() or not value.strip():
            said = "expected key=value, such as temperature=0.7. Correct it."
            problems.append(Problem(one_line(text), said))
        elif key in found:
            problems.append(Problem(where, "stands twice. Keep one."))
        else:
            try:
                found[key] = read_value(value, where=where)
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(problems)
    return found


def _objection(key: str, value: object) -> str | None:
    if key == "strategy":
        return Option(key, Strategy).objection(value)
    if key in REFUSED:
        return REFUSED[key]
    if key not in USES:
        known = [*USES, "strategy"]
        near = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1, cutoff=0.6)
        hint = f"Did you mean {near[0]}?" if near else f"Choose among {', '.join(known)}."
        return f"unknown key. {hint}"
    return USES[key][0].objection(value)


def _strategy_of(given: Mapping[str, Any]) -> str:
    """As GenerationConfig.get_generation_mode finds it."""
    if given.get("force_words") or given.get("force_words_ids"):
        return "constrained_beam_search"
    sampled = given.get("do_sample") is True
    if (given.get("num_beams") or 1) != 1:
        if given.get("num_beam_groups"):
            return "group_beam_search"
        return "beam_sample" if sampled else "beam_search"
    if given.get("assistant_model") or given.get("prompt_lookup_num_tokens"):
        return "assisted_generation"
    if given.get("dola_layers") is not None:
        return "dola_generation"
    if sampled:
        return "sample"
    contrastive = given.get("penalty_alpha") and given.get("top_k")
    return "contrastive_search" if contrastive else "greedy_search"


def _with_defaults(strategy: str, given: Mapping[str, Any]) -> dict[str, Any]:
    values = {"max_new_tokens": _MAX_NEW_TOKENS, **_DEFAULTS.get(strategy, {}), **given}
    if strategy == "assisted_generation" and not values.get("assistant_model"):
        values = {**_LOOK_UP, **values}
    floats = (name for name, (option, _) in USES.items() if _takes_floats(option))
    for name in floats:  # the library refuses repetition_penalty: 2
        if isinstance(values.get(name), int):
            values[name] = float(values[name])
    values.pop("strategy", None)
    return values


def _takes_floats(option: Option) -> bool:
    return option.type is float or float in get_args(option.type)[:1]


def _ignored(strategy: str, given: Mapping[str, Any]) -> dict[str, str]:
    ignored = {}
    for key in given:
        users = USES[key][1] if key in USES else STRATEGIES
        if strategy not in users:
            ignored[key] = (
                f"{strategy} would ignore it. Leave it out, or use strategy={_either(users)}."
            )
        elif (
            strategy in _EITHER
            and not given.get("do_sample")
            and key in {"seed", "top_k", *(option.name for option in _SAMPLED)}
        ):
            ignored[key] = f"{strategy} ignores it unless it samples. Add do_sample=true."
    return ignored


def _contradictions(strategy: str, values: Mapping[str, Any], faulty: set[str]) -> dict[str, str]:
    """What is wrong between keys that are each right alone; ``faulty`` ones are told already."""
    found: dict[str, str] = {}
    most = values["max_new_tokens"]
    if values.get("min_new_tokens", 0) > most:
        found["min_new_tokens"] = f"{values['min_new_tokens']} is above max_new_tokens={most}."
    sampled = values.get("do_sample", strategy in _ALWAYS_SAMPLING)
    if strategy not in _EITHER and sampled != (strategy in _ALWAYS_SAMPLING):
        found["do_sample"] = (
            f"{str(sampled).lower()} contradicts strategy={strategy}. Leave it out, or use "
            f"strategy={_either(_ALWAYS_SAMPLING) if sampled else 'greedy_search'}."
        )
    found |= _beam_contradictions(strategy, values)
    if strategy == "contrastive_search" and values["top_k"] < 2:
        found["top_k"] = "1 candidate is greedy_search. Use at least 2."
    words = ("force_words", "force_words_ids")
    if strategy == "constrained_beam_search" and not faulty.intersection(words):
        both = [key for key in words if values.get(key)]
        if len(both) != 1:
            said = (
                "stands beside force_words_ids. Keep one."
                if both
                else ("missing: what must the answer contain? Write force_words='[red, blue]'.")
            )
            found["force_words"] = said
    if strategy == "assisted_generation":
        found |= _draft_contradictions(values)
    for key in ("sequence_bias", "exponential_decay_length_penalty"):
        if key in values and (objection := _SHAPES[key](values[key])):
            found[key] = objection
    return found


def _beam_contradictions(strategy: str, values: Mapping[str, Any]) -> dict[str, str]:
    if strategy not in _BEAMS:
        return {}
    found = {}
    beams, groups = values["num_beams"], values.get("num_beam_groups", 1)
    if values.get("num_return_sequences", 1) > beams:
        found["num_return_sequences"] = f"above num_beams={beams}. Lower it, or raise num_beams."
    if strategy == "group_beam_search" and beams % groups:
        found["num_beams"] = f"{beams} beams do not divide into {groups} groups. Use a multiple."
    return found


def _draft_contradictions(values: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    drafted = values.get("assistant_model") is not None
    if values.get("use_cache") is False:
        found["use_cache"] = "false: drafts are checked against the cache. Leave it out."
    if drafted and "prompt_lookup_num_tokens" in values:
        found["prompt_lookup_num_tokens"] = "stands beside assistant_model. Keep one."
    of_model = [option.name for option in _OF_DRAFTS if "assistant_" in option.name]
    for key in of_model if not drafted else ["max_matching_ngram_size"]:
        if key in values:
            other = "assistant_model" if not drafted else "prompt_lookup_num_tokens"
            found[key] = f"has no effect without {other}. Leave it out."
    return found


def _bias_objection(value: list[list[Any]]) -> str | None:
    for pair in value:
        sound = (
            len(pair) == 2
            and isinstance(pair[0], list)
            and pair[0]
            and all(type(token) is int and token >= 0 for token in pair[0])
            and type(pair[1]) in (int, float)
        )
        if not sound:
            return f"expected pairs such as [[12, 7], -2.0], found {one_line(str(pair))[:60]}."
    return None


def _decay_objection(value: list[float]) -> str | None:
    if len(value) == 2 and float(value[0]).is_integer() and value[0] >= 0:
        return None
    return "expected a whole number of tokens and a factor, such as [20, 1.05]."


_SHAPES: Mapping[str, Callable[[Any], str | None]] = {
    "sequence_bias": _bias_objection,
    "exponential_decay_length_penalty": _decay_objection,
}


def _either(names: tuple[str, ...]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _compact(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_compact, value))}]"
    return str(value).lower() if isinstance(value, bool) else one_line(str(value))
