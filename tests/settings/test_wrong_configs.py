"""Configs with one mistake each: one problem, at the right key and line, that says what to do."""

import re

import pytest

from recipe.settings import UserError, load_settings
from tests.settings.wrong_configs import CASES, IDS


@pytest.mark.parametrize(("section", "lines", "key", "fragments"), CASES, ids=IDS)
def test_one_mistake_is_one_problem(
    write_config, section: str, lines: str, key: str, fragments: list[str]
) -> None:
    config = write_config(**{section: lines})
    with pytest.raises(UserError) as error:
        load_settings(str(config))
    (problem,) = error.value.problems
    assert re.fullmatch(rf"c\.yaml(:\d+)?: {re.escape(key)}", problem.where)
    assert str(problem) == f"{problem.where}: {problem.message}"
    assert problem.message.isprintable()
    assert problem.message[-1] in ".?"
    assert "secret" not in problem.message
    for fragment in fragments:
        assert fragment in problem.message


@pytest.mark.parametrize("section", ["model", "data", "lora"])
def test_missing_section(tmp_path, section: str) -> None:
    sections = {"model": "{name_or_path: x}", "data": "{path: x}", "lora": "{r: 8}"}
    del sections[section]
    config = tmp_path / "c.yaml"
    config.write_text("".join(f"{key}: {value}\n" for key, value in sections.items()))
    with pytest.raises(UserError) as error:
        load_settings(str(config))
    assert str(error.value).startswith(f"c.yaml: {section}: missing.")


@pytest.mark.parametrize("key", ["model.name_or_path", "data.path"])
def test_missing_key(tmp_path, key: str) -> None:
    section, name = key.split(".")
    config = tmp_path / "c.yaml"
    text = "model: {name_or_path: x}\ndata: {path: x}\nlora: {r: 8}\n"
    config.write_text(text.replace(f"{section}: {{{name}: x}}", f"{section}:"))
    with pytest.raises(UserError) as error:
        load_settings(str(config))
    assert str(error.value).startswith(f"c.yaml: {key}: missing, expected text")


def test_section_that_is_no_mapping(tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: {name_or_path: x}\ndata: {path: x}\nlora: 8\n")
    with pytest.raises(
        UserError, match=r"c\.yaml:3: lora: expected keys below it, found the number"
    ):
        load_settings(str(config))


def test_the_example_of_the_design(write_config) -> None:
    with pytest.raises(UserError) as error:
        load_settings(str(write_config(training="learning_rat: 1e-4")))
    assert str(error.value) == (
        "c.yaml:12: training.learning_rat: unknown key. Did you mean training.learning_rate?"
    )


def test_everything_wrong_is_one_report(write_config) -> None:
    config = write_config(
        model="dtype: fp16",
        lora="r: 010\nlora_alpha: 1\nlora_alpha: 2",
        training="seed: x",
        rest="a: 1",
    )
    with pytest.raises(UserError) as error:
        load_settings(str(config), ["lora.rr=1", "training.bf16=maybe", "--fp16"])
    blamed = [problem.where for problem in error.value.problems]
    assert blamed == [
        "c.yaml:10: lora.r",
        "c.yaml:12: lora.lora_alpha",
        "override --fp16",
        "c.yaml:15: a",
        "c.yaml:3: model.dtype",
        "override lora.rr",
        "c.yaml:14: training.seed",
        "override training.bf16",
    ]
