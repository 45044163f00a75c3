"""A payload, once executed, leaves a folder behind; no test may find it, and no one is asked."""

import shutil

import pytest

from recipe.exit_codes import run_command
from recipe.settings import UserError
from tests.untrusted.payload import module, watched


@pytest.fixture
def marker(tmp_path):
    """The folder that a payload makes."""
    return tmp_path / "executed"


@pytest.fixture
def nothing_runs(marker, monkeypatch):
    """At the end of the test no payload has run and nobody was asked."""
    with watched(marker, monkeypatch):
        yield


@pytest.fixture
def refused(capsys):
    """Call a part of the recipe as a command does: it ends with 2 and one line a problem."""

    def refused(call, *arguments, **named):
        raised = []

        def main():
            try:
                call(*arguments, **named)
            except UserError as error:
                raised.append(error)
                raise

        code = run_command(main)
        assert code == 2, "it was accepted"
        printed = capsys.readouterr().err
        (error,) = raised
        assert printed.splitlines()[-len(error.problems) :] == [str(p) for p in error.problems]
        assert "Traceback" not in printed
        return str(error)

    return refused


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


@pytest.fixture
def code(marker):
    return module(marker)
