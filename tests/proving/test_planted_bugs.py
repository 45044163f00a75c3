"""Each planted bug turns its own line red and no other."""

from pathlib import Path

import pytest

from recipe.proving import processes
from recipe.proving.claims import CLAIMS
from tests.proving.harm import BUGS

EVERY = [claim.name for claim in CLAIMS]


def red(found):
    return [claim for claim, finding in found.items() if finding.passed is False]


SECOND = {
    "positions count by two",
    "checkpointing halves the gradient",
    "the mask is shifted by one",
    "the prompt is trained",
    "optimizer and schedule are not restored",
    "generation leaves out the last newline",
}


def slow_where_second(bug):
    return pytest.param(bug, marks=[pytest.mark.slow] if bug in SECOND else [])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("bug", [slow_where_second(one) for one in BUGS])
def test_a_bug_turns_its_line_red(proof, bug):
    claim, planted = BUGS[bug]
    with planted():
        found = proof()
    assert red(found) == [claim]
    assert len(found) == 12


@pytest.mark.slow
def test_processes_that_average_otherwise_are_told(proof, monkeypatch):
    monkeypatch.setattr(processes, "TRAIN", Path(__file__).with_name("train_unlike_one.py"))
    found = proof(*EVERY)
    assert red(found) == [processes.PROCESSES]
    assert len(found) == 13
    assert found[processes.PROCESSES].measured > 1e-3


@pytest.mark.slow
def test_processes_that_end_badly_are_told(proof, monkeypatch, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("import sys; sys.exit('out of order')")
    monkeypatch.setattr(processes, "TRAIN", script)
    found = proof(*EVERY)
    assert red(found) == [processes.PROCESSES]
    assert "out of order" in found[processes.PROCESSES].note
