"""SIGTERM to runs in their own processes, started by each way, at random steps; then a table."""

import json
import random
import shutil
import signal
import time
from functools import cache
from pathlib import Path

from tests.faults.comparison import differences
from tests.faults.jobs import Server
from tests.faults.scenarios import Scenario
from tests.faults.starts import WAYS, processes, start
from tests.faults.torment import QUICKLY, Reference, Tormentor

# Longer than the others, so that the signal finds it at work; it saves only when it must.
LONG = Scenario("long", "0:9", 100, 2, True, training={"save_steps": 10_000, "eval_strategy": "no"})


class SignalRuns:
    """Runs in their own processes, compared with what the fork server made undisturbed."""

    def __init__(self, server: Server, folder: Path, *, model: str, rows: Path) -> None:
        self._folder = folder
        self._config = LONG.write_config(folder, model=model, rows=rows)
        self._tormentors = {n: Tormentor(server, self._config, processes=n) for n in (1, 2)}
        self._number = 0
        self.reference = cache(self._reference)

    def _reference(self, processes: int) -> Reference:
        return self._tormentors[processes].reference(self._folder / f"reference-{processes}")

    def once(self, way: str, number: int, *, after_steps: int, group: bool = False) -> list[str]:
        """Signal one run behind so many steps and let it go on to its end; what went wrong."""
        reference = self.reference(processes(way))
        self._number += 1
        folder = self._folder / f"{self._number:03d}-{way.replace(' ', '-')}"
        folder.mkdir()
        run = folder / "run"
        started = start(way, self._config, run=run, log=folder / "log", extra=QUICKLY)
        if not started.wait_for_steps(after_steps):
            return [f"it ended before: {' '.join(started.log.read_text().split())[-300:]}"]
        started.signal(number, group=group)
        problems = started.problems(number)
        if not (run / "adapter").exists():
            tormentor = self._tormentors[processes(way)]
            jobs = tormentor.begin_or_resume(run, log=folder / "resumed")
            codes = [job.wait() for job in jobs]
            if any(codes):
                return [*problems, f"resumed: exit {codes}: {jobs[0].said()[-300:]}"]
        problems += self._compare(run, reference)
        if not problems:
            shutil.rmtree(folder)
        return problems

    @staticmethod
    def _compare(run: Path, reference: Reference) -> list[str]:
        """The checkpoint of the signal is one more than the reference has."""
        said = differences(run, reference.folder)
        return [line for line in said if not line.startswith("checkpoints [")]


def signal_table(folder: Path, count: int, *, seed: int) -> int:
    """``count`` SIGTERMs by each way; exit code 3 if anything went wrong."""
    from tests import conftest
    from tests.faults.torture import tiny_checkpoint

    chance = random.Random(seed)
    rows = folder / "rows.json"
    rows.write_text(json.dumps(conftest.ROWS))
    lines, failed = [], False
    with Server() as server:
        runs = SignalRuns(server, folder, model=str(tiny_checkpoint(folder)), rows=rows)
        for way in WAYS:
            began, good = time.monotonic(), 0
            for number in range(1, count + 1):
                step = chance.randint(1, 60)
                problems = runs.once(way, signal.SIGTERM, after_steps=step)
                good += not problems
                for problem in problems:
                    print(f"{way}, run {number}, step {step}: {problem}", flush=True)
            failed |= good < count
            seconds = (time.monotonic() - began) / count
            lines.append(f"| {way} | {count} | {good} | {seconds:.1f} s |")
            print(f"{way}: {good} of {count}", flush=True)
    print("\n| started by | SIGTERMs | saved, ended, exact | each |\n|---|---|---|---|")
    print("\n".join(lines))
    if not failed:
        shutil.rmtree(folder)
    return 3 if failed else 0
