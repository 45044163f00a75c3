"""Tokenised once: a second start, and a second process, read what the first one wrote."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from recipe.data import cache
from recipe.data.templates import build_template
from recipe.sealed import seal
from recipe.settings import UserError
from tests.conftest import build_tokenizer
from tests.data.conversations import one_turn, talk

REPOSITORY = Path(__file__).parents[2]
ROWS = [
    one_turn(5, "Name a fruit.", "", "Apple"),
    one_turn(9, "Give the plural.", "cat", "cats"),
]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return tmp_path / "recipe/tokens"


@pytest.fixture
def tokenised(monkeypatch):
    """Counts how often rows are tokenised."""
    calls = []
    real = cache.tokenize_rows

    def counted(rows, *rest, **named):
        calls.append(len(rows))
        return real(rows, *rest, **named)

    monkeypatch.setattr(cache, "tokenize_rows", counted)
    return calls


def cached(tokenizer, rows=ROWS, template="alpaca"):
    return cache.cached_rows(rows, build_template(template, tokenizer), tokenizer, source="rows")


def same(one, other):
    return all(
        a.index == b.index
        and a.input_ids.dtype == b.input_ids.dtype == np.int32
        and a.trained.dtype == b.trained.dtype == np.bool_
        and (a.input_ids == b.input_ids).all()
        and (a.trained == b.trained).all()
        for a, b in zip(one, other, strict=True)
    )


def test_a_second_start_tokenises_nothing_and_gets_the_same(tokenizer, tokenised):
    first, said = cached(tokenizer)
    second, said_again = cached(tokenizer)
    assert tokenised == [2]
    assert said == ""
    assert said_again.startswith("read from ")
    assert same(first, second)


def test_whatever_the_ids_depend_on_is_part_of_the_key(tokenizer, tokenised):
    cached(tokenizer)
    cached(tokenizer, [ROWS[0], one_turn(9, "Give the plural.", "cat", "cat")])
    cached(tokenizer, template="chat")
    cached(tokenizer, [ROWS[0]])
    kept, tokenizer.chat_template = tokenizer.chat_template, "{# a #}" + tokenizer.chat_template
    try:
        cached(tokenizer, template="chat")
    finally:
        tokenizer.chat_template = kept
    assert len(tokenised) == 5


def test_another_tokenizer_reads_nothing_of_this_one(tokenizer, tokenised):
    cached(tokenizer)
    other = build_tokenizer()
    other.add_tokens(["fruit"])
    rows, said = cached(other)
    assert said == ""
    assert tokenised == [2, 2]
    assert len(tokenizer) in rows[0].input_ids


def test_other_code_of_the_data_room_reads_nothing_of_this_one(tokenizer, tokenised, monkeypatch):
    cached(tokenizer)
    changed = {path: path.read_bytes() for path in Path(cache.__file__).parent.glob("*.py")}
    read_bytes = Path.read_bytes
    monkeypatch.setattr(
        Path,
        "read_bytes",
        lambda path: changed[path] + b"#" if path in changed else read_bytes(path),
    )
    assert cached(tokenizer)[1] == ""
    assert tokenised == [2, 2]


def test_a_damaged_folder_is_made_again(tokenizer, tokenised, home):
    first, _ = cached(tokenizer)
    (file,) = home.glob("*/tokens.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    second, said = cached(tokenizer)
    assert len(tokenised) == 2
    assert said == ""
    assert same(first, second)
    assert cached(tokenizer)[1].startswith("read from ")


def test_a_sealed_folder_of_something_else_is_made_again(tokenizer, tokenised, home):
    cached(tokenizer)
    (file,) = home.glob("*/tokens.safetensors")
    file.write_bytes(b"something else")
    seal(file.parent)
    assert cached(tokenizer)[1] == ""
    assert len(tokenised) == 2


def test_a_full_disk_is_said(tokenizer, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    rows, said = cached(tokenizer)
    assert len(rows) == 2
    assert "cannot be written (No space left on device)" in said


def test_broken_rows_are_told_each_time_and_nothing_is_kept(tokenizer, home):
    for _ in range(2):
        with pytest.raises(UserError, match="reads as the end"):
            cached(tokenizer, [one_turn(3, "Say it.", "", "one</s>two")])
    assert not list(home.glob("*/"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_HOME": "h", "XDG_CACHE_HOME": "x"}, "h/recipe"),
        ({"XDG_CACHE_HOME": "x"}, "x/huggingface/recipe"),
        ({"HF_HOME": "", "XDG_CACHE_HOME": ""}, "~/.cache/huggingface/recipe"),
    ],
)
def test_the_cache_lies_where_the_hub_client_keeps_its_own(monkeypatch, environment, expected):
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache.recipe_cache() == Path(expected).expanduser()


def test_a_place_that_cannot_be_written_is_said(tokenizer, tokenised, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    for _ in range(2):
        rows, said = cached(tokenizer)
        assert len(rows) == 2
        assert "cannot be written (Not a directory)" in said
    assert len(tokenised) == 2


def test_conversations_come_back_whole(tokenizer):
    rows = [talk(0, "a", "b", "c", "d", system="s"), talk(1, "e", "f")]
    assert same(cached(tokenizer, rows, "chat")[0], cached(tokenizer, rows, "chat")[0])


CHILD = """
import os, sys, time
from recipe.data import cache
real = cache.tokenize_rows
def slow(rows, *rest, **named):
    print("tokenised", flush=True)
    time.sleep(1)
    return real(rows, *rest, **named)
cache.tokenize_rows = slow
from recipe.data.templates import build_template
from tests.conftest import build_tokenizer
from tests.data.test_cache import ROWS
os.environ["HF_HOME"] = sys.argv[1]  # conftest set another one
tokenizer = build_tokenizer()
print("ready", flush=True)
sys.stdin.readline()
rows, said = cache.cached_rows(ROWS, build_template("alpaca", tokenizer), tokenizer, source="rows")
print(len(rows), flush=True)
"""


def test_two_processes_tokenise_once(tmp_path):
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    said = [child.communicate(timeout=120)[0].split() for child in children]
    assert sorted(map(len, said)) == [1, 2]
    assert {words[-1] for words in said} == {"2"}
