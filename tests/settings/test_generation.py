"""Which keys a strategy takes, which it refuses, and that none of the library's is forgotten."""

import itertools

import pytest
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from recipe.settings import STRATEGIES, UserError, generation_keys, generation_settings, load_lab
from recipe.settings.strategies import REFUSED, USES
from tests.refusal import problems

# Keys that are ours, or arguments of generate() itself.
OURS = {"seed", "force_words", "assistant_model"}


def test_strategies_are_the_librarys():
    assert set(STRATEGIES) == {mode.value for mode in GenerationMode}


def test_every_field_of_the_library_is_used_or_refused_and_none_both():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    known = set(USES) - OURS
    assert not known & set(REFUSED)
    assert fields - known - set(REFUSED) == set()
    # 5.17, the oldest that is supported, lacks some of what 5.23 has, never the reverse.
    assert known | set(REFUSED) == fields


GRID = {
    "do_sample": [None, True],
    "num_beams": [None, 4],
    "num_beam_groups": [None, 2],
    "penalty_alpha": [None, 0.5],
    "top_k": [None, 4],
    "dola_layers": [None, "low"],
    "prompt_lookup_num_tokens": [None, 3],
    "force_words_ids": [None, [[3]]],
}


def test_without_a_strategy_it_is_the_one_that_the_library_would_take():
    """Wherever our keys are accepted together, which never includes one that is ignored."""
    agreed = 0
    for values in itertools.product(*GRID.values()):
        given = {k: v for k, v in zip(GRID, values, strict=True) if v is not None}
        try:
            settings = generation_settings(given)
        except UserError:
            continue
        config = GenerationConfig(**given)
        assert config.get_generation_mode().value == settings.strategy, given
        agreed += 1
    assert agreed >= 12


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_needs_nothing_more_and_is_what_its_keys_say(strategy):
    given = {"force_words": ["red"]} if "constrained" in strategy else {}
    settings = generation_settings({"strategy": strategy, **given})
    assert settings.strategy == strategy
    assert settings.described.startswith(f"{strategy} ")
    values = {k: v for k, v in settings.recorded.items() if k in USES and k not in OURS}
    values |= {"force_words_ids": [[3]]} if "constrained" in strategy else {}
    assert GenerationConfig(**values).get_generation_mode().value == strategy


def test_every_key_is_an_error_for_each_strategy_that_does_not_use_it():
    examples = {
        "temperature": 0.7, "top_k": 5, "top_p": 0.9, "top_h": 0.5, "min_p": 0.1, "seed": 1,
        "typical_p": 0.9, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "num_beams": 4,
        "length_penalty": 2.0, "early_stopping": True, "renormalize_logits": True,
        "num_return_sequences": 2, "num_beam_groups": 2, "diversity_penalty": 0.3,
        "force_words": ["red"], "force_words_ids": [[3]], "penalty_alpha": 0.5,
        "dola_layers": "low", "assistant_model": "x", "prompt_lookup_num_tokens": 3,
        "max_matching_ngram_size": 2, "num_assistant_tokens": 5,
        "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.5,
    }  # fmt: skip
    common = {name for name, (_, users) in USES.items() if users == STRATEGIES}
    assert set(examples) == set(USES) - common
    for strategy, (key, value) in itertools.product(STRATEGIES, examples.items()):
        if strategy in USES[key][1]:
            continue
        with pytest.raises(UserError) as raised:
            generation_settings({"strategy": strategy, key: value})
        said = next(str(p) for p in raised.value.problems if p.where == key)
        assert f"{strategy} would ignore it. Leave it out, or use strategy=" in said


WRONG = [
    ({"strategy": "greedy"}, "strategy", "Did you mean 'greedy_search'?"),
    ({"tempature": 1.0}, "tempature", "unknown key. Did you mean temperature?"),
    ({"max-new-tokens": 5}, "max-new-tokens", "Did you mean max_new_tokens?"),
    ({"zzz": 5}, "zzz", "Choose among"),
    ({"max_new_tokens": 0}, "max_new_tokens", "of at least 1"),
    ({"max_new_tokens": "5"}, "max_new_tokens", "Remove the quotes."),
    ({"max_length": 5}, "max_length", "Use max_new_tokens."),
    ({"strategy": "sample", "temperature": 0}, "temperature", "from 0.001 to 1000"),
    ({"strategy": "beam_search", "length_penalty": 1000}, "length_penalty", "from -10 to 10"),
    ({"strategy": "sample", "top_p": 1.5}, "top_p", "at most 1"),
    ({"strategy": "sample", "top_k": 0}, "top_k", "of at least 1"),
    ({"strategy": "sample", "min_p": float("nan")}, "min_p", "never nan"),
    ({"temperature": 0.7}, "temperature", "greedy_search would ignore it"),
    ({"do_sample": True, "strategy": "greedy_search"}, "do_sample", "contradicts"),
    ({"do_sample": False, "strategy": "sample"}, "do_sample", "strategy=greedy_search"),
    ({"strategy": "beam_search", "num_beams": 1}, "num_beams", "of at least 2"),
    ({"num_beams": 4, "num_return_sequences": 5}, "num_return_sequences", "above num_beams=4"),
    ({"num_beams": 5, "num_beam_groups": 2}, "num_beams", "do not divide into 2 groups"),
    ({"strategy": "contrastive_search", "top_k": 1}, "top_k", "is greedy_search"),
    ({"strategy": "constrained_beam_search"}, "force_words", "missing"),
    ({"force_words": ["a"], "force_words_ids": [[1]]}, "force_words", "Keep one."),
    ({"force_words": []}, "force_words", "not empty"),
    ({"force_words_ids": [[]]}, "force_words_ids", "a list"),
    ({"dola_layers": "middle"}, "dola_layers", "'low', 'high'"),
    ({"dola_layers": "low", "temperature": 0.5}, "temperature", "Add do_sample=true."),
    ({"assistant_model": "a", "prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens", "Keep"),
    (
        {"strategy": "assisted_generation", "num_assistant_tokens": 2},
        "num_assistant_tokens",
        "has no effect without assistant_model",
    ),
    (
        {"assistant_model": "a", "max_matching_ngram_size": 2},
        "max_matching_ngram_size",
        "has no effect without prompt_lookup_num_tokens",
    ),
    ({"strategy": "assisted_generation", "use_cache": False}, "use_cache", "drafts"),
    ({"min_new_tokens": 9, "max_new_tokens": 5}, "min_new_tokens", "above max_new_tokens=5"),
    ({"stop_strings": ""}, "stop_strings", "not empty"),
    ({"sequence_bias": [[1, 2.0]]}, "sequence_bias", "expected pairs such as"),
    ({"exponential_decay_length_penalty": [1.5, 2.0]}, "exponential_decay_length_penalty", "whole"),
    ({"repetition_penalty": -1.0}, "repetition_penalty", "above 0"),
    ({"guidance_scale": 2.0}, "guidance_scale", "not tried"),
    ({"eos_token_id": 3}, "eos_token_id", "stop_strings ends earlier"),
]


@pytest.mark.parametrize(("given", "key", "fragment"), WRONG, ids=str)
def test_a_wrong_setting_is_one_line(given, key, fragment):
    with pytest.raises(UserError) as raised:
        generation_settings(given)
    (line,) = problems(raised.value)
    assert line.startswith(f"{key}: ")
    assert fragment in line


def test_all_problems_come_at_once():
    with pytest.raises(UserError) as raised:
        generation_settings({"strategy": "beam_search", "top_p": 0.9, "num_beams": 1, "x": 1})
    assert [problem.where for problem in raised.value.problems] == ["num_beams", "x", "top_p"]


def test_whole_numbers_become_what_the_library_takes():
    settings = generation_settings({"repetition_penalty": 2, "strategy": "sample", "top_p": 1})
    assert settings.values["repetition_penalty"] == 2.0
    assert type(settings.values["repetition_penalty"]) is type(settings.values["top_p"]) is float


def test_the_lab_that_is_shipped_has_every_strategy_that_needs_nothing_of_the_users():
    lab = load_lab("decoding.yaml", {"max_new_tokens": 7})
    assert {s.strategy for s in lab.values()} == set(STRATEGIES) - {"constrained_beam_search"}
    assert {s.values["max_new_tokens"] for s in lab.values()} == {7}


def test_keys_are_read_as_yaml():
    read = generation_keys(["top_p=.9", "force_words=[red, [a, b]]", 'stop_strings="\\n"'])
    assert read == {"top_p": 0.9, "force_words": ["red", ["a", "b"]], "stop_strings": "\n"}


@pytest.mark.parametrize(
    ("texts", "fragment"),
    [
        (["top_p"], "'top_p': expected key=value"),
        (["top_p="], "'top_p=': expected key=value"),
        (["=1"], "'=1': expected key=value"),
        (["a.b=1"], "'a.b=1': expected key=value"),
        (["top_p=1", "top_p=1"], "top_p: stands twice."),
        (["top_p=[1"], "top_p: not valid YAML"),
        (["top_p=!!python/object:os.system x"], "top_p: tag"),
    ],
)
def test_a_wrong_key_is_one_line(texts, fragment):
    with pytest.raises(UserError) as raised:
        generation_keys(texts)
    (line,) = problems(raised.value)
    assert line.startswith(fragment)
