"""How long plan.py says that a run takes, and how long it takes itself."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from recipe import planning
from recipe.memory.cards import CARDS
from recipe.memory.forecast import forecast
from recipe.settings import load_settings
from recipe.workload import Workload, workload

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def long_run(anywhere):
    """Of 10^13 tokens, so that hours are told."""
    asked = workload(load_settings(anywhere), device="cuda")
    return replace(asked, computed_tokens=10**13)


def hours_of(asked: Workload, *, processes: int = 1) -> dict[str, float]:
    lines, _ = planning.report(asked, room=None, name="", processes=processes, strategy="ddp")
    line = next(one for one in lines if one.startswith("fits      RTX"))
    return {
        name: float(hours.replace(",", ""))
        for name, hours in re.findall(r"([A-Z0-9][^,(]+) \(([\d,.]+) h\)", line)
    }


def test_hours_are_operations_by_the_makers_rate(long_run):
    hours = hours_of(long_run)
    assert len(hours) == len(CARDS)
    trace = forecast(long_run.plan).trace
    flops = trace.flops + trace.attention_flops
    own = sum(map(len, long_run.plan.rows))  # more than are computed
    for card in CARDS:
        least = flops / own * 10**13 / (0.45 * card.single) / 3600
        assert least <= hours[card.name] <= 1.5 * least
    assert hours["V100 16GB"] / hours["H100 80GB"] == pytest.approx(66.9 / 15.7, rel=0.01)


def test_mixed_precision_is_as_fast_as_a_card_is_in_16_bit(long_run):
    training = {**long_run.plan.settings.training, "bf16": True}
    settings = long_run.plan.settings.model_copy(update={"training": training})
    half = hours_of(replace(long_run, plan=replace(long_run.plan, settings=settings)))
    assert half["H100 80GB"] / half["A100 80GB"] == pytest.approx(312 / 989, rel=0.01)
    single = hours_of(long_run)  # attention that sees one row at a time counts a little less
    assert single["A100 80GB"] / half["A100 80GB"] == pytest.approx(312 / 19.5, rel=0.1)
    # Not made for it.
    assert set(single) - set(half) == {"T4 16GB", "V100 16GB", "V100 32GB"}


def test_several_cards_take_their_share_of_the_time(long_run):
    one, two = hours_of(long_run), hours_of(long_run, processes=2)
    for name, hours in one.items():
        assert two[name] == pytest.approx(hours / 2, rel=0.01)


# Not ru_maxrss, which Linux starts at what the parent, here pytest, was resident with.
MEASURED = """
import sys, time
began = time.process_time()
import recipe.planning
imported = time.process_time() - began
from recipe import plan
plan.main(sys.argv[1:])
spent = time.process_time() - began - imported
from recipe.memory.probe import peak_memory
print(spent, peak_memory("cpu")["resident"], file=sys.stderr)
"""


@pytest.mark.slow
def test_a_model_of_70_billion_is_planned_in_seconds_and_in_two_gigabytes():
    """The seconds are of the processor: what else the machine does is not in them."""
    overrides = ["model.name_or_path=meta-llama/Llama-3.1-70B", "model.dtype=bfloat16"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "--config", "lora_alpaca.yaml", *overrides],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    spent, peak = map(float, done.stderr.split()[-2:])
    assert spent < 10
    assert peak < 2e9
    assert re.search(r"131\.\d\d GiB  base weights, bfloat16", done.stdout)
