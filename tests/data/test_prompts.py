"""Prompts and shots from files, standard input and the command line."""

import io
import json

import pytest

from recipe.data.prompts import (
    Prompt,
    Shot,
    one_prompt,
    prompt_text,
    read_prompts,
    read_shots,
)
from recipe.data.templates import build_template
from recipe.settings import UserError
from tests.refusal import problems


@pytest.fixture
def stdin(monkeypatch):
    def give(text):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))

    return give


def test_a_line_each(tmp_path, stdin):
    expected = [Prompt(0, "Name a fruit."), Prompt(1, "  indented"), Prompt(2, "日本語")]
    text = "Name a fruit.\n\n  indented\r\n \n日本語"
    (tmp_path / "p.txt").write_text(text)
    assert read_prompts(str(tmp_path / "p.txt")) == (expected, [])
    stdin(text)
    assert read_prompts("-") == (expected, [])


def test_records_of_either_kind(tmp_path):
    rows = [
        {"prompt": "Name a fruit.", "input": 7},
        {"instruction": "Give the plural.", "input": "cat", "output": "cats"},
        {"instruction": "Count."},
        {"instruction": "Count.", "input": None},
    ]
    expected = [
        Prompt(0, "Name a fruit."),
        Prompt(1, "Give the plural.", "cat"),
        Prompt(2, "Count."),
        Prompt(3, "Count."),
    ]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.JSONL").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("p.json", "p.JSONL"):
        prompts, unread = read_prompts(str(tmp_path / name))
        assert prompts == expected
        assert unread == ["input", "output"]  # the input beside a prompt is none


def test_one_prompt_may_have_lines(stdin):
    assert one_prompt("a\nb") == [Prompt(0, "a\nb")]
    stdin("a\n\nb\n")
    assert one_prompt("-") == [Prompt(0, "a\n\nb")]


def test_shots(tmp_path):
    (tmp_path / "s.txt").write_text("quick => fast\n\nhappy =>  glad \n")
    found = read_shots(["big => large", str(tmp_path / "s.txt")])
    assert found == [Shot("big", "large"), Shot("quick", "fast"), Shot("happy", "glad")]


SHOTS = [Shot("quick", "fast"), Shot("happy", "glad")]


def test_shots_are_lines_where_the_template_has_no_turns(tokenizer):
    raw = build_template("raw", tokenizer)
    lines = "quick => fast\nhappy => glad\nintelligent =>"
    assert prompt_text(raw, Prompt(0, "intelligent"), shots=SHOTS) == lines
    alpaca = build_template("alpaca", tokenizer)
    assert prompt_text(alpaca, Prompt(0, "intelligent"), shots=SHOTS) == alpaca.prompt(lines)
    for written in ("intelligent =>", "intelligent => ", "intelligent=>"):
        assert prompt_text(raw, Prompt(0, written), shots=SHOTS) == lines
    with pytest.raises(UserError, match="prompt 3: has an input"):
        prompt_text(alpaca, Prompt(3, "intelligent", "in English"), shots=SHOTS)


def test_shots_are_turns_where_it_has(tokenizer):
    chat = build_template("chat", tokenizer)
    text = prompt_text(chat, Prompt(0, "intelligent"), shots=SHOTS)
    expected = tokenizer.apply_chat_template(
        [
            {"role": role, "content": content}
            for shot in SHOTS
            for role, content in (("user", shot.prompt), ("assistant", shot.answer))
        ]
        + [{"role": "user", "content": "intelligent"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == expected


WRONG = {
    "p.txt": [
        (b"\n \n", "p.txt: holds no prompts."),
        (b"ok\na\0b\n", "p.txt:2: holds what is no text"),
    ],
    "q.txt": [(b"ok\ncaf\xe9\n", "q.txt: not UTF-8.")],
    "p.jsonl": [
        (b"[1]\n", "p.jsonl: begins with [, so it is a JSON list"),
        (b"1\n", "p.jsonl: row 0: expected an object, found a number."),
        (b'{"text": "a"}\n', "p.jsonl: row 0: instruction: expected text, found nothing"),
        (b'{"prompt": 3}\n', "p.jsonl: row 0: prompt: expected text, found a number."),
        (b'{"prompt": " "}\n', "p.jsonl: row 0: prompt: empty."),
        (b'{"instruction": "a", "input": []}\n', "p.jsonl: row 0: input: expected text, found a l"),
        (b'{"prompt": "\\ud800"}\n', "p.jsonl: row 0: prompt: holds what is no text"),
        (b"{\n", "p.jsonl:1: not JSON"),
    ],
    "p.json": [(b"[]", "p.json: holds no prompts."), (b"{}", "p.json: expected a JSON list")],
    "p.doc": [(b"a", "--prompts: p.doc is none of .txt, .json, .jsonl, .csv, .parquet.")],
}


@pytest.mark.parametrize(
    ("name", "content", "begins"), [(n, *case) for n, cases in WRONG.items() for case in cases]
)
def test_a_wrong_file_is_one_line(tmp_path, monkeypatch, name, content, begins):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_prompts(name)
    (line,) = problems(raised.value)
    assert line.startswith(begins)


def test_absent_files_are_told():
    for read, name in ((read_prompts, "absent.txt"), (read_prompts, "absent.jsonl")):
        with pytest.raises(UserError, match=r"--prompts: .*absent"):
            read(name)
    with pytest.raises(UserError, match=r"--shots: 'quick fast' cannot be read"):
        read_shots(["quick fast"])
    with pytest.raises(UserError, match="cannot be read"):
        read_shots(["x" * 5000])


def test_wrong_shots_are_all_named(tmp_path):
    (tmp_path / "s.txt").write_text("quick => fast\nhappy\n => glad\n")
    with pytest.raises(UserError) as raised:
        read_shots(["big =>", str(tmp_path / "s.txt")])
    first, second, third = problems(raised.value)
    assert first == "--shots: expected 'prompt => answer', found 'big =>'."
    assert second.endswith("s.txt:2: expected 'prompt => answer', found 'happy'.")
    assert third.endswith("s.txt:3: expected 'prompt => answer', found '=> glad'.")


def test_an_empty_or_endless_prompt_is_told(stdin):
    for text in ("", " \n"):
        with pytest.raises(UserError, match="--prompt: empty"):
            one_prompt(text)
    stdin("")
    with pytest.raises(UserError, match="--prompt: empty"):
        one_prompt("-")
    with pytest.raises(UserError, match="expected at most 1,000,000"):
        one_prompt("a" * 1_000_001)
