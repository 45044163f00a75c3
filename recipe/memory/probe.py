"""Measured memory: the device's own counters, or the process's resident set on the CPU."""

import resource
import sys

import psutil
import torch


def peak_memory() -> dict[str, int]:
    """Peak bytes so far: ``allocated`` and ``reserved`` on CUDA, else ``resident``.

    ``resident`` counts from the start of the process, so loading is in it.
    """
    if torch.cuda.is_available():
        return {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }
    # getrusage counts KiB on Linux and bytes on macOS.
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes}


def in_words(peak: dict[str, int]) -> str:
    """For the screen: ``2.61 GiB resident``."""
    return ", ".join(f"{count / 2**30:.2f} GiB {kind}" for kind, count in peak.items())


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)
