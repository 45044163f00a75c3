"""How text is decoded, checked before any model is loaded.

transformers ignores what a strategy does not use; here that is an error.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict

from recipe.settings.option import Option
from recipe.settings.problem import Problem, UserError
from recipe.settings.schema import Frozen, plain
from recipe.settings.strategies import (
    ALWAYS_SAMPLING,
    BEAMS,
    DEFAULTS,
    EITHER,
    LOOK_UP,
    MAX_NEW_TOKENS,
    OF_DRAFTS,
    REFUSED,
    SAMPLED,
    STRATEGIES,
    USES,
    Strategy,
)
from recipe.settings.yaml_text import one_line, read_value


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
            problems.append(Problem(repr(text), said))
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
    values = {"max_new_tokens": MAX_NEW_TOKENS, **DEFAULTS.get(strategy, {}), **given}
    if strategy == "assisted_generation" and not values.get("assistant_model"):
        values = {**LOOK_UP, **values}
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
            strategy in EITHER
            and not given.get("do_sample")
            and key in {"seed", "top_k", *(option.name for option in SAMPLED)}
        ):
            ignored[key] = f"{strategy} ignores it unless it samples. Add do_sample=true."
    return ignored


def _contradictions(strategy: str, values: Mapping[str, Any], faulty: set[str]) -> dict[str, str]:
    """What is wrong between keys that are each right alone; ``faulty`` ones are told already."""
    found: dict[str, str] = {}
    most = values["max_new_tokens"]
    if values.get("min_new_tokens", 0) > most:
        found["min_new_tokens"] = f"{values['min_new_tokens']} is above max_new_tokens={most}."
    sampled = values.get("do_sample", strategy in ALWAYS_SAMPLING)
    if strategy not in EITHER and sampled != (strategy in ALWAYS_SAMPLING):
        found["do_sample"] = (
            f"{str(sampled).lower()} contradicts strategy={strategy}. Leave it out, or use "
            f"strategy={_either(ALWAYS_SAMPLING) if sampled else 'greedy_search'}."
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
    if strategy not in BEAMS:
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
    of_model = [option.name for option in OF_DRAFTS if "assistant_" in option.name]
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
