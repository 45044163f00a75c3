"""Whatever is given for decoding, it becomes settings or an error of one line a problem."""

import json

from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from recipe.settings import STRATEGIES, UserError, generation_keys, generation_settings, load_lab
from recipe.settings.strategies import REFUSED, USES
from tests import junk
from tests.refusal import problems

SOUND = st.one_of(
    st.sampled_from(["low", "high", "never", "constant", "red"]),
    st.integers(1, 12),
    st.floats(0.01, 1.0),
    st.booleans(),
    st.lists(st.integers(0, 20), min_size=1, max_size=3),
    st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=2), min_size=1, max_size=2),
)
KEYS = st.sampled_from([*USES, *REFUSED]) | junk.texts
SETTINGS = st.dictionaries(KEYS, SOUND | junk.values, max_size=5)
STRATEGY = st.one_of(st.none(), st.sampled_from(STRATEGIES), junk.values)


@given(SETTINGS, STRATEGY)
def test_any_settings(values, strategy):
    chosen = {} if strategy is None else {"strategy": strategy}
    try:
        settings = generation_settings({**values, **chosen}, where=lambda key: f"key {key!r}")
    except UserError as error:
        problems(error)
        return
    assert settings.strategy in STRATEGIES
    assert "\n" not in settings.described
    json.dumps(settings.recorded)
    config = {k: v for k, v in settings.recorded.items() if k in vars(GenerationConfig())}
    if "sequence_bias" not in config and settings.strategy != "constrained_beam_search":
        mode = GenerationConfig(**config).get_generation_mode(settings.assistant_model)
        assert mode.value == settings.strategy


@given(st.lists(junk.texts | st.builds("{}={}".format, st.sampled_from([*USES]), junk.texts)))
def test_any_keys_of_the_command_line(texts):
    try:
        generation_settings(generation_keys(texts))
    except UserError as error:
        problems(error)


@given(st.dictionaries(st.sampled_from(["generation", "strategies"]) | junk.texts, junk.values))
def test_any_lab(tmp_path_factory, values):
    file = tmp_path_factory.mktemp("lab") / "lab.yaml"
    file.write_text(json.dumps(values))
    try:
        load_lab(str(file), {})
    except UserError as error:
        problems(error)
