"""The rows that base and tuned model are compared on, each with its last answer set apart."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from recipe.data.rows import Row
from recipe.data.tokens import TokenizedRow
from recipe.decoding.task import Encoded


@dataclass(frozen=True)
class Part:
    """``rows`` as they were tokenised, ``texts`` as they stand in the source, in the same order."""

    rows: list[TokenizedRow]
    texts: list[Row]

    def prompts(self, room: int, *, cut: Collection[int] = ()) -> list[Encoded]:
        """Of each row the ids before its last answer, as training had them; those left out that are
        empty or longer than ``room`` tokens.

        Args:
            cut: rows whose last answer may be missing, by their place in the source.
        """
        found = [
            Encoded(row.index, row.input_ids[: answer_start(row)].tolist())
            for row in self.rows
            if row.index not in cut
        ]
        return [prompt for prompt in found if 0 < len(prompt.ids) <= room]


def choose(rows: Sequence[TokenizedRow], texts: Sequence[Row], *, count: int) -> Part:
    """Of ``rows``, which may be fewer than ``texts``, at most ``count``, evenly spread."""
    at = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return part_of([rows[place] for place in at], texts)


def part_of(rows: Sequence[TokenizedRow], texts: Sequence[Row]) -> Part:
    """``rows`` with their texts."""
    by_index = {row.index: row for row in texts}
    return Part(list(rows), [by_index[row.index] for row in rows])


def answer_start(row: TokenizedRow) -> int:
    """Where the last trained tokens of a row begin."""
    last = row.trained.nonzero()[0][-1]
    before = (~row.trained[:last]).nonzero()[0]
    return int(before[-1]) + 1 if len(before) else 0


def last_answers(rows: Sequence[TokenizedRow]) -> list[TokenizedRow]:
    """The rows with only their last answer to be predicted."""
    return [_behind(row, row.input_ids[: answer_start(row)]) for row in rows]


def behind_others(rows: Sequence[TokenizedRow], *, context: int) -> list[TokenizedRow | None]:
    """Each last answer behind the prompt of the next row that has another one.

    Whoever learned only how answers look finds them as likely there as where they belong. None for
    a row to which no other prompt is given, or none that leaves room in the context.
    """
    prompts = [row.input_ids[: answer_start(row)] for row in rows]
    found: list[TokenizedRow | None] = []
    for place, row in enumerate(rows):
        rest = (prompts[(place + step) % len(rows)] for step in range(1, len(rows)))
        other = next((ids for ids in rest if not np.array_equal(ids, prompts[place])), None)
        fits = other is not None and len(other) + len(row) - len(prompts[place]) <= context
        found.append(_behind(row, other) if other is not None and fits else None)
    return found


def _behind(
    row: TokenizedRow, prompt: "np.ndarray[tuple[int], np.dtype[np.int32]]"
) -> TokenizedRow:
    start = answer_start(row)
    ids = np.concatenate([prompt, row.input_ids[start:]])
    trained = np.concatenate([np.zeros(len(prompt), dtype=np.bool_), row.trained[start:]])
    return TokenizedRow(row.index, ids, trained)
