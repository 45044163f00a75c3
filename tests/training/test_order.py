"""The micro-batches that are foreseen are those that a run takes, in its order."""

import pytest
from transformers import TrainerCallback

from recipe.finetune import finetune
from recipe.settings import Settings, load_settings
from recipe.training.arguments import training_arguments
from recipe.training.order import micro_batches, planned_micro_batches, steps_of
from recipe.training.pace import Pace
from recipe.training.trainer import TokenWeightedTrainer

Steps = list[list[list[int]]]


class TrainedError(Exception):
    pass


class NoFurther(TrainerCallback):
    """What is behind the last step takes as long as the steps, and is not looked at."""

    def on_train_end(self, *_, **__):
        raise TrainedError


@pytest.fixture
def taken(write_config, trainer, monkeypatch):
    """Of each step that a real run takes, the rows of its micro-batches, as places in its data.

    Unless it ``looks`` ahead, nobody does.
    """

    def run(*overrides: str, looks: bool = False) -> tuple[Steps, Settings]:
        steps: dict[int, list[list[int]]] = {}

        def step(self, model, inputs, *rest):
            places = {row.index: place for place, row in enumerate(self.train_dataset)}
            rows = [places[index] for index in inputs["row_indices"]]
            steps.setdefault(self.state.global_step, []).append(rows)
            return training_step(self, model, inputs, *rest)

        training_step = TokenWeightedTrainer.training_step
        with monkeypatch.context() as patch:
            patch.setattr(TokenWeightedTrainer, "training_step", step)
            if not looks:
                patch.setattr(Pace, "on_train_begin", lambda *_, **__: None)
            # 9 rows, of which none is at the place that its index says; where openings are
            # shared, the rows of a micro-batch are put into another order.
            config = write_config(
                data={"rows": "3:12", "share_openings": False},
                training={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            )
            settings = load_settings(str(config), list(overrides))
            with pytest.raises(TrainedError):
                finetune(settings, watchers=[NoFurther()])
        assert list(steps) == list(range(len(steps)))
        return list(steps.values()), settings

    return run


CASES = {
    # 5 micro-batches an epoch: the third step has one, of a single row.
    "a short last window": ([], [3, 3], 1),
    "max_steps in an epoch": (["training.max_steps=4"], [3, 1], 1),
    "drop_last": (["training.dataloader_drop_last=true"], [2, 2], 2),
    "half an epoch": (
        ["training.num_train_epochs=2.5", "training.gradient_accumulation_steps=3"],
        [2, 2, 1],
        2,
    ),
    "a seed of its own": (["training.data_seed=7", "training.num_train_epochs=3"], [3] * 3, 1),
    "in the order of the file": (["training.train_sampling_strategy=sequential"], [3, 3], 1),
    "a window larger than an epoch": (["training.gradient_accumulation_steps=8"], [1, 1], 5),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_takes_what_is_foreseen(taken, trainer, case):
    overrides, steps_an_epoch, last = CASES[case]
    real, settings = taken(*overrides)
    assert len(real) == sum(steps_an_epoch)
    assert len(real[steps_an_epoch[0] - 1]) == last
    made, accumulation = trainer(), settings.training["gradient_accumulation_steps"]
    loader = made.get_train_dataloader()
    assert list(steps_of(loader, steps=len(real), accumulation=accumulation)) == real
    assert made.state.max_steps == len(real)
    # And without model, optimizer or run.
    planned = planned_micro_batches(list(made.train_dataset), training_arguments(settings))
    assert list(planned) == [rows for step in real for rows in step]


def test_who_looks_ahead_changes_nothing(taken, tmp_path):
    overrides = ["training.num_train_epochs=3", "training.data_seed=3"]
    looked, _ = taken(*overrides, looks=True)
    real, _ = taken(*overrides, f"training.output_dir={tmp_path / 'other'}")
    assert looked == real
    assert len({str(epoch) for epoch in (real[:3], real[3:6], real[6:])}) == 3


class Loader:
    """Epochs whose order is their number, as accelerate's loaders have them."""

    def __init__(self, *epochs: list[list[int]]) -> None:
        self.epochs, self.batch_sampler = epochs, epochs[0]

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler = self.epochs[epoch % len(self.epochs)]


def test_each_epoch_begins_a_step_of_its_own():
    loader = Loader([[0], [1], [2]], [[2], [0], [1]])
    steps = list(steps_of(loader, steps=5, accumulation=2))
    assert steps == [[[0], [1]], [[2]], [[2], [0]], [[1]], [[0], [1]]]
    assert list(micro_batches(loader, steps=3, accumulation=2)) == [[0], [1], [2], [2], [0]]
    assert list(steps_of(loader, steps=0, accumulation=2)) == []


def test_a_loader_without_batches_ends():
    assert list(steps_of(Loader([]), steps=3, accumulation=1)) == []
