"""Two launchers on one machine, as on two hosts: what one does wrong, the other one is told."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = Path(sys.executable).with_name("torchrun")
pytestmark = pytest.mark.slow


@pytest.fixture
def on_both(write_config, tmp_path):
    """Start train.py on "hosts" 0 and 1, each with overrides of its own; what each said, and how
    long host 0 took.
    """
    config = write_config(training={"max_steps": 4, "gradient_accumulation_steps": 2})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank, *arguments):
        command = [str(TORCHRUN), "--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1"]
        command += ["--master_addr=127.0.0.1", f"--master_port={port}", "recipe/train.py"]
        return subprocess.Popen(
            [
                *command,
                "--config",
                str(config),
                f"training.output_dir={tmp_path / 'run'}",
                *arguments,
            ],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(first, second):
        began = time.monotonic()
        processes = [start(0, *first), start(1, *second)]
        try:
            said = [process.communicate(timeout=120)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        return said, time.monotonic() - began, [p.returncode for p in processes]

    return run


def test_both_train_where_nothing_differs(on_both, tmp_path):
    said, _, codes = on_both([], [])
    assert codes == [0, 0], said
    assert "× 2 processes, ddp\n" in said[0]
    assert (tmp_path / "run/adapter").is_dir()
    command = f"--config {tmp_path / 'run/settings.yaml'}  repeats this run"
    assert command in said[0]
    assert "launch/ddp_multi_node.yaml" in said[0]


def test_a_host_with_another_learning_rate_is_named(on_both, tmp_path):
    said, _, codes = on_both([], ["training.learning_rate=0.5"])
    assert all(codes)
    line = "training.learning_rate: is 0.5 for rank 1 on "
    assert [text.count(line) for text in said] == [1, 1]
    assert not (tmp_path / "run").exists()


def test_a_host_that_has_ended_ends_the_other_with_its_word(on_both, tmp_path):
    said, seconds, codes = on_both([], ["model.name_or_path=/there/is/none"])
    assert all(codes)
    assert seconds < 60  # and not training.ddp_timeout, 1800
    assert "has ended. model.name_or_path: no folder /there/is/none" in said[0]
    assert not (tmp_path / "run").exists()


def test_a_host_whose_config_is_wrong_is_not_waited_for(on_both):
    said, seconds, codes = on_both([], ["training.learning_rat=1"])
    assert all(codes)
    assert seconds < 60
    assert "has ended. " in said[0]
    assert "training.learning_rat: unknown key" in said[0]
