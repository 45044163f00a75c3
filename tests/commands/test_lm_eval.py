"""The task for lm-evaluation-harness in docs/lm-eval asks what training taught."""

import importlib.util
import json
from pathlib import Path

import yaml

from recipe.data.templates import AlpacaTemplate
from recipe.settings import load_settings, row_range

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "docs/lm-eval"


def task_code():
    spec = importlib.util.spec_from_file_location("starter_task", FOLDER / "starter.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Rows(list):
    """What of datasets.Dataset the task uses."""

    def select(self, indices):
        return Rows(self[index] for index in indices)

    def filter(self, wanted):
        return Rows(filter(wanted, self))


def test_the_prompt_is_that_of_training_to_the_byte():
    code, template = task_code(), AlpacaTemplate("<eos>")
    rows = json.loads((REPOSITORY / "configs/data/starter.json").read_text())
    assert {bool(row["input"]) for row in rows} == {True, False}
    for row in rows:
        assert code.prompt(row) == template.prompt(row["instruction"], row["input"])


def test_the_rows_are_those_that_the_config_holds_out():
    rows = Rows(json.loads((REPOSITORY / "configs/data/starter.json").read_text()))
    start, stop = row_range(load_settings("starter.yaml").data.held_out)
    expected = [row for row in rows[start:stop] if row["checkable"] == "yes"]
    assert task_code().held_out(rows) == expected
    assert len(expected) == 50


def test_the_task_names_what_is_there():
    text = (FOLDER / "starter_held_out.yaml").read_text()
    task = yaml.safe_load(text.replace("!function ", ""))
    assert (REPOSITORY / task["dataset_kwargs"]["data_files"]["test"]).is_file()
    for key in ("process_docs", "doc_to_text"):
        file, name = task[key].split(".")
        assert file == "starter"
        assert hasattr(task_code(), name)
