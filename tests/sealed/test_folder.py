"""A sealed folder is whole or absent, and says what changed in it."""

import pytest

from recipe.sealed import SEAL, damage, whole_folder


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
