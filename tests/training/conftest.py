"""A run whose Trainer a test can look at."""

import pytest

from recipe import finetune as finetune_module
from recipe.settings import load_settings
from tests.training.harm import TRAINING


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
