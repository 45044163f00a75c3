"""A full disk, or one that turns read-only: one line says what to do, and nothing earned is lost.

The run writes to a small tmpfs in a mount namespace of its own, which the system may not permit.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from recipe.sealed import damage
from tests.faults.aims import Aim
from tests.faults.comparison import checkpoints, differences
from tests.faults.jobs import Job, Server
from tests.faults.scenarios import Scenario
from tests.faults.torment import Reference, Tormentor

ROOMY = "256m"


@dataclass
class Disk:
    """A tmpfs that only the server's runs see at ``folder``; we see it at ``seen``."""

    server: Server
    folder: Path
    reference: Reference
    tormentor: Tormentor

    @property
    def seen(self) -> Path:
        return self.server.root / self.folder.relative_to("/")

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def resize(self, size: str) -> None:
        self.server.run(["mount", "-o", f"remount,rw,size={size}", str(self.folder)])

    def make_read_only(self) -> None:
        self.server.run(["mount", "-o", "remount,ro", str(self.folder)])

    def start(self, log: Path, aim: Aim | None = None) -> Job:
        """As a user would: from the newest checkpoint, or anew where nothing was saved."""
        seen = self.seen / "run"
        if checkpoints(seen):
            (job,) = self.tormentor.start(
                f"training.resume_from_checkpoint={self.run}", log=log, aim=aim
            )
            return job
        self.server.run(["rm", "-rf", str(self.run)])
        (job,) = self.tormentor.start(f"training.output_dir={self.run}", log=log, aim=aim)
        return job

    def check_end(self, tmp_path: Path) -> None:
        copy = shutil.copytree(self.seen / "run", tmp_path / "copy")
        assert differences(copy, self.reference.folder) == []
        shutil.rmtree(copy)


@pytest.fixture(scope="module")
def mount(
    server: Server,
    no_mount: str,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Path,
    rows: Path,
) -> Callable[[], Disk]:
    """Mount a fresh disk; all runs on them are of one config, whose whole run is made once."""
    if no_mount:
        pytest.skip(no_mount)
    base, numbers = tmp_path_factory.mktemp("disks"), count(1)
    scenario = Scenario(
        "disk", "0:9", 4, 2, True, training={"eval_strategy": "epoch", "save_steps": 3}
    )
    config = scenario.write_config(base, model=str(tiny_checkpoint), rows=rows)
    tormentor = Tormentor(server, config)
    reference = tormentor.reference(base / "reference")

    def mount() -> Disk:
        folder = base / f"disk-{next(numbers)}"
        folder.mkdir()
        size = f"size={ROOMY}"
        server.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)])
        return Disk(server, folder, reference, tormentor)

    return mount


def used_bytes(folder: Path) -> int:
    """As a tmpfs counts: in pages."""
    sizes = (file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return sum(-(-size // 4096) * 4096 for size in sizes)


def told_in_one_line(disk: Disk, job: Job, code: int = 3) -> str:
    """The run failed with ``code``, and all it says of that is one line with a way out."""
    assert job.wait() == code, job.said()
    said = job.said()
    assert "Traceback" not in said
    line = said.rstrip("\n").split("\n")[-1]
    assert line.isprintable()
    assert str(disk.folder) in line
    return line


def whole_checkpoints(disk: Disk) -> list[int]:
    run = disk.seen / "run"
    for step in checkpoints(run):
        assert damage(run / f"checkpoint-{step}") == []
    assert not [path for path in run.rglob("*") if ".partial" in path.name]
    return checkpoints(run)


def fill_and_recover(disk: Disk, tmp_path: Path, *, share: float) -> None:
    """Before the first step, leave room for ``share`` of what the run will write."""
    first_step = Aim("step", 1, operation=0)
    job = disk.start(tmp_path / "full.log", first_step)
    assert job.wait_until_held()
    there, all_of_it = used_bytes(disk.seen / "run"), used_bytes(disk.reference.folder)
    disk.resize(str(there + int(share * (all_of_it - there))))
    job.board.release()
    if job.wait() == 0:  # full behind the adapter, when the loss was drawn
        assert "warning   " in job.said()
        assert "loss.png could not be written" in job.said()
        disk.resize(ROOMY)
        disk.check_end(tmp_path)
        return
    line = told_in_one_line(disk, job)
    assert "python recipe/train.py --config" in line
    saved = whole_checkpoints(disk)
    disk.resize(ROOMY)
    assert ("resume_from_checkpoint" in line) == bool(saved)
    again = disk.start(tmp_path / "again.log")
    assert again.wait() == 0, again.said()
    disk.check_end(tmp_path)


def test_a_full_disk_loses_nothing(mount, tmp_path):
    fill_and_recover(mount(), tmp_path, share=0.6)


@pytest.mark.slow
@pytest.mark.parametrize("tenth", range(10))
def test_a_disk_full_at_any_byte_loses_nothing(mount, tmp_path, tenth):
    fill_and_recover(mount(), tmp_path, share=tenth / 10 + 0.02)


def test_a_disk_that_turns_read_only_loses_nothing(mount, tmp_path):
    disk = mount()
    job = disk.start(tmp_path / "read-only.log", Aim("between", 5, operation=0))
    assert job.wait_until_held()
    disk.make_read_only()
    job.board.release()
    assert "resume_from_checkpoint" in told_in_one_line(disk, job)
    disk.resize(ROOMY)
    assert whole_checkpoints(disk)
    again = disk.start(tmp_path / "again.log")
    assert again.wait() == 0, again.said()
    disk.check_end(tmp_path)


def test_a_read_only_folder_is_told_before_the_first_step(mount, tmp_path):
    disk = mount()
    disk.make_read_only()
    (job,) = disk.tormentor.start(f"training.output_dir={disk.run}", log=tmp_path / "log")
    told_in_one_line(disk, job, code=2)
    assert job.board.steps == 0
