"""The runs of the two hosts: undisturbed, and with one of them lost in the middle."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import conftest
from tests.faults.comparison import differences
from tests.faults.torture import tiny_checkpoint
from tests.hosts.launches import (
    Part,
    apart,
    launcher,
    start,
    wait,
    wait_for_checkpoint,
    write_config,
)
from tests.hosts.link import Host, two_hosts
from tests.hosts.words import Story, last_words, telling

# Both sum the same gradients in another order, and Adam makes rounding larger.
TOLERANCE = 1e-4
_KILLED_BEHIND = 50


@dataclass
class Stage:
    """The hosts, what they share, and who tells what they do."""

    hosts: tuple[Host, Host]
    folder: Path
    story: Story
    processes: int
    patience: float

    def run(self, name: str) -> Path:
        return self.folder / "shared" / name

    def start(self, name: str, config: Path, *more: str, hosts: Sequence[Host] = ()) -> list[Part]:
        """Begin the run ``name``, or go on with it."""
        on = hosts or self.hosts
        logs = self.folder / "logs" / "-".join([name, *(["resumed"] if more else [])])
        arguments = ["--config", str(config), *(more or [f"training.output_dir={self.run(name)}"])]
        processes = self.processes if len(on) > 1 else 1
        return start(on, arguments, logs=logs, processes=processes)

    def finish(self, parts: Sequence[Part]) -> bool:
        """Wait for the end of all, and tell it; whether each ended with 0."""
        wait(parts)
        for part in parts:
            self.story.quote(part, telling(part.running.said()))
        self.story.tell("; ".join(_ending(part) for part in parts))
        return all(part.code == 0 for part in parts)

    def whole(self, name: str, config: Path, *, hosts: Sequence[Host] = ()) -> Path:
        """A run that nobody disturbs."""
        if not self.finish(self.start(name, config, hosts=hosts)):
            raise RuntimeError(f"{name}: see {self.folder}")
        return self.run(name)


def _ending(part: Part) -> str:
    if part.code is None:
        return f"{part.host.name} still on"
    return f"{part.host.name} exit {part.code} after {part.seconds:.0f} s"


def play(folder: Path, *, processes: int, patience: float) -> dict[str, bool]:
    """Tell all of it; each claim, and whether it holds."""
    model = tiny_checkpoint(folder)
    rows = folder / "rows.json"
    rows.write_text(json.dumps(conftest.ROWS))
    configs = {
        dropout: write_config(folder, f"dropout-{dropout}", model=model, rows=rows, dropout=dropout)
        for dropout in (0.1, 0.0)
    }
    story = Story(folder)
    with two_hosts() as hosts:
        stage = Stage(hosts, folder, story, processes, patience)
        _introduce(stage)
        story.title(f"1. Undisturbed, {processes} processes on two hosts")
        reference = stage.whole("whole", configs[0.1])
        story.title("2. Every process of beta is killed; its kernel can still tell alpha")
        told = _lose_beta(stage, "killed", configs[0.1], silently=False)
        found = {"alpha ends by itself when beta is killed": told}
        found["resumed, it is the run that nobody killed"] = _go_on(stage, "killed", reference)
        story.title(
            "3. The cable is pulled, and nothing tells anybody; training.ddp_timeout is 30 s"
        )
        told = _lose_beta(stage, "unplugged", configs[0.1], silently=True)
        found["both end by themselves when the cable is pulled"] = told
        found["resumed, it is the run that kept its cable"] = _go_on(stage, "unplugged", reference)
        story.title("4. Without dropout: two hosts, then one process on alpha")
        two = stage.whole("two", configs[0.0])
        one = stage.whole("one", configs[0.0], hosts=hosts[:1])
        distance = apart(two, one)
        found[f"lora_B {distance:.1e} from one process, at most {TOLERANCE}"] = distance < TOLERANCE
    return found


def _introduce(stage: Stage) -> None:
    alpha, beta = stage.hosts
    print(
        f"{alpha.name} {alpha.address} and {beta.name} {beta.address}: network, host name and "
        "processes of their own, one cable, shared files\n"
        "each: GLOO_SOCKET_IFNAME=eth0 accelerate "
        f"{' '.join(launcher(stage.hosts, 0, stage.processes)[1:])} recipe/train.py …  "
        "(beta: --machine_rank 1)"
    )


def _lose_beta(stage: Stage, name: str, config: Path, *, silently: bool) -> bool:
    """Lose it behind a checkpoint; whether who is left ended by itself, and not with 0."""
    parts = stage.start(name, config)
    alpha, beta = parts
    step = wait_for_checkpoint(stage.run(name), _KILLED_BEHIND, parts)
    heard = {part.host.name: len(part.running.said()) for part in parts}
    lost = time.monotonic()
    if silently:
        beta.host.link("down")
        what = "eth0 of beta is down"
    else:
        what = f"SIGKILL to the {beta.running.cut_power()} processes of beta"
    stage.story.tell(f"step {step}, checkpoint-{_KILLED_BEHIND} is whole: {what}")
    survivors = parts if silently else [alpha]
    wait(survivors, stage.patience)
    for part in survivors:
        _tell_end(stage, part, part.running.said()[heard[part.host.name] :], lost)
    ended = all(part.code not in (None, 0) for part in survivors)
    for part in parts:
        part.running.cut_power()
    beta.host.link("up")
    return ended


def _tell_end(stage: Stage, part: Part, said: Sequence[str], lost: float) -> None:
    """``said``: since beta was lost."""
    name, words = part.host.name, last_words(said)
    if words:
        stage.story.quote(part, words)
    if part.code is None:
        stage.story.tell(
            f"{name} is still on {stage.patience:.0f} s later, {len(said)} lines printed; killed"
        )
        return
    ways = any("training.resume_from_checkpoint=" in line for line in said)
    stage.story.tell(
        f"{name} ended {part.started + part.seconds - lost:.1f} s later, exit {part.code}, "
        f"{len(said)} lines printed, {'one' if ways else 'none'} says how to go on"
    )


def _go_on(stage: Stage, name: str, reference: Path) -> bool:
    """Start both hosts again; whether the run ends as ``reference`` did, all checkpoints too."""
    run = stage.run(name)
    more = f"training.resume_from_checkpoint={run}"
    ended = stage.finish(stage.start(name, run / "settings.yaml", more))
    problems = differences(run, reference) if ended else ["it did not end with 0"]
    for problem in problems:
        stage.story.tell(problem)
    return not problems
