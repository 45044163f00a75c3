"""YAML as its 1.2 core schema reads it, and nothing beyond plain data.

PyYAML implements YAML 1.1, where ``3e-4`` is a string, ``no`` is False, ``010`` is 8 and
``12:30:45`` is 45045. So only its parser is used: the events are turned into values here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.reader import Reader

from recipe.settings.problem import Problem, UserError

KeyPath = tuple[str, ...]

_INTEGER = re.compile(r"[-+]?[0-9]+")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CONSTANTS: dict[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
}
_MAX_DIGITS = 18
_MAX_DEPTH = 20
_ITEM = "[]"


@dataclass(frozen=True)
class Document:
    """What a text says, and what is wrong with it.

    ``lines`` gives the line of every key outside lists. ``unreadable`` are keys whose value is
    missing from ``values`` because a problem names it already. Unless ``whole``, reading stopped
    early and ``values`` mean nothing.
    """

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    unreadable: frozenset[KeyPath] = frozenset()
    whole: bool = True


def parse(text: str, *, name: str) -> dict[str, Any]:
    """The mapping that ``text`` holds.

    Raises:
        UserError: with one ``name:line`` problem for every mistake that could be found.
    """
    document = read(text, name=name)
    if document.problems:
        raise UserError(document.problems)
    return document.values


def read(text: str, *, name: str) -> Document:
    """As ``parse``, but the problems come back beside whatever could be read."""

    def where(line: int, path: KeyPath) -> str:
        return f"{name}:{line}: {dotted(path)}" if path else f"{name}:{line}"

    reading = _Reading(text, where)
    value = reading.root()
    if reading.whole and value is not _UNREADABLE and not isinstance(value, dict):
        reading.report(1, "expected sections such as 'model:', found none. Write at least one.")
    values = value if isinstance(value, dict) else {}
    return Document(
        values,
        reading.lines,
        tuple(reading.problems),
        frozenset(reading.unreadable),
        whole=reading.whole and isinstance(value, dict),
    )


def read_value(text: str, *, where: str) -> Any:
    """One value, as it would stand after ``key:``.

    Raises:
        UserError: every problem at ``where``.
    """
    reading = _Reading(text, lambda line, path: where)
    value = reading.root()
    if reading.problems:
        raise UserError(reading.problems)
    if rest := text[reading.end :].strip():
        raise UserError.single(where, f"{rest!r} would not be read. Quote the value from ' to '.")
    return value


def dotted(path: KeyPath) -> str:
    """``training.learning_rate``, always on one line."""
    return ".".join(one_line(key) for key in path)


def one_line(text: str) -> str:
    """``text``, escaped if it would break a message's line."""
    return text if text.isprintable() else repr(text)


def plain_scalar(text: str) -> object:
    """The value of an unquoted scalar.

    Raises:
        ValueError: an integer that YAML versions read differently, or that is absurdly long.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _LEADING_ZERO.fullmatch(text):
        raise ValueError(
            f"{text} starts with 0, which is octal to YAML 1.1 and decimal to 1.2. "
            "Write it without the 0, or in quotes if it is a name."
        )
    if _INTEGER.fullmatch(text):
        if (digits := len(text.lstrip("+-"))) > _MAX_DIGITS:
            raise ValueError(
                f"a number of {digits} digits, expected at most {_MAX_DIGITS}. "
                "Put it in quotes if it is a name."
            )
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


class _Unreadable:
    """Stands for a value that a problem names already."""


_UNREADABLE = _Unreadable()


class _TooDeepError(Exception):
    pass


class _Reading:
    """One pass over the parser's events. Recursion is bounded by ``_MAX_DEPTH``."""

    def __init__(self, text: str, where: Callable[[int, KeyPath], str]) -> None:
        self.problems: list[Problem] = []
        self.lines: dict[KeyPath, int] = {}
        self.unreadable: set[KeyPath] = set()
        self.whole = True
        self.end = len(text)
        self._where = where
        self._text = text
        # The loader refuses control characters at once; ``root`` names all of them instead.
        # Any, because types-PyYAML leaves the methods that hand out events without types.
        self._loader: Any = yaml.SafeLoader(Reader.NON_PRINTABLE.sub(" ", text))

    def report(self, line: int, message: str, path: KeyPath = ()) -> None:
        outside_lists = path if _ITEM not in path else path[: path.index(_ITEM)]
        self.problems.append(Problem(self._where(line, outside_lists), message))

    def root(self) -> Any:
        """The document's value; ``whole`` is False afterwards if the text is no YAML."""
        self._report_control_characters()
        if self.problems:
            self.whole = False
            return _UNREADABLE
        try:
            return self._document()
        except _TooDeepError:
            pass
        except yaml.MarkedYAMLError as error:
            self._report_syntax(error)
        except (ValueError, OverflowError):
            # PyYAML hands escapes such as "\UFFFFFFFF" to chr() unchecked.
            self.report(self._loader.line + 1, "no such character. Correct the \\ escape.")
        self.whole = False
        return _UNREADABLE

    def _report_control_characters(self) -> None:
        for number, line in enumerate(self._text.split("\n"), start=1):
            if match := Reader.NON_PRINTABLE.search(line):
                self.report(
                    number,
                    f"control character U+{ord(match.group()):04X}. Delete it from the text.",
                )

    def _report_syntax(self, error: yaml.MarkedYAMLError) -> None:
        mark = error.problem_mark or error.context_mark
        said = " ".join((error.problem or "syntax error").split())
        remedy = "Check the colons, quotes and indentation up to this line."
        if "'\\t'" in said:
            remedy = "Indent with spaces, never with tabs."
        elif "cannot start any token" in said:
            remedy = "Put the value in quotes."
        self.report(mark.line + 1 if mark else 1, f"not valid YAML: {said}. {remedy}")

    def _document(self) -> Any:
        loader = self._loader
        loader.get_event()
        if loader.check_event(yaml.StreamEndEvent):
            return None
        loader.get_event()
        value = self._node((), 0)
        loader.get_event()
        if not loader.check_event(yaml.StreamEndEvent):
            line = loader.peek_event().start_mark.line + 1
            self.report(line, "a second document starts. Keep one, without '---' inside.")
        return value

    def _node(self, path: KeyPath, depth: int) -> Any:
        event = self._loader.get_event()
        line = event.start_mark.line + 1
        self.end = event.end_mark.index
        if depth > _MAX_DEPTH:
            self.report(line, f"nested deeper than {_MAX_DEPTH} levels. Flatten it.", path)
            raise _TooDeepError
        if isinstance(event, yaml.AliasEvent):
            self.report(line, f"alias *{event.anchor}. Write the value out, or quote it.", path)
            return _UNREADABLE
        plain = self._is_undecorated(event, line, path)
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, line, path)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(path, depth)
        else:
            value = self._mapping(path, depth)
        return value if plain else _UNREADABLE

    def _is_undecorated(self, event: Any, line: int, path: KeyPath) -> bool:
        """Report an anchor and a tag; True unless the tag changes what the value means."""
        if event.anchor is not None:
            self.report(line, f"anchor &{event.anchor}. Delete it: aliases are not read.", path)
        if event.tag is not None:
            self.report(line, f"tag {event.tag!r}. Delete it: only plain data is read.", path)
        return event.tag is None

    def _scalar(self, event: yaml.ScalarEvent, line: int, path: KeyPath) -> Any:
        text: str = event.value
        if match := Reader.NON_PRINTABLE.search(text):
            code = f"U+{ord(match.group()):04X}"
            self.report(line, f"control character {code} in the value. Delete it.", path)
            return _UNREADABLE
        if event.style is not None:
            return text
        try:
            return plain_scalar(text)
        except ValueError as error:
            self.report(line, str(error), path)
            return _UNREADABLE

    def _sequence(self, path: KeyPath, depth: int) -> Any:
        items = []
        while not self._loader.check_event(yaml.SequenceEndEvent):
            items.append(self._node((*path, _ITEM), depth + 1))
        self.end = self._loader.get_event().end_mark.index
        return _UNREADABLE if _UNREADABLE in items else items

    def _mapping(self, path: KeyPath, depth: int) -> Any:
        values: dict[str, Any] = {}
        seen: dict[str, int] = {}
        readable = True
        while not self._loader.check_event(yaml.MappingEndEvent):
            line = self._loader.peek_event().start_mark.line + 1
            key = self._key(path, depth)
            inside = (*path, key) if isinstance(key, str) else (*path, _ITEM)
            value = self._node(inside, depth + 1)
            if not isinstance(key, str):
                readable = False
            elif key in seen:
                twice = f"stands twice, first on line {seen[key]}. Keep one."
                self.report(line, twice, inside)
            else:
                seen[key] = line
                readable &= self._keep(values, inside, value, line)
        self.end = self._loader.get_event().end_mark.index
        # Below a section, a value with a hole in it would only be reported a second time.
        return values if readable or depth < 2 else _UNREADABLE

    def _keep(self, values: dict[str, Any], path: KeyPath, value: Any, line: int) -> bool:
        if _ITEM not in path:
            self.lines[path] = line
        if value is _UNREADABLE:
            self.unreadable.add(path)
            return False
        values[path[-1]] = value
        return True

    def _key(self, path: KeyPath, depth: int) -> Any:
        """The key's text, or ``_UNREADABLE`` after reporting why it is none."""
        line = self._loader.peek_event().start_mark.line + 1
        reported = len(self.problems)
        key = self._node((*path, _ITEM), depth + 1)
        if isinstance(key, str):
            return key
        if len(self.problems) == reported:
            self.report(line, f"the key {key!r} is no text. Put it in quotes.", path)
        return _UNREADABLE
