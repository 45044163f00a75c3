"""SIGTERM and Ctrl-C, by every way of starting: the step is saved, nobody stays, and it goes on.

`python -m tests.faults.torture --signals 20` does it twenty times by each way.
"""

import os
import signal
import sys
import time

import pytest

from tests.faults.aims import Aim
from tests.faults.comparison import checkpoints, differences
from tests.faults.signals_table import SignalRuns
from tests.faults.starts import WAYS

CASES = [
    *((way, signal.SIGTERM, False) for way in WAYS),
    # make leaves a SIGINT to the terminal, which sends it to all; to make alone it does nothing.
    *((way, signal.SIGINT, False) for way in WAYS if way != "make train"),
    # What a terminal does: the whole group gets it. For python alone it is the same.
    *((way, signal.SIGINT, True) for way in WAYS[1:]),
]


@pytest.fixture(scope="module")
def signal_runs(server, tmp_path_factory, tiny_checkpoint, rows):
    return SignalRuns(
        server, tmp_path_factory.mktemp("signals"), model=str(tiny_checkpoint), rows=rows
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a launcher's death")
@pytest.mark.parametrize(
    ("way", "number", "group"),
    CASES,
    ids=[f"{way}-{number.name}{'-group' * group}" for way, number, group in CASES],
)
def test_the_run_is_saved_and_goes_on(signal_runs, way, number, group):
    assert signal_runs.once(way, number, after_steps=7, group=group) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_between_micro_batches_finishes_the_step(prepare, tmp_path, number, code):
    """The command in the fork server, held where the signal comes."""
    tormentor, reference = prepare("evaluation-by-epoch")
    run = tmp_path / "run"
    (job,) = tormentor.start(
        f"training.output_dir={run}",
        "training.save_steps=100",
        log=tmp_path / "log",
        aim=Aim("between", 5, operation=0),
    )
    assert job.wait_until_held()
    os.kill(job.process, number)
    job.board.release()
    assert job.wait() == code, job.said()
    # 5 micro-batches an epoch make windows of 2, 2 and 1, so the 5th pause is in step 7.
    assert checkpoints(run) == [job.board.steps]
    assert job.board.steps == 7
    assert f"training.resume_from_checkpoint={run}" in job.said()
    assert "Traceback" not in job.said()
    (again,) = tormentor.start(
        f"training.resume_from_checkpoint={run}",
        "training.save_steps=100",
        log=tmp_path / "again",
    )
    assert again.wait() == 0, again.said()
    adapter = "adapter/adapter_model.safetensors"
    assert (run / adapter).read_bytes() == (reference.folder / adapter).read_bytes()


def test_a_second_ctrl_c_stops_at_once(prepare, tmp_path):
    tormentor, _ = prepare("evaluation-by-epoch")
    run = tmp_path / "run"
    (job,) = tormentor.start(
        f"training.output_dir={run}",
        "training.save_steps=100",
        log=tmp_path / "log",
        aim=Aim("between", 5, operation=0),
    )
    assert job.wait_until_held()
    os.kill(job.process, signal.SIGINT)
    while "SIGINT" not in job.said():  # two that wait together are one
        time.sleep(0.01)
    os.kill(job.process, signal.SIGINT)
    assert job.wait() == 130, job.said()
    assert checkpoints(run) == []
    assert "Traceback" not in job.said()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_saving_saves_whole(prepare, tmp_path, number, code):
    tormentor, reference = prepare("one-checkpoint")
    run = tmp_path / "run"
    aim = Aim("save", 4, operation=5)
    (job,) = tormentor.start(f"training.output_dir={run}", log=tmp_path / "log", aim=aim)
    assert job.wait_until_held()
    os.kill(job.process, number)
    job.board.release()
    assert job.wait() == code, job.said()
    assert len(checkpoints(run)) == 1
    (again,) = tormentor.begin_or_resume(run, log=tmp_path / "again")
    assert again.wait() == 0, again.said()
    assert differences(run, reference.folder) == []
