"""What takes less is told where the memory of a run did not suffice."""

import re
import shlex
from types import SimpleNamespace

import pytest
import torch

from recipe.memory.forecast import Plan, forecast
from recipe.run_memory import what_takes_less
from recipe.settings import load_settings
from tests.memory.test_trace import rows, shape

TRAINED, HELD_OUT = rows(300, 40, 280, 60), rows(200, 390, 380, 60)
# So large that hundredths of a GiB tell one saving from another.
LARGE = shape(3, hidden_size=1024, intermediate_size=4096, num_attention_heads=8)


@pytest.fixture
def told(write_config):
    """Of a run with these rows and settings."""
    config = str(write_config())

    def made(places: list[int], *overrides: str, of=None, evaluating=False, step=0):
        settings = load_settings(config, list(overrides))
        run = SimpleNamespace(
            settings=settings,
            model=SimpleNamespace(config=of or shape(1)),
            arguments=SimpleNamespace(device=torch.device("cpu")),
            data=SimpleNamespace(
                train=SimpleNamespace(rows=TRAINED), held_out=SimpleNamespace(rows=HELD_OUT)
            ),
        )
        return settings, what_takes_less(run)(places, evaluating, step)

    return made


def test_each_way_is_told_with_what_it_saves(told, write_config):
    batch = "training.per_device_train_batch_size=2"
    settings, said = told([0, 2], batch, of=LARGE)
    start, _, listed = said.partition(": ")
    assert start == "What takes less, first what trains the same"
    ways = re.findall(
        r"(.+?) \((\d+\.\d\d) GiB less by forecast, (\d\.\d\d) of the time(, trains otherwise)?\)"
        r"(?:; |$)",
        listed,
    )
    assert 1 < len(ways) <= 4
    assert [bool(otherwise) for *_, otherwise in ways] == sorted(bool(one[3]) for one in ways)

    def allocated(of) -> int:
        micro_batch = [TRAINED[0], TRAINED[2]][: int(of.training["per_device_train_batch_size"])]
        return forecast(Plan(of, LARGE, micro_batch, (), "cpu", share_openings=True)).allocated

    assert all(float(less) > 0.01 for _, less, *_ in ways)
    for overrides, less, *_ in ways:
        if "data." not in overrides:  # other rows
            given = {one.partition("=")[0]: one for one in (batch, *shlex.split(overrides))}
            after = load_settings(str(write_config()), list(given.values()))
            assert (allocated(settings) - allocated(after)) / 2**30 == pytest.approx(
                float(less), abs=0.006
            )


def test_an_evaluation_is_given_fewer_rows(told):
    _, said = told([0, 1, 2, 3], "training.per_device_eval_batch_size=4", evaluating=True)
    assert "training.per_device_eval_batch_size=2 (" in said
    assert "train_batch" not in said
    assert "gradient_checkpointing" not in said  # an evaluation keeps no activations


def test_a_run_that_has_begun_keeps_its_base_and_its_optimizer(told):
    """What its checkpoints hold would fit no other."""
    large = ["lora.r=4096", "training.gradient_checkpointing=true"]
    assert "training.optim=adamw_bnb_8bit (" in told([1, 3], *large)[1]
    assert "training.optim=" not in told([1, 3], *large, step=5)[1]


def test_where_nothing_takes_less_that_is_told(told):
    single = ["training.gradient_checkpointing=true", "training.per_device_train_batch_size=1"]
    _, said = told([1], *single)
    assert said.startswith("Use a smaller model")
