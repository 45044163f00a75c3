"""Which fields of ``transformers.GenerationConfig`` each decoding strategy uses.

Strategies are the values of its ``GenerationMode``. Every field stands in ``USES`` or ``REFUSED``,
and a test fails when a new version adds one.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, Le, Lt, MinLen

from recipe.settings.option import Option
from recipe.settings.schema import NonEmpty

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
BEAMS = ("beam_search", "beam_sample", "group_beam_search", "constrained_beam_search")
# Several prompts at once; the others take one after the other.
TOGETHER = ("greedy_search", "sample", "dola_generation", "beam_search")
# They may sample, and do where do_sample is true.
EITHER = ("dola_generation", "assisted_generation")
_SAMPLING = ("sample", "beam_sample", *EITHER)
ALWAYS_SAMPLING = ("sample", "beam_sample")

# What a strategy takes where nothing is said; the screen shows it.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "sample": {"do_sample": True},
    "beam_search": {"num_beams": 4},
    "beam_sample": {"num_beams": 4, "do_sample": True},
    "group_beam_search": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constrained_beam_search": {"num_beams": 4},
    "contrastive_search": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_generation": {"dola_layers": "high"},
}
LOOK_UP = {"prompt_lookup_num_tokens": 10}
MAX_NEW_TOKENS = 256

_Share = Annotated[float, Gt(0), Le(1)]
_Cutoff = Annotated[float, Gt(0), Lt(1)]
_Count = Annotated[int, Ge(1)]
_Token = Annotated[int, Ge(0)]
_Tokens = Annotated[list[_Token], MinLen(1)]


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
SAMPLED = (
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
OF_DRAFTS = (
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
        (SAMPLED, _SAMPLING),
        (
            (_option("seed", Annotated[int, Ge(0), Le(2**32 - 1)], "Draws the samples; 0."),),
            _SAMPLING,
        ),
        (
            (_option("top_k", _Count, "Keeps so many of the likeliest tokens."),),
            (*_SAMPLING, "contrastive_search"),
        ),
        (_OF_BEAMS, BEAMS),
        (
            (_option("num_return_sequences", _Count, "Answers to each prompt."),),
            ("sample", *BEAMS),
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
        (OF_DRAFTS, ("assisted_generation",)),
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
