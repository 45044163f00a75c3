"""One of two processes hangs, dies or is signalled: it is told once, and the run goes on."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.faults.comparison import WEIGHTS, checkpoints, metrics
from tests.faults.jobs import REPOSITORY
from tests.faults.starts import wait_until_gone

pytestmark = pytest.mark.slow

HOST = socket.gethostname()
BIN = Path(sys.executable).parent
TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node", "2", "recipe/train.py"]
PATIENCE = 120
STEPS = 240
TRAINING = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.001,
    "save_strategy": "steps",
    "save_steps": 20,
    "save_total_limit": 1,
    "ddp_timeout": 12,
}


@dataclass
class Launched:
    """A launcher, the run of its two processes, and the screen of all."""

    launcher: subprocess.Popen
    run: Path
    log: Path

    def said(self):
        return self.log.read_text()

    def ours(self):
        """What the screen has before torchrun's own account."""
        return self.said().partition("torch/distributed/elastic")[0]

    def wait_for(self, happened, seconds=PATIENCE):
        """Until ``happened()``; the seconds that it took."""
        began = time.monotonic()
        while not happened():
            assert self.launcher.poll() is None, self.said()
            assert time.monotonic() - began < seconds, self.said()
            time.sleep(0.02)
        return time.monotonic() - began

    def wait_for_a_checkpoint(self):
        """And some steps behind it."""
        self.wait_for(lambda: checkpoints(self.run))
        begun = len(metrics(self.run))
        self.wait_for(lambda: len(metrics(self.run)) > begun + 5)

    def process_of(self, rank):
        """Its number."""
        for child in psutil.Process(self.launcher.pid).children():
            if child.environ().get("RANK") == str(rank):
                return child.pid
        raise LookupError(rank)

    def ended(self):
        """The launcher's exit code, once it and both processes are gone."""
        code = self.launcher.wait(PATIENCE)
        assert wait_until_gone(self.run) == []
        return code

    def way_out(self):
        """The command that the screen has, once, to go on with."""
        (command,) = re.findall(r"To go on: (.*)", self.said())
        return shlex.split(command)


@contextmanager
def launched(command, run, log):
    """As a terminal starts it; no process stays."""
    with log.open("wb") as stream:
        launcher = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        yield Launched(launcher, run, log)
    finally:
        # torchrun starts each process as the leader of a group of its own.
        below = psutil.Process(launcher.pid).children() if launcher.poll() is None else []
        for process in (*below, launcher):
            if psutil.pid_exists(process.pid):
                os.kill(process.pid, signal.SIGKILL)
        launcher.wait()
        wait_until_gone(run)


@pytest.fixture
def started(write_config, tmp_path):
    run = tmp_path / "run"
    config = str(write_config(training={**TRAINING, "output_dir": str(run)}))
    with launched([*TORCHRUN, "--config", config], run, tmp_path / "log") as job:
        job.wait_for_a_checkpoint()
        yield job


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_checkpoint):
    """The run that nobody touches."""
    from tests.conftest import write_config, write_rows

    folder = tmp_path_factory.mktemp("uninterrupted")
    write = write_config.__wrapped__(folder, tiny_checkpoint, write_rows.__wrapped__(folder))
    config, run = str(write(training=TRAINING)), folder / "run"
    with launched([*TORCHRUN, "--config", config], run, folder / "log") as job:
        assert job.ended() == 0, job.said()
        return job


def went_on(job, uninterrupted):
    """Do what the screen says; the run must end as the one that nobody touched."""
    with launched(job.way_out(), job.run, job.log.with_name("again")) as again:
        assert again.ended() == 0, again.said()
        assert "resumed" in again.said()
    assert (job.run / WEIGHTS).read_bytes() == (uninterrupted.run / WEIGHTS).read_bytes()
    assert metrics(job.run) == metrics(uninterrupted.run)


def test_the_screen_has_the_first_process_alone(uninterrupted):
    epochs = [line for line in uninterrupted.said().splitlines() if line.startswith("epoch ")]
    numbers = [int(line.split()[1]) for line in epochs]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) == STEPS / 3
    assert uninterrupted.said().count("result ") == 1
    assert (uninterrupted.run / "logs/rank-1.log").is_file()
    assert "Traceback" not in uninterrupted.said()


def test_a_process_that_hangs_is_named(started, uninterrupted):
    os.kill(started.process_of(1), signal.SIGSTOP)
    line = re.compile(rf"^rank 0 on {HOST}: .*rank 1 on {HOST} is silent since step \d+", re.M)
    assert started.wait_for(lambda: line.search(started.said())) < 40
    # The launcher gives what does not end 30 s.
    assert started.ended() != 0
    assert len(line.findall(started.said())) == 1
    assert "Traceback" not in started.ours()
    assert "training.ddp_timeout" in started.said()
    went_on(started, uninterrupted)


@pytest.mark.parametrize("rank", [1, 0])
def test_a_process_that_dies_is_told_in_one_line(started, uninterrupted, rank):
    """Though the launcher sends the other one a SIGTERM at once."""
    os.kill(started.process_of(rank), signal.SIGKILL)
    assert started.ended() != 0
    said = [line for line in started.said().splitlines() if "no longer answers" in line]
    assert len(said) == 1, started.said()
    assert "What was saved before is whole. To go on: torchrun" in said[0]
    assert "Traceback" not in started.ours()
    went_on(started, uninterrupted)


def test_a_signal_to_one_process_saves_in_both(started, uninterrupted):
    os.kill(started.process_of(0), signal.SIGUSR1)
    assert started.ended() != 0
    (stopped,) = re.findall(r"stopped by SIGUSR1 after step (\d+) of 240", started.said())
    assert checkpoints(started.run) == [int(stopped)]
    assert "Traceback" not in started.ours()
    went_on(started, uninterrupted)
