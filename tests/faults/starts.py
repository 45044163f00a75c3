"""Every way in which people start a run, as its own processes, and a signal to the topmost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.comparison import checkpoints
from tests.faults.jobs import PATIENCE, REPOSITORY

_BIN = Path(sys.executable).parent
_ONE = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
_THREAD = "--num_cpu_threads_per_process 1"
_EXIT = {signal.SIGTERM: 143, signal.SIGINT: 130}

WAYS = ("python", "accelerate launch", "make train", "torchrun")


def command(way: str, config: Path, *, overrides: Sequence[str]) -> list[str]:
    """One thread each, as the runs that the result is compared with have."""
    arguments = ["--config", str(config), *overrides]
    if way == "python":
        return [sys.executable, "recipe/train.py", *arguments]
    if way == "accelerate launch":
        launch = f"launch --quiet {_ONE} {_THREAD}".split()
        return [str(_BIN / "accelerate"), *launch, "recipe/train.py", *arguments]
    if way == "make train":
        # `-o`: what setup installs is there, or this would not run.
        chosen = [f"CONFIG={config}", f"ARGS={' '.join(overrides)}", f"LAUNCH={_ONE} {_THREAD}"]
        return ["make", "-o", "setup", "train", *chosen]
    assert way == "torchrun"
    return [str(_BIN / "torchrun"), "--nproc_per_node=2", "recipe/train.py", *arguments]


def processes(way: str) -> int:
    return 2 if way == "torchrun" else 1


@dataclass
class Started:
    """A run, its topmost process, and what both print."""

    way: str
    run: Path
    process: subprocess.Popen[bytes]
    log: Path

    def wait_for_steps(self, count: int) -> bool:
        """Until so many lines are in its metrics; False if it ended before."""
        file = self.run / "metrics.jsonl"
        while not file.is_file() or file.read_bytes().count(b"\n") < count:
            if self.process.poll() is not None:
                return False
            time.sleep(0.005)
        return True

    def signal(self, number: int, *, group: bool = False) -> None:
        """``group``: as a terminal sends a Ctrl-C, to the launcher and all it started."""
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def problems(self, number: int) -> list[str]:
        """What is wrong with the way it ended; an empty list means nothing."""
        code = self.process.wait(PATIENCE)
        alive = wait_until_gone(self.run)
        said = self.log.read_text()
        problems = []
        if alive:
            problems.append(f"processes {alive} stayed behind")
        if self.way == "python" and code != _EXIT[signal.Signals(number)]:
            problems.append(f"exit {code}")
        if code == 0:
            problems.append("exit 0, as if it had come to its end")
        if not checkpoints(self.run):
            problems.append("no checkpoint")
        if f"training.resume_from_checkpoint={self.run}" not in said:
            problems.append(f"does not say how to go on: …{' '.join(said.split())[-300:]}")
        # The launchers' own tracebacks are theirs.
        if self.way == "python" and "Traceback" in said:
            problems.append("a traceback")
        return problems


def start(way: str, config: Path, *, run: Path, log: Path, extra: Sequence[str] = ()) -> Started:
    overrides = [f"training.output_dir={run}", *extra]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command(way, config, overrides=overrides),
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    return Started(way, run, process, log)


def wait_until_gone(run: Path) -> list[int]:
    """Processes that have ``run`` in their command line, once they had time to save and end."""
    deadline = time.monotonic() + 60
    while (alive := _naming(run)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in alive:
        os.kill(process, signal.SIGKILL)
    return alive


def _naming(run: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            named = entry.name.isdecimal() and str(run).encode() in (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if named:
            found.append(int(entry.name))
    return found
