"""Shared openings against rows written out: no token lost that is needed, none shared that has a
loss.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.data.batch import IGNORED, flatten
from recipe.data.openings import shared_openings
from recipe.data.tokens import TokenizedRow

OPENING = list(range(100, 120))


def row(index, ids, prompt, tail=0):
    """The last ``tail`` tokens are not trained, as of a conversation that is cut."""
    places = np.arange(len(ids))
    trained = (places >= prompt) & (places < len(ids) - tail)
    return TokenizedRow(index, np.array(ids, dtype=np.int32), trained)


def rebuilt(batch):
    """Ids and positions of each row as far as it is needed, by what the batch says of openings."""
    rows, start = [], 0
    for own, opening in zip(batch["row_lengths"], batch["openings"], strict=True):
        ids, positions = (
            batch[name][0, start : start + own].tolist() for name in ("input_ids", "position_ids")
        )
        before = rows[-1] if rows else ([], [])
        rows.append((before[0][:opening] + ids, before[1][:opening] + positions))
        start += own
    return rows


def targets(batch):
    """(row index, position in the row, token) of all that is predicted."""
    found, place = [], {}
    start = 0
    for index, own, opening in zip(
        batch["row_indices"], batch["row_lengths"], batch["openings"], strict=True
    ):
        place.update({start + i: (index, opening + i) for i in range(own)})
        start += own
    for position, label in zip(
        batch["logits_to_keep"].tolist(), batch["labels"].tolist(), strict=True
    ):
        if label != IGNORED:
            index, at = place[position]
            found.append((index, at + 1, label))
    return sorted(found)


def test_two_templates_and_a_stranger():
    other = [7, *OPENING[1:]]
    rows = [
        row(0, [*OPENING, 1, 2, 3], 21),
        row(1, [*other, 4, 5], 21),
        row(2, [*OPENING, 1, 9], 21),
        row(3, [*other, 6, 5], 21),
        row(4, [50, 51, 52], 2),
    ]
    batch = flatten(rows, share_openings=True)
    shared = dict(zip(batch["row_indices"], batch["openings"], strict=True))
    # Row 2 begins with 21 ids of row 0, of which the last predicts its first trained token.
    assert sorted(shared.values()) == [0, 0, 0, 20, 20]
    assert shared[4] == 0
    assert batch["input_ids"].shape == (1, sum(len(one) - 1 for one in rows) - 40)


SMALL = st.lists(st.integers(1, 3), min_size=2, max_size=14)


@given(st.lists(st.tuples(SMALL, st.integers(0, 14), st.integers(0, 4)), min_size=1, max_size=6))
def test_rows_and_targets_are_those_of_the_plain_batch(drawn):
    rows = [
        row(i, [*OPENING, *ids, *[8] * tail], min(18 + prompt, 19 + len(ids)), tail)
        for i, (ids, prompt, tail) in enumerate(drawn)
    ]
    plain, shared = flatten(rows), flatten(rows, share_openings=True)
    assert targets(shared) == targets(plain)
    by_index = dict(zip(shared["row_indices"], rebuilt(shared), strict=True))
    for one in rows:
        needed = int(np.flatnonzero(one.trained)[-1])  # from the last trained one nothing is
        assert by_index[one.index] == (one.input_ids[:needed].tolist(), list(range(needed)))
    assert len(set(shared["logits_to_keep"].tolist()) - {0}) >= len(targets(plain)) - 1
    if len(rows) > 1:
        assert sum(shared["openings"]) >= 17 * (len(rows) - 1)
    assert shared["endings"] == [1 + drawn[index][2] for index in shared["row_indices"]]


def test_an_opening_ends_before_the_last_prompt_token():
    twins = [row(i, [*OPENING, 1, 2, 3], 20) for i in range(3)]
    batch = flatten(twins, share_openings=True)
    assert batch["openings"] == [0, 19, 19]


def test_an_opening_ends_where_the_row_before_does():
    """A conversation that goes on where another ended: of its last token nothing was computed."""
    first = row(0, [*OPENING, 1, 2], 20)
    longer = row(1, [*OPENING, 1, 2, 3, 4, 5], 24)
    batch = flatten([longer, first], share_openings=True)
    assert batch["row_indices"] == [0, 1]
    assert batch["openings"] == [0, 21]
    assert rebuilt(batch) == [
        ([*OPENING, 1], list(range(21))),
        ([*OPENING, 1, 2, 3, 4], list(range(24))),
    ]


@pytest.mark.parametrize(
    "rows",
    [
        [row(0, [*OPENING, 1], 20)],
        [row(0, [1, 2, 3, 4], 3), row(1, [1, 2, 3, 5], 3)],
        [row(i, [*OPENING[:8], *range(200 * i, 200 * i + 190)], 10) for i in range(2)],
    ],
    ids=["one row", "too short", "too small a part"],
)
def test_nothing_is_shared_where_it_does_not_pay(rows):
    assert shared_openings(rows) is None
    assert flatten(rows, share_openings=True)["row_indices"] == [one.index for one in rows]
