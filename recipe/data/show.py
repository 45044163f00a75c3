"""Rows as the model will see them: each token's fate, read from the very batch that is trained."""

import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from recipe.data.batch import IGNORED, flatten
from recipe.data.lengths import FittedRows
from recipe.data.tokens import TokenizedRow

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# What SGR codes a terminal gets. Each fate is also named, for eyes and pipes without colours.
_COLOURS = {"masked": "2", "trained": "32", "EOS": "1;35", "cut": "9;31"}
_WIDTH = 100


def shown_rows(
    fitted: FittedRows, tokenizer: "PreTrainedTokenizerBase", *, count: int, colour: bool
) -> list[str]:
    """Lines for the first ``count`` rows: text and ids of each run of tokens with one fate.

    ``masked`` tokens are not trained, ``trained`` ones are predicted, ``EOS`` is a trained
    end of sequence, and ``cut`` is what ``data.max_length`` takes away.
    """
    kept = {row.index: row for row in fitted.rows}
    lines: list[str] = []
    for row in fitted.whole[:count]:
        fates = token_fates(row, kept.get(row.index), eos=tokenizer.eos_token_id)
        counts = ", ".join(f"{fates.count(fate)} {fate}" for fate in _COLOURS)
        lines.append(f"row {row.index} · {len(row)} tokens: {counts}")
        for fate, run in groupby(zip(fates, row.input_ids.tolist(), strict=True), lambda t: t[0]):
            ids = [token for _, token in run]
            text = _visible(str(tokenizer.decode(ids)))
            lines += _segment(fate, text, ids, colour=colour)
        lines.append("")
    return lines


def token_fates(whole: TokenizedRow, kept: TokenizedRow | None, *, eos: int) -> list[str]:
    """One fate a token of ``whole``; ``kept`` is what is left of the row, None if it is dropped."""
    fates = ["cut"] * len(whole)
    if kept is None:
        return fates
    batch = flatten([kept])
    positions: torch.Tensor = batch["logits_to_keep"]  # type: ignore[assignment]
    labels: torch.Tensor = batch["labels"]  # type: ignore[assignment]
    fates[: len(kept)] = ["masked"] * len(kept)
    for position, label in zip(positions.tolist(), labels.tolist(), strict=True):
        if label == IGNORED:
            continue
        if label != whole.input_ids[position + 1]:
            raise AssertionError(f"row {whole.index}: label {label} at {position} is not its token")
        fates[position + 1] = "EOS" if label == eos else "trained"
    return fates


def _segment(fate: str, text: str, ids: Sequence[int], *, colour: bool) -> list[str]:
    numbers = textwrap.wrap(f"ids {' '.join(map(str, ids))}", _WIDTH)
    start, end = (f"\x1b[{_COLOURS[fate]}m", "\x1b[0m") if colour else ("", "")
    body = [f"{start}{line}{end}" for line in text.split("\n")] + numbers
    names = [f"  {fate:<9}", *[" " * 11] * (len(body) - 1)]
    return [name + line for name, line in zip(names, body, strict=True)]


def _visible(text: str) -> str:
    """Line breaks marked; anything that could steer a terminal written out."""
    marked = text.replace("\n", "↵\n").removesuffix("\n")
    return "".join(
        letter if letter == "\n" or letter.isprintable() else repr(letter)[1:-1]
        for letter in marked
    )
