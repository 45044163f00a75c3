"""What is in launch/: where to train, and nothing of what is trained."""

import re
import shlex

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from recipe.settings import load_settings
from recipe.training.arguments import accumulation
from recipe.training.engine import Engine
from recipe.training.engine_limits import limits
from tests.launch.fake_slurm import REPOSITORY

LAUNCH = REPOSITORY / "launch"
FILES = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".yaml", ".sh"))
ACCELERATE = [path for path in FILES if path.suffix == ".yaml" and path.name != "trainjob.yaml"]
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
MACHINES = {"num_machines", "num_processes", "main_process_ip", "main_process_port"}
OF_THE_CONFIG = re.compile(
    r"batch_?size|accumulat|precision|fp8|fp16|bf16|float16|float32|half|dtype|downcast|autocast"
    r"|\blearning|clipping|epoch",
    re.IGNORECASE,
)
ALLOWED = "Precision and batch size belong to the config, not here."


def named(path):
    return path.name


def test_the_files_are_there():
    expected = {f"{name}{kind}.yaml" for name in STRATEGIES for kind in ("", "_multi_node")}
    expected |= {"cpu.yaml", "single_gpu.yaml"}
    assert {path.name for path in ACCELERATE} == expected
    assert {path.name for path in FILES} == expected | {"slurm.sh", "trainjob.yaml"}


@pytest.mark.parametrize("file", ACCELERATE, ids=named)
def test_accelerate_loads_it(file):
    """An unknown key is an error there."""
    loaded = load_config_from_file(str(file))
    assert loaded.mixed_precision is None
    assert loaded.dynamo_config == {}


def test_accelerate_refuses_an_unknown_key(tmp_path):
    file = tmp_path / "ddp.yaml"
    file.write_text((LAUNCH / "ddp.yaml").read_text() + "num_gpus: 8\n")
    with pytest.raises(ValueError, match="num_gpus"):
        load_config_from_file(str(file))


@pytest.mark.parametrize("file", ACCELERATE, ids=named)
def test_what_is_sharded_is_spelt_as_accelerate_spells_it(file):
    """It takes any key of these two sections, and ignores the ones that it does not know."""
    known = vars(launch_command_parser().parse_args(["recipe/train.py"]))
    content = yaml.safe_load(file.read_text())
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(content.get(section, {})) <= set(known)


@pytest.mark.parametrize("file", FILES, ids=named)
def test_it_names_nothing_that_belongs_to_the_config(file):
    text = file.read_text()
    assert text.count(ALLOWED) == 1
    for config in (REPOSITORY / "configs").glob("*.yaml"):  # which may be named after it
        text = text.replace(config.name, "")
    assert not OF_THE_CONFIG.findall(text.replace(ALLOWED, ""))


@pytest.mark.parametrize(
    "line",
    [
        "mixed_precision: bf16",
        "downcast_bf16: true",
        "fp16: true",
        "training.per_device_train_batch_size=4",
        "  gradient_accumulation_steps: 4",
        "  train_micro_batch_size_per_gpu: 4",
        "fp8_config: {}",
    ],
)
def test_each_of_these_would_be_found(line):
    assert OF_THE_CONFIG.search(line)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_several_machines_differ_in_the_machines_alone(strategy):
    one, several = (
        yaml.safe_load((LAUNCH / f"{strategy}{kind}.yaml").read_text())
        for kind in ("", "_multi_node")
    )
    differing = {key for key in one.keys() | several.keys() if one.get(key) != several.get(key)}
    assert differing - {"rdzv_backend"} == MACHINES
    assert several["num_machines"] == 2
    assert several["num_processes"] == 2 * one["num_processes"]


@pytest.mark.parametrize("file", ACCELERATE, ids=named)
def test_the_command_in_its_head_starts_it(file, monkeypatch):
    head = re.sub(r" \\\n#", "", file.read_text())
    (command,) = re.findall(r"^# accelerate (launch .*)", head, re.M)
    assert head.splitlines().index(f"# accelerate {command}") <= 1
    words = shlex.split(command)
    parsed = launch_command_parser().parse_args(words[1:])
    assert parsed.config_file == f"launch/{file.name}"
    assert parsed.training_script == "recipe/train.py"
    config, *overrides = parsed.training_script_args[1:]
    settings = load_settings(config, overrides)
    # Of what an engine does otherwise the config asks nothing, and its batch can be divided.
    monkeypatch.setenv("WORLD_SIZE", str(parsed.num_processes or 1))
    engine = Engine(next((name for name in STRATEGIES if file.name.startswith(name)), "single"))
    assert list(limits(settings, engine, on_cpu=file.name == "cpu.yaml")) == []
    assert accumulation(settings.training) >= 1


def test_readme_and_folder_name_the_same_files():
    readme = (LAUNCH / "README.md").read_text()
    said = set(re.findall(r"[\w-]+\.(?:sh|yaml)\b", readme))
    configs = {path.name for path in (REPOSITORY / "configs").iterdir()} | {"settings.yaml"}
    assert said - configs == {path.name for path in FILES}


def test_readmes_commands_name_what_is_there():
    readme = (LAUNCH / "README.md").read_text()
    for path in re.findall(r"\b((?:launch|recipe|tests)/[\w./]+\w)", readme):
        assert (REPOSITORY / path).exists(), path
    for module in re.findall(r"python -m ([\w.]+)", readme):
        assert (REPOSITORY / (module.replace(".", "/") + ".py")).exists(), module
