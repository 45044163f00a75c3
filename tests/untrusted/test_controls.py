"""The payloads are live: read carelessly, each does what the other tests say never happens."""

import contextlib
import pickle
import runpy
import sys

import pytest
import torch
import yaml

from tests.untrusted.payload import module, pickled, watched, zipped


def test_a_pickle_runs(tmp_path, marker):
    pickled(tmp_path, marker, "x.bin")
    with (tmp_path / "x.bin").open("rb") as stream:
        pickle.load(stream)
    assert marker.exists()


def test_a_file_of_torch_runs(tmp_path, marker):
    zipped(tmp_path, marker, "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert marker.exists()


def test_a_module_runs(tmp_path, marker):
    (tmp_path / "evil.py").write_text(module(marker))
    assert {"Config", "Model", "Tokens"} <= runpy.run_path(str(tmp_path / "evil.py")).keys()
    assert marker.exists()


@pytest.mark.parametrize("kind", ["apply", "new"])
def test_a_tag_of_yaml_runs(marker, kind):
    yaml.unsafe_load(f"!!python/object/{kind}:os.mkdir ['{marker}']")
    assert marker.exists()


def test_a_payload_that_ran_is_noticed(marker, monkeypatch):
    with pytest.raises(AssertionError, match="executed"), watched(marker, monkeypatch):
        marker.mkdir()


@pytest.mark.parametrize("ask", [lambda: input("y/N? "), lambda: sys.stdin.readline()])
def test_a_question_is_noticed_even_if_its_failure_is_caught(marker, monkeypatch, ask):
    with (
        pytest.raises(AssertionError, match="asked"),
        watched(marker, monkeypatch),
        contextlib.suppress(OSError),
    ):
        ask()
