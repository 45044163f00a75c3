"""What the columns of a record mean: Alpaca, prompt/completion, chat messages, ShareGPT.

Each reader turns a record into the messages of a ``Row``, or says field by field what is wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from recipe.data.sources import MAX_CHARACTERS, RepeatedKey, kind
from recipe.settings import UserError

_REMEDY = "Correct or remove the row."
_SHOWN = 10
_SHOWN_CHARACTERS = 40


class Message(NamedTuple):
    """One turn. ``role`` is ``system``, ``user`` or ``assistant``; ``context`` is an Alpaca row's
    ``input``, which a template may set apart from the instruction.
    """

    role: str
    content: str
    context: str = ""


@dataclass
class Reading:
    """One record while it is read: ``wrong`` collects (field, what is wrong with it)."""

    record: Mapping[str, Any]
    wrong: list[tuple[str, str]] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)

    def text(self, name: str, value: object, *, may_be_empty: bool = False) -> str:
        """``value``, which must be text; what is wrong with it is kept."""
        objection = _text_objection(value, may_be_empty=may_be_empty)
        if objection:
            self.wrong.append((name, objection))
            return ""
        return str(value)


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Format:
    """``needs`` and ``may`` are columns; ``template`` is what suits it unless another is asked."""

    name: str
    needs: frozenset[str]
    may: frozenset[str]
    template: str
    read: Callable[[Reading], Messages]


def read_messages(chosen: Format, record: object) -> tuple[Messages, Reading]:
    """The messages of one record; they mean nothing if ``Reading.wrong`` is not empty."""
    if not isinstance(record, Mapping):
        reading = Reading({})
        reading.wrong.append(("", f"expected an object, found {kind(record)}. {_REMEDY}"))
        return (), reading
    reading = Reading(record)
    if isinstance(record, RepeatedKey):
        reading.wrong.append((record.key, f"stands twice in the row. {_REMEDY}"))
        return (), reading
    return chosen.read(reading), reading


def find_format(asked: str | None, columns: set[str], records: Sequence[Any], path: str) -> Format:
    """The format that was asked for, or the one that the columns fit.

    Raises:
        UserError: the columns fit none, or several, or not the one that was asked for.
    """
    known = {name: _with_its_column(one, columns, records) for name, one in FORMATS.items()}
    if asked is not None:
        chosen = known[asked]
        if chosen.needs <= columns:
            return chosen
        raise UserError.single(
            path,
            f"columns {_listed(columns)} found, but the {asked} format needs "
            f"{_listed(chosen.needs)}. Rename the columns, or correct data.format.",
        )
    fitting = [one for one in known.values() if one.needs <= columns]
    if len(fitting) > 1:  # a column of nulls is none
        used = {key for r in records if isinstance(r, Mapping) for key in r if r[key] is not None}
        fitting = [one for one in fitting if one.needs <= used] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " and ".join(one.name for one in fitting)
        raise UserError.single(
            path,
            f"columns {_listed(columns)} fit the formats {names}. Say which in data.format.",
        )
    needed = "; ".join(f"{one.name}: {_listed(one.needs)}" for one in FORMATS.values())
    raise UserError.single(
        path,
        f"columns {_listed(columns)} found, expected those of a format ({needed}). Rename them.",
    )


def _with_its_column(one: Format, columns: set[str], records: Sequence[Any]) -> Format:
    """``conversations`` is ShareGPT's column; with ``role`` and ``content`` inside, messages'."""
    if one.name not in ("messages", "sharegpt") or "messages" in columns:
        return one
    if not _has_roles(records):
        return one
    if one.name == "sharegpt":
        return replace(one, needs=frozenset(["conversations with from and value"]))
    return replace(
        one, needs=frozenset(["conversations"]), read=partial(_chat, column="conversations")
    )


def _has_roles(records: Sequence[Any]) -> bool:
    for record in records:
        turns = record.get("conversations") if isinstance(record, Mapping) else None
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            # Columnar files write null where a turn has no such key.
            return turns[0].get("role") is not None and turns[0].get("from") is None
    return False


def _alpaca(reading: Reading) -> Messages:
    record = reading.record
    instruction = reading.text("instruction", record.get("instruction"))
    # Columnar files write null where a row has none.
    given = record.get("input")
    context = "" if given is None else reading.text("input", given, may_be_empty=True)
    if not context.strip():  # as the template would put a heading over nothing
        context = ""
    output = reading.text("output", record.get("output"), may_be_empty=True)
    return Message("user", instruction, context), Message("assistant", output)


def _prompt_completion(reading: Reading) -> Messages:
    prompt = reading.text("prompt", reading.record.get("prompt"))
    completion = reading.text("completion", reading.record.get("completion"), may_be_empty=True)
    return Message("user", prompt), Message("assistant", completion)


_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_ROLES = {name: name for name in ("system", "user", "assistant")}


def _chat(reading: Reading, column: str = "messages") -> Messages:
    turns = _turns(reading, column, role="role", content="content", roles=_ROLES)
    return _in_order(reading, column, turns)


def _sharegpt(reading: Reading) -> Messages:
    column = "conversations"
    turns = _turns(reading, column, role="from", content="value", roles=_SHAREGPT_ROLES)
    system = reading.record.get("system")
    if system not in (None, ""):
        text = reading.text("system", system)
        if turns and turns[0].role == "system":
            reading.wrong.append(("system", f"and {column}[0] is a system turn too. {_REMEDY}"))
        turns.insert(0, Message("system", text))
    return _in_order(reading, column, turns)


def _turns(
    reading: Reading, column: str, *, role: str, content: str, roles: Mapping[str, str]
) -> list[Message]:
    value = reading.record.get(column)
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind(value)
        in_cell = "A CSV cell holds no list: use JSONL or Parquet."
        remedy = in_cell if isinstance(value, str) else _REMEDY
        reading.wrong.append((column, f"expected a list of turns, found {found}. {remedy}"))
        return []
    turns = []
    for number, turn in enumerate(value):
        where = f"{column}[{number}]"
        if not isinstance(turn, Mapping):
            reading.wrong.append((where, f"expected an object, found {kind(turn)}. {_REMEDY}"))
            continue
        if isinstance(turn, RepeatedKey):
            reading.wrong.append((f"{where}.{turn.key}", f"stands twice in the turn. {_REMEDY}"))
            continue
        reading.ignored |= {
            f"{column}[].{key}"
            for key, extra in turn.items()
            if key not in (role, content) and extra is not None
        }
        meant = _role(reading, f"{where}.{role}", turn.get(role), roles)
        text = reading.text(f"{where}.{content}", turn.get(content), may_be_empty=meant != "user")
        turns.append(Message(meant, text))
    return turns


def _role(reading: Reading, where: str, said: object, roles: Mapping[str, str]) -> str:
    if isinstance(said, str) and said in roles:
        return roles[said]
    found = repr(said[:40]) if isinstance(said, str) else kind(said)
    expected = ", ".join(roles)
    reading.wrong.append((where, f"expected one of {expected}; found {found}. {_REMEDY}"))
    return ""


def _in_order(reading: Reading, column: str, turns: list[Message]) -> Messages:
    """An optional system turn, then user and assistant in turns, the assistant last."""
    if reading.wrong:
        return ()
    spoken = turns[1:] if turns[0].role == "system" else turns
    offset = len(reading.record[column]) - len(spoken)
    for number, turn in enumerate(spoken):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            what = f"expected the {expected}'s turn, found the {turn.role}'s. {_REMEDY}"
            reading.wrong.append((f"{column}[{number + offset}]", what))
            return ()
    if not spoken or len(spoken) % 2:
        reading.wrong.append((column, f"no assistant turn at its end to train on. {_REMEDY}"))
    return tuple(turns)


def _text_objection(value: object, *, may_be_empty: bool) -> str | None:
    if not isinstance(value, str):
        return f"expected text, found {kind(value)}. {_REMEDY}"
    if not may_be_empty and not value.strip():
        return f"expected text, found nothing in it. {_REMEDY}"
    if len(value) > MAX_CHARACTERS:
        return (
            f"expected at most {MAX_CHARACTERS:,} characters, found {len(value):,}. "
            "Split or remove the row."
        )
    if "\0" in value:
        return f"expected text, found a NUL character at {value.index(chr(0))}. {_REMEDY}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(value[error.start]):04X}"
        return f"expected text, found half of a surrogate pair ({code}). {_REMEDY}"
    return None


def _listed(names: set[str] | frozenset[str]) -> str:
    shown = [
        name if len(name) <= _SHOWN_CHARACTERS else f"{name[: _SHOWN_CHARACTERS - 1]}…"
        for name in sorted(names)[:_SHOWN]
    ]
    return ", ".join([*shown, "…"] if len(names) > _SHOWN else shown) or "none"


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format(
            "alpaca",
            frozenset(["instruction", "output"]),
            frozenset(["input"]),
            "alpaca",
            _alpaca,
        ),
        Format(
            "prompt_completion",
            frozenset(["prompt", "completion"]),
            frozenset(),
            "raw",
            _prompt_completion,
        ),
        Format("messages", frozenset(["messages"]), frozenset(), "chat", _chat),
        Format("sharegpt", frozenset(["conversations"]), frozenset(["system"]), "chat", _sharegpt),
    )
}
