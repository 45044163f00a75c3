"""What an answer must contain, and how much of it an answer so far contains."""

from collections.abc import Sequence

Phrase = tuple[int, ...]


class Constraints:
    """Each constraint is met by any one of its phrases, anywhere in the answer.

    An answer's ``progress`` counts the tokens that it has of what it needs: the longest phrase of a
    constraint that is met, and of one that is not, the most that the answer's end has of a phrase.
    """

    def __init__(self, constraints: Sequence[Sequence[Phrase]]) -> None:
        self._constraints = [tuple(alternatives) for alternatives in constraints]

    @property
    def fewest_tokens(self) -> int:
        """An answer of at least so many tokens can contain everything, one after the other."""
        return sum(min(map(len, phrases)) for phrases in self._constraints)

    def progress(self, ids: Sequence[int]) -> int:
        """Between 0 and ``whole``."""
        return sum(
            max(map(len, phrases))
            if _met(phrases, ids)
            else max(_begun(phrase, ids) for phrase in phrases)
            for phrases in self._constraints
        )

    @property
    def whole(self) -> int:
        """The progress of an answer that contains everything."""
        return sum(max(map(len, phrases)) for phrases in self._constraints)

    def met(self, ids: Sequence[int]) -> bool:
        """Whether everything is there."""
        return all(_met(phrases, ids) for phrases in self._constraints)

    def next_tokens(self, ids: Sequence[int]) -> set[int]:
        """The tokens that begin, or go on with, a phrase of a constraint that is not yet met."""
        return {
            phrase[_begun(phrase, ids)]
            for phrases in self._constraints
            if not _met(phrases, ids)
            for phrase in phrases
        }


def _met(phrases: Sequence[Phrase], ids: Sequence[int]) -> bool:
    return any(
        tuple(ids[at : at + len(phrase)]) == phrase
        for phrase in phrases
        for at in range(len(ids) - len(phrase) + 1)
    )


def _begun(phrase: Phrase, ids: Sequence[int]) -> int:
    """How many tokens at the end of ``ids`` begin the phrase; less than the whole of it."""
    for length in range(min(len(phrase) - 1, len(ids)), 0, -1):
        if tuple(ids[-length:]) == phrase[:length]:
            return length
    return 0
