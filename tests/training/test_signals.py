"""A signal ends a run behind a checkpoint, and the resumed run is the one that never stopped."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from transformers import TrainerCallback

from recipe.exit_codes import run_command
from recipe.finetune import finetune
from recipe.settings import Stopped, load_settings
from recipe.training.faults import how_to_continue
from tests.training.test_resume import WEIGHTS, metrics


class Send(TrainerCallback):
    """Sends signals to this process in the middle of the step after ``step``."""

    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.fixture
def config(write_config):
    """12 rows, 4 held out, 2 × 2 rows a step: 2 steps an epoch, 3 epochs."""
    return write_config(
        lora={"lora_dropout": 0.1},
        data={"rows": "0:8", "held_out": "8:12"},
        training={
            "num_train_epochs": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "eval_strategy": "epoch",
            "logging_steps": 3,
        },
    )


def run(config, *overrides, watchers=()):
    return finetune(load_settings(str(config), overrides), watchers=watchers)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("step", [0, 1, 2, 5])  # 1 and 5: the last step of an epoch, of the run
def test_stopped_is_uninterrupted(config, tmp_path, capfd, number, step):
    whole = run(config, f"training.output_dir={tmp_path / 'whole'}")
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped) as raised:
        run(config, watchers=[Send(step, number)])
    assert handlers == [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    assert raised.value.signal_number == number
    stopped = tmp_path / "run"
    assert f"stopped by {number.name} after step {step + 1} of 6, and saved" in str(raised.value)
    assert str(raised.value).endswith(f"training.resume_from_checkpoint={stopped}")
    assert f"{number.name}: finishing the step and saving" in capfd.readouterr().err
    assert [p.name for p in stopped.glob("*checkpoint*")] == [f"checkpoint-{step + 1}"]
    resumed = run(config, f"training.resume_from_checkpoint={stopped}")
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert metrics(resumed) == metrics(whole)


class SendToAll(Send):
    """To the data workers as well, from outside, as a batch system does."""

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == self.step:
            every = [*psutil.Process().children(), psutil.Process()]
            for number in self.numbers:
                kill = ["kill", f"-{number:d}", *(str(process.pid) for process in every)]
                subprocess.run(kill, check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_data_workers_leave_a_signal_to_the_trainer(config, tmp_path, number):
    workers = "training.dataloader_num_workers=2"
    whole = run(config, workers, f"training.output_dir={tmp_path / 'whole'}")
    with pytest.raises(Stopped):
        run(config, workers, watchers=[SendToAll(1, number)])
    resumed = run(config, workers, f"training.resume_from_checkpoint={tmp_path / 'run'}")
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert metrics(resumed) == metrics(whole)


class KillWorkers(TrainerCallback):
    """A SIGTERM from outside to the data workers alone, long before they have handed over all."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            workers = [str(process.pid) for process in psutil.Process().children()]
            assert workers
            subprocess.run(["kill", "-TERM", *workers], check=True)
            time.sleep(0.3)


def test_data_workers_do_not_die_of_a_signal(config):
    run(
        config,
        "training.dataloader_num_workers=1",
        "training.per_device_train_batch_size=1",
        watchers=[KillWorkers()],
    )


class SendAtEpochEnd(SendToAll):
    """Before the evaluation of an epoch, whose batches the workers make."""

    def on_epoch_end(self, args, state, control, **named):
        if state.global_step == 2:
            self.step = 2
            super().on_substep_end(args, state, control)
            self.step = None


def test_an_evaluation_keeps_its_data_workers(config, tmp_path):
    workers = "training.dataloader_num_workers=2"
    with pytest.raises(Stopped):
        run(config, workers, watchers=[SendAtEpochEnd(None, signal.SIGTERM)])
    assert (tmp_path / "run/checkpoint-3").is_dir()


def test_a_screen_that_is_gone_loses_nothing(config, tmp_path, monkeypatch):
    def write(descriptor, text):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(Stopped):
        run(config, watchers=[Send(1, signal.SIGINT)])
    assert (tmp_path / "run/checkpoint-2").is_dir()


class SendAtTheEnd(TrainerCallback):
    def on_train_end(self, args, state, control, **_):
        os.kill(os.getpid(), signal.SIGTERM)


def test_behind_the_last_step_the_run_is_finished(config, tmp_path):
    with pytest.raises(Stopped, match=r"behind the last step. The run is finished, and .*adapter"):
        run(config, watchers=[SendAtTheEnd()])
    assert (tmp_path / "run" / WEIGHTS).is_file()


def test_several_processes_go_on_as_several(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = how_to_continue(tmp_path)
    assert said.startswith("torchrun --nproc_per_node 2 recipe/train.py --config ")


def test_a_second_ctrl_c_stops_at_once(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(config, watchers=[Send(1, signal.SIGINT, signal.SIGINT)])
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_a_launcher_that_dies_after_ctrl_c_stops_nothing_at_once(config, tmp_path):
    with pytest.raises(Stopped) as raised:
        run(config, watchers=[Send(1, signal.SIGINT, signal.SIGTERM)])
    assert raised.value.signal_number == signal.SIGINT
    assert (tmp_path / "run/checkpoint-2").is_dir()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_codes(capsys, number, code):
    def end():
        raise Stopped("stopped, and saved", signal_number=number)

    assert run_command(end) == code
    assert capsys.readouterr().err == "stopped, and saved\n"


LAUNCHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", '''
import signal, time
from recipe.training.signals import follow_launcher
follow_launcher()
print("ready", flush=True)
time.sleep(60)
'''])
child.wait()
"""


def test_the_exit_code_stands_when_nobody_reads(monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    def end():
        raise Stopped("stopped, and saved", signal_number=signal.SIGINT)

    monkeypatch.setattr(sys, "stderr", Gone())
    assert run_command(end) == 130


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize(
    "name", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow), "nohup"]
)
def test_a_launcher_takes_its_child_with_it(tmp_path, name):
    """A shell that ends must not: that is how runs are left alone over night."""
    script = tmp_path / name
    script.write_text(LAUNCHER)
    launcher = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert launcher.stdout.readline() == "ready\n"
        (child,) = psutil.Process(launcher.pid).children()
        launcher.kill()
        launcher.wait()
        if name == "nohup":
            time.sleep(0.3)
            assert child.is_running()
            assert child.status() != psutil.STATUS_ZOMBIE
        else:
            child.wait(20)
    finally:
        for one in psutil.process_iter(["cmdline"]):
            if "follow_launcher" in " ".join(one.info["cmdline"] or []):
                one.kill()
