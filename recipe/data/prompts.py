"""What is asked: one prompt, a file of them, standard input, and the shots in front of each.

A shot shows the model what is wanted: "quick => fast". Where the template writes conversations it
becomes an earlier turn; elsewhere the shots are lines above the prompt, as in Brown et al. 2020
(arXiv 2005.14165).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from recipe.data.formats import Message
from recipe.data.sources import MAX_CHARACTERS, READERS, kind, read_file
from recipe.data.templates import Template, UnfitRowError
from recipe.settings import Problem, UserError
from recipe.settings.yaml_text import one_line

ARROW = "=>"
_STDIN = "-"
_LINES = (".txt", "")


@dataclass(frozen=True)
class Prompt:
    """``index`` counts from 0 in what was given; ``context`` is an Alpaca row's ``input``."""

    index: int
    instruction: str
    context: str = ""


class Shot(NamedTuple):
    """A prompt and the answer that it should have got."""

    prompt: str
    answer: str


def one_prompt(text: str) -> list[Prompt]:
    """The prompt itself as the only one, or all of standard input for ``-``.

    Raises:
        UserError: there is nothing in it.
    """
    if text == _STDIN:
        text = _standard_input("--prompt").removesuffix("\n")
    return [sound_prompt("--prompt", 0, text)]


def read_prompts(path: str) -> tuple[list[Prompt], list[str]]:
    """A prompt a line of a text file or of standard input (``-``), or a record each.

    Records (.jsonl, .json, .csv, .parquet) have ``prompt``, or ``instruction`` and perhaps
    ``input``. The second list names the columns that nobody reads.

    Raises:
        UserError: nothing to read, or prompts that are none; the first ten are named.
    """
    suffix = Path(path).suffix.lower()
    if path != _STDIN and suffix not in _LINES:
        if suffix not in READERS:
            known = ", ".join((".txt", *READERS))
            raise UserError.single("--prompts", f"{path} is none of {known}. Convert it.")
        return _of_records(path, read_file(Path(path), where="--prompts")[0])
    text = _standard_input("--prompts") if path == _STDIN else _file("--prompts", path)
    source = "standard input" if path == _STDIN else path
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError.single(source, "holds no prompts. Write one a line.")
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    for index, (number, line) in enumerate(lines):
        try:
            prompts.append(sound_prompt(f"{source}:{number}", index, line.removesuffix("\r")))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError.first_of(problems)
    return prompts, []


def read_shots(given: Sequence[str]) -> list[Shot]:
    """Each of ``given`` is a shot, "quick => fast", or a file with one a line.

    Raises:
        UserError: a file that is not there, or a line without an arrow; all are named.
    """
    shots: list[Shot] = []
    problems: list[Problem] = []
    for one in given:
        inline = ARROW in one
        lines = [one] if inline else _file("--shots", one).split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            prompt, arrow, answer = (part.strip() for part in line.partition(ARROW))
            if arrow and prompt and answer:
                shots.append(Shot(prompt, answer))
            else:
                where = "--shots" if inline else f"{one}:{number}"
                problems.append(
                    Problem(
                        where, f"expected 'prompt {ARROW} answer', found {line.strip()[:40]!r}."
                    )
                )
    if problems:
        raise UserError.first_of(problems)
    return shots


def prompt_text(
    template: Template,
    prompt: Prompt,
    *,
    shots: Sequence[Shot] = (),
    before: Sequence[Message] = (),
) -> str:
    """What the model reads: the prompt in its template, behind the shots and the turns so far.

    Raises:
        UserError: the template cannot write it.
    """
    instruction = prompt.instruction
    if shots and template.writes_turns:
        shown = [
            message
            for shot in shots
            for message in (Message("user", shot.prompt), Message("assistant", shot.answer))
        ]
        before = [*shown, *before]
    elif shots and prompt.context:
        raise UserError.single(
            f"prompt {prompt.index}",
            f"has an input, which the shots above it do not show. Put it into the prompt, or use "
            f"a template that writes turns ({template.name} does not).",
        )
    elif shots:
        instruction = shots_above(shots, instruction)
    try:
        return template.prompt(instruction, prompt.context, before)
    except UnfitRowError as error:
        raise UserError.single(f"prompt {prompt.index}", f"{error} Use --template raw.") from error


def shots_above(shots: Sequence[Shot], prompt: str) -> str:
    """The shots as lines, and the prompt as one that is still to be completed."""
    prompt = prompt.rstrip().removesuffix(ARROW).rstrip()  # it may have its arrow already
    lines = [f"{shot.prompt} {ARROW} {shot.answer}" for shot in shots]
    return "\n".join([*lines, f"{prompt} {ARROW}"])


def _of_records(path: str, records: Sequence[Any]) -> tuple[list[Prompt], list[str]]:
    problems: list[Problem] = []
    prompts = []
    unread: set[str] = set()
    for index, record in enumerate(records):
        where = f"{path}: row {index}"
        if not isinstance(record, dict):
            problems.append(Problem(where, f"expected an object, found {kind(record)}."))
            continue
        key = "prompt" if "prompt" in record else "instruction"
        text, context = record.get(key), record.get("input")
        read = {"prompt"} if key == "prompt" else {"instruction", "input"}
        unread |= record.keys() - read
        context = "" if context is None or key == "prompt" else context
        wrong = [
            Problem(f"{where}: {name}", f"expected text, found {kind(value)}.")
            for name, value in ((key, text), ("input", context))
            if not isinstance(value, str)
        ]
        if wrong:
            problems += wrong
            continue
        try:
            sound = sound_prompt(f"{where}: {key}", index, str(text))
            prompts.append(replace(sound, context=context))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError.first_of(problems)
    if not prompts:
        raise UserError.single(path, "holds no prompts. Write one a row.")
    return prompts, sorted(map(one_line, unread))


def sound_prompt(where: str, index: int, text: str) -> Prompt:
    """A prompt, if ``text`` can be one.

    Args:
        where: it comes from, for the message.

    Raises:
        UserError: it is empty, too long, or no text.
    """
    if not text.strip():
        raise UserError.single(where, "empty. Write what is asked.")
    if len(text) > MAX_CHARACTERS:
        raise UserError.single(
            where, f"{len(text):,} characters, expected at most {MAX_CHARACTERS:,}. Shorten it."
        )
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError.single(where, "holds what is no text (NUL, or bytes that are not UTF-8).")
    return Prompt(index, text)


def _standard_input(flag: str) -> str:
    if sys.stdin is None or sys.stdin.isatty():
        said = "- is standard input, which is the terminal. Pipe text into it, or use --chat."
        raise UserError.single(flag, said)
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError.single(flag, "standard input is not UTF-8. Convert it.") from error


def _file(where: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError.single(path, "not UTF-8. Save the file as UTF-8.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError.single(where, f"{path!r} cannot be read: {reason}. Correct it.") from error
