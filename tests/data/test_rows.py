"""Rows in, or one message that says where, what and what to do."""

import json

import pytest

from recipe.data.rows import read_rows
from recipe.settings import DataSettings, UserError

GOOD = {"instruction": "Name a fruit.", "input": "", "output": "Apple"}


def read(path, **settings):
    return read_rows(DataSettings(path=str(path), **settings))


def test_json_and_jsonl_read_the_same(write_rows):
    assert read(write_rows()).train == read(write_rows(name="rows.jsonl")).train


def test_slices_keep_the_index_of_the_source(write_rows):
    rows = read(write_rows(), rows="2:5", held_out="8:")
    assert [row.index for row in rows.train] == [2, 3, 4]
    assert [row.index for row in rows.held_out] == [8, 9, 10, 11]


def test_input_may_be_absent(write_rows):
    rows = read(write_rows([{"instruction": "Name a fruit.", "output": "Apple"}]))
    assert rows.train[0].input == ""


def test_empty_outputs_are_dropped_and_named(write_rows):
    rows = read(write_rows([GOOD, {**GOOD, "output": " \n"}, GOOD]))
    assert [row.index for row in rows.train] == [0, 2]
    assert rows.empty == [1]


def test_the_four_columns_of_the_hub_data_set(write_rows):
    rows = read(write_rows([{**GOOD, "text": "Below is an instruction…"}]))
    assert rows.ignored_columns == ["text"]


def test_a_hub_data_set_is_read_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, split):
        asked.append((path, split))
        return datasets.Dataset.from_list([{**GOOD, "text": "…"}, {**GOOD, "text": "…"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read("tatsu-lab/alpaca", rows="1:2")
    assert asked == [("tatsu-lab/alpaca", "train")]
    assert [row.index for row in rows.train] == [1]
    assert rows.ignored_columns == ["text"]


WRONG = [
    ("rows.json", b"[{]", "rows.json:1: not JSON"),
    ("rows.json", b'[{"instruction": "a",\n "output": }]', "rows.json:2: not JSON"),
    ("rows.json", b'{"data": []}', "expected a JSON list of rows, found an object"),
    ("rows.json", b"[]", "holds no rows"),
    ("rows.json", b"[" * 100_000, "nested too deeply|not JSON"),
    ("rows.jsonl", b'{"instruction": "a", "output": "b"}\n{oops}\n', "rows.jsonl:2: not JSON"),
    ("rows.json", b'[\n{"instruction": "\xff"}]', "rows.json:2: byte 0xff is not UTF-8"),
    ("rows.json", b'[{"prompt": "a", "text": "b"}]', "columns prompt, text found.*missing: instr"),
    ("rows.json", b'[{"instruction": "a", "output": null}]', "row 0: output: expected text, found"),
    ("rows.json", b'[{"instruction": 7, "output": "b"}]', "row 0: instruction:.*a number"),
    ("rows.json", b'[{"instruction": "a", "output": ["b"]}]', "row 0: output:.*a list"),
    (
        "rows.json",
        b'[{"instruction": "a", "input": null, "output": "b"}]',
        "row 0: input: expected text, found nothing",
    ),
    ("rows.json", b'[{"instruction": " ", "output": "b"}]', "row 0: instruction: empty"),
    (
        "rows.json",
        b'[{"instruction": "a", "output": "b"}, 5]',
        "row 1: expected an object, found a number",
    ),
    ("rows.json", b'[{"instruction": "a", "output": ""}]', "every row .* has an empty output"),
    ("rows.json", b'{"output": 1}\n{"output": 2}\n', "rename it to .jsonl"),
    ("rows.jsonl", b'[{"instruction": "a", "output": "b"}]', "Rename the file to .json"),
    ("rows.csv", b"instruction,output\na,b\n", "neither .json nor .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_a_wrong_file_gives_one_message(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read(file)
    assert len(raised.value.problems) == 1


def test_a_split_of_a_file_is_refused(write_rows):
    with pytest.raises(UserError, match="validation is of a hub data set"):
        read(write_rows(), split="validation")


def test_a_missing_file_is_not_asked_of_the_hub(tmp_path):
    with pytest.raises(UserError, match="no file"):
        read(tmp_path / "absent.json")


@pytest.mark.parametrize("settings", [{"rows": "0:13"}, {"rows": "0:4", "held_out": "4:99"}])
def test_a_slice_past_the_end_is_told(write_rows, settings):
    with pytest.raises(UserError, match=r"holds 12 rows \(0:12\)"):
        read(write_rows(), **settings)


def test_many_broken_rows_are_counted_and_ten_shown(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([GOOD] + [{**GOOD, "output": None}] * 25))
    with pytest.raises(UserError) as raised:
        read(file)
    lines = str(raised.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "and: 15 more of 25 in all."
