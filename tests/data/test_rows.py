"""Rows in, or one message that says where, what and what to do."""

import json

import pytest

from recipe.data.rows import read_rows
from recipe.settings import DataSettings, UserError
from tests.data.conversations import one_turn

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
    null = read(write_rows([{"instruction": "Name a fruit.", "input": None, "output": "Apple"}]))
    assert rows.train == null.train == [one_turn(0, "Name a fruit.", "", "Apple")]


def test_an_input_of_spaces_is_none(write_rows):
    (row,) = read(write_rows([{**GOOD, "input": " \n"}])).train
    assert row == one_turn(0, "Name a fruit.", "", "Apple")


def test_of_two_columns_of_turns_one_is_used_and_the_other_named(write_rows):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = read(write_rows([{"messages": turns, "conversations": turns}]), format="messages")
    assert rows.ignored_columns == ["conversations"]
    with pytest.raises(UserError, match="row 1: messages: expected a list of turns, found nothing"):
        read(write_rows([{"messages": turns}, {"conversations": turns}]), format="messages")


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


def test_held_out_rows_that_are_trained_on_are_left_out(write_rows):
    other = {**GOOD, "output": "Pear"}
    rows = read(write_rows([GOOD, GOOD, GOOD, other]), rows="0:2", held_out="2:4")
    assert rows.overlap == [2]
    assert [row.index for row in rows.held_out] == [3]
    assert rows.asked_before == [3]
    assert rows.repeated == [1]
    assert [row.index for row in rows.train] == [0, 1]


def test_held_out_rows_that_are_all_trained_on_are_an_error(write_rows):
    with pytest.raises(UserError, match=r"all 1 rows .* are training rows too"):
        read(write_rows([GOOD, GOOD]), rows="0:1", held_out="1:2")


def test_columns_and_keys_of_nulls_do_not_decide_over_the_format(write_rows):
    """As a columnar file fills them in for rows that have none."""
    null = {"from": None, "value": None}
    turns = [
        {"role": "user", "content": "a", **null},
        {"role": "assistant", "content": "b", **null},
    ]
    assert read(write_rows([{"conversations": turns}])).format == "messages"
    both = {"messages": turns, "conversations": None, "prompt": "a", "completion": None}
    assert read(write_rows([both])).format == "messages"
