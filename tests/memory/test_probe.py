"""The peak is the process's own."""

import subprocess
import sys

import pytest
import torch

from recipe.memory.probe import allocated_peak, peak_memory, resident

SHOW = "from recipe.memory.probe import peak_memory; print(peak_memory()['resident'])"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's resident set")
def test_a_large_parent_is_not_counted():
    held = bytearray(2**30)
    held[:: 2**12] = b"x" * len(held[:: 2**12])  # touched, each page
    assert resident() > 2**30
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**30 < peak_memory()["resident"]
    del held


def test_what_a_step_allocates_at_most():
    def step() -> None:
        a = torch.ones(2**20)
        b = a + 1
        del a
        c = b.double()
        del b, c

    assert allocated_peak(step) == pytest.approx(12 * 2**20, rel=0.01)
