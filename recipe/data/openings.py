"""What the rows of a micro-batch begin with in common, so that it is computed once.

Keys, values and all else at a position depend on the tokens up to it alone. Sorted by their ids,
each row shares its longest opening with the row right before it (a depth-first walk of the tree of
all prefixes), so one number a row says what it need not compute. Where the row before needs fewer
tokens than that, the opening ends there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from recipe.data.tokens import TokenizedRow

# Taking over an opening copies its keys and values, by SDPA its queries too, in each layer.
_WORTH_A_COPY = 8
# Below this share of the tokens the copies cost as much as they save.
_WORTH_IT = 0.03


@dataclass(frozen=True)
class Opened:
    """A row, and how many of its first tokens are those of the row before it."""

    row: TokenizedRow
    opening: int


def shared_openings(rows: Sequence[TokenizedRow]) -> list[Opened] | None:
    """Sort ``rows`` so that neighbours share their openings; None where that would not pay.

    An opening ends before the position that predicts the row's first trained token, so each row
    keeps its own of all positions that have a loss; and where the row before needs no more tokens.
    """
    ordered = sorted(rows, key=lambda row: row.input_ids.tobytes())
    opened = [Opened(ordered[0], 0)]
    for before, row in pairwise(ordered):
        common = min(_common(before, row), before.needed, _own_from(row))
        opened.append(Opened(row, common if common >= _WORTH_A_COPY else 0))
    saved = sum(one.opening for one in opened)
    return opened if saved >= _WORTH_IT * sum(row.needed for row in rows) else None


def _common(first: TokenizedRow, second: TokenizedRow) -> int:
    """How many ids two rows begin with in common."""
    n = min(len(first), len(second))
    differ = np.flatnonzero(first.input_ids[:n] != second.input_ids[:n])
    return int(differ[0]) if len(differ) else n


def _own_from(row: TokenizedRow) -> int:
    """The position that predicts the first token with a loss."""
    return int(row.predicting[0]) if len(row.predicting) else 0
