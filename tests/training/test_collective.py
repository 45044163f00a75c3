"""Two processes under torchrun: whether all are there, what they agree on, and who says it.

Each launch imports torch twice, so most that needs no end of its own shares one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist

from recipe.settings import RunFailed
from recipe.training import collective, heartbeat
from recipe.training.collective import key
from recipe.training.heartbeat import loss_told
from tests.conftest import REPOSITORY

HOST = socket.gethostname()
PATIENCE = 120
TORCHRUN = [
    str(Path(sys.executable).with_name("torchrun")),
    *("--standalone", "--nproc_per_node", "2", "tests/training/several.py"),
]
TOGETHER = (
    *("answer", "seen", "blind-and-full", "from-the-first", "logs", "shards", "finite"),
    *("alike", "answer"),  # again, with the keys of the first time in the store
)


def launch(folder, *modes):
    """Run ``modes`` in two processes.

    Returns:
        The launcher's exit code, what the screen has, and seconds.
    """
    started = time.monotonic()
    launcher = subprocess.Popen(
        [*TORCHRUN, str(folder), *modes],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        screen, _ = launcher.communicate(timeout=PATIENCE)
    finally:
        if launcher.poll() is None:
            # torchrun starts each process as the leader of a group of its own.
            for process in (*psutil.Process(launcher.pid).children(), launcher):
                os.kill(process.pid, signal.SIGKILL)
            launcher.wait()
    return launcher.returncode, screen, time.monotonic() - started


def ours(screen):
    """What the screen has before torchrun's own account."""
    return screen.partition("torch/distributed/elastic")[0]


def exit_codes(screen):
    """Of those that ended by themselves, by torchrun's account."""
    return {line.split()[2] for line in screen.splitlines() if line.startswith("  exitcode")}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What a mode returned in each process; ``screen`` and ``folder`` of the launch."""
    folder = tmp_path_factory.mktemp("several")
    code, screen, _ = launch(folder, *TOGETHER)
    assert code == 0, screen
    results = {
        mode: [json.loads((folder / f"{mode}-{rank}.json").read_text()) for rank in (0, 1)]
        for mode in TOGETHER
    }
    return {**results, "screen": screen, "folder": folder}


@pytest.mark.slow
def test_all_answer(together):
    assert together["answer"] == ["answered", "answered"]


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_named(tmp_path):
    code, screen, seconds = launch(tmp_path, "late")
    assert code != 0
    line = f"rank 0 on {HOST}: the processes do not all answer within 10 s: rank 1 on {HOST}\n"
    assert line in screen
    assert exit_codes(screen) == {"3", "-15"}
    # The other one sleeps for 60; the start of torch is in it.
    assert seconds < 55
    assert "Traceback" not in ours(screen)


@pytest.mark.slow
def test_a_folder_that_all_see(together):
    assert together["seen"] == [[], []]  # the mark is gone


@pytest.mark.slow
def test_a_folder_that_one_does_not_see(tmp_path):
    code, screen, _ = launch(tmp_path, "blind")
    assert code != 0
    assert exit_codes(screen) == {"2"}
    said = f"training.output_dir: {tmp_path}/blind/run is not seen by rank 1 on {HOST}. Name a"
    assert screen.count(said) == screen.count("training.output_dir") == 1
    assert list((tmp_path / "blind").iterdir()) == []
    assert "Traceback" not in ours(screen)


@pytest.mark.slow
def test_a_folder_that_is_not_empty_stays(together):
    assert together["blind-and-full"] == [["settings.yaml"], ["settings.yaml"]]


@pytest.mark.slow
def test_other_settings_are_refused_with_their_place(together):
    line = f"training.seed: is 1 for rank 1 on {HOST}, and 0 for rank 0. Give every host the same"
    for process in together["alike"]:
        (said,) = process
        assert said.startswith(line)


@pytest.mark.slow
def test_the_first_computes_for_all(together):
    value = {"value": "of rank 0", "rank": 0}
    assert together["from-the-first"] == [[value, 1], [value, 0]]


@pytest.mark.slow
def test_what_the_others_say_goes_into_their_logs(together):
    (log,) = (together["folder"] / "logs/logs").iterdir()
    assert log.name == "rank-1.log"
    said = ["rank 1 prints within", "rank 1 writes within", "rank 1 calls within"]
    assert log.read_text().splitlines() == said
    assert not any(line in together["screen"] for line in said)
    for line in (
        *(f"rank 0 {verb} within" for verb in ("prints", "writes", "calls")),
        *(f"rank {rank} prints {where}" for rank in (0, 1) for where in ("before", "behind")),
    ):
        assert together["screen"].count(line) == 1


@pytest.mark.slow
def test_what_all_find_is_told_once(tmp_path):
    code, screen, _ = launch(tmp_path, "both-tell")
    assert code != 0
    assert exit_codes(screen) == {"3"}
    assert screen.count("the disk is full.") == 1
    assert f"on {HOST}" not in screen
    assert "Traceback" not in ours(screen)


@pytest.mark.slow
def test_what_one_finds_alone_is_told_with_its_place(tmp_path):
    code, screen, _ = launch(tmp_path, "one-tells")
    assert code != 0
    assert exit_codes(screen) == {"3", "-15"}
    assert screen.count(f"rank 1 on {HOST}: the disk is full.\n") == 1
    assert screen.count("the disk is full.") == 1


@pytest.mark.slow
def test_who_leaves_says_it_on_the_screen(tmp_path):
    code, screen, _ = launch(tmp_path, "leaves")
    assert code != 0
    assert exit_codes(screen) == {"3", "-15"}
    assert screen.count(f"rank 1 on {HOST}: nothing moves.\n") == 1
    assert "nothing moves" not in (tmp_path / "leaves/logs/rank-1.log").read_text()


@pytest.mark.slow
def test_parts_of_parameters_make_the_whole(together):
    for process in together["shards"]:
        assert set(process) == {"3", "1"}
        for rank, found in process.items():
            assert len(found) == 11
            assert [name for name, holds in found.items() if not holds] == [], rank


@pytest.mark.slow
def test_what_one_part_alone_breaks_is_named_by_all(together):
    name = "model.layers.1.self_attn.k_proj.lora_B.default.weight"
    for rank, found in enumerate(together["finite"]):
        assert found["close"]
        assert found["before"] == ""
        assert found["broken"] == name
        assert found["said"].startswith(f"{name} of the adapter is not finite after step 1 (row")
        assert f"(row {rank})" in found["said"]


@pytest.fixture
def store(monkeypatch):
    """What four processes on two hosts share, as the first of them sees it."""
    shared = dist.HashStore()
    for module in (collective, heartbeat):
        monkeypatch.setattr(module, "_get_default_store", lambda: shared)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return shared


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ({0: "a", 1: "a", 2: "b"}, "rank 3 on b"),
        ({0: "a", 3: "b"}, "rank 1 on a, rank 2 on b"),
        ({0: "a", 1: "a"}, "rank 2 on host 2 of 2, rank 3 on host 2 of 2"),
        ({0: "a", 1: "a", 2: "b", 3: "b"}, "all have begun, and nothing arrives. Is the network"),
    ],
)
def test_who_is_missing(store, here, said):
    for rank, host in here.items():
        store.set(key("here", rank), host)
    assert collective._missing().startswith(said)


@pytest.mark.parametrize(
    ("steps", "alive", "said"),
    [
        ([7, 7, 7, 6], [0, 1, 2, 3], "rank 3 on host-3 waits behind step 6"),
        ([7, 7, 6, 7], [0, 2, 3], "rank 1 on host-1 is silent since step 7"),
        ([], [], "the first host, or the network to it, is gone too"),
    ],
)
def test_who_stands_furthest_back(store, monkeypatch, steps, alive, said):
    for rank, step in enumerate(steps):
        store.set(key("at", rank), f"{step} 41 host-{rank}")

    def beat(seconds):
        for rank in alive:
            store.set(key("at", rank), f"{steps[rank]} 42 host-{rank}")

    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(sleep=beat))
    assert heartbeat._slowest() == said


def test_an_error_of_the_network_is_told_with_the_way_out(store, monkeypatch, tmp_path):
    store.set(key("at", 1), "5 41 host-1")
    monkeypatch.setattr(heartbeat, "_SILENT", 0)
    said = "no longer answers: rank 1 on host-1 is silent since step 5.*closed by peer.*--config"
    with pytest.raises(RunFailed, match=said), loss_told(tmp_path):
        raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:3")
    with pytest.raises(RunFailed, match="no longer answers"), loss_told(tmp_path):
        raise dist.DistNetworkError("of any kind")
    for error in (RuntimeError("shapes do not match"), ValueError("Connection closed by peer")):
        with pytest.raises(type(error), match=str(error)), loss_told(tmp_path):
            raise error
