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


NF4 = "model.quantization={load_in_4bit: true, bnb_4bit_compute_dtype: %s}"
INT8 = "model.quantization={load_in_8bit: true}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([NF4 % "bfloat16", "training.use_cpu=false"], "4bit_compute_dtype: no accel.*=float32"),
        ([NF4 % "float16", "training.use_cpu=false"], "float16 on the CPU must be meant"),
        (["training.optim=paged_adamw_8bit"], "not page it. Use adamw_bnb_8bit"),
        (["training.optim=paged_lion_32bit"], "training.optim: paged_lion_32bit moves its state"),
        ([INT8, "lora.use_dora=true"], "lora.use_dora: on a base in 8 bit needs a GPU"),
    ],
)
def test_what_only_a_gpu_does_well(write_config, monkeypatch, overrides, message):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        check_machine(load_settings(str(write_config()), overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [NF4 % "float32", "training.use_cpu=false"],
        [NF4 % "bfloat16"],  # use_cpu is set: it is meant
        ["training.optim=adamw_bnb_8bit"],
        [INT8],
        ["model.quantization={load_in_4bit: true}", "lora.use_dora=true"],
    ],
)
def test_what_a_cpu_does_as_asked(write_config, monkeypatch, overrides):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    check_machine(load_settings(str(write_config()), overrides))


def test_an_old_gpu_is_not_asked_for_bfloat16(write_config, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: False)
    config = str(write_config())
    with pytest.raises(UserError, match=r"by emulation.*compute_dtype=float16"):
        check_machine(load_settings(config, [NF4 % "bfloat16", "training.use_cpu=false"]))
    check_machine(load_settings(config, [NF4 % "float16", "training.use_cpu=false"]))


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
