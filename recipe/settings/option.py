"""One key of the settings: its type, its default, and what to say about a wrong value."""

import contextlib
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ConfigDict, TypeAdapter, ValidationError

from recipe.settings.yaml_text import one_line, plain_scalar

# Strict: no text for a number, no 1 for true. A whole number is still a number.
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_YAML_1_1 = {"yes": True, "on": True, "y": True, "no": False, "off": False, "n": False}
_SHOWN_CHOICES = 14
_SHOWN_LENGTH = 60


class Absent(Enum):
    """Why an option has no default to show."""

    REQUIRED = "required"
    UNREAD = "set by the library"


@dataclass(frozen=True)
class Shown:
    """``Annotated`` metadata: how a type is described when its structure does not say it."""

    text: str


@dataclass(frozen=True)
class Option:
    """A key. ``type`` is what pydantic validates; ``inner`` are the keys of its mapping."""

    name: str
    type: Any
    default: object = Absent.UNREAD
    help: str = ""
    inner: Mapping[str, "Option"] | None = None

    @property
    def expected(self) -> str:
        """The type in words."""
        return describe(self.type)

    @property
    def choices(self) -> tuple[object, ...]:
        """All literal values that the type allows, including those that ``expected`` omits."""
        return tuple(_choices(self.type))

    def objection(self, value: object) -> str | None:
        """Found, expected and remedy in one line, or None if ``value`` is fine."""
        adapter: TypeAdapter[Any] = TypeAdapter(self.type, config=_STRICT)

        def fits(candidate: object) -> bool:
            try:
                adapter.validate_python(candidate)
            except ValidationError:
                return False
            return _is_finite(candidate)

        if fits(value):
            return None
        remedies = (text for better, text in self._corrections(value) if fits(better))
        excluded = "" if _is_finite(value) else " (never nan or infinity)"
        sentence = f"expected {self.expected}{excluded}, found {found(value)}."
        return " ".join([sentence, *list(remedies)[:1]])

    def _corrections(self, value: object) -> Iterator[tuple[object, str]]:
        """What may have been meant, best guess first; the caller keeps what fits."""
        if isinstance(value, str):
            yield from self._text_corrections(value)
        elif isinstance(value, bool):
            if value is False and "no" in self.choices:
                yield "no", "Write no."
            yield str(value).lower(), f"Put it in quotes: '{str(value).lower()}'."
        elif isinstance(value, int | float):
            if isinstance(value, float) and value.is_integer():
                yield int(value), f"Write {int(value)}."
            if value in (0, 1):
                yield bool(value), f"Write {str(bool(value)).lower()}."
            yield str(value), f"Put it in quotes: '{value}'."
            yield [value], f"Write [{value}]."
        elif isinstance(value, list) and len(value) == 1:
            yield value[0], "Write it without the brackets."

    def _text_corrections(self, value: str) -> Iterator[tuple[object, str]]:
        stripped = value.strip()
        with contextlib.suppress(ValueError):
            yield plain_scalar(stripped), "Remove the quotes."
        with contextlib.suppress(ValueError):
            # 0x10, 1_000 and 1,000: numbers to YAML 1.1, to Python or to a reader.
            number = int(stripped.replace(",", ""), 0)
            yield number, f"Write {number}."
        if (truth := _YAML_1_1.get(stripped.lower())) is not None:
            yield truth, f"Write {str(truth).lower()}."
        names = [choice for choice in self.choices if isinstance(choice, str)]
        for name in difflib.get_close_matches(value.lower(), names, n=1, cutoff=0.5):
            yield name, f"Did you mean '{name}'?"
        yield [value], f"Write [{one_line(value)}]."


def describe(kind: Any) -> str:
    """A type in words: ``a number above 0 or null``."""
    if kind is None or kind is NoneType:
        return "null"
    if kind is Any:
        return "anything"
    if kind in _WORDS:
        return _WORDS[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _describe_limits(arguments[0], arguments[1:])
    if origin is Literal:
        return _alternatives([_literal(value) for value in arguments])
    if origin in (Union, UnionType):
        return _describe_union(arguments)
    if kind in (list, tuple, set) or origin in (list, tuple, set):
        items = {describe(item) for item in arguments if item not in (Any, ...)}
        return f"a list (each item: {_alternatives(sorted(items))})" if items else "a list"
    if len(arguments) == 2 and arguments[1] is not Any:
        return f"a mapping (each value: {describe(arguments[1])})"
    return "a mapping"


def found(value: object) -> str:
    """A value as the user wrote it, in words and never long."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    kind = "string" if isinstance(value, str) else "list" if isinstance(value, list) else "mapping"
    shown = repr(value)
    if len(shown) > _SHOWN_LENGTH:
        shown = f"{shown[: _SHOWN_LENGTH - 1]}…"
    return f"the {kind} {shown}"


def _describe_limits(kind: Any, limits: tuple[Any, ...]) -> str:
    words = [describe(kind)]
    for limit in limits:
        match limit:
            case Shown(text):
                return text
            case Gt(gt=bound):
                words.append(f"above {bound}")
            case Ge(ge=bound):
                words.append(f"of at least {bound}")
            case Lt(lt=bound):
                words.append(f"below {bound}")
            case Le(le=bound):
                words.append(f"of at most {bound}")
            case MinLen():
                words.append("that is not empty")
    sentence = re.sub(r"of at least (\S+) of at most (\S+)", r"from \1 to \2", " ".join(words))
    return re.sub(r"(of at least|above) (\S+) below", r"\1 \2 and below", sentence)


def _describe_union(members: tuple[Any, ...]) -> str:
    ordered = sorted(members, key=lambda member: member is NoneType)
    words: list[str] = []
    for member in ordered:
        if get_origin(member) is Literal:
            words += [_literal(value) for value in get_args(member)]
        elif member is bool:
            words += ["true", "false"]
        else:
            words.append(describe(member))
    return _alternatives(words)


def _alternatives(words: list[str]) -> str:
    if len(words) > _SHOWN_CHOICES:
        return f"one of {len(words)} names that configs/OPTIONS.md lists"
    return " or ".join([*([", ".join(words[:-1])] if words[1:] else []), *words[-1:]])


def _literal(value: object) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value).lower()


def _choices(kind: Any) -> Iterator[object]:
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    elif get_origin(kind) in (Union, UnionType, Annotated):
        for member in get_args(kind):
            yield from _choices(member)


def _is_finite(value: object) -> bool:
    """False for a nan or an infinity anywhere inside, also where the type says nothing."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(_is_finite(item) for item in value.values())
    return not isinstance(value, list | tuple) or all(_is_finite(item) for item in value)
