"""``adapter.py`` as a user calls it wrongly: one line, exit 2, nothing written, at once."""

import subprocess

import pytest

from recipe import adapter
from recipe.exit_codes import run_command
from tests.conftest import REPOSITORY
from tests.refusal import listing, whole_lines

WRONG = {
    "repository": (["push", "mine"], "repo: expected a repository such as"),
    "hidden": (["push", ".a/b"], "repo: expected"),
    "two dashes": (["pull", "a/b--c"], "repo: expected"),
    "no repository": (
        ["push", ""],
        "repo: expected a repository such as 'user/name', found the string ''.",
    ),
    "licence": (["push", "a/b", "--license", "Apache 2"], "--license: expected an identifier"),
    "base": (["push", "a/b", "--base-model", "x"], "--base-model: expected a repository"),
    "the base alone": (["verify", "none"], "adapter: none is the base alone"),
    "the base alone, inspected": (["inspect", "none"], "adapter: none is the base alone"),
    "no adapter yet": (["verify"], "adapter: no adapter under runs/ yet."),
    "no such folder": (["verify", "runs/x"], "adapter: runs/x is no folder."),
    "no name of the hub": (["verify", "a/b--c"], "adapter: a/b--c is no folder."),
    "a long name": (["verify", "x" * 5000], "adapter: x"),
    "a file": (["verify", "file"], "adapter: file is no folder."),
    "an empty folder": (["verify", "empty"], "adapter: empty holds no adapter_config.json."),
    "picture": (["inspect", "x", "--plot", "a.txt"], "--plot: expected a name that ends in .png"),
    "picture nowhere": (["inspect", "x", "--plot", "no/a.png"], "--plot: there is no folder no."),
    "figures nowhere": (["inspect", "x", "--output", "no/a"], "--output: there is no folder no."),
    "taken": (["merge", "x", "--output", "empty"], "--output: empty exists already"),
    "in a file": (["merge", "x", "--output", "file/a"], "--output: "),
    "no output": (["merge", "x", "--output", ""], "--output: empty."),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_one_line(tmp_path, monkeypatch, capsys, name):
    arguments, begins = WRONG[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = listing(tmp_path)
    capsys.readouterr()
    assert run_command(lambda: adapter.main(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = whole_lines(said.err.removesuffix("\n"))
    assert line.startswith(begins), line
    assert listing(tmp_path) == before


def test_several_processes_do_not_each_merge(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    output = tmp_path / "merged"
    assert run_command(lambda: adapter.main(["merge", "runs/x", "--output", str(output)])) == 2
    said = capsys.readouterr().err
    assert said.startswith("adapter.py: 2 processes were started, and each would hold the whole")
    assert len(said.splitlines()) == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["verify", "ADAPTER=runs/no such run"], "adapter: runs/no such run is no folder."),
        (["merge", "OUTPUT="], "--output: empty."),
        (["push", "REPO="], "repo: expected a repository"),
        (["pull", "REPO=x"], "repo: expected a repository"),
    ],
)
def test_through_make(words, says):
    result = subprocess.run(
        ["make", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
