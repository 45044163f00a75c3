"""What the launcher did is compared with what was asked."""

import pytest

from recipe.settings import UserError, load_settings
from recipe.training.arguments import accumulation, training_arguments
from recipe.training.machine import check_machine


@pytest.mark.parametrize(
    ("environment", "overrides", "message"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, [], "only this one was started"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, [], "config asks for no"),
        ({"ACCELERATE_USE_FSDP": "true"}, [], "asks for FSDP"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, [], r"asks for dynamo \(inductor\)"),
        ({"WORLD_SIZE": "2"}, ["training.use_cpu=false"], "would each train alone"),
        ({"WORLD_SIZE": "abc"}, [], "WORLD_SIZE: 'abc' in the environment is no number of proc"),
        ({"WORLD_SIZE": "0"}, [], "WORLD_SIZE: '0' in the environment"),
    ],
)
def test_a_launch_that_is_not_what_was_asked(
    write_config, monkeypatch, environment, overrides, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        check_machine(load_settings(str(write_config()), overrides))


def test_one_process_does_not_spread_over_gpus(write_config, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=0"):
        check_machine(load_settings(str(write_config()), ["training.use_cpu=false"]))


def test_accumulation_is_divided_over_processes(write_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert accumulation({"gradient_accumulation_steps": 6}) == 2
    config = str(write_config(training={"gradient_accumulation_steps": 6}))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="cannot be divided over 4 processes"):
        training_arguments(load_settings(config))
