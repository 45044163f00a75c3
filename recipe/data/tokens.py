"""Spans → token ids with an exact mask, and the invariants that make the mask trustworthy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from recipe.data.rows import Row, first
from recipe.data.templates import Span, Template
from recipe.settings import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_AT_ONCE = 512  # keeps the fast tokenizer's threads busy; memory stays small


@dataclass(frozen=True)
class TokenizedRow:
    """``input_ids`` int32 and ``trained`` bool, both of shape (tokens,)."""

    index: int
    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class TokenizedRows:
    """The rows that are kept, and the indices of those that ``max_length`` touched."""

    rows: list[TokenizedRow] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def trained_tokens(self) -> int:
        return sum(int(row.trained.sum()) for row in self.rows)


def tokenize_rows(
    rows: Sequence[Row],
    template: Template,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    too_long: str,
) -> TokenizedRows:
    """Tokenise rows through ``template``; nothing is cut unless ``too_long`` says so.

    Args:
        max_length: in tokens, EOS included.
        too_long: what happens to a longer row: ``error``, ``drop`` or ``truncate``.

    Raises:
        UserError: a row breaks an invariant (see ``broken_invariant``) or is too long under
            ``error``; the first ten rows are named and all are counted.
    """
    result = TokenizedRows()
    problems: list[Problem] = []
    for row, spans, ids in _encoded(rows, template, tokenizer):
        broken = broken_invariant(ids, spans, tokenizer)
        if broken:
            problems.append(Problem(f"row {row.index}", broken))
            continue
        tokenized = TokenizedRow(
            row.index, np.asarray(ids[-1], dtype=np.int32), _mask([len(i) for i in ids], spans)
        )
        if len(tokenized) <= max_length:
            result.rows.append(tokenized)
        elif too_long == "error":
            problems.append(Problem(f"row {row.index}", _too_long(len(tokenized), max_length)))
        else:
            _shorten(tokenized, max_length, too_long, result)
    if problems:
        raise UserError(first(problems))
    if rows and not result.rows:
        raise UserError.single(
            "data.max_length", f"no row fits into {max_length} tokens. Raise it."
        )
    return result


def broken_invariant(
    ids: Sequence[Sequence[int]], spans: Sequence[Span], tokenizer: "PreTrainedTokenizerBase"
) -> str | None:
    """Say which invariant a row breaks, with its remedy; None when all hold.

    Args:
        ids: token ids of the text up to and with each span; the last are the whole row's.
    """
    whole = ids[-1]
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    for border in ids[:-1]:
        if list(whole[: len(border)]) != list(border):
            at = next(
                (i for i, (a, b) in enumerate(zip(border, whole, strict=False)) if a != b),
                len(whole),
            )
            merged = tokenizer.decode(whole[max(at - 2, 0) : at + 2])
            return (
                "the prompt's ids are not a prefix of the row's: the tokenizer merges across the "
                f"border, near {merged!r}. Remove what the response begins with, or change the "
                "template."
            )
    if len(whole) > 1 and bos is not None and whole[0] == whole[1] == bos:
        return "begins with the BOS token twice: the tokenizer and the text both write it."
    trained = np.asarray(whole)[_mask([len(i) for i in ids], spans)]
    if not len(trained):
        return "trains no token: its response is empty."
    if trained[-1] != eos:
        return (
            f"its EOS ({tokenizer.eos_token!r}) is not the last trained token, so the model would "
            "never learn to stop."
        )
    if (trained == eos).sum() != sum(span.trained for span in spans):
        return (
            f"its response contains {tokenizer.eos_token!r}, which the tokenizer reads as the end. "
            "Remove it from the text."
        )
    return None


def _encoded(
    rows: Sequence[Row], template: Template, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[Row, list[Span], list[list[int]]]]:
    """Each row with its spans and the ids of the text up to and with each span."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        chunk = rows[start : start + _ROWS_AT_ONCE]
        all_spans = [template.spans(row) for row in chunk]
        borders = [list(accumulate(span.text for span in spans)) for spans in all_spans]
        encoded = iter(
            tokenizer(
                [text for texts in borders for text in texts],
                add_special_tokens=template.add_special_tokens,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
        )
        for row, spans in zip(chunk, all_spans, strict=True):
            yield row, spans, [next(encoded) for _ in spans]


def _mask(borders: Sequence[int], spans: Sequence[Span]) -> NDArray[np.bool_]:
    mask = np.zeros(borders[-1], dtype=np.bool_)
    for start, stop, span in zip([0, *borders[:-1]], borders, spans, strict=True):
        mask[start:stop] = span.trained
    return mask


def _shorten(row: TokenizedRow, max_length: int, too_long: str, result: TokenizedRows) -> None:
    kept = TokenizedRow(row.index, row.input_ids[:max_length], row.trained[:max_length])
    # A row whose prompt alone fills max_length would train nothing.
    if too_long == "truncate" and kept.trained.any():
        result.rows.append(kept)
        result.truncated.append(row.index)
    else:
        result.dropped.append(row.index)


def _too_long(tokens: int, max_length: int) -> str:
    return (
        f"{tokens} tokens, but data.max_length is {max_length}. Raise it, or set data.too_long to "
        "drop or truncate."
    )
