"""How sure a measured number is: intervals over rows, and a test of two models on the same rows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Column = NDArray[np.float64]

_LEVEL = 0.95
_TAILS = ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2)
_RESAMPLES = 2_000
_FLIPS = 10_000
_SEED = 0
_ENUMERATED = 14  # below so many rows every flip is tried
_BLOCK = 1 << 20  # numbers that are drawn at a time
# Sums of the same numbers in another order differ by their rounding; they are ties.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % interval; nan where there are too few rows to say."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Tuned minus base, and the ends of its 95 % interval, as in `Interval`.

    ``p`` is two-sided: how often chance alone would make a difference at least so large if the two
    models were alike. It is 1 for one row.
    """

    value: float
    low: float
    high: float
    p: float


def perplexity_interval(nll: ArrayLike, tokens: ArrayLike) -> Interval:
    """exp(sum of nll / sum of tokens), with a bootstrap over rows.

    The ends are percentiles of 2,000 resamples of whole rows (Efron and Tibshirani 1993, "An
    Introduction to the Bootstrap", chapter 13), the same at each call. One row has no ends, and
    neither have rows of which one is not finite.

    Args:
        nll: (rows,), the sum over the row's tokens, in nats.
        tokens: (rows,), how many they are. Rows without any are left out.

    Raises:
        ValueError: the lengths differ, or there are several dimensions.
    """
    total, count = _counted(tokens, nll)
    nats = _ratio(total, count)
    with np.errstate(over="ignore"):
        value, low, high = (float(np.exp(end)) for end in (nats.value, nats.low, nats.high))
    return Interval(value, low, high)


def mean_interval(values: ArrayLike) -> Interval:
    """The mean of (rows,) values, with the bootstrap of `perplexity_interval`."""
    (column,) = _columns(values)
    return _ratio(column, np.ones_like(column))


def share_interval(hits: int, n: int) -> Interval:
    """hits / n, with the interval of Wilson 1927 (JASA 22, 209-212), which stays within 0 and 1.

    Raises:
        ValueError: hits is not between 0 and n.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"expected between 0 and {n} hits, found {hits}")
    if n < 2:
        return Interval(hits / n if n else math.nan, math.nan, math.nan)
    z = NormalDist().inv_cdf(_TAILS[1])
    share = hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # None and all are ends of the interval themselves, but for rounding.
    return Interval(share, middle - half if hits else 0.0, middle + half if hits < n else 1.0)


def paired_nll(base_nll: ArrayLike, tuned_nll: ArrayLike, tokens: ArrayLike) -> Difference:
    """(sum of tuned - sum of base) / sum of tokens: nats a token, below zero where tuned is better.

    The interval is the bootstrap of `perplexity_interval`, over pairs. The test flips the sign of
    each row's difference (Fisher 1935, "The Design of Experiments"; Pitman 1937), for fewer than 14
    rows in all 2**rows ways, otherwise in 10,000 random ones, where p = (1 + hits) / (1 + flips).

    Args:
        base_nll, tuned_nll: (rows,), sums over each row's tokens, in nats.
        tokens: (rows,), how many they are. Rows without any are left out.

    Raises:
        ValueError: the lengths differ, or there are several dimensions.
    """
    base, tuned, count = _counted(tokens, base_nll, tuned_nll)
    return _difference(tuned - base, count)


def paired_mean(base: ArrayLike, tuned: ArrayLike) -> Difference:
    """Mean of tuned minus mean of base, of (rows,) values that count alike; see `paired_nll`."""
    before, after = _columns(base, tuned)
    return _difference(after - before, np.ones_like(before))


def _columns(*given: ArrayLike) -> tuple[_Column, ...]:
    columns = tuple(np.asarray(one, dtype=np.float64) for one in given)
    shapes = {column.shape for column in columns}
    if len(shapes) != 1 or columns[0].ndim != 1:
        raise ValueError(f"expected columns of one length, found shapes {sorted(shapes)}")
    return columns


def _counted(tokens: ArrayLike, *sums: ArrayLike) -> tuple[_Column, ...]:
    """The sums and then the tokens, of the rows that have tokens."""
    *columns, count = _columns(*sums, tokens)
    return tuple(column[count > 0] for column in (*columns, count))


def _ratio(numerator: _Column, denominator: _Column) -> Interval:
    rows = len(numerator)
    if not rows:
        return Interval(math.nan, math.nan, math.nan)
    value = float(numerator.sum() / denominator.sum())
    if rows == 1 or not np.isfinite(numerator).all():
        return Interval(value, math.nan, math.nan)
    random = np.random.default_rng(_SEED)
    ratios = []
    for count in _blocks(_RESAMPLES, rows):
        drawn = random.integers(0, rows, size=(count, rows))
        ratios.append(numerator[drawn].sum(axis=1) / denominator[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios), _TAILS)
    return Interval(value, float(low), float(high))


def _difference(change: _Column, weight: _Column) -> Difference:
    interval = _ratio(change, weight)
    return Difference(interval.value, interval.low, interval.high, _sign_flip_p(change))


def _sign_flip_p(change: _Column) -> float:
    """Two-sided, of the sum; what it is divided by is the same for every flip."""
    if not len(change) or not np.isfinite(change).all():
        return math.nan
    reached = abs(change.sum()) - _ROUNDING * np.abs(change).sum()
    flips = _every_flip(len(change)) if len(change) < _ENUMERATED else _random_flips(len(change))
    tried = hits = 0
    for flipped in flips:
        sums = np.where(flipped, -change, change).sum(axis=1)
        tried += len(sums)
        hits += int(np.count_nonzero(np.abs(sums) >= reached))
    return hits / tried if len(change) < _ENUMERATED else (1 + hits) / (1 + tried)


def _every_flip(rows: int) -> Iterator[NDArray[np.bool_]]:
    numbers = np.arange(1 << rows)
    yield (numbers[:, None] >> np.arange(rows)) & 1 == 1


def _random_flips(rows: int) -> Iterator[NDArray[np.bool_]]:
    random = np.random.default_rng(_SEED)
    for count in _blocks(_FLIPS, rows):
        yield random.random((count, rows)) < 0.5


def _blocks(total: int, rows: int) -> Iterator[int]:
    """Parts of total, so that a part times rows is about _BLOCK."""
    size = max(1, _BLOCK // rows)
    for start in range(0, total, size):
        yield min(size, total - start)
