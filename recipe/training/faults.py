"""What can happen to a run from outside, in words: no memory, no space, a killed data worker."""

import errno
import os
import shlex
import shutil
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from recipe.sealed import SEAL
from recipe.settings import RunFailed
from recipe.training.arguments import world_size
from recipe.training.checkpoints import checkpoints
from recipe.training.engine import asked_engine

_NOT_WRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EFBIG,
}


@contextmanager
def faults_told(run: Path) -> Iterator[None]:
    """Turn what comes from outside into one line with the way out.

    Raises:
        RunFailed: a file of the run could not be written, or a data worker was killed.
    """
    try:
        with _no_more_of_workers():
            yield
    except (OSError, EOFError, SafetensorError, RuntimeError) as error:
        reason = _not_written(error)
        if reason:
            raise RunFailed(
                f"{run} could not be written to: {reason} ({_free(run)}). What was saved before is "
                f"whole. Put that right; then: {how_to_continue(run)}"
            ) from error
        if out_of_memory(error):
            raise RunFailed(
                f"{run}: out of memory outside of a step ({first_line(error)}). Use more "
                "processes with launch/fsdp2.yaml, model.quantization, or a smaller model."
            ) from error
        if _of_a_worker(error):
            raise RunFailed(
                f"a data worker was killed ({first_line(error)}), mostly by the system for want of "
                "memory. Free some, or do without: "
                f"{how_to_continue(run, 'training.dataloader_num_workers=0')}"
            ) from error
        raise


@contextmanager
def _no_more_of_workers() -> Iterator[None]:
    """Once a run fails, a dead worker no longer raises.

    torch's handler of SIGCHLD raises wherever Python happens to be: a broken connection to a worker
    can be known, and on its way to the screen, before the signal arrives.
    """
    try:
        yield
    except Exception:
        # SIG_DFL would have Python write about a signal "ignored due to race condition".
        if callable(signal.getsignal(signal.SIGCHLD)):
            signal.signal(signal.SIGCHLD, lambda number, frame: None)
        raise


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was asked for that is not there; a CPU raises a plain RuntimeError."""
    lacking = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return lacking or "can't allocate memory" in str(error)


def how_to_continue(run: Path, *changes: str) -> str:
    """The command that goes on from the newest checkpoint of ``run``, or starts it anew; of several
    hosts that of this one.
    """
    words = [*launch(), "recipe/train.py", "--config", str(run / "settings.yaml"), *changes]
    saved = any((folder / SEAL).is_file() for folder in checkpoints(run))
    if saved:
        words.append(f"training.resume_from_checkpoint={run}")
        words += ["--allow-changed"] if changes else []
    return shlex.join(words) + ("" if saved else " (no checkpoint had been saved)")


def launch() -> list[str]:
    """The words that start as many processes again, on each of as many hosts."""
    processes, engine = world_size(), asked_engine()
    hosts = processes // int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if engine.name == "single":
        return ["python"]
    if engine.name == "ddp" and hosts == 1:
        return ["torchrun", "--nproc_per_node", str(processes)]
    many = "_multi_node" if hosts > 1 else ""
    words = ["accelerate", "launch", "--quiet", "--config_file", f"launch/{engine.name}{many}.yaml"]
    words += ["--num_processes", str(processes)]
    if hosts > 1:
        first, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "29500")
        words += ["--num_machines", str(hosts), "--machine_rank", os.environ.get("GROUP_RANK", "0")]
        words += ["--main_process_ip", first, "--main_process_port", port]
    return words


def _of_a_worker(error: BaseException) -> bool:
    """A worker that dies while it hands over a batch shows in the connection to it."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in str(error)
    if not isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return any("torch/utils/data/" in frame.filename for frame in frames)


def _not_written(error: Exception) -> str:
    """Why a file could not be written; empty for other errors."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in _NOT_WRITABLE else ""
    text = first_line(error)
    # torch.save tells no reason.
    if any(words in text for words in ("PytorchStreamWriter", "inline_container", "iostream")):
        return "torch could not write a file, as when a disk is full"
    return text if isinstance(error, SafetensorError) and "os error" in text else ""


def _free(run: Path) -> str:
    try:
        return f"{shutil.disk_usage(run).free / 2**20:,.0f} MiB free"
    except OSError:
        return "no longer there"


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
