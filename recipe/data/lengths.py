"""What ``data.max_length`` does to rows: counted for any length, cut only where that is asked."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from recipe.data.tokens import TokenizedRow
from recipe.settings import UserError

_SHOWN = 10
_SHORTEST = 64


@dataclass(frozen=True)
class FittedRows:
    """The rows that are trained, all rows as they were, and the indices of those touched."""

    rows: list[TokenizedRow]
    whole: list[TokenizedRow]
    dropped: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def trained_tokens(self) -> int:
        return sum(int(row.trained.sum()) for row in self.rows)


def fit_rows(
    rows: Sequence[TokenizedRow], *, max_length: int, too_long: str, part: str
) -> FittedRows:
    """Hold rows to ``max_length`` tokens, EOS included; nothing is cut unless ``too_long`` says so.

    Args:
        too_long: what happens to a longer row: ``error``, ``drop`` or ``truncate``. A row whose
            prompt alone fills ``max_length`` would train nothing, so it is dropped then.
        part: which rows these are, for the message.

    Raises:
        UserError: a row is too long under ``error``, or no row is left.
    """
    fitted = FittedRows([], list(rows))
    longer = [row for row in rows if len(row) > max_length]
    if longer and too_long == "error":
        raise UserError.single("data.max_length", _too_long(rows, longer, max_length, part))
    for row in rows:
        if len(row) <= max_length:
            fitted.rows.append(row)
            continue
        cut = TokenizedRow(row.index, row.input_ids[:max_length], row.trained[:max_length])
        if too_long == "truncate" and _trained(cut):
            fitted.rows.append(cut)
            fitted.truncated.append(row.index)
        else:
            fitted.dropped.append(row.index)
    if rows and not fitted.rows:
        raise UserError.single(
            "data.max_length",
            f"no {part} row fits into {max_length} tokens. Raise it; the shortest has "
            f"{min(map(len, rows))}.",
        )
    return fitted


def length_table(rows: Sequence[TokenizedRow], *, max_length: int) -> list[str]:
    """Lines of a table: how many rows each ``data.max_length`` would touch, and what they train.

    Powers of two up to the longest row, and ``max_length`` itself, which is marked.
    """
    longest = max(map(len, rows))
    lengths = {max_length}
    step = _SHORTEST
    while step < 2 * longest and step <= max(max_length, _SHORTEST):
        lengths.add(step)
        step *= 2
    trained = sum(map(_trained, rows))
    lines = [f"{'max_length':>11}{'rows longer':>22}{'drop loses':>22}{'truncate loses':>22}"]
    for length in sorted(lengths):
        touched, dropped, cut = lost(rows, length)
        lines.append(
            f"{length:>10,}{'*' if length == max_length else ' '}{_share(touched, len(rows)):>22}"
            f"{_share(dropped, trained):>22}{_share(cut, trained):>22}"
        )
    marked = f"* data.max_length here; the longest row has {longest:,} tokens"
    return [*lines, f"{marked}. Lost are trained tokens."]


def lost(rows: Sequence[TokenizedRow], length: int) -> tuple[int, int, int]:
    """Rows longer than ``length``, and the trained tokens lost by dropping or truncating them."""
    longer = [row for row in rows if len(row) > length]
    return (
        len(longer),
        sum(_trained(row) for row in longer),
        sum(int(row.trained[length:].sum()) for row in longer),
    )


def _trained(row: TokenizedRow) -> int:
    # A first token has nothing before it that could predict it.
    return int(row.trained[1:].sum())


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})"


def _too_long(
    rows: Sequence[TokenizedRow], longer: Sequence[TokenizedRow], max_length: int, part: str
) -> str:
    touched, dropped, cut = lost(rows, max_length)
    trained = sum(map(_trained, rows))
    named = ", ".join(str(row.index) for row in longer[:_SHOWN])
    more = ", …" if len(longer) > _SHOWN else ""
    return (
        f"{touched} of {len(rows)} {part} rows are longer than {max_length} tokens: {named}{more}. "
        f"Raise it ({max(map(len, longer))} holds every row), or set data.too_long to drop, which "
        f"loses {_share(dropped, trained)} of the trained tokens, or truncate, which loses "
        f"{_share(cut, trained)}."
    )
