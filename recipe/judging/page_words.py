"""Which words of two texts differ, in a time that hostile text cannot stretch."""

import re
from collections.abc import Sequence
from itertools import islice

Span = tuple[int, int]
LIMIT = 5000
"""Words of either text; beyond, nothing is compared."""

# Of ASCII, of Latin script (quotes, dashes, ellipsis), and full-width.
_PUNCTUATION = (
    r"!-/:-@\[-`{-~\xa1\xab\xbb\xbf\u2010-\u2027\u2030-\u205e"
    r"\u3001-\u3011\uff01-\uff0f\uff1a-\uff20"
)
# Thai, Lao, kana and Han are written without spaces: each letter counts as a word.
_UNSPACED = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_PUNCTUATION}{_UNSPACED}]|[^\s{_PUNCTUATION}{_UNSPACED}]+")


def differing(first: str, second: str) -> tuple[list[Span], list[Span]] | None:
    """The stretches of each text whose words are not in their longest common subsequence.

    Stretches are (start, end) in characters; words that only spaces part are one stretch.
    None where a text has more than ``LIMIT`` words.
    """
    places = [
        [match.span() for match in islice(_WORD.finditer(text), LIMIT + 1)]
        for text in (first, second)
    ]
    if max(map(len, places)) > LIMIT:
        return None
    one, other = (
        [text[start:end] for start, end in spans]
        for text, spans in zip((first, second), places, strict=True)
    )
    pairs = common(one, other)
    ours, theirs = {i for i, _ in pairs}, {j for _, j in pairs}
    return _stretches(first, places[0], ours), _stretches(second, places[1], theirs)


def common(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """A longest common subsequence, as pairs of positions in order.

    Bit-parallel, Hyyrö 2004, "Bit-parallel LCS-length computation revisited": each word of
    ``second`` costs a few operations on an integer of ``len(first)`` bits, whatever the texts.
    """
    where: dict[str, int] = {}
    for at, word in enumerate(first):
        where[word] = where.get(word, 0) | 1 << at
    full = (1 << len(first)) - 1
    # Bit i of column j is 0 where first[: i + 1] has one more in common with second[:j] than
    # first[:i] has.
    columns = [full]
    for word in second:
        column = columns[-1]
        matches = column & where.get(word, 0)
        columns.append((column + matches | column - matches) & full)
    pairs = []
    i, j = len(first), len(second)
    while i and j:
        if columns[j] >> i - 1 & 1:
            i -= 1
        elif columns[j - 1] >> i - 1 & 1:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        else:
            j -= 1
    return pairs[::-1]


def _stretches(text: str, places: Sequence[Span], kept: set[int]) -> list[Span]:
    found: list[Span] = []
    last = -1
    for at, (start, end) in enumerate(places):
        if at in kept:
            continue
        if found and last == at - 1 and "\n" not in text[found[-1][1] : start]:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
        last = at
    return found
