"""One process of many, against what the papers and the libraries say is divided."""

import dataclasses
from fractions import Fraction
from math import ceil
from types import SimpleNamespace

import pytest

from recipe.memory.forecast import ADAPTER, ALLOCATOR, OPTIMIZER, PROCESS, Forecast
from recipe.memory.live_bytes import GRADIENTS, SAVED, TEMPORARY
from recipe.memory.sharding import STRATEGIES, sharded

# No two alike, and no number of processes divides them.
SIZES = {
    "base weights, uint8": 1_000_003,
    "base weights, bfloat16": 500_009,
    ADAPTER: 40_009,
    OPTIMIZER: 80_021,
    TEMPORARY: 3_001,
    GRADIENTS: 40_013,
    SAVED: 700_001,
    PROCESS: 9_001,
    ALLOCATOR: 35_027,
}
LAYER = 110_017
# The share of each process, of what is not held whole by all.
DIVIDED = {
    "ddp": (),
    "zero2": (OPTIMIZER, GRADIENTS),
    "zero3": ("base weights, uint8", "base weights, bfloat16", ADAPTER, OPTIMIZER, GRADIENTS),
}
DIVIDED["fsdp2"] = DIVIDED["zero3"]


def foreseen(**other: int) -> Forecast:
    trace = SimpleNamespace(layer_weights=LAYER)
    items = {name: n for name, n in (SIZES | other).items() if n}
    return Forecast(items, "backward", SIZES[SAVED], SIZES[GRADIENTS], trace)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_process_holds_all_and_nothing_else(strategy):
    found = sharded(foreseen(), processes=1, strategy=strategy)
    assert dict(found.items) == SIZES
    assert found.peak == foreseen().peak


@pytest.mark.parametrize("processes", [2, 8])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_process_holds_its_share(strategy, processes):
    """Rajbhandari et al. 2019, figure 1: which states each stage divides."""
    found = sharded(foreseen(), processes=processes, strategy=strategy)
    expected = {
        name: ceil(Fraction(n, processes)) if name in DIVIDED[strategy] else n
        for name, n in SIZES.items()
    }
    whole = strategy == "ddp"
    expected["communication buckets"] = ceil(Fraction(SIZES[GRADIENTS], 1 if whole else processes))
    if strategy in ("zero3", "fsdp2"):
        expected["gathered layers"] = 2 * LAYER
    assert dict(found.items) == expected
    assert found.peak == sum(expected.values())
    assert (found.processes, found.strategy) == (processes, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bucket_is_there_where_the_peak_has_no_gradients(strategy):
    found = sharded(foreseen(**{GRADIENTS: 0}), processes=2, strategy=strategy)
    assert GRADIENTS not in found.items
    assert found.items["communication buckets"] >= SIZES[GRADIENTS] // 2


def test_shares_add_up_to_the_whole():
    """With what all of them hold for themselves aside, 8 shares are the forecast, rounded up."""
    for strategy in STRATEGIES[1:]:
        found = sharded(foreseen(), processes=8, strategy=strategy)
        for name in DIVIDED[strategy]:
            assert SIZES[name] <= 8 * found.items[name] < SIZES[name] + 8


def test_the_forecast_stays_as_it_is():
    found = foreseen()
    before = dataclasses.replace(found, items=dict(found.items))
    sharded(found, processes=8, strategy="fsdp2")
    assert found == before
