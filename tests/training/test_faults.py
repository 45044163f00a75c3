"""What ends a run from outside, when more than one thing does."""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from recipe.settings import RunFailed
from recipe.training.faults import faults_told


class Workers(torch.utils.data.IterableDataset[int]):
    """Hands over the process number of the worker, forever."""

    def __iter__(self) -> Iterator[int]:
        assert get_worker_info() is not None
        while True:
            yield os.getpid()


class DiskFull(OSError):
    """A worker dies while this error is looked into."""

    def __init__(self, worker: int) -> None:
        super().__init__()
        self.worker = worker

    @property
    def errno(self) -> int:  # type: ignore[override]
        kill(self.worker)
        return errno.ENOSPC


def kill(worker: int) -> None:
    """Return when the handler of SIGCHLD has run."""
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
        os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
        signal.raise_signal(signal.SIGCHLD)


@pytest.fixture
def a_worker() -> Iterator[int]:
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(DataLoader(Workers(), batch_size=None, num_workers=1))
    yield next(batches)
    del batches
    torch.utils.data._utils.signal_handling._SIGCHLD_handler_set = False
    signal.signal(signal.SIGCHLD, before)


def test_a_worker_that_dies_after_the_run_failed_does_not_hide_why(a_worker, tmp_path):
    with pytest.raises(RunFailed, match="No space left on device"), faults_told(tmp_path):
        raise DiskFull(a_worker)


def break_off(worker: int) -> None:
    try:
        raise ConnectionResetError
    finally:
        kill(worker)


def test_a_worker_that_dies_while_the_run_fails_is_told(a_worker, tmp_path):
    with pytest.raises(RunFailed, match="a data worker was killed"), faults_told(tmp_path):
        break_off(a_worker)
