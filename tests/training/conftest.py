"""A run whose Trainer a test can look at."""

import signal

import pytest

from recipe import finetune as finetune_module
from recipe.settings import load_settings
from tests.training.harm import TRAINING


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """One of several processes that ends hears no SIGTERM any more; this one shall."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def trainer(monkeypatch):
    """What the run's Trainer is, once it was built; the model knows its rows."""
    kept = {}
    build = finetune_module.build_trainer

    def build_and_keep(model, arguments, train, *rest, **named):
        model.rows = train
        kept["trainer"] = build(model, arguments, train, *rest, **named)
        return kept["trainer"]

    monkeypatch.setattr(finetune_module, "build_trainer", build_and_keep)
    return lambda: kept["trainer"]


@pytest.fixture
def run(write_config, trainer):
    def run(*watchers, overrides=(), **sections):
        training = {**TRAINING, **sections.pop("training", {})}
        config = write_config(training=training, **sections)
        return finetune_module.finetune(load_settings(str(config), overrides), watchers=watchers)

    return run
