"""study.py as a user types it, as far as lessons go; arms are in tests/proving/test_arms.py."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from recipe import study
from recipe.exit_codes import run_command
from recipe.proving.lessons import LESSONS
from tests.refusal import listing, whole_lines
from tests.sharing.spectra import chosen

REPOSITORY = Path(__file__).parents[2]
QUICK = "low-precision"


def studied(*arguments: str) -> int:
    return run_command(lambda: study.main(list(arguments)))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Where nothing is: no starter model, no run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_list_imports_nothing_heavy(here):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['study.py', '--lesson']\n"
        "try:\n    runpy.run_path('recipe/study.py', run_name='__main__')\n"
        "except SystemExit as ended:\n    assert not ended.code\n"
        "print({'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    *lines, last = done.stdout.splitlines()
    assert last == "set()", done.stderr
    assert [line.split()[0] for line in lines[: len(LESSONS)]] == list(LESSONS)
    for line, lesson in zip(lines, LESSONS.values(), strict=False):
        assert line.endswith(lesson.question)
        assert lesson.question.endswith("?")
    assert "make study LESSON=NAME" in lines[-1]


def test_a_lesson_writes_what_it_says(here, capsys):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert studied("--lesson", QUICK, "--seed", "3", "--folder", "new/place") == 0
    said = capsys.readouterr().out
    figure, numbers = here / f"new/place/{QUICK}.png", here / f"new/place/{QUICK}.json"
    assert {path for path in here.rglob("*") if path.is_file()} == {figure, numbers}
    assert figure.read_bytes().startswith(b"\x89PNG")
    content = json.loads(numbers.read_text(), parse_constant=pytest.fail)
    place = Path("new/place")
    assert said == f"{content['paragraph']}\n\n{place / figure.name}\n{place / numbers.name}\n"
    assert content["lesson"] == QUICK
    assert content["numbers"]
    assert content["versions"]["torch"] == version("torch")
    assert content["model"] is None
    assert content["adapter"] is None
    assert (torch.get_num_threads(), state.tolist()) == (threads, torch.get_rng_state().tolist())
    # Measured once more, and in the same place; by the same seed the same numbers.
    assert studied("--lesson", QUICK, "--seed", "3", "--folder", "new/place") == 0
    again = json.loads(numbers.read_text())
    assert again["numbers"] == content["numbers"]
    assert {path for path in here.rglob("*") if path.is_file()} == {figure, numbers}


def below_a_file(here: Path) -> str:
    (here / "file").write_text("")
    return str(here / "file/below")


MISTAKES = {
    "no such lesson": (
        ["--lesson", "svd"],
        "--lesson: 'svd' is none. Choose among accumulation, checkpointing,",
    ),
    "no adapter": (
        ["--lesson", "truncated-svd", "--model", "{here}"],
        "--adapter: this lesson needs one, and none is given. Name ",
    ),
    "no such adapter": (
        ["--lesson", "truncated-svd", "--model", "{here}", "--adapter", "gone"],
        "--adapter: there is no folder gone. Name ",
    ),
    "no model": (["--lesson", "kv-cache"], "--model: this lesson needs one, and none is given."),
    "no such model": (
        ["--lesson", QUICK, "--model", "gone"],
        "--model: there is no folder gone. Name ",
    ),
    "a folder below a file": (
        ["--lesson", QUICK, "--folder", "{below}"],
        "--folder: {here}/file cannot be written into. Name another.",
    ),
    "a file for a folder": (
        ["--lesson", QUICK, "--folder", "{file}"],
        "--folder: {here}/file cannot be written into. Name another.",
    ),
    "a folder's name that is too long": (["--lesson", QUICK, "--folder", "x" * 300], "--folder: "),
    "overrides": (["--lesson", QUICK, "lora.r=8"], "lora.r=8: "),
    "arms": (["--lesson", QUICK, "--arms", "full"], "--arms: "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_a_line_and_leaves_nothing(here, capsys, name):
    arguments, begins = MISTAKES[name]
    places = {"here": here, "below": below_a_file(here), "file": here / "file"}
    before = listing(here)
    assert studied(*(one.format(**places) for one in arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = whole_lines(said.err.removesuffix("\n"))
    assert line.startswith(begins.format(**places))
    assert listing(here) == before


def test_a_lesson_that_fails_leaves_nothing(here, monkeypatch, capsys):
    """A folder that is no model is the user's mistake, and it is found after seconds."""
    (here / "model").mkdir()
    before = listing(here)
    assert studied("--lesson", "kv-cache", "--model", "model") == 2
    assert listing(here) == before
    assert "Traceback" not in capsys.readouterr().err


def test_the_newest_adapter_is_taken_where_none_is_named(here, tiny_checkpoint, capsys):
    for name in ("tiny-002", "tiny-001"):  # the newest by time, not by name
        adapter = here / f"runs/{name}/adapter"
        chosen(tiny_checkpoint, [[4.0, 1.0], [2.0, 1.0]]).save_pretrained(adapter)
        (adapter / "recipe.json").write_text("{}")
    os.utime(here / "runs/tiny-002/adapter/recipe.json", (1, 1))
    assert studied("--lesson", "truncated-svd", "--model", str(tiny_checkpoint)) == 0
    content = json.loads((here / "runs/study/truncated-svd.json").read_text())
    assert (content["model"], content["adapter"]) == (str(tiny_checkpoint), "runs/tiny-001/adapter")
    assert content["paragraph"] in capsys.readouterr().out
