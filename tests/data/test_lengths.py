"""What max_length does, counted by a loop that a reader can check by eye."""

import numpy as np
import pytest

from recipe.data.lengths import fit_rows, length_table, lost
from recipe.data.tokens import TokenizedRow
from recipe.settings import UserError


def row(index, masked, trained):
    mask = np.array([False] * masked + [True] * trained)
    return TokenizedRow(index, np.arange(masked + trained, dtype=np.int32), mask)


ROWS = [row(0, 4, 4), row(1, 10, 6), row(2, 20, 2), row(3, 3, 40)]


def fit(max_length, too_long):
    return fit_rows(ROWS, max_length=max_length, too_long=too_long, part="training")


def test_an_error_says_what_each_remedy_costs():
    with pytest.raises(UserError) as raised:
        fit(16, "error")
    (problem,) = raised.value.problems
    assert str(problem) == (
        "data.max_length: 2 of 4 training rows are longer than 16 tokens: 2, 3. Raise it (43 holds "
        "every row), or set data.too_long to drop, which loses 42 (80.8%) of the trained tokens, "
        "or truncate, which loses 29 (55.8%)."
    )


def test_drop():
    fitted = fit(16, "drop")
    assert [kept.index for kept in fitted.rows] == [0, 1]
    assert fitted.dropped == [2, 3]
    assert fitted.trained_tokens == 10


def test_truncate_drops_a_row_that_would_train_nothing():
    fitted = fit(16, "truncate")
    assert [kept.index for kept in fitted.rows] == [0, 1, 3]
    assert [len(kept) for kept in fitted.rows] == [8, 16, 16]
    assert fitted.dropped == [2]
    assert fitted.truncated == [3]
    assert [len(whole) for whole in fitted.whole] == [8, 16, 22, 43]


def test_nothing_is_touched_at_the_longest_row():
    for too_long in ("error", "drop", "truncate"):
        fitted = fit(43, too_long)
        assert fitted.rows == ROWS
        assert not fitted.dropped
        assert not fitted.truncated


def test_no_row_left_is_an_error():
    with pytest.raises(UserError, match=r"no training row fits into 7 tokens.* has 8\."):
        fit(7, "drop")


@pytest.mark.parametrize("length", range(1, 45))
def test_lost_tokens_are_counted_one_by_one(length):
    longer, dropped, cut = 0, 0, 0
    for one in ROWS:
        if len(one) <= length:
            continue
        longer += 1
        dropped += sum(one.trained)
        cut += sum(1 for at, trained in enumerate(one.trained) if trained and at >= length)
    assert lost(ROWS, length) == (longer, dropped, cut)


def test_the_table():
    lines = length_table([*ROWS, row(4, 10, 90)], max_length=96)
    assert [line.split()[0] for line in lines] == ["max_length", "64", "96*", "*"]
    assert lines[2].split()[1:] == ["1", "(20.0%)", "90", "(63.4%)", "4", "(2.8%)"]
    assert "the longest row has 100 tokens" in lines[-1]
