"""ROUGE: how many words and word orders an answer shares with a reference."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Rouge:
    """F-measures from 0 to 1: of words, of pairs of words, of the longest common subsequence."""

    rouge1: float
    rouge2: float
    rougeL: float


def rouge(prediction: str, reference: str) -> Rouge:
    """ROUGE-1, ROUGE-2 and ROUGE-L of Lin 2004, "ROUGE: A Package for Automatic Evaluation".

    The numbers are those of the package rouge_score without its stemmer, to the last digit. Words
    are runs of a-z and 0-9 after lowering, so texts in other scripts have none, and accented
    letters split a word. A text without words has 0 with every other, itself included.
    """
    predicted, expected = (_WORD.findall(text.lower()) for text in (prediction, reference))
    return Rouge(
        rouge1=_shared_grams(predicted, expected, 1),
        rouge2=_shared_grams(predicted, expected, 2),
        rougeL=_f_measure(
            longest_common_subsequence(predicted, expected), len(predicted), len(expected)
        ),
    )


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Its length in words, found bit-parallel: one addition of len(left) bits a word of right.

    Hyyrö 2004, "Bit-parallel LCS-length computation revisited". In the column of the usual table
    that belongs to a word of right, a bit is 0 where the length grows by one.
    """
    places: dict[str, int] = defaultdict(int)
    for at, word in enumerate(left):
        places[word] |= 1 << at
    every = (1 << len(left)) - 1
    column = every
    for word in right:
        matched = column & places.get(word, 0)
        column = ((column + matched) | (column - matched)) & every
    return len(left) - column.bit_count()


def _shared_grams(predicted: Sequence[str], expected: Sequence[str], n: int) -> float:
    ours, theirs = _grams(predicted, n), _grams(expected, n)
    return _f_measure((ours & theirs).total(), ours.total(), theirs.total())


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def _f_measure(shared: int, predicted: int, expected: int) -> float:
    if not shared:
        return 0.0
    # 2 * shared / (predicted + expected) is the same number, but not to the last digit.
    precision, recall = shared / predicted, shared / expected
    return 2 * precision * recall / (precision + recall)
