"""prove.py as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipe import prove
from recipe.exit_codes import run_command
from recipe.proving import claims, gradients
from recipe.proving.finding import Finding
from tests.proving.harm import BUGS

REPOSITORY = Path(__file__).parents[2]
PROVE = [sys.executable, "recipe/prove.py"]


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False
    )


def in_process(*arguments: str) -> int:
    return run_command(lambda: prove.main(list(arguments)))


@pytest.fixture
def config(write_config):
    return write_config(
        lora={"lora_dropout": 0.1},
        data={"rows": "0:10", "held_out": "10:12"},
        training={"per_device_train_batch_size": 8},
    )


@pytest.fixture
def without_processes(monkeypatch):
    monkeypatch.setattr(claims, "CLAIMS", claims.CLAIMS[:12])


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['prove.py', '--help']\n"
        "try:\n    runpy.run_path('recipe/prove.py', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))"
    )
    result = command(sys.executable, "-c", code)
    assert "--config" in result.stdout
    assert result.stdout.rstrip().endswith("set()")


@pytest.mark.slow
def test_the_whole_command(config, tmp_path):
    """Every claim, in its own process; nothing is left but the JSON file."""
    file = tmp_path / "proof.json"
    before = {path for path in tmp_path.rglob("*")}
    result = command(*PROVE, "--config", str(config), "--json", str(file))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert {path for path in tmp_path.rglob("*")} == {*before, file}
    check_same(result.stdout, file)
    assert "13 passed, 0 failed, 0 not applicable" in result.stdout


def check_same(screen: str, file: Path) -> None:
    """The lines of the screen are those of the file, in their order."""
    found = [Finding(**record) for record in json.loads(file.read_text())["claims"]]
    lines = screen.splitlines()
    start = lines.index(found[0].line)
    assert lines[start : start + len(found)] == [finding.line for finding in found]
    assert lines[-1].endswith(str(file))


def test_what_holds_is_exit_0_and_a_file(config, tmp_path, monkeypatch, capsys, without_processes):
    monkeypatch.chdir(tmp_path)
    assert in_process("--config", str(config)) == 0
    screen = capsys.readouterr().out
    check_same(screen, Path("runs/prove-tiny-001.json"))
    assert "lora_dropout 0.1 is 0 where gradients or processes are compared" in screen
    assert [path.name for path in Path("runs").iterdir()] == ["prove-tiny-001.json"]


def test_what_does_not_hold_is_exit_3_and_named(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(claims, "CLAIMS", claims.CLAIMS[:3])
    claim, planted = BUGS["rows see each other"]
    file = tmp_path / "proof.json"
    with planted():
        assert in_process("--config", str(config), "--json", str(file)) == 3
    captured = capsys.readouterr()
    check_same(captured.out, file)
    assert captured.err == f"not proven: {claim}\n"
    assert f'not applicable: rests on "{gradients.FLATTENED}"' in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.learning_rat=1"], "Did you mean training.learning_rate?"),
        (["--json", "{here}/there.json"], "exists already, and nothing is overwritten"),
        (["--json", "{here}/no/such.json"], "there is no folder"),
        (["data.rows=0:100"], "holds 12 rows"),
        (["lora.target_modules=[q_porj]"], "Choose among"),
    ],
)
def test_a_mistake_is_exit_2_and_writes_nothing(
    config, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").touch()
    before = sorted(tmp_path.rglob("*"))
    arguments = [one.format(here=tmp_path) for one in arguments]
    assert in_process("--config", str(config), "data.held_out=null", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_the_starter_config_is_proven(starter, tmp_path):
    file = tmp_path / "proof.json"
    result = command(*PROVE, "--config", "starter.yaml", "--json", str(file))
    print(result.stdout)
    assert result.returncode == 0, result.stderr
    check_same(result.stdout, file)
    assert "13 passed, 0 failed, 0 not applicable" in result.stdout
