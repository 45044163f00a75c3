"""A data worker killed, a token cache spoilt, rows changed under a run that goes on."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from recipe.data.cache import recipe_cache
from tests.conftest import ROWS
from tests.faults.aims import Aim
from tests.faults.comparison import checkpoints, differences
from tests.faults.jobs import Server
from tests.faults.torment import Tormentor
from tests.refusal import whole_lines


def kill_a_worker(prepare: Callable[..., Any], folder: Path, *, pause: int, which: int) -> None:
    """Kill one of two data workers while the run waits between two micro-batches."""
    tormentor, reference = prepare("data-workers")
    folder.mkdir()
    run, aim = folder / "run", Aim("between", pause, operation=0)
    (job,) = tormentor.start(f"training.output_dir={run}", log=folder / "log", aim=aim)
    assert job.wait_until_held()
    workers = psutil.Process(job.process).children()
    assert len(workers) == 2
    os.kill(workers[which].pid, signal.SIGKILL)
    job.board.release()
    code = job.wait()
    assert "Traceback" not in job.said()
    if code == 0:  # it had handed over all it had
        assert differences(run, reference.folder) == []
        return
    assert code == 3, job.said()
    line = job.said().rstrip("\n").split("\n")[-1]
    assert "training.dataloader_num_workers" in line
    assert "python recipe/train.py --config" in line
    assert ("resume_from_checkpoint" in line) == bool(checkpoints(run))
    assert job.left_over() == []
    (again,) = tormentor.begin_or_resume(run, log=folder / "again")
    assert again.wait() == 0, again.said()
    assert differences(run, reference.folder) == []


def test_a_killed_data_worker_is_told(prepare, tmp_path):
    kill_a_worker(prepare, tmp_path / "killed", pause=5, which=0)


@pytest.mark.slow
def test_a_data_worker_killed_at_any_pause_is_told(prepare, tmp_path):
    """What a dead worker raises depends on what it was about to hand over."""
    for number in range(12):
        pause, which = number // 2 + 1, number % 2
        kill_a_worker(prepare, tmp_path / f"killed-{number}", pause=pause, which=which)


def changed(cache: Path) -> None:
    content = bytearray(cache.read_bytes())
    content[-5] ^= 1
    cache.write_bytes(content)


def cut(cache: Path) -> None:
    cache.write_bytes(cache.read_bytes()[:-40])


SPOILT: dict[str, Callable[[Path], object]] = {
    "one byte changed": changed,
    "truncated": cut,
    "of 0 bytes": lambda cache: cache.write_bytes(b""),
    "missing": lambda cache: cache.unlink(),
}


@pytest.mark.parametrize(
    "kind",
    [
        "one byte changed",
        *(pytest.param(k, marks=pytest.mark.slow) for k in SPOILT if k != "one byte changed"),
    ],
)
def test_a_spoilt_token_cache_is_made_anew(prepare, tmp_path, kind):
    tormentor, reference = prepare("evaluation-by-epoch")
    run = tmp_path / "run"
    aim = Aim("between", 5, operation=0)
    (job,) = tormentor.start(f"training.output_dir={run}", log=tmp_path / "log", aim=aim)
    assert job.wait_until_held()
    job.kill()
    caches = list(recipe_cache().glob("tokens/*/tokens.safetensors"))
    assert caches
    for cache in caches:
        SPOILT[kind](cache)
    (again,) = tormentor.begin_or_resume(run, log=tmp_path / "again")
    assert again.wait() == 0, again.said()
    assert differences(run, reference.folder) == []


@pytest.mark.parametrize("change", ["an answer", "a row less", "their order"])
def test_a_run_does_not_go_on_with_other_rows(
    server: Server, write_scenario: Callable[..., Path], tmp_path: Path, change: str
):
    rows = tmp_path / "mine.json"
    rows.write_text(json.dumps(ROWS))
    tormentor = Tormentor(server, write_scenario("accumulation-1", rows=rows))
    run = tmp_path / "run"
    (job,) = tormentor.start(
        f"training.output_dir={run}", log=tmp_path / "log", aim=Aim("save", 3, operation=1)
    )
    assert job.wait_until_held()
    job.kill()
    assert checkpoints(run)[0] == 2
    others = {
        "an answer": [{**ROWS[0], "output": "Green."}, *ROWS[1:]],
        "a row less": ROWS[1:],
        "their order": [ROWS[1], ROWS[0], *ROWS[2:]],
    }
    rows.write_text(json.dumps(others[change]))
    (refused,) = tormentor.begin_or_resume(run, log=tmp_path / "again")
    assert refused.wait() == 2, refused.said()
    (line,) = whole_lines(refused.said().rstrip("\n"))
    assert line.startswith("data.path: ")
    assert not (run / "adapter").exists()
