"""train.py as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TRAIN = [sys.executable, "recipe/train.py"]


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, **options
    )


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['train.py', '--help']\n"
        "try:\n    runpy.run_path('recipe/train.py', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))"
    )
    result = command(sys.executable, "-c", code)
    assert "--config" in result.stdout
    assert result.stdout.rstrip().endswith("set()")


WRONG = {
    "unknown key": (
        ["--config", "starter.yaml", "training.learning_rat=1"],
        "training.learning_rat: unknown key. Did you mean training.learning_rate?",
    ),
    "no such config": (["--config", "absent.yaml"], "starter.yaml"),
    "wrong value": (["--config", "starter.yaml", "training.learning_rate=abc"], "learning_rate"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_message_and_exit_2(name):
    arguments, message = WRONG[name]
    result = command(*TRAIN, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_accelerate_launch_trains_and_generate_answers(write_config, tmp_path):
    """The documented command, then the documented answer, each in its own process."""
    config = write_config(training={"use_cpu": False})
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--quiet"]
    one = [
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    result = command(*map(str, launch), *one, "recipe/train.py", "--config", str(config))
    assert result.returncode == 0, result.stderr
    assert "reopened: whole, finite, as trained" in result.stdout
    assert result.stderr == ""

    adapter = str(tmp_path / "run/adapter")
    generate = [sys.executable, "recipe/generate.py", "--max-new-tokens", "5"]
    result = command(*generate, "--adapter", adapter, "--prompt", "Name a fruit.")
    assert result.returncode == 0, result.stderr
    assert "alpaca template, greedy" in result.stderr


def test_generate_refuses_in_one_line(tmp_path):
    for arguments, message in (
        (["--prompt", " "], "prompt: empty"),
        (["--prompt", "a", "--max-new-tokens", "0"], "below 1"),
        (["--prompt", "a", "--template", "chat"], "brings its own base and template"),
    ):
        result = command(sys.executable, "recipe/generate.py", *arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr
