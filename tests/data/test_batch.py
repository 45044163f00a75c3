"""The flattened batch against a loop that a reader can check by eye."""

import numpy as np
import pytest

from recipe.data.batch import IGNORED, KEPT_MULTIPLE, flatten, largest_batch
from recipe.data.tokens import TokenizedRow


def row(index, ids, trained):
    return TokenizedRow(index, np.array(ids, dtype=np.int32), np.array(trained, dtype=bool))


ROWS = [
    row(0, [5, 6, 7, 8], [False, False, True, True]),
    row(1, [9, 10], [False, True]),
    row(2, [11, 12, 13], [False, True, True]),
]


def kept(batch):
    """(position, label) of what is not filled up."""
    pairs = zip(batch["logits_to_keep"].tolist(), batch["labels"].tolist(), strict=True)
    return [pair for pair in pairs if pair[1] != IGNORED]


def test_layout():
    batch = flatten(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert batch["row_lengths"] == [3, 1, 2]
    assert batch["endings"] == [1, 1, 1]
    assert batch["row_indices"] == [0, 1, 2]
    assert flatten(ROWS[:0:-1])["row_indices"] == [2, 1]
    assert batch["max_length_q"] == batch["max_length_k"] == 3


def test_each_kept_position_predicts_the_next_token_of_its_row():
    batch = flatten(ROWS)
    expected, start = [], 0
    for tokens in ROWS:
        for i in range(1, len(tokens)):
            if tokens.trained[i]:
                expected.append((start + i - 1, int(tokens.input_ids[i])))
        start += len(tokens) - 1
    assert kept(batch) == expected
    assert batch["predicting"].tolist() == [position for position, _ in expected]
    assert batch["shift_labels"].tolist() == batch["labels"].tolist()


def test_a_trained_first_token_is_not_predicted_from_the_row_before():
    batch = flatten([row(0, [1, 2], [False, True]), row(1, [3, 4], [True, True])])
    assert kept(batch) == [(0, 2), (1, 4)]
    assert batch["predicting"].tolist() == [0, 1]


def test_what_predicts_nothing_and_is_seen_by_nothing_that_does_is_left_out():
    """The last trained token, all behind it, and of a row that trains nothing all but one."""
    yes, no = True, False
    rows = [
        row(0, [1, 2, 3, 4, 5], [no, yes, no, yes, no]),
        row(1, [6, 7, 8, 9], [yes, no, no, no]),
        row(2, [10, 11, 12, 13, 14], [no, no, yes, no, no]),
        row(3, [15], [yes]),
    ]
    batch = flatten(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 6, 10, 11, 15]]
    assert batch["row_lengths"] == [3, 1, 2, 1]
    assert batch["endings"] == [2, 3, 3, 0]
    assert kept(batch) == [(0, 2), (2, 4), (5, 12)]


def test_the_largest_batch_is_the_one_that_needs_the_most():
    long = row(0, range(9), [False, True, *[False] * 7])
    short = [row(n, range(4), [False, True, True, True]) for n in (1, 2)]
    assert [one.index for one in largest_batch([long, *short], 1)] == [1]


@pytest.mark.parametrize("trained", range(1, 20))
def test_kept_positions_are_filled_up_with_ignored_ones(trained):
    batch = flatten([row(0, range(30), [False] * (30 - trained) + [True] * trained)])
    assert len(batch["labels"]) % KEPT_MULTIPLE == 0
    assert (batch["labels"] != IGNORED).sum() == len(kept(batch)) == trained
    assert batch["predicting"].tolist() == list(range(29 - trained, 29))


def test_no_rows_are_one_token_that_predicts_nothing():
    batch = flatten([])
    assert batch["input_ids"].shape == (1, 1)
    assert kept(batch) == batch["predicting"].tolist() == []
