"""Each wrong data file, given to the command: one line a problem, exit 2, nothing written."""

import json
import shutil

import pyarrow
import pytest

from recipe.data.cache import recipe_cache
from recipe.data.rows import read_rows
from recipe.settings import DataSettings
from tests.data.wrong_files import ROW, columns, lines, rows
from tests.data.wrong_rows import ASSISTANT, CASES, USER
from tests.refusal import refused


@pytest.fixture
def refuse(tmp_path, tmp_path_factory, monkeypatch, capsys, write_config):
    """Run the command on a data file in an otherwise empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
    (tmp_path / "folder.json").mkdir()

    def run(file: str, content: bytes, data=None, **sections):
        config = write_config(data={"path": file, **(data or {})}, **sections)
        (tmp_path / "rows.json").unlink()
        (tmp_path / file).write_bytes(content)
        return refused(["--config", str(config)], capsys, tmp_path)

    return run


def test_there_are_enough_cases():
    assert len(CASES) >= 45


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_file(refuse, name):
    case = CASES[name]
    first, *rest = refuse(case.file, case.bytes, case.data)
    assert first.startswith(f"{case.where}: ")
    for fragment in case.said:
        assert fragment in first
    assert len(rest) == case.problems - 1
    kept = [entry for entry in (recipe_cache() / "tokens").glob("*") if entry.is_dir()]
    assert not kept or name.startswith("length")
    if len(rest) == 10:
        assert rest[-1] == "and: 15 more of 25 in all."


def test_a_tokenizer_without_chat_template(refuse, tiny_checkpoint, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint, base)
    (base / "chat_template.jinja").unlink()
    content = lines({"messages": [USER, ASSISTANT]})
    (line,) = refuse("d.jsonl", content, model={"name_or_path": str(base)})
    assert line.startswith(
        "data.template: the tokenizer of this model has no chat template. Name a"
    )


RIGHT = {
    "byte order mark": ("d.json", b"\xef\xbb\xbf" + rows(ROW)),
    "Windows' line ends": ("d.jsonl", lines(ROW, ROW).replace(b"\n", b"\r\n")),
    "no line end at the end": ("d.jsonl", lines(ROW).rstrip()),
    "U+2028 inside a text": (
        "d.jsonl",
        json.dumps({**ROW, "output": "a\u2028b"}, ensure_ascii=False).encode(),
    ),
    "a sheet's byte order mark": ("d.csv", b"\xef\xbb\xbfinstruction,output\r\na,b\r\n"),
    "line end in a cell": ("d.csv", b'instruction,output\n"a\nb",c\n'),
    "capitals in the ending": ("d.JSON", rows(ROW)),
    "a date beyond the calendar that nobody needs": (
        "d.parquet",
        columns(instruction=["a"], output=["b"], at=pyarrow.array([2**30], pyarrow.date32())),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_odd_and_right_is_read(tmp_path, name):
    file, content = RIGHT[name]
    (tmp_path / file).write_bytes(content)
    assert read_rows(DataSettings(path=str(tmp_path / file))).train
