"""What was read from the libraries' source equals what the imported libraries say."""

import dataclasses
import inspect

import pytest

from recipe.settings import SECTIONS, Absent, Option, UserError, options, source
from recipe.settings.library import lora_options, quantization_options, training_options
from recipe.settings.refused import LORA, TRAINING, TRAINING_HONOURED
from recipe.settings.renamed import REMOVED, RENAMED
from recipe.settings.sections import unknown_key


@pytest.fixture(scope="module")
def classes() -> dict[str, type]:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments

    return {
        "training": TrainingArguments,
        "lora": LoraConfig,
        "quantization": BitsAndBytesConfig,
    }


@pytest.mark.parametrize("section", ["training", "lora"])
def test_fields_equal_those_of_the_dataclass(classes, section: str) -> None:
    fields = [field for field in dataclasses.fields(classes[section]) if field.init]
    assert list(options(section)) == [field.name for field in fields]
    for field in fields:
        read = options(section)[field.name].default
        if read is Absent.UNREAD:
            continue
        if field.default_factory is not dataclasses.MISSING:
            assert read == field.default_factory()
        else:
            assert read == field.default, field.name


def test_defaults_that_are_no_literals() -> None:
    unread = [
        name
        for section in ("training", "lora")
        for name, option in options(section).items()
        if option.default is Absent.UNREAD
    ]
    assert unread == ["optim", "runtime_config"]


def test_quantization_parameters_equal_the_signature(classes) -> None:
    parameters = inspect.signature(classes["quantization"]).parameters
    named = {k: p.default for k, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    assert {name: option.default for name, option in quantization_options().items()} == named


@pytest.mark.parametrize("read", [training_options, lora_options, quantization_options])
def test_defaults_pass_their_own_types(read) -> None:
    for option in read().values():
        if not isinstance(option.default, Absent):
            assert option.objection(option.default) is None, option.name


def test_enums_are_read_from_the_source(classes) -> None:
    from transformers import SchedulerType
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy
    from transformers.training_args import OptimizerNames

    for name, enum in {
        "lr_scheduler_type": SchedulerType,
        "eval_strategy": IntervalStrategy,
        "save_strategy": SaveStrategy,
        "optim": OptimizerNames,
    }.items():
        assert training_options()[name].choices == tuple(member.value for member in enum)


def test_every_field_of_training_arguments_stands_in_exactly_one_table() -> None:
    assert not TRAINING_HONOURED & TRAINING.keys()
    assert set(training_options()) <= TRAINING_HONOURED | TRAINING.keys()


def test_refused_keys_exist() -> None:
    assert LORA.keys() <= set(lora_options())
    assert TRAINING.keys() <= set(training_options())


def test_refused_keys_can_keep_their_default() -> None:
    from recipe.settings.refused import refusal

    for section, table in (("training", TRAINING), ("lora", LORA)):
        for name in table:
            option = options(section)[name]
            if not isinstance(option.default, Absent):
                assert refusal(section, option, option.default) is None


def test_a_field_that_nobody_has_tried_is_refused() -> None:
    from recipe.settings.refused import refusal

    message = refusal("training", Option("brand_new", bool, default=False), True)
    assert message is not None
    assert "not tried" in message


def test_todays_names_exist_and_old_ones_do_not() -> None:
    for section, names in RENAMED.items():
        for old, today in names.items():
            place, _, key = today.rpartition(".")
            known = quantization_options() if place == "model.quantization" else None
            assert today in SECTIONS or key in (known or options(place)), today
            assert section not in SECTIONS or old not in options(section), old
    for section, names in REMOVED.items():
        for old in names:
            assert section not in SECTIONS or old not in options(section), old
            assert unknown_key((section,) if section else (), old, ()) == names[old]


def test_every_message_tells_what_to_do() -> None:
    refusals = [entry.because for table in (TRAINING, LORA) for entry in table.values()]
    removals = [text for names in REMOVED.values() for text in names.values()]
    for text in [*refusals, *removals]:
        assert text.endswith(".")
        assert any(
            verb in text
            for verb in ("Leave it out", "Delete it", "Use ", "Write ", "Name ", "Set ")
        ), text


def test_every_own_key_is_described() -> None:
    for section in ("model", "data"):
        for option in options(section).values():
            assert option.help.endswith("."), option.name
            assert option.expected, option.name


def test_the_libraries_field_helps_are_read() -> None:
    assert "initial learning rate" in training_options()["learning_rate"].help
    assert "attention dimension" in lora_options()["r"].help


def test_a_library_that_is_not_installed(monkeypatch) -> None:
    with pytest.raises(UserError, match="no_such_library: not installed"):
        source.installed("no_such_library", "x.py")
    with pytest.raises(UserError, match="newer or older than this recipe"):
        source.installed("transformers", "no_such_file.py")
