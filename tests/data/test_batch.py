"""The flattened batch against a loop that a reader can check by eye."""

import numpy as np
from recipe.data.batch import flatten
from recipe.data.tokens import TokenizedRow


def row(index, ids, trained):
    return TokenizedRow(index, np.array(ids, dtype=np.int32), np.array(trained, dtype=bool))


ROWS = [
    row(0, [5, 6, 7, 8], [False, False, True, True]),
    row(1, [9, 10], [False, True]),
    row(2, [11, 12, 13], [False, True, True]),
]


def test_layout():
    batch = flatten(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 4, 6, 9]
    assert batch["max_length_q"] == batch["max_length_k"] == 4


def test_each_kept_position_predicts_the_next_token_of_its_row():
    batch = flatten(ROWS)
    expected, start = [], 0
    for tokens in ROWS:
        for i in range(1, len(tokens)):
            if tokens.trained[i]:
                expected.append((start + i - 1, int(tokens.input_ids[i])))
        start += len(tokens)
    kept = zip(batch["logits_to_keep"].tolist(), batch["labels"].tolist(), strict=True)
    assert list(kept) == expected


def test_a_trained_first_token_is_not_predicted_from_the_row_before():
    batch = flatten([row(0, [1, 2], [False, True]), row(1, [3, 4], [True, True])])
    assert batch["labels"].tolist() == [2, 4]
    assert batch["logits_to_keep"].tolist() == [0, 2]
