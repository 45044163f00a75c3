"""Each verdict from figures that leave no doubt, and its limits."""

import math
from dataclasses import replace

import pytest

from recipe.judging.statistics import Difference
from recipe.judging.verdict import Answers, Epoch, Evidence, turning, verdict


def about(value: float, spread: float = 0.05) -> Difference:
    return Difference(value, value - spread, value + spread, 0.01)


LEARNED = Evidence(
    base_nats=2.9,
    seen=about(-1.3),
    neutral=about(0.03),
    unseen=about(-1.0),
    rows={"seen": 100, "unseen": 100},
    own_prompt=about(0.8),
    answers=Answers(
        copied=(0.0, 0.1),
        told=40,
        copied_unseen=(0.0, 0.1),
        repetition=(0.1, 0.05),
        empty=(0.0, 0.0),
    ),
)


def changed(**named: object) -> str:
    return verdict(replace(LEARNED, **named)).label


def test_learned():
    found = verdict(LEARNED)
    assert found.label == "learned"
    assert found.notes == []
    assert any("held-out rows: -1.000 nats" in line for line in found.evidence)
    assert any("perplexity times 0.37" in line for line in found.evidence)


def test_memorised_by_what_it_repeats():
    answers = replace(LEARNED.answers, copied=(0.0, 0.8))
    assert changed(answers=answers) == "memorised"
    # What the base repeats too, such as "Yes", is no memory of the training.
    assert changed(answers=replace(answers, copied=(0.7, 0.8))) == "learned"
    # Nor is what is right for rows it never saw, such as one of two set phrases.
    assert changed(answers=replace(answers, copied_unseen=(0.0, 0.9))) == "learned"
    # One answer of five words is one 5-gram, and says nothing of the others.
    assert changed(answers=replace(answers, copied=(0.0, 1.0), told=4)) == "learned"


def test_memorised_by_where_the_gain_is():
    assert changed(seen=about(-2.5), unseen=about(-0.3)) == "memorised"
    worse = verdict(replace(LEARNED, seen=about(-2.5), unseen=about(0.4)))
    assert worse.label == "memorised"
    assert "gained 2.50 nats a token and held-out rows lost 0.40" in worse.summary
    assert changed(seen=about(-2.5), unseen=about(-1.5)) == "learned"
    # A base that knew the rows nearly by heart has little left to gain.
    knew = {"base_nats": 0.5, "seen": about(-0.48, 0.02), "unseen": about(-0.05, 0.02)}
    assert changed(**knew) == "memorised"
    # One row, or some of which the interval leaves all open, prove nothing.
    nowhere = Difference(-3.0, math.nan, math.nan, 1.0)
    assert changed(seen=nowhere, unseen=about(-0.9)) == "learned"
    assert changed(seen=about(-2.5, 2.4), unseen=about(-0.3)) == "learned"
    # A third of a gain that is small all the same.
    assert changed(seen=about(-0.4), unseen=about(-0.1, 0.02)) == "learned"


def test_memorised_says_after_which_epoch():
    epochs = [
        Epoch(0, 0, "base", 18.0, 18.0, 20.0),
        Epoch(1, 10, "checkpoint-10", 7.0, 7.5, 20.0),
        Epoch(2, 20, "checkpoint-20", 4.0, 7.0, 20.0),
        Epoch(3, 30, "checkpoint-30", 2.0, 9.0, 20.0, is_adapter=True),
    ]
    found = verdict(replace(LEARNED, epochs=epochs))
    assert turning(epochs) == 2
    assert found.label == "memorised"
    assert "After epoch 2" in found.summary
    assert "7.00 → 9.00" in found.summary
    assert "after epoch 2" in found.notes[0]
    # A run that keeps its best checkpoint is not what it was in the end.
    kept = [replace(one, is_adapter=one.epoch == 2) for one in epochs]
    assert verdict(replace(LEARNED, epochs=kept)).label == "learned"
    # An adapter from before the best epoch has lost nothing since.
    early = [replace(one, is_adapter=one.epoch == 1, unseen=13 - 2.5 * one.epoch) for one in epochs]
    early[3] = replace(early[3], unseen=8.5)
    assert turning(early) == 2
    assert verdict(replace(LEARNED, epochs=early)).label == "learned"
    # Two held-out rows may do so by chance.
    assert changed(epochs=epochs, rows={"seen": 100, "unseen": 2}) == "too few rows to tell"
    # A little worse again is told, and no more.
    little = [*epochs[:3], replace(epochs[3], unseen=7.3)]
    assert verdict(replace(LEARNED, epochs=little)).label == "learned"
    assert verdict(replace(LEARNED, epochs=little)).notes


def test_no_turning_without_a_rise_or_with_seen_rows_that_get_worse_too():
    def curve(*pairs: tuple[float, float]) -> list[Epoch]:
        return [Epoch(n, n, "", seen, unseen, 1.0) for n, (seen, unseen) in enumerate(pairs)]

    assert turning(curve((9, 9), (5, 6), (3, 5))) is None
    assert turning(curve((9, 9), (5, 6), (3, 6.01))) is None  # noise
    assert turning(curve((9, 9), (5, 6), (6, 8))) is None  # it diverges
    assert turning(curve((9, 9), (5, 10))) == 0
    assert turning([]) is None


def test_broken():
    assert changed(neutral=about(3.0)) == "broken"
    assert changed(unseen=about(math.nan)) == "broken"
    assert changed(seen=about(math.inf)) == "broken"
    assert changed(answers=replace(LEARNED.answers, repetition=(0.1, 0.9))) == "broken"
    assert changed(answers=replace(LEARNED.answers, repetition=(0.8, 0.9))) == "learned"
    assert changed(answers=replace(LEARNED.answers, empty=(0.0, 0.9))) == "broken"
    assert changed(seen=about(0.5), unseen=about(0.5)) == "broken"
    assert changed(neutral=about(800.0)) == "broken"


def test_a_base_that_is_broken_is_told_from_a_tuned_model_that_is():
    unknown = about(math.nan)
    found = verdict(replace(LEARNED, seen=unknown, unseen=unknown, neutral=unknown))
    assert "The tuned model" in found.summary
    assert any("perplexity times –" in line for line in found.evidence)
    base = replace(LEARNED, base_nats=math.inf, seen=unknown, unseen=unknown, neutral=unknown)
    assert "The base itself" in verdict(base).summary


def test_forgot_and_that_it_learned_all_the_same():
    found = verdict(replace(LEARNED, neutral=about(0.5)))
    assert found.label == "forgot"
    assert "It learned what the rows teach" in found.summary
    assert "1.65 times" in found.summary
    assert changed(neutral=about(0.5, spread=0.6)) == "learned"  # not certain
    assert changed(neutral=about(0.1)) == "learned"  # not much


def test_memorised_goes_before_forgot_and_tells_it():
    found = verdict(replace(LEARNED, seen=about(-2.5), unseen=about(-0.3), neutral=about(0.5)))
    assert found.label == "memorised"
    assert "Neutral text became less likely too: perplexity times 1.65." in found.notes


def test_no_effect():
    assert changed(seen=about(-0.01), unseen=about(0.0)) == "no effect"
    assert changed(seen=about(-0.02), unseen=about(-0.01, 0.005)) == "no effect"
    assert changed(seen=about(-0.1), unseen=about(-0.03)) == "no effect"  # with 0 in its interval


def test_a_little_worse_is_neither_broken_nor_memorised():
    assert changed(seen=about(0.03, 0.01), unseen=about(0.03, 0.005)) == "no effect"
    assert changed(seen=about(-0.01, 0.005), unseen=about(0.03, 0.005)) == "no effect"
    assert changed(seen=about(-0.3), unseen=about(0.15)) == "memorised"


def test_no_effect_when_any_prompt_would_do():
    found = verdict(replace(LEARNED, own_prompt=about(0.005)))
    assert found.label == "no effect"
    assert "how answers look" in found.summary
    assert changed(own_prompt=None) == "learned"


def test_too_few_rows():
    assert changed(unseen=None, rows={"seen": 8}) == "too few rows to tell"
    assert changed(rows={"seen": 100, "unseen": 9}) == "too few rows to tell"
    assert changed(seen=about(-0.2), unseen=about(-0.1, 0.3)) == "too few rows to tell"
    assert changed(seen=about(-0.1), unseen=about(0.28, 0.33)) == "too few rows to tell"
    assert changed(seen=about(0.0), unseen=None, rows={"seen": 8}) == "no effect"
    # Few held-out rows do not hide what needs none of them.
    copies = replace(LEARNED.answers, copied=(0.0, 1.0), told=8)
    assert changed(unseen=None, rows={"seen": 8}, answers=copies) == "memorised"


UNKNOWN = (math.nan, math.nan)


@pytest.mark.parametrize("answers", [None, Answers(UNKNOWN, 0, UNKNOWN, UNKNOWN, (0.0, 0.0))])
def test_without_answers_the_likelihoods_decide(answers):
    assert changed(answers=answers) == "learned"
