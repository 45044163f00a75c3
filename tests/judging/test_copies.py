"""The training answer that is most repeated, against all pairs of sets."""

import json
import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.judging.copies import NEAR_COPY, Copy, TrainingAnswers


def words(text):
    return "".join(x if x.isalnum() or x == "_" else " " for x in text.lower()).split()


def grams(text):
    found = words(text)
    return {tuple(found[at : at + 5]) for at in range(len(found) - 4)}


def by_brute_force(training, answer):
    if len(words(answer)) < 5:
        return None
    wanted = grams(answer)
    shared = [len(wanted & grams(text)) for text in training]
    most = max(shared, default=0)
    if not most:
        return Copy(0.0, None, "")
    index = shared.index(most)
    return Copy(most / len(wanted), index, training[index])


SENTENCES = st.lists(st.sampled_from(["a", "B", "b", "ß", "日本", "7_"]), max_size=25).map(" ".join)


@given(training=st.lists(SENTENCES, max_size=6), answer=SENTENCES)
def test_few_different_words(training, answer):
    assert TrainingAnswers(training).overlap(answer) == by_brute_force(training, answer)


@given(
    training=st.lists(st.text(max_size=60), max_size=4),
    cut=st.integers(0, 40),
    more=st.text(max_size=20),
)
def test_any_text(training, cut, more):
    answer = "".join(training)[cut:] + more
    assert TrainingAnswers(training).overlap(answer) == by_brute_force(training, answer)


def test_real_answers(alpaca):
    answers = [row["output"] for row in json.loads(alpaca.read_text())]
    training = answers[:300]
    index = TrainingAnswers(training)
    change = random.Random(0)
    for answer in answers[250:350]:
        changed = [word for word in answer.split() if change.random() < 0.95]
        for asked in (answer, " ".join(changed), answer + " " + change.choice(training)):
            assert index.overlap(asked) == by_brute_force(training, asked)


def test_too_short_to_tell_is_not_no_copy():
    index = TrainingAnswers(["one two three four five", "yes"])
    assert index.overlap("One, two, three: four.") is None
    assert index.overlap("") is None
    assert index.overlap("yes") is None
    assert index.overlap("five four three two one") == Copy(0.0, None, "")
    assert index.overlap("ONE two, three four five!") == Copy(1.0, 0, "one two three four five")
    assert TrainingAnswers([]).overlap("one two three four five") == Copy(0.0, None, "")


@pytest.mark.parametrize(("kept", "share", "near"), [(8, 4 / 5, True), (7, 3 / 5, False)])
def test_a_near_copy_shares_four_fifths(kept, share, near):
    letters = "abcdefghi"
    found = TrainingAnswers([" ".join(letters[:kept])]).overlap(" ".join(letters))
    assert (found.share, found.near_copy) == (share, near)
    assert NEAR_COPY == 0.8


def test_a_repeated_phrase_counts_once():
    """Nearly all places are in the loop, but it has two 5-grams, and what follows has five."""
    training = ["go on go on go on go"]
    answer = "go " + "on go " * 50 + "and then we all stop"
    found = TrainingAnswers(training).overlap(answer)
    assert found == by_brute_force(training, answer)
    assert found.share == 2 / 7


def test_the_first_of_several_alike():
    text = "all of them say the same"
    assert TrainingAnswers(["x", text, text]).overlap(text).index == 1


def test_what_every_answer_has_is_counted_too():
    """Nothing is left out for being frequent: the last one alone has one 5-gram more."""
    common = "as a language model I cannot"
    training = [f"{common} {number}" for number in range(3000)] + [f"{common} say"]
    found = TrainingAnswers(training).overlap(f"{common} say")
    assert found == Copy(1.0, 3000, f"{common} say")
    assert TrainingAnswers(training).overlap(common).share == 1


def test_memory_of_many_answers():
    """52,000 answers of 100 words have 5 million 5-grams: 200 bytes each would be a gigabyte."""
    choose = random.Random(0)
    vocabulary = [f"word{number}" for number in range(5000)]
    training = [" ".join(choose.choices(vocabulary, k=100)) for _ in range(1000)]
    tracemalloc.start()
    try:
        index = TrainingAnswers(training)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / (96 * len(training)) < 100
    assert index.overlap(training[700]) == Copy(1.0, 700, training[700])
