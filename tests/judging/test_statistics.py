"""Intervals and tests against enumeration, closed forms, and simulations whose truth is known."""

import itertools
import math
from fractions import Fraction

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.judging import statistics
from recipe.judging.statistics import (
    Difference,
    Interval,
    mean_interval,
    paired_mean,
    paired_nll,
    perplexity_interval,
    share_interval,
)

NLL = [3.1, 12.0, 7.5, 40.2, 9.9, 1.4]
TUNED = [2.0, 12.5, 5.0, 30.0, 8.0, 1.5]
TOKENS = [2, 8, 3, 20, 4, 1]


def is_percentile(value, distribution, share):
    """Up to what 2,000 draws can say: four standard deviations of a count."""
    spread = 4 * math.sqrt(share * (1 - share) / 2000)
    distribution = numpy.asarray(distribution)
    below = (distribution < value * (1 - 1e-9)).mean()
    upto = (distribution <= value * (1 + 1e-9)).mean()
    return below - spread <= share <= upto + spread


def every_resample(rows):
    return itertools.product(range(rows), repeat=rows)


def test_perplexity_by_hand():
    assert perplexity_interval(NLL, TOKENS).value == pytest.approx(math.exp(sum(NLL) / sum(TOKENS)))


def test_ends_of_perplexity_among_all_resamples():
    found = perplexity_interval(NLL, TOKENS)
    every = [
        math.exp(sum(NLL[i] for i in drawn) / sum(TOKENS[i] for i in drawn))
        for drawn in every_resample(6)
    ]
    assert is_percentile(found.low, every, 0.025)
    assert is_percentile(found.high, every, 0.975)


def test_ends_of_a_mean_among_all_resamples():
    found = mean_interval(NLL)
    every = [sum(NLL[i] for i in drawn) / 6 for drawn in every_resample(6)]
    assert found.value == pytest.approx(sum(NLL) / 6)
    assert is_percentile(found.low, every, 0.025)
    assert is_percentile(found.high, every, 0.975)


def test_ends_of_a_difference_among_all_resamples():
    found = paired_nll(NLL, TUNED, TOKENS)
    change = [b - a for a, b in zip(NLL, TUNED, strict=True)]
    every = [
        sum(change[i] for i in drawn) / sum(TOKENS[i] for i in drawn) for drawn in every_resample(6)
    ]
    assert found.value == pytest.approx(sum(change) / sum(TOKENS))
    assert is_percentile(-found.high, numpy.negative(every), 0.025)
    assert is_percentile(-found.low, numpy.negative(every), 0.975)


def test_many_rows_are_normal():
    values = numpy.random.default_rng(5).normal(10, 3, size=3000)
    found = mean_interval(values)
    half = 1.959964 * values.std() / math.sqrt(3000)
    assert found.low == pytest.approx(values.mean() - half, abs=half / 8)
    assert found.high == pytest.approx(values.mean() + half, abs=half / 8)


# Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3.
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_shares(hits, n, low, high):
    found = share_interval(hits, n)
    assert found.value == hits / n
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(n=st.integers(2, 5000), data=st.data())
def test_ends_of_a_share_are_where_the_score_test_rejects(n, data):
    hits = data.draw(st.integers(0, n))
    found = share_interval(hits, n)
    for end in (found.low, found.high):
        distance = abs(found.value - end)
        expected = 1.9599639845 * math.sqrt(end * (1 - end) / n)
        assert distance == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1
    opposite = share_interval(n - hits, n)
    assert opposite.low == pytest.approx(1 - found.high, abs=1e-12)


@pytest.mark.parametrize(("hits", "n"), [(-1, 3), (4, 3), (1, 0)])
def test_hits_that_cannot_be(hits, n):
    with pytest.raises(ValueError, match="found"):
        share_interval(hits, n)


def covers(interval, truth):
    return interval.low <= truth <= interval.high


def draw_rows(random, n=40):
    """Rows of unequal length whose losses differ: (nll, tokens), with 2 nats a token in truth."""
    tokens = random.integers(5, 60, size=n)
    return tokens * random.gamma(4, 0.5, size=n), tokens


def test_coverage():
    """Of 200 samples of a known truth 95 in 100 intervals hold it; 90 to 99 allows for chance."""
    random = numpy.random.default_rng(11)
    held = {"mean": 0, "perplexity": 0, "share": 0, "paired": 0}
    for _ in range(200):
        nll, tokens = draw_rows(random)
        held["perplexity"] += covers(perplexity_interval(nll, tokens), math.exp(2))
        held["mean"] += covers(mean_interval(random.normal(3, 2, size=40)), 3)
        held["share"] += covers(share_interval(int(random.binomial(60, 0.2)), 60), 0.2)
        tuned = nll - 0.1 * tokens + random.normal(0, 2, size=40)
        held["paired"] += covers(paired_nll(nll, tuned, tokens), -0.1)
    assert all(180 <= count <= 198 for count in held.values()), held


def exact_p(change):
    change = [Fraction(x) for x in change]
    sums = [
        abs(sum(sign * x for sign, x in zip(signs, change, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(change))
    ]
    return sum(x >= abs(sum(change)) for x in sums) / len(sums)


@given(change=st.lists(st.integers(-4, 4), min_size=1, max_size=8))
def test_p_of_few_rows_is_that_of_every_flip(change):
    """Small integers have many ties, which count; halves and tenths round."""
    zeros = [0] * len(change)
    assert paired_mean(zeros, change).p == exact_p(change)
    assert paired_mean(zeros, [x / 10 for x in change]).p == exact_p(change)


@pytest.mark.parametrize("shift", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("rows", [13, 14, 15])
def test_p_at_the_border_of_enumeration(rows, shift):
    change = numpy.random.default_rng(rows).normal(shift, 1, size=rows)
    signs = 1 - 2 * ((numpy.arange(2**rows)[:, None] >> numpy.arange(rows)) & 1)
    reached = abs(change.sum()) - 1e-9
    truth = float((abs(signs @ change) >= reached).mean())
    found = paired_mean(numpy.zeros(rows), change).p
    spread = 4 * math.sqrt(truth * (1 - truth) / 10_000) + 1e-4
    assert found == pytest.approx(truth, abs=1e-12 if rows == 13 else spread)


def test_p_of_many_rows_counts_the_sample_itself():
    assert paired_mean([0.0] * 200, [1.0] * 200).p == 1 / 10_001
    assert paired_mean([0.0] * 200, [0.0] * 200).p == 1


def test_alike_models_are_rarely_told_apart():
    """Under the null p is uniform: below 0.05 in at most 5 in 100, here of 400."""
    random = numpy.random.default_rng(2)
    found = [paired_mean(*random.normal(size=(2, 10))).p for _ in range(400)]
    assert 6 <= sum(p <= 0.05 for p in found) <= 36
    assert sum(p <= 0.5 for p in found) / 400 == pytest.approx(0.5, abs=0.1)


def test_p_is_that_of_whole_rows_weighted_by_their_tokens():
    """A long row counts for more: the sums are flipped, not the means of rows."""
    found = paired_nll([10.0, 3.0, 3.0, 3.0], [40.0, 1.0, 1.0, 1.0], [30, 1, 1, 1])
    assert found.p == exact_p([30, -2, -2, -2]) == 1
    assert exact_p([1, -2, -2, -2]) == 1 / 4
    assert found.value == 24 / 33


@pytest.mark.parametrize("rows", [5, 13, 14, 60])
def test_swapping_the_models_negates(rows):
    random = numpy.random.default_rng(rows)
    nll, tokens = draw_rows(random, rows)
    tuned = nll - random.normal(1, 4, size=rows)
    there, back = paired_nll(nll, tuned, tokens), paired_nll(tuned, nll, tokens)
    assert (back.value, back.low, back.high) == pytest.approx(
        (-there.value, -there.high, -there.low), rel=1e-12
    )
    assert back.p == there.p
    ten = paired_nll(10 * nll, 10 * tuned, tokens)
    assert (ten.value, ten.low, ten.high) == pytest.approx(
        (10 * there.value, 10 * there.low, 10 * there.high), rel=1e-12
    )
    assert ten.p == there.p
    assert paired_nll(nll, tuned, [1] * rows) == paired_mean(nll, tuned)


def test_perplexity_of_scaled_nats_is_a_power():
    once, twice = (
        perplexity_interval(NLL, TOKENS),
        perplexity_interval(2 * numpy.array(NLL), TOKENS),
    )
    assert (twice.value, twice.low, twice.high) == pytest.approx(
        (once.value**2, once.low**2, once.high**2)
    )


def test_the_same_at_each_call_and_nothing_else_is_drawn(monkeypatch):
    random = numpy.random.default_rng(8)
    nll, tokens = draw_rows(random, 30)
    numpy.random.seed(4)
    state = numpy.random.get_state()[1].tolist()
    first = perplexity_interval(nll, tokens), paired_nll(nll, nll[::-1], tokens)
    assert (perplexity_interval(nll, tokens), paired_nll(nll, nll[::-1], tokens)) == first
    assert numpy.random.get_state()[1].tolist() == state
    # How much is drawn at a time is a matter of memory, not of the result.
    monkeypatch.setattr(statistics, "_BLOCK", 100)
    assert (perplexity_interval(nll, tokens), paired_nll(nll, nll[::-1], tokens)) == first


def test_too_few_rows():
    nan = pytest.approx(math.nan, nan_ok=True)
    none = Interval(nan, nan, nan)
    assert perplexity_interval([], []) == none
    assert mean_interval([]) == none
    assert share_interval(0, 0) == none
    assert paired_nll([], [], []) == paired_mean([], []) == Difference(nan, nan, nan, nan)
    assert perplexity_interval([math.log(9)], [1]) == Interval(pytest.approx(9), nan, nan)
    assert mean_interval([0.25]) == Interval(0.25, nan, nan)
    assert share_interval(1, 1) == Interval(1.0, nan, nan)
    assert paired_nll([4.0], [2.0], [8]) == Difference(-0.25, nan, nan, 1.0)
    assert paired_mean([1.0], [3.0]) == Difference(2.0, nan, nan, 1.0)


def test_rows_without_tokens_say_nothing():
    assert perplexity_interval([*NLL, 0], [*TOKENS, 0]) == perplexity_interval(NLL, TOKENS)
    with_empty = paired_nll([0, *NLL], [0, *TUNED], [0, *TOKENS])
    assert with_empty == paired_nll(NLL, TUNED, TOKENS)


def test_what_is_not_finite_is_not_hidden():
    broken = perplexity_interval([1.0, math.nan, 2.0], [1, 1, 1])
    assert all(math.isnan(x) for x in (broken.value, broken.low, broken.high))
    assert perplexity_interval([1.0, math.inf], [1, 1]).value == math.inf
    assert perplexity_interval([8000.0, 8000.0], [1, 1]) == Interval(math.inf, math.inf, math.inf)
    assert math.isnan(paired_mean([1.0, 2.0], [1.0, math.nan]).p)


def test_columns_of_different_lengths_are_refused():
    for call in (
        lambda: perplexity_interval([1.0, 2.0], [1]),
        lambda: paired_nll([1.0, 2.0], [1.0], [1, 1]),
        lambda: paired_mean([1.0], [1.0, 2.0]),
        lambda: mean_interval([[1.0, 2.0]]),
    ):
        with pytest.raises(ValueError, match="shapes"):
            call()


def test_results_are_plain_floats():
    for found in (
        perplexity_interval(NLL, TOKENS),
        mean_interval(NLL),
        share_interval(1, 3),
        paired_nll(NLL, TUNED, TOKENS),
        paired_mean(NLL, TUNED),
    ):
        assert {type(value) for value in vars(found).values()} == {float}
