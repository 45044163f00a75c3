"""Whether an answer repeats an answer of the training rows."""

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEAR_COPY = 0.8
_GRAM = 5
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Copy:
    """The training answer that is most like an answer.

    Attributes:
        share: how many of the answer's distinct 5-grams of words are in that training answer, from
            0 to 1.
        index: which training answer, the first of several with that share; None where no training
            answer has any of the 5-grams.
        text: that training answer; empty without index.
    """

    share: float
    index: int | None
    text: str

    @property
    def near_copy(self) -> bool:
        """The share is at least `NEAR_COPY`."""
        return self.share >= NEAR_COPY


class TrainingAnswers:
    """An index of training answers by their 5-grams of words, to be asked about other answers.

    Words are runs of letters, digits and underscores of any script after lowering, which splits
    words at combining vowel signs, and in scripts without spaces takes a run between two marks of
    punctuation as one word. Of a 5-gram 64 bits are kept: that two of ten million are confused
    has a probability of about 3e-6. An entry takes 12 bytes: 52,000 answers of 100 words 60 MB.
    """

    def __init__(self, answers: Sequence[str]) -> None:
        hashes, sizes = array("q"), array("q")
        for text in answers:
            grams = _grams(_words(text))
            hashes.extend(grams)
            sizes.append(len(grams))
        found = np.array(hashes, dtype=np.int64)
        owners = np.repeat(np.arange(len(answers), dtype=np.int32), np.array(sizes, dtype=np.int64))
        order = np.argsort(found, kind="stable")
        self._hashes, self._owners = found[order], owners[order]
        self._answers = answers

    def overlap(self, answer: str) -> Copy | None:
        """The training answer with most of the answer's distinct 5-grams.

        None for an answer of fewer than five words, which is too short to tell.
        """
        grams = _grams(_words(answer))
        if not grams:
            return None
        wanted = np.fromiter(grams, dtype=np.int64, count=len(grams))
        starts = np.searchsorted(self._hashes, wanted, side="left")
        ends = np.searchsorted(self._hashes, wanted, side="right")
        owners = [
            self._owners[start:end] for start, end in zip(starts, ends, strict=True) if start < end
        ]
        if not owners:
            return Copy(share=0.0, index=None, text="")
        counts = np.bincount(np.concatenate(owners))
        index = int(counts.argmax())
        return Copy(int(counts[index]) / len(grams), index, self._answers[index])


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _grams(words: Sequence[str]) -> set[int]:
    """Hashes of the distinct 5-grams, none for fewer than five words."""
    return {hash(gram) for gram in zip(*(words[at:] for at in range(_GRAM)), strict=False)}
