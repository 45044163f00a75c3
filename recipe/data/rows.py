"""Rows of instruction data: read, sliced, and checked field by field before anything is trained."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.settings import DataSettings, Problem, UserError, row_range

FIELDS = ("instruction", "input", "output")
LOCAL_SUFFIXES = (".json", ".jsonl")
_SHOWN = 10


@dataclass(frozen=True)
class Row:
    """One instruction row; ``index`` counts from 0 in the source, before any slicing."""

    index: int
    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Rows:
    """What a run trains on and is judged on, and what was left out on the way."""

    train: list[Row]
    held_out: list[Row]
    sha256: str
    empty: list[int] = field(default_factory=list)
    ignored_columns: list[str] = field(default_factory=list)


def read_rows(settings: DataSettings) -> Rows:
    """Read ``data.path``, take ``rows`` and ``held_out`` of it, and check every row taken.

    Rows whose output is empty train nothing: they are dropped and their indices returned.

    Raises:
        UserError: the source cannot be read, a slice reaches past its end, or rows are broken;
            the first ten broken rows are named and all are counted.
    """
    records, sha256 = _records(settings)
    if not records:
        raise UserError.single("data.path", f"{settings.path} holds no rows.")
    train_span = _slice("data.rows", settings.rows, len(records), source=settings.path)
    held_span = range(0)
    if settings.held_out:
        held_span = _slice("data.held_out", settings.held_out, len(records), source=settings.path)
    columns = _columns(records, settings)
    problems: list[Problem] = []
    train = _checked(records, train_span, settings.path, problems)
    held_out = _checked(records, held_span, settings.path, problems)
    if problems:
        raise UserError(first(problems))
    empty = [row.index for row in (*train, *held_out) if not row.output.strip()]
    rows = Rows(
        train=[row for row in train if row.output.strip()],
        held_out=[row for row in held_out if row.output.strip()],
        sha256=sha256,
        empty=empty,
        ignored_columns=sorted(columns - set(FIELDS)),
    )
    if not rows.train:
        raise UserError.single("data.path", f"every row of {settings.path} has an empty output.")
    return rows


def _records(settings: DataSettings) -> tuple[list[Any], str]:
    path = Path(settings.path)
    if path.is_file():
        if settings.split != "train":
            raise UserError.single(
                "data.split",
                f"{settings.split} is of a hub data set, but {path} is a file. Leave it out.",
            )
        return _local(path)
    if path.suffix in LOCAL_SUFFIXES or path.is_absolute() or path.is_dir():
        raise UserError.single(
            "data.path", f"no file {settings.path} (looked from {Path.cwd()}). Correct the path."
        )
    return _from_hub(settings)


def _local(path: Path) -> tuple[list[Any], str]:
    if path.suffix not in LOCAL_SUFFIXES:
        raise UserError.single(
            "data.path", f"{path} is neither .json nor .jsonl. Convert it to one of them."
        )
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError.single(
            f"{path}:{line}",
            f"byte {content[error.start]:#04x} is not UTF-8. Save the file as UTF-8.",
        ) from None
    records = _json_list(path, text) if path.suffix == ".json" else _json_lines(path, text)
    return records, hashlib.sha256(content).hexdigest()


def _json_list(path: Path, text: str) -> list[Any]:
    try:
        loaded = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            raise UserError.single(
                f"{path}:{getattr(error, 'lineno', 1)}",
                "a second JSON value begins here. If each line is a row, rename it to .jsonl.",
            ) from None
        raise UserError.single(*_broken_json(path, error)) from None
    if not isinstance(loaded, list):
        found = "an object" if isinstance(loaded, dict) else type(loaded).__name__
        raise UserError.single(
            str(path), f"expected a JSON list of rows, found {found}. Keep only the list."
        )
    return loaded


def _json_lines(path: Path, text: str) -> list[Any]:
    records, problems = [], []
    if text.lstrip().startswith("["):
        raise UserError.single(
            str(path), "begins with [, so it is a JSON list of rows. Rename the file to .json."
        )
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError) as error:
            problems.append(Problem(*_broken_json(path, error, line=number)))
    if problems:
        raise UserError(first(problems))
    return records


def _broken_json(
    path: Path, error: json.JSONDecodeError | RecursionError, line: int | None = None
) -> tuple[str, str]:
    if isinstance(error, RecursionError):
        return f"{path}:{line or 1}", "nested too deeply to be a row. Correct the file."
    where = f"{path}:{line or error.lineno}"
    reason = error.msg.removesuffix(" at")
    return where, f"not JSON: {reason} at column {error.colno}. Correct the line."


def _from_hub(settings: DataSettings) -> tuple[list[Any], str]:
    # A JSON file needs none of this library, and importing it costs a second.
    import datasets

    try:
        dataset = datasets.load_dataset(settings.path, split=settings.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError.single(
            "data.path",
            f"{settings.path} is no local file, and as a hub data set it could not be loaded "
            f"({reason}). Correct the name, log in with `hf auth login`, or name a local file.",
        ) from error
    records = dataset.to_list()
    canonical = json.dumps(records, sort_keys=True, ensure_ascii=False).encode()
    return records, hashlib.sha256(canonical).hexdigest()


def _slice(where: str, text: str | None, total: int, *, source: str) -> range:
    start, stop = row_range(text) if text else (0, None)
    taken = range(start, total if stop is None else stop)
    if taken.stop > total or not taken:
        raise UserError.single(
            where,
            f"asks for {text}, but {source} holds {total} rows (0:{total}). Name rows that are "
            "there; data.rows=null data.held_out=null trains on all.",
        )
    return taken


def _columns(records: Sequence[Any], settings: DataSettings) -> set[str]:
    """The columns of the source, which must be those of the Alpaca form."""
    columns = {key for record in records if isinstance(record, Mapping) for key in record}
    missing = {"instruction", "output"} - columns
    if missing:
        raise UserError.single(
            settings.path,
            f"columns {_listed(columns)} found, but the alpaca format needs instruction and "
            f"output (input may be absent); missing: {_listed(missing)}. Rename the columns.",
        )
    return columns


def _checked(
    records: Sequence[Any], taken: Iterable[int], source: str, problems: list[Problem]
) -> list[Row]:
    rows = []
    for index in taken:
        record = records[index]
        if not isinstance(record, Mapping):
            found = f"expected an object, found {_kind(record)}"
            problems.append(Problem(f"{source}: row {index}", f"{found}. Correct or remove it."))
            continue
        wrong = [
            Problem(
                f"{source}: row {index}: {name}",
                f"expected text, found {_kind(record.get(name))}. Correct or remove the row.",
            )
            for name in FIELDS
            if not isinstance(record.get(name, "" if name == "input" else None), str)
        ]
        if not wrong and not record["instruction"].strip():
            where = f"{source}: row {index}: instruction"
            wrong.append(Problem(where, "empty. Correct or remove the row."))
        problems.extend(wrong)
        if not wrong:
            texts = {name: record.get(name, "") for name in FIELDS}
            rows.append(Row(index=index, **texts))
    return rows


def _kind(value: object) -> str:
    if value is None:
        return "nothing (null or absent)"
    if isinstance(value, str):
        return "text"
    names = {dict: "an object", list: "a list", bool: "a boolean"}
    return names.get(type(value), "a number")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def first(problems: list[Problem]) -> list[Problem]:
    """The first ten of many problems, and how many there are."""
    if len(problems) <= _SHOWN:
        return problems
    rest = Problem("and", f"{len(problems) - _SHOWN} more of {len(problems)} in all.")
    return [*problems[:_SHOWN], rest]
