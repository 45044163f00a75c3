"""One run through its whole life: begun, killed, resumed, killed again, finished, compared."""

import os
import random
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.aims import Aim, Measured, draw, strike
from tests.faults.comparison import checkpoints, differences
from tests.faults.jobs import REPOSITORY, Job, Server

# The rehearsal is for a user's first minutes; here it would be most of each run.
_SWITCH = "--no-rehearsal"
QUICKLY = [_SWITCH] if _SWITCH in (REPOSITORY / "recipe/train.py").read_text() else []


@dataclass(frozen=True)
class Kill:
    aim: Aim
    phase: str

    def __str__(self) -> str:
        return f"{self.aim} (in {self.phase})"


@dataclass
class Outcome:
    """What became of one run; ``problems`` is empty if it equals the reference."""

    scenario: str
    folder: Path
    kills: list[Kill] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kills = "; ".join(map(str, self.kills)) or "no kill"
        return f"{self.scenario}: {kills}: {' · '.join(self.problems)}\n  kept in {self.folder}"


@dataclass(frozen=True)
class Reference:
    folder: Path
    measured: Measured


class Tormentor:
    """Starts the runs of one config, with one or several processes."""

    def __init__(self, server: Server, config: Path, *, processes: int = 1) -> None:
        self._server = server
        self._config = config
        self._processes = processes

    def start(self, *overrides: str, log: Path, aim: Aim | None = None) -> list[Job]:
        """Start the run with its config and ``overrides``; one job a process."""
        arguments = ["--config", str(self._config), *overrides, *QUICKLY]
        port = _free_port() if self._processes > 1 else 0
        return [
            self._server.start(
                arguments,
                log=log if not rank else log.with_suffix(f".{rank}.log"),
                hold=aim.hold if aim and not rank else None,
                environment=self._environment(rank, port),
            )
            for rank in range(self._processes)
        ]

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        """What torchrun sets."""
        if self._processes == 1:
            return {}
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._processes),
            "LOCAL_WORLD_SIZE": str(self._processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }

    def begin_or_resume(self, run: Path, *, log: Path, aim: Aim | None = None) -> list[Job]:
        """Take the newest checkpoint of ``run``; without one, begin anew."""
        if checkpoints(run):
            resume = f"training.resume_from_checkpoint={run}"
            return self.start(resume, log=log, aim=aim)
        shutil.rmtree(run, ignore_errors=True)
        return self.start(f"training.output_dir={run}", log=log, aim=aim)

    def reference(self, folder: Path) -> Reference:
        """Let a run be, and measure it."""
        folder.mkdir(parents=True)
        jobs = self.begin_or_resume(folder / "run", log=folder / "log")
        codes = [job.wait() for job in jobs]
        if any(codes):
            raise RuntimeError(f"the reference exited with {codes}:\n{jobs[0].said()}")
        return Reference(folder / "run", Measured.of(jobs[0].board))

    def torment(self, reference: Reference, folder: Path, *, aims: Sequence[Aim]) -> Outcome:
        """Kill the run at each of ``aims`` in turn, then let it end and compare it."""
        folder.mkdir(parents=True)
        run, outcome = folder / "run", Outcome(self._config.stem, folder)
        for number, aim in enumerate([*aims, None], 1):
            if (run / "adapter").is_dir():  # killed behind the last thing that counts
                break
            jobs = self.begin_or_resume(run, log=folder / f"log-{number}", aim=aim)
            phase = strike(jobs, aim, measured=reference.measured) if aim else None
            if aim and phase:
                outcome.kills.append(Kill(aim, phase))
            codes = [job.wait() for job in jobs]
            left = [process for job in jobs for process in job.left_over()]
            if left:
                outcome.problems.append(f"processes {left} stayed behind")
            if phase is None:
                if any(codes):
                    said = " ".join(jobs[0].said().split())[-600:]
                    outcome.problems.append(f"exit {codes} instead of a run: …{said}")
                break
        if not outcome.problems:
            outcome.problems = differences(run, reference.folder)
        return outcome


def draw_aims(chance: random.Random, measured: Measured) -> list[Aim]:
    """One kill, or two in a run of three."""
    aims = [draw(chance, measured)]
    if chance.random() < 1 / 3:
        aims.append(draw(chance, measured, left=0.4))
    return aims


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def cores() -> int:
    return len(os.sched_getaffinity(0))
