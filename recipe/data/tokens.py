"""Spans → token ids with an exact mask, and the invariants that make the mask trustworthy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from recipe.data.rows import Row
from recipe.data.templates import Span, Template, UnfitRowError
from recipe.settings import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of all texts that are tokenised together: keeps the tokenizer's threads busy, and memory small.
# A conversation of n turns is tokenised n times, each time one turn longer.
_CHARACTERS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class TokenizedRow:
    """``input_ids`` int32 and ``trained`` bool, both of shape (tokens,)."""

    index: int
    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def predicting(self) -> NDArray[np.int64]:
        """The positions whose next token is trained."""
        return np.flatnonzero(self.trained[1:])

    @cached_property
    def needed(self) -> int:
        """How many of the first tokens a model must see for what is trained; 1 where nothing is.

        From those behind nothing is predicted, and none before them attends to them.
        """
        predicting = self.predicting
        return int(predicting[-1]) + 1 if len(predicting) else 1


@dataclass(frozen=True)
class EncodedRow:
    """A row before it is accepted.

    ``borders`` are the ids of the text up to and with each span, each tokenised on its own; the
    last are the whole row's. ``offsets``, int (tokens, 2), are the characters of each of them, and
    None where the tokenizer is not a fast one and does not tell.
    """

    spans: list[Span]
    borders: list[list[int]]
    offsets: NDArray[np.int64] | None

    @property
    def ids(self) -> NDArray[np.int32]:
        return np.asarray(self.borders[-1], dtype=np.int32)

    def mask(self) -> NDArray[np.bool_]:
        """True for the tokens of trained spans."""
        mask = np.zeros(len(self.borders[-1]), dtype=np.bool_)
        stops = [len(ids) for ids in self.borders]
        for start, stop, span in zip([0, *stops[:-1]], stops, self.spans, strict=True):
            mask[start:stop] = span.trained
        return mask


def tokenize_rows(
    rows: Sequence[Row], template: Template, tokenizer: "PreTrainedTokenizerBase", *, source: str
) -> list[TokenizedRow]:
    """Tokenise whole rows through ``template``; nothing is cut here.

    Args:
        source: where the rows come from, for the messages.

    Raises:
        UserError: a row breaks an invariant (see ``broken_invariant``) or does not fit the
            template; the first ten rows are named and all are counted.
    """
    tokenized: list[TokenizedRow] = []
    problems: list[Problem] = []
    bar = tqdm(total=len(rows), desc="tokenising", unit="row", delay=2, leave=False, disable=None)
    for chunk in _chunks(rows):
        for row, encoded in _encoded(chunk, template, tokenizer):
            if isinstance(encoded, EncodedRow):
                mask = encoded.mask()
                wrong = broken_invariant(encoded, mask, tokenizer)
                tokenized.append(TokenizedRow(row.index, encoded.ids, mask))
            else:
                wrong = encoded
            if wrong:
                problems.append(Problem(f"{source}: row {row.index}", wrong))
        bar.update(len(chunk))
    bar.close()
    if problems:
        raise UserError.first_of(problems)
    return tokenized


def broken_invariant(
    encoded: EncodedRow, mask: NDArray[np.bool_], tokenizer: "PreTrainedTokenizerBase"
) -> str | None:
    """Say which invariant a row breaks first, with its remedy; None when all hold.

    Args:
        mask: bool (tokens,), what would be trained.
    """
    whole = encoded.borders[-1]
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    for border in encoded.borders[:-1]:
        if whole[: len(border)] != border:
            return _merged_border(whole, border, tokenizer)
    if len(whole) > 1 and bos is not None and whole[0] == whole[1] == bos:
        return (
            "begins with the BOS token twice: the tokenizer and the text both write it. Use "
            "another data.template, or remove it from the text."
        )
    if not mask.any():
        return "trains no token: its response is empty. Correct or remove it."
    if encoded.offsets is not None and (mask != _mask_by_offsets(encoded, mask)).any():
        return (
            "the trained tokens are not those of its response: tokenizer and template disagree "
            "about where it begins. Use another data.template."
        )
    pairs = zip(encoded.borders, encoded.spans, strict=True)
    last = [len(ids) - 1 for ids, span in pairs if span.trained]
    if any(whole[at] != eos or not mask[at] for at in last):
        return (
            f"its EOS ({tokenizer.eos_token!r}) is not the last trained token, so the model would "
            "never learn to stop. Use another data.template."
        )
    if (encoded.ids[mask] == eos).sum() != len(last):
        return (
            f"its response contains {tokenizer.eos_token!r}, which the tokenizer reads as the end. "
            "Remove it from the text."
        )
    return None


def _chunks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        texts = [message.content + message.context for message in row.messages]
        chunk.append(row)
        characters += len(texts) * sum(map(len, texts))
        if characters > _CHARACTERS_AT_ONCE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _merged_border(
    whole: Sequence[int], border: Sequence[int], tokenizer: "PreTrainedTokenizerBase"
) -> str:
    pairs = enumerate(zip(border, whole, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), len(whole))
    merged = tokenizer.decode(whole[max(at - 2, 0) : at + 2])
    return (
        "the prompt's ids are not a prefix of the row's: the tokenizer merges across the "
        f"border, near {merged!r}. Remove what the response begins with, or change the "
        "template."
    )


def _mask_by_offsets(encoded: EncodedRow, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask once more, from the characters of each token and not from counts of tokens.

    Tokens without characters, such as a BOS that the tokenizer adds, are taken over from ``mask``.
    """
    assert encoded.offsets is not None
    starts, stops = encoded.offsets.T
    borders = np.cumsum([len(span.text) for span in encoded.spans])
    span_of_token = np.minimum(np.searchsorted(borders, starts, side="right"), len(borders) - 1)
    trained = np.array([span.trained for span in encoded.spans])[span_of_token]
    return np.where(stops > starts, trained, mask)


def _encoded(
    rows: Sequence[Row], template: Template, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[Row, EncodedRow | str]]:
    """Each row as it is tokenised, or why the template cannot write it."""
    spans_of_rows: list[list[Span] | str] = []
    prefixes: list[str] = []
    wholes: list[str] = []
    for row in rows:
        try:
            spans = template.spans(row)
        except UnfitRowError as error:
            spans_of_rows.append(str(error))
            continue
        spans_of_rows.append(spans)
        *before, whole = accumulate(span.text for span in spans)
        prefixes += before
        wholes.append(whole)

    def tokenized(texts: list[str], *, offsets: bool = False) -> Any:
        return tokenizer(
            texts,
            add_special_tokens=template.add_special_tokens,
            return_attention_mask=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )

    ids_before = iter(tokenized(prefixes)["input_ids"] if prefixes else ())
    whole_rows = tokenized(wholes, offsets=tokenizer.is_fast) if wholes else {}
    at = 0
    for row, found in zip(rows, spans_of_rows, strict=True):
        if isinstance(found, str):
            yield row, found
            continue
        borders = [*(next(ids_before) for _ in found[1:]), whole_rows["input_ids"][at]]
        offsets = np.asarray(whole_rows["offset_mapping"][at]) if tokenizer.is_fast else None
        at += 1
        yield row, EncodedRow(found, borders, offsets)
