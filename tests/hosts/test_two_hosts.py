"""Two hosts train one run, one is lost, they go on; `make bench-hosts` tells it."""

import subprocess
import sys
import time

import psutil
import pytest

from tests.hosts.launches import REPOSITORY
from tests.hosts.link import why_not
from tests.hosts.words import last_words

PATIENCE = 900


@pytest.fixture(scope="module")
def hosts():
    reason = why_not()
    if reason:
        pytest.skip(reason)


def command(folder, *more):
    return [sys.executable, "-m", "tests.hosts.two_hosts", "--folder", str(folder), *more]


@pytest.mark.slow
def test_a_run_that_lost_a_host_ends_as_if_it_had_not(hosts, tmp_path):
    result = subprocess.run(
        command(tmp_path, "--processes", "4"),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("\nholds ") == 5
    assert result.stdout.count("resumed   from ") == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_nothing_stays_when_it_is_killed_itself(hosts, tmp_path):
    killed = subprocess.Popen(command(tmp_path), cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    wait_until(lambda: any("recipe/train.py" in words for words in naming(tmp_path)))
    killed.kill()
    killed.wait()
    wait_until(lambda: not naming(tmp_path))


def naming(folder):
    """Command lines with ``folder`` in them."""
    every = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return [words for words in every if any(str(folder) in word for word in words)]


def wait_until(true):
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_last_words_are_those_of_the_run():
    said = [
        "pace      0.02 s a step",
        "epoch 3   loss 5.1 · 0 s",
        "[rank0]: Traceback (most recent call last):",
        '[rank0]:   File "train.py", line 1, in <module>',
        "[rank0]: RuntimeError: Connection reset by peer",
        "E1126 18:15:22 1 torch/distributed/elastic/multiprocessing/api.py:1002] failed",
        "Traceback (most recent call last):",
        '  File "accelerate", line 8, in <module>',
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
        "=====",
        "recipe/train.py FAILED",
        "=====",
    ]
    words = ["pace      0.02 s a step", "traceback, RuntimeError: Connection reset by peer"]
    assert last_words(said) == words
