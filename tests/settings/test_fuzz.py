"""Whatever a config holds, the loader answers with settings or with one line a problem."""

from collections.abc import Sequence

import pytest
import yaml
from hypothesis import event, given
from hypothesis import strategies as st

from recipe.settings import SECTIONS, Settings, UserError, dump, load_settings, options
from tests import hypothesis_profiles, junk  # noqa: F401
from tests.refusal import problems

VALID = {
    "model": {"name_or_path": "base", "dtype": "float32"},
    "data": {"path": "rows.json", "rows": "0:200", "held_out": "200:250"},
    "lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "training": {"seed": 1, "eval_strategy": "epoch"},
}
KEYS = [(section, key) for section in SECTIONS for key in options(section)]
SOUND = yaml.safe_dump(VALID)

keys = st.sampled_from(KEYS)
# What means something in YAML comes more often than other text.
SIGNS = r"""model: data: r: - ? : [ ] { } , &a *a << !!str !b ' " "\UFFFFFFFF" "\uD800" --- ... %YA
# @ ` | > 010 0x1F 1e999 .nan ~ 12:30:45 9999999999999999999 1_000 no = . a"""
TOKENS = [*SIGNS.split(), "\n", "\n  ", "\n    ", " ", "\t", "\0", "\x85", "\ufeff", "\u2028"]
tokens = st.lists(st.sampled_from(TOKENS))
yaml_texts = st.text() | tokens.map("".join) | tokens.map(" ".join)
value_texts = yaml_texts | st.from_regex(r"[-+]?[0-9._:exo]{1,24}", fullmatch=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "c.yaml"


def outcome(file, content: bytes, overrides: Sequence[str] = ()) -> None:
    """The only two: settings that can be written down again, or problems of one line each."""
    file.write_bytes(content)
    try:
        settings = load_settings(str(file), overrides)
    except UserError as error:
        problems(error)
        event("refused")
    else:
        event("read")
        assert isinstance(settings, Settings)
        assert yaml.safe_load(dump(settings))


@given(content=st.binary())
def test_any_bytes(file, content):
    outcome(file, content)


@given(text=yaml_texts)
def test_any_text(file, text):
    outcome(file, text.encode(errors="surrogatepass"))


@given(content=junk.damaged(st.just(SOUND.encode())))
def test_a_damaged_config(file, content):
    outcome(file, content)


@given(changes=st.dictionaries(keys, junk.values, max_size=4), quotes=st.sampled_from([None, '"']))
def test_any_value_of_known_keys(file, changes, quotes):
    config = {section: dict(values) for section, values in VALID.items()}
    for (section, key), value in changes.items():
        config.setdefault(section, {})[key] = value
    text = yaml.safe_dump(config, default_style=quotes, allow_unicode=True)
    outcome(file, text.encode(errors="surrogatepass"))


@given(config=st.dictionaries(st.sampled_from([*SECTIONS, "name"]) | junk.texts, junk.values))
def test_any_sections(file, config):
    outcome(file, yaml.safe_dump(config).encode(errors="surrogatepass"))


@given(
    overrides=st.lists(
        st.builds(lambda key, value: f"{'.'.join(key)}={value}", keys, value_texts)
        | junk.texts
        | st.builds(lambda key, value: f"{key}={value}", junk.texts, junk.texts),
        max_size=3,
    )
)
def test_any_overrides(file, overrides):
    outcome(file, SOUND.encode(), overrides)
