"""Rows of instruction data: read, sliced, and checked field by field before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from recipe.data.formats import Format, Message, find_format, read_messages
from recipe.data.sources import read_records
from recipe.settings import DataSettings, Problem, UserError, row_range
from recipe.settings.yaml_text import one_line


@dataclass(frozen=True)
class Row:
    """One conversation; ``index`` counts from 0 in the source, before any slicing.

    ``messages`` are an optional system turn, then user and assistant in turns, the assistant last.
    """

    index: int
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last answer."""
        return self.messages[:-1]

    @property
    def is_empty(self) -> bool:
        """Whether an assistant says nothing in some turn: that would be trained as an answer."""
        return any(
            message.role == "assistant" and not message.content.strip() for message in self.messages
        )


@dataclass(frozen=True)
class Rows:
    """What a run trains on and is judged on, and what was found on the way.

    ``empty`` rows and ``overlap`` (held-out rows that are training rows too) are left out.
    ``repeated`` rows are training rows that occur before; ``asked_before`` held-out rows whose
    prompt is a training row's, with another answer. Both stay in. All are indices of the source.
    """

    train: list[Row]
    held_out: list[Row]
    sha256: str
    format: str
    template: str
    empty: list[int] = field(default_factory=list)
    overlap: list[int] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    asked_before: list[int] = field(default_factory=list)
    ignored_columns: list[str] = field(default_factory=list)


def read_rows(settings: DataSettings) -> Rows:
    """Read ``data.path``, take ``rows`` and ``held_out`` of it, and check every row taken.

    Raises:
        UserError: the source cannot be read, a slice reaches past its end, or rows are broken;
            the first ten problems are named and all are counted.
    """
    records, sha256 = read_records(settings)
    if not records:
        raise UserError.single("data.path", f"{settings.path} holds no rows. Name another file.")
    train_span = _slice("data.rows", settings.rows, len(records), source=settings.path)
    held_span = range(0)
    if settings.held_out:
        held_span = _slice("data.held_out", settings.held_out, len(records), source=settings.path)
    columns = {str(key) for record in records if isinstance(record, dict) for key in record}
    chosen = find_format(settings.format, columns, records, settings.path)
    checked = _Checked(chosen, settings.path)
    train = checked.rows(records, train_span)
    held_out = checked.rows(records, held_span)
    if checked.problems:
        raise UserError.first_of(checked.problems)
    return _without_useless(
        [row for row in train if not row.is_empty],
        [row for row in held_out if not row.is_empty],
        settings,
        sha256=sha256,
        format=chosen.name,
        template=settings.template or chosen.template,
        empty=[row.index for row in (*train, *held_out) if row.is_empty],
        ignored_columns=sorted(
            map(one_line, (columns - chosen.needs - chosen.may) | checked.ignored)
        ),
    )


def _without_useless(
    train: list[Row], held_out: list[Row], settings: DataSettings, **found: Any
) -> Rows:
    """Leave out held-out rows that are trained on: their perplexity would be that of memory."""
    trained = {row.messages for row in train}
    prompts = {row.prompt for row in train}
    unseen = [row for row in held_out if row.messages not in trained]
    if not train:
        raise UserError.single(
            "data.path",
            f"every row of {settings.path} has an empty {_answer(found['format'])}, so nothing "
            "would be trained. Correct the rows, or name another file.",
        )
    if settings.held_out and not held_out:
        raise UserError.single(
            "data.held_out", f"every row has an empty {_answer(found['format'])}. Hold out others."
        )
    if settings.held_out and not unseen:
        raise UserError.single(
            "data.held_out",
            f"all {len(held_out)} rows that have an answer are training rows too, so nothing would "
            "be measured. Hold out other rows.",
        )
    return Rows(
        train,
        unseen,
        overlap=[row.index for row in held_out if row.messages in trained],
        repeated=_repeated(train),
        asked_before=[row.index for row in unseen if row.prompt in prompts],
        **found,
    )


def _repeated(rows: Sequence[Row]) -> list[int]:
    seen: set[tuple[Message, ...]] = set()
    repeated = []
    for row in rows:
        if row.messages in seen:
            repeated.append(row.index)
        seen.add(row.messages)
    return repeated


def _answer(format_name: str) -> str:
    return {"alpaca": "output", "prompt_completion": "completion"}.get(format_name, "answer")


def _slice(where: str, text: str | None, total: int, *, source: str) -> range:
    start, stop = row_range(text) if text else (0, None)
    taken = range(start, total if stop is None else stop)
    if taken.stop > total or not taken:
        raise UserError.single(
            where,
            f"asks for {text}, but {source} holds {total} rows (0:{total}). Name rows that are "
            "there; data.rows=null data.held_out=null trains on all.",
        )
    return taken


class _Checked:
    """Reads records into rows and keeps what is wrong with them."""

    def __init__(self, chosen: Format, source: str) -> None:
        self.problems: list[Problem] = []
        self.ignored: set[str] = set()
        self._format = chosen
        self._source = source

    def rows(self, records: Sequence[Any], taken: range) -> list[Row]:
        rows = []
        for index in taken:
            messages, reading = read_messages(self._format, records[index])
            self.ignored |= reading.ignored
            for name, what in reading.wrong:
                where = f"{self._source}: row {index}{f': {name}' if name else ''}"
                self.problems.append(Problem(where, what))
            if not reading.wrong:
                rows.append(Row(index, messages))
        return rows
