"""Which rows are compared, and where their last answer begins."""

import numpy as np

from recipe.data.formats import Message
from recipe.data.rows import Row
from recipe.data.tokens import TokenizedRow
from recipe.judging.parts import answer_start, behind_others, choose, last_answers, part_of


def row(index: int, ids: list[int], mask: str) -> TokenizedRow:
    trained = np.array([letter == "x" for letter in mask])
    return TokenizedRow(index, np.array(ids, dtype=np.int32), trained)


def text(index: int) -> Row:
    said = (Message("user", f"question {index}"), Message("assistant", f"answer {index}"))
    return Row(index, said)


def test_the_last_answer_begins_behind_everything_that_is_not_trained():
    assert answer_start(row(0, [1, 2, 3, 4, 5], "..xxx")) == 2
    assert answer_start(row(0, [1, 2, 3, 4, 5], "xx..x")) == 4
    assert answer_start(row(0, [1, 2, 3, 4, 5], ".xxx.")) == 1
    assert answer_start(row(0, [1, 2, 3], "xxx")) == 0


def test_prompts_are_what_training_had_before_the_answer():
    rows = [row(7, [1, 2, 3, 4], "..xx"), row(8, [9, 9], "xx"), row(9, [5] * 6, ".....x")]
    part = part_of(rows, [text(9), text(8), text(7)])
    assert [one.messages[0].content for one in part.texts] == [
        "question 7",
        "question 8",
        "question 9",
    ]
    found = {prompt.index: prompt.ids for prompt in part.prompts(4)}
    assert found == {7: [1, 2]}  # 8 has no prompt, that of 9 leaves no room
    assert part.prompts(4, cut={7}) == []


def test_rows_are_spread_evenly():
    rows = [row(index, [1, 2], ".x") for index in range(100, 110)]
    texts = [text(index) for index in range(100, 115)]

    def chosen(count):
        return [row.index for row in choose(rows, texts, count=count).rows]

    assert chosen(4) == [100, 103, 106, 109]
    assert chosen(50) == list(range(100, 110))
    assert chosen(1) == [100]


def test_an_answer_goes_behind_the_next_prompt_that_is_another():
    rows = [
        row(0, [1, 2, 10], "..x"),
        row(1, [1, 2, 11], "..x"),
        row(2, [3, 12, 13], ".xx"),
    ]
    found = behind_others(rows, context=4)
    assert [None if one is None else one.input_ids.tolist() for one in found] == [
        [3, 10],
        [3, 11],
        [1, 2, 12, 13],
    ]
    assert [one.trained.tolist() for one in found if one] == [
        [False, True],
        [False, True],
        [False, False, True, True],
    ]
    assert behind_others(rows, context=3)[2] is None
    assert behind_others(rows[:2], context=9) == [None, None]
    assert behind_others(rows[:1], context=9) == [None]


def test_only_the_last_answer_of_a_conversation_is_predicted():
    (found,) = last_answers([row(0, [1, 2, 3, 4, 5], ".x.xx")])
    assert found.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert found.trained.tolist() == [False, False, False, True, True]
