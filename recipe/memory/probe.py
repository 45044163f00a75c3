"""Measured memory: the device's own counters, or the process's resident set on the CPU."""

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from recipe.memory.cgroups import left_by_cgroups

_STATUS = Path("/proc/self/status")


def peak_memory(device: str | None = None) -> dict[str, int]:
    """Peak bytes so far: ``allocated`` and ``reserved`` on CUDA, else ``resident``.

    ``resident`` counts from the start of the process, so loading is in it.

    Args:
        device: that computes; None is CUDA where there is one.
    """
    if torch.cuda.is_available() and device in (None, "cuda"):
        return {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }
    return {"resident": _peak_resident()}


def _peak_resident() -> int:
    # Linux counts into getrusage's figure the peak of whoever started this process.
    lines = _STATUS.read_text().splitlines() if _STATUS.is_file() else []
    own = next((line for line in lines if line.startswith("VmHWM:")), None)
    if own is not None:
        return int(own.split()[1]) * 1024
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def in_words(peak: dict[str, int]) -> str:
    """For the screen: ``2.61 GiB resident``."""
    return ", ".join(f"{count / 2**30:.2f} GiB {kind}" for kind, count in peak.items())


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def held(device: str) -> int:
    """Bytes that this process holds of the memory of ``device`` now: ``cuda``, or any other's."""
    return int(torch.cuda.memory_reserved()) if device == "cuda" else resident()


def free_memory(device: str) -> int | None:
    """Bytes of the memory of ``device`` that this process can still get; None where that is not
    known. A container or a batch job may be given less than the machine has.
    """
    if device == "cpu":
        free, left = int(psutil.virtual_memory().available), left_by_cgroups()
        return free if left is None else min(free, left)
    if device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return None


def allocated_peak(step: Callable[[], None]) -> int:
    """Bytes that the allocator hands out at most while ``step`` runs, beyond those that are out
    when it begins: by CUDA's own counters, or by torch's profiler, which a CPU's tells.
    """
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    # Its public tables add up what an operation took and gave back; peaks need the order.
    events = found.profiler.kineto_results.events()
    now = peak = 0
    for _, count in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += count
        peak = max(peak, now)
    return peak
