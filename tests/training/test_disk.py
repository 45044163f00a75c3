"""What a run will write is known before it begins."""

import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from recipe.finetune import finetune
from recipe.settings import UserError, load_settings
from recipe.training import disk
from recipe.training.arguments import training_arguments

_BY_LOSS = "training.metric_for_best_model=loss"


@pytest.fixture
def config(write_config):
    return write_config(
        data={"rows": "0:10", "held_out": "10:12"},
        training={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.save_strategy=steps", "training.save_steps=4"],
        ["training.save_strategy=epoch", "training.save_total_limit=1"],
        ["training.save_strategy=best", "training.eval_strategy=epoch", _BY_LOSS],
        *(
            pytest.param([f"training.{one}" for one in overrides], marks=pytest.mark.slow)
            for overrides in (
                ["save_strategy=no"],
                ["save_strategy=epoch"],
                ["save_strategy=steps", "save_steps=1"],
                ["save_strategy=steps", "save_steps=0.5"],
                ["save_strategy=steps", "save_steps=1", "max_steps=5"],
                ["save_strategy=epoch", "num_train_epochs=1.5"],
            )
        ),
    ],
)
def test_the_checkpoints_of_a_run_are_forecast(config, tmp_path, monkeypatch, overrides):
    from recipe.training import trainer

    most = [0]

    def count(**named):
        most[0] = max(most[0], len(list((tmp_path / "run").glob("checkpoint-*"))))
        rotate(**named)

    rotate = trainer.rotate_checkpoints
    monkeypatch.setattr(trainer, "rotate_checkpoints", count)
    settings = load_settings(str(config), overrides)
    folder = finetune(settings)
    arguments = training_arguments(settings)
    assert disk.kept_checkpoints(arguments, 10) == most[0]
    tensors = load_file(folder / "adapter/adapter_model.safetensors").values()
    parameters = sum(tensor.numel() for tensor in tensors)
    limit = disk.checkpoint_bytes(4 * parameters, parameters)
    for checkpoint in folder.glob("checkpoint-*"):
        assert sum(file.stat().st_size for file in checkpoint.iterdir()) < limit


def test_a_disk_that_is_too_small_is_told_before_the_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 20))
    every = ["training.save_strategy=steps", "training.save_steps=1"]
    with pytest.raises(UserError) as raised:
        finetune(load_settings(str(config), every))
    assert str(raised.value) == (
        f"training.output_dir: 3 MiB are free in {tmp_path}, and the run will write up to 7 MiB: 6 "
        "checkpoints of 1 MiB and the adapter. Free some, or keep fewer checkpoints with "
        "training.save_total_limit."
    )
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4 << 20))
    finetune(load_settings(str(config), [*every, "training.save_total_limit=1"]))
