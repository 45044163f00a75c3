"""What the launcher asks for is trained, or refused in one line with the way out."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed import TCPStore

from recipe.exit_codes import run_command
from recipe.sealed import SEAL
from recipe.settings import UserError, load_settings
from recipe.training.engine import Engine, asked_engine, check_running, load_engine
from recipe.training.engine_limits import limits
from recipe.training.faults import how_to_continue
from recipe.training.machine import check_machine
from recipe.training.meeting import explained
from tests.conftest import REPOSITORY
from tests.refusal import problems

FSDP = {"ACCELERATE_USE_FSDP": "true"}
FSDP2 = {**FSDP, "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
OFFLOAD = "ACCELERATE_DEEPSPEED_OFFLOAD_%s_DEVICE"
CONFIG_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
OF_LAUNCHERS = ("ACCELERATE_", "FSDP_", "SLURM_", "OMPI_", "PMI_")
OF_TORCHRUN = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Sets what a launcher sets; nothing of the launcher that started the tests is left."""
    for name in list(os.environ):
        if name.startswith(OF_LAUNCHERS) or name in OF_TORCHRUN:
            monkeypatch.delenv(name)

    def launch(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "single"),
        ({"WORLD_SIZE": "1"}, "single"),
        ({"WORLD_SIZE": "2"}, "ddp"),
        ({"ACCELERATE_USE_FSDP": "false", "WORLD_SIZE": "2"}, "ddp"),
        (FSDP2, "fsdp2"),
        ({**FSDP2, "ACCELERATE_USE_FSDP": "1", "WORLD_SIZE": "4"}, "fsdp2"),
        (DEEPSPEED, "zero2"),
        ({**DEEPSPEED, STAGE: "2"}, "zero2"),
        ({**DEEPSPEED, STAGE: "3", OFFLOAD % "PARAM": "none", CONFIG_FILE: "none"}, "zero3"),
    ],
)
def test_the_engine_that_is_asked_for(launched, environment, name):
    launched(environment)
    assert asked_engine() == Engine(name)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (FSDP, "asks for FSDP 1, whose.*fsdp_version: 2"),
        ({**FSDP, "FSDP_VERSION": "1"}, "asks for FSDP 1"),
        ({**DEEPSPEED, STAGE: "0"}, "asks for zero_stage 0, which.*launch/zero2.yaml"),
        ({**DEEPSPEED, STAGE: "1"}, "asks for zero_stage 1"),
        ({**DEEPSPEED, OFFLOAD % "OPTIMIZER": "cpu"}, "asks for offload of optimizer"),
        ({**DEEPSPEED, STAGE: "3", OFFLOAD % "PARAM": "nvme"}, "asks for offload of param,"),
        ({**DEEPSPEED, CONFIG_FILE: "ds.json"}, r"deepspeed_config_file \(ds.json\).*zero_stage"),
    ],
)
def test_an_engine_that_is_not_trained_with(launched, environment, message):
    launched(environment)
    with pytest.raises(UserError, match=message) as raised:
        asked_engine()
    assert len(problems(raised.value)) == 1


def test_what_each_engine_cuts():
    names = ("single", "ddp", "zero2", "zero3", "fsdp2")
    assert [n for n in names if Engine(n).shards] == ["zero2", "zero3", "fsdp2"]
    assert [n for n in names if Engine(n).shards_weights] == ["zero3", "fsdp2"]
    assert [n for n in names if Engine(n).deepspeed] == ["zero2", "zero3"]


SHARDING = ("fsdp2", "zero2", "zero3")
CUTTING = ("fsdp2", "zero3")
NF4 = "model.quantization={load_in_4bit: true, bnb_4bit_compute_dtype: float32}"
# What is asked for, where the problem is, and the engines that refuse it.
REFUSED = {
    "nothing": ([], "", ()),
    "bf16": (["training.bf16=true"], "", ()),
    "sgd": (["training.optim=sgd"], "", ()),
    "fused": (["training.optim=adamw_torch_fused"], "", ()),
    "gaussian": (["lora.init_lora_weights=gaussian"], "", ()),
    "rslora": (["lora.use_rslora=true"], "", ()),
    "fp16": (["training.fp16=true"], "training.fp16", SHARDING),
    "adafactor": (["training.optim=adafactor"], "training.optim", SHARDING),
    "8-bit Adam": (["training.optim=adamw_8bit"], "training.optim", SHARDING),
    "QLoRA": ([NF4], "model.quantization", CUTTING),
    "DoRA": (["lora.use_dora=true"], "lora.use_dora", CUTTING),
    "PiSSA": (["lora.init_lora_weights=pissa"], "lora.init_lora_weights", SHARDING),
    "OLoRA": (["lora.init_lora_weights=olora"], "lora.init_lora_weights", SHARDING),
    "a whole module": (["lora.modules_to_save=[lm_head]"], "lora.modules_to_save", CUTTING),
    "tokens": (["lora.trainable_token_indices=[1]"], "lora.trainable_token_indices", CUTTING),
}


@pytest.mark.parametrize("name", ["single", "ddp", *SHARDING])
@pytest.mark.parametrize("asked", REFUSED)
def test_what_an_engine_refuses_and_lets_through(write_config, asked, name):
    overrides, where, engines = REFUSED[asked]
    settings = load_settings(str(write_config()), overrides)
    found = list(limits(settings, Engine(name), on_cpu=False))
    assert [problem.where for problem in found] == [where] * (name in engines)
    for problem in found:
        assert name in problem.message or asked == "nothing"
        assert problem.message.endswith(".")


@pytest.mark.parametrize("name", ["single", "ddp", *SHARDING])
@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "training.gradient_checkpointing"),
        ("ACCELERATE_DEEPSPEED_ZERO3_INIT", "zero3_init_flag"),
    ],
)
def test_what_of_a_launch_file_is_refused(write_config, launched, name, variable, message):
    settings = load_settings(str(write_config()), [])
    launched({variable: "True"})
    found = list(limits(settings, Engine(name), on_cpu=False))
    assert [message in problem.message for problem in found] == [True] * (name in SHARDING)
    launched({variable: "false"})
    assert list(limits(settings, Engine(name), on_cpu=False)) == []


def test_fsdp2_on_a_cpu_is_refused_in_one_line(write_config, launched, monkeypatch):
    launched({**FSDP2, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(UserError, match=r"would silently run DDP.*launch/zero3\.yaml") as raised:
        check_machine(load_settings(str(write_config()), []))
    assert len(problems(raised.value)) == 1
    launched({**DEEPSPEED, "ACCELERATE_USE_FSDP": "false", STAGE: "3"})
    check_machine(load_settings(str(write_config()), []))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, "4 tasks were started, and each would train alone"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "2 tasks were started"),
        ({"PMI_SIZE": "3"}, "3 tasks were started"),
        (
            {"SLURM_STEP_NUM_NODES": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"},
            "2 nodes were given, and each would train alone with its 4 processes",
        ),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, None),
        (
            {
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NUM_NODES": "2",
                "WORLD_SIZE": "8",
                "LOCAL_WORLD_SIZE": "4",
            },
            None,
        ),
    ],
)
def test_a_cluster_whose_processes_know_nothing_of_each_other(
    write_config, launched, monkeypatch, environment, message
):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    launched(environment)
    settings = load_settings(str(write_config()), [])
    if message is None:
        check_machine(settings)
        return
    with pytest.raises(UserError, match=message) as raised:
        check_machine(settings)
    assert len(problems(raised.value)) == 1


@pytest.mark.parametrize(
    ("gpus", "message"), [(1, "has 1 GPU. Add"), (3, "has 3 GPUs. Add"), (4, None)]
)
def test_a_gpu_for_each_process(write_config, launched, monkeypatch, gpus, message):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    launched({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})
    settings = load_settings(str(write_config()), ["training.use_cpu=false"])
    if message is None:
        check_machine(settings)
        return
    with pytest.raises(UserError, match=f"4 processes on this machine, which {message}"):
        check_machine(settings)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_that_is_not_installed(monkeypatch, name):
    monkeypatch.setattr("recipe.training.engine.find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf"asks for {name}, .*not installed\. Run make deepspeed"):
        load_engine(Engine(name))
    for other in ("single", "ddp", "fsdp2"):
        load_engine(Engine(other))


def state(kind, processes=2, *, stage=None, version=None):
    """What accelerate says of itself."""
    return SimpleNamespace(
        distributed_type=kind,
        num_processes=processes,
        deepspeed_plugin=SimpleNamespace(zero_stage=stage),
        fsdp_plugin=SimpleNamespace(fsdp_version=version),
    )


def trainer(accelerators_state, *, cut=False):
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        if cut:  # as ZeRO-3 leaves them behind
            parameter.ds_tensor = parameter.data.flatten()[:1]
            parameter.data = torch.empty(0)
    return SimpleNamespace(model=model, accelerator=SimpleNamespace(state=accelerators_state))


CPU, ZERO, SHARDED = DistributedType.MULTI_CPU, DistributedType.DEEPSPEED, DistributedType.FSDP
RUNNING = {
    "DDP": ("ddp", state(CPU), False, None),
    "DDP on GPUs": ("ddp", state(DistributedType.MULTI_GPU), False, None),
    "ZeRO-2": ("zero2", state(ZERO, stage=2), False, None),
    "ZeRO-3": ("zero3", state(ZERO, stage=3), True, None),
    "one process": ("ddp", state(DistributedType.NO, 1), False, "single in 1 of 2 processes"),
    "three processes": ("ddp", state(CPU, 3), False, "ddp in 3 of 2 processes"),
    "DDP for FSDP2": ("fsdp2", state(CPU), True, "ddp"),
    "FSDP 1": ("fsdp2", state(SHARDED, version=1), True, "fsdp1"),
    "ZeRO-2 for 3": ("zero3", state(ZERO, stage=2), True, "zero2"),
    "ZeRO-3 for DDP": ("ddp", state(ZERO, stage=3), True, "zero3"),
    "whole": ("zero3", state(ZERO, stage=3), False, "weights that every process holds whole"),
    "whole in FSDP2": ("fsdp2", state(SHARDED, version=2), False, "weights that every process"),
}


@pytest.mark.parametrize("case", RUNNING)
def test_what_started_is_what_was_asked_for(launched, case):
    asked, running, cut, message = RUNNING[case]
    launched({"WORLD_SIZE": "2"})
    if message is None:
        check_running(trainer(running, cut=cut), Engine(asked))
        return
    expected = f"asks for {asked} in 2 processes, and what started is {message}"
    with pytest.raises(UserError, match=expected) as raised:
        check_running(trainer(running, cut=cut), Engine(asked))
    assert len(problems(raised.value)) == 1


def test_one_weight_that_is_whole_is_enough(launched):
    launched({"WORLD_SIZE": "2"})
    started = trainer(state(ZERO, stage=3), cut=True)
    started.model.extra = nn.Parameter(torch.ones(1))
    with pytest.raises(UserError, match="holds whole"):
        check_running(started, Engine("zero3"))


ON_TWO_HOSTS = {
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29511",
}
ZERO3 = {**DEEPSPEED, STAGE: "3"}
LAUNCH = "accelerate launch --quiet --config_file launch/"
WHERE = " --num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.7 --main_process_port 29511"
STARTS = {
    "alone": ({}, "python"),
    "ddp": ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "torchrun --nproc_per_node 2"),
    "zero3": (
        {**ZERO3, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        f"{LAUNCH}zero3.yaml --num_processes 2",
    ),
    "ddp, two hosts": (ON_TWO_HOSTS, f"{LAUNCH}ddp_multi_node.yaml --num_processes 4{WHERE}"),
    "fsdp2, two hosts": (
        {**ON_TWO_HOSTS, **FSDP2},
        f"{LAUNCH}fsdp2_multi_node.yaml --num_processes 4{WHERE}",
    ),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_run_goes_on_as_it_was_started(launched, tmp_path, case):
    environment, start = STARTS[case]
    launched(environment)
    begin = f"{start} recipe/train.py --config {tmp_path}/settings.yaml"
    assert how_to_continue(tmp_path) == f"{begin} (no checkpoint had been saved)"
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / SEAL).touch()
    resume = f"training.resume_from_checkpoint={tmp_path}"
    assert how_to_continue(tmp_path) == f"{begin} {resume}"
    changed = how_to_continue(tmp_path, "training.optim=sgd")
    assert changed == f"{begin} training.optim=sgd {resume} --allow-changed"
    if "launch/" in start:
        assert (REPOSITORY / start.split()[4]).is_file()


def test_the_first_process_of_a_host_tells_a_mistake(launched, capsys):
    """Another one only what the first does not find."""
    store = TCPStore("127.0.0.1", 0, is_master=True)  # as torchrun's
    everyone = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }

    def said(rank, message):
        launched({**everyone, "RANK": rank, "LOCAL_RANK": rank})

        def mistaken():
            raise explained(UserError.single("data.path", message))

        assert run_command(mistaken) == 2
        return capsys.readouterr().err

    assert said("0", "is not there.") == "data.path: is not there.\n"
    assert said("1", "is not there.") == ""
    assert said("1", "is here alone.") == "data.path: is here alone.\n"
