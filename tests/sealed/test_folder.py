"""A sealed folder is whole or absent, and says what changed in it."""

import io
import json
import os
from pathlib import Path

import pytest

from recipe.sealed import SEAL, damage, seal, whole_folder


def write(path):
    with whole_folder(path) as staged:
        (staged / "a.txt").write_text("first")
        (staged / "sub").mkdir()
        (staged / "sub/b.bin").write_bytes(b"\0" * 1000)


def test_written_whole(tmp_path):
    write(tmp_path / "folder")
    assert damage(tmp_path / "folder") == []
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_absent_after_an_exception(tmp_path, error):
    def stop_half_way():
        with whole_folder(tmp_path / "folder") as staged:
            (staged / "a.txt").write_text("half")
            raise error

    with pytest.raises(error):
        stop_half_way()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    write(tmp_path / "folder")
    with pytest.raises(FileExistsError):
        write(tmp_path / "folder")
    assert damage(tmp_path / "folder") == []


def flip(folder):
    content = bytearray((folder / "sub/b.bin").read_bytes())
    content[500] ^= 1
    (folder / "sub/b.bin").write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flip, "changed since"),
        (lambda f: (f / "a.txt").write_text(""), "changed since"),
        (lambda f: (f / "a.txt").unlink(), "missing"),
        (lambda f: (f / SEAL).unlink(), "missing, so nothing proves"),
        (lambda f: (f / SEAL).write_text("{"), "not readable as JSON"),
        (lambda f: (f / SEAL).write_text("[]"), "not a table"),
    ],
)
def test_damage_is_named(tmp_path, harm, said):
    write(tmp_path / "folder")
    harm(tmp_path / "folder")
    (problem,) = damage(tmp_path / "folder")
    assert said in problem


def reseal(folder, **hashes):
    """Write a seal that holds, and ``hashes`` besides."""
    seal(folder)
    sealed = json.loads((folder / SEAL).read_text())
    (folder / SEAL).write_text(json.dumps({**sealed, **hashes}))


HOSTILE = [
    ("/dev/zero", "x", "dev/zero: named in sha256.json, but not inside the folder"),
    ("../outside.txt", "x", "../outside.txt: named in sha256.json, but not inside the folder"),
    ("sub/../../outside.txt", "x", "but not inside the folder"),
    ("sub/link", "x", "sub/link: missing"),  # a link to /dev/zero
    ("pipe", "x", "pipe: missing"),
    ("sub", "x", "sub: missing"),
    ("", "x", "missing"),
    ("a\0b", "x", "'a\\x00b': missing"),
    ("a\nb", "x", "'a\\nb': missing"),
    ("x" * 5000, "x", "missing"),
    ("a.txt", None, "a.txt: no hash in sha256.json"),
    ("a.txt", ["x"], "a.txt: no hash in sha256.json"),
    ("a.txt", 7, "a.txt: no hash in sha256.json"),
]


@pytest.mark.parametrize(("name", "sha256", "said"), HOSTILE)
def test_a_hostile_seal_opens_nothing_outside(tmp_path, monkeypatch, name, sha256, said):
    folder = tmp_path / "folder"
    write(folder)
    (tmp_path / "outside.txt").write_text("outside")
    (folder / "sub/link").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    reseal(folder, **{name: sha256})
    opened, opener = [], io.open

    def watched(file, *arguments, **named):
        opened.append(Path(file).resolve())
        return opener(file, *arguments, **named)

    monkeypatch.setattr(io, "open", watched)  # what Path.open calls
    (problem,) = damage(folder)
    assert said in problem
    assert problem.startswith(str(folder))
    assert "\n" not in problem
    assert opened
    assert all(folder in file.parents for file in opened)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": "\xff"}', b"\0", b"3", b""])
def test_a_broken_seal_is_told(tmp_path, content):
    write(tmp_path / "folder")
    (tmp_path / "folder" / SEAL).write_bytes(content)
    assert len(damage(tmp_path / "folder")) == 1


def test_a_seal_that_is_no_file_is_not_read(tmp_path):
    write(tmp_path / "folder")
    (tmp_path / "folder" / SEAL).unlink()
    (tmp_path / "folder" / SEAL).symlink_to("/dev/zero")
    (problem,) = damage(tmp_path / "folder")
    assert "nothing proves" in problem
