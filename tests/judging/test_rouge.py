"""ROUGE is that of rouge_score to the last digit; the subsequence is that of brute force."""

import itertools
import json
import random
import time
from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.judging.rouge import Rouge, longest_common_subsequence, rouge

WORDS = ["the", "cat", "sat", "on", "a", "mat", "4", "The", "CAT", "it's", "naïve", "x_y", "İ", "K"]
SEPARATORS = [" ", "  ", "\n", ", ", ". ", "-", "\u00a0", "…"]


@pytest.fixture(scope="module")
def scorer():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        pytest.skip("rouge_score is not there: pip install 'rouge-score>=0.1.2'")
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


def theirs(scorer, prediction, reference):
    return Rouge(**{name: x.fmeasure for name, x in scorer.score(reference, prediction).items()})


@st.composite
def sentences(draw):
    """Few different words, so that texts share many, in all kinds of punctuation."""
    words = draw(st.lists(st.sampled_from(WORDS), max_size=30))
    return "".join(word + draw(st.sampled_from(SEPARATORS)) for word in words)


@given(prediction=st.text() | sentences(), reference=st.text() | sentences())
def test_any_two_texts(scorer, prediction, reference):
    assert rouge(prediction, reference) == theirs(scorer, prediction, reference)


@given(prediction=sentences(), reference=sentences())
def test_two_texts_of_the_same_words(scorer, prediction, reference):
    assert rouge(prediction, reference) == theirs(scorer, prediction, reference)


def test_real_answers(scorer, alpaca):
    answers = [row["output"] for row in json.loads(alpaca.read_text())][:400]
    changed = random.Random(0)
    for answer, following in itertools.pairwise(answers):
        words = answer.split()
        shuffled = " ".join(changed.sample(words, len(words)))
        for other in (following, shuffled, answer[: len(answer) // 2], answer + following, answer):
            assert rouge(other, answer) == theirs(scorer, other, answer)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat", "The cat ran!", Rouge(2 / 3, 1 / 2, 2 / 3)),
        ("a b c d", "d c b a", Rouge(1, 0, 1 / 4)),
        ("a a a", "a", Rouge(1 / 2, 0, 1 / 2)),
        ("a b", "a b c d", Rouge(2 / 3, 1 / 2, 2 / 3)),
        ("one", "one", Rouge(1, 0, 1)),
        ("", "", Rouge(0, 0, 0)),
        ("?!", "?!", Rouge(0, 0, 0)),
        ("Привет, мир", "Привет, мир", Rouge(0, 0, 0)),
        ("café", "caf", Rouge(1, 0, 1)),
    ],
)
def test_by_hand(prediction, reference, expected):
    found = rouge(prediction, reference)
    for name in ("rouge1", "rouge2", "rougeL"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-15)


def is_subsequence(short, long):
    rest = iter(long)
    return all(word in rest for word in short)


@given(
    left=st.lists(st.sampled_from("abc"), max_size=8),
    right=st.lists(st.sampled_from("abcd"), max_size=12),
)
def test_the_longest_of_all_subsequences(left, right):
    lengths = (
        size
        for size in range(len(left), -1, -1)
        if any(is_subsequence(chosen, right) for chosen in itertools.combinations(left, size))
    )
    assert longest_common_subsequence(left, right) == next(lengths)


def test_two_thousand_words():
    """Of an order of different words, a common subsequence with their sorted order only rises."""
    order = random.Random(1).sample(range(2000), 2000)
    tails = []  # the smallest end of a rising subsequence of each length
    for number in order:
        at = bisect_left(tails, number)
        tails[at : at + 1] = [number]
    started = time.perf_counter()
    found = longest_common_subsequence([str(x) for x in order], [str(x) for x in range(2000)])
    assert time.perf_counter() - started < 2
    assert found == len(tails)
