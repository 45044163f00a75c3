"""plan.py as tests call it, on a machine that is the same everywhere."""

import json
from types import SimpleNamespace

import pytest
import torch

from recipe import plan, planning, workload
from recipe.exit_codes import run_command
from recipe.memory.rate import Rate
from tests.refusal import listing, whole_lines


@pytest.fixture
def memory_of_machine(monkeypatch):
    def made(count: int) -> None:
        memory = SimpleNamespace(total=count)
        monkeypatch.setattr(planning, "psutil", SimpleNamespace(virtual_memory=lambda: memory))

    return made


@pytest.fixture
def machine(monkeypatch, memory_of_machine):
    """A CPU of one GFLOP/s and one GB/s, which is not measured each time, 8 GiB and no card; and a
    process that does not grow from one plan to the next.
    """
    monkeypatch.setattr(workload, "resident", lambda: 256 << 20)
    monkeypatch.setattr(planning, "cpu_rate", lambda **_: Rate(flops=1e9, written=1e9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    memory_of_machine(8 << 30)


@pytest.fixture
def planned(machine, tmp_path, capsys):
    """What the command says of arguments, and its JSON."""

    def made(*arguments: str) -> tuple[str, dict]:
        file = tmp_path / f"plan-{len(list(tmp_path.glob('plan-*')))}.json"
        capsys.readouterr()
        code = run_command(lambda: plan.main([*arguments, "--json", str(file)]))
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out, json.loads(file.read_text())

    return made


@pytest.fixture
def no_plan(machine, tmp_path, capsys):
    """The one line of a mistake; nothing is written."""

    def made(*arguments: str) -> str:
        before = listing(tmp_path)
        capsys.readouterr()
        assert run_command(lambda: plan.main(list(arguments))) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert listing(tmp_path) == before
        (line,) = whole_lines(said.err.removesuffix("\n"))
        return line

    return made


@pytest.fixture
def on_cpu(write_config) -> str:
    """A config that asks for a CPU."""
    return str(write_config())


@pytest.fixture
def anywhere(write_config) -> str:
    """A config that takes a card where there is one."""
    return str(write_config(training={"use_cpu": False}))
