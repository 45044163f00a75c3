"""``data.path`` → records as they stand in the file or the hub data set, and their hash.

Local files are read here and not through ``datasets``, whose messages name neither line nor field
and which fills absent values silently.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.settings import DataSettings, Problem, UserError

# Far beyond any context of a Llama model. A longer text is another file that got in by mistake, and
# a tokenizer would need minutes and gigabytes for it.
MAX_CHARACTERS = 1_000_000


class RepeatedKey(dict[str, Any]):
    """A JSON object in which ``key`` stands twice; json itself keeps the last value silently."""

    key = ""


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value in a Parquet file that Python cannot hold, and says why."""

    reason: str


def read_records(settings: DataSettings) -> tuple[list[Any], str]:
    """Return the records of ``data.path`` and a sha256 of them.

    Raises:
        UserError: nothing is there, or it cannot be read; broken lines of a JSONL or CSV file are
            all counted and the first ten named.
    """
    path = Path(settings.path)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:  # such as a name of 5000 letters
        reason = f"{path} cannot be read: {error.strerror}. Correct the path."
        raise UserError.single("data.path", reason) from error
    if is_file:
        if settings.split != "train":
            raise UserError.single(
                "data.split",
                f"{settings.split} is of a hub data set, but {path} is a file. Leave it out.",
            )
        return read_file(path)
    if is_folder:
        raise UserError.single("data.path", f"{path} is a folder. Name a file in it.")
    if path.suffix.lower() in READERS or path.is_absolute():
        raise UserError.single(
            "data.path", f"no file {settings.path} (looked from {Path.cwd()}). Correct the path."
        )
    if "/" not in settings.path:
        # datasets takes such a name for one of its own loaders, which may read this very folder.
        raise UserError.single(
            "data.path",
            f"{settings.path} is neither a file here nor a hub id such as tatsu-lab/alpaca. "
            "Correct it.",
        )
    return _from_hub(settings)


def read_file(path: Path, *, where: str = "data.path") -> tuple[list[Any], str]:
    """Return the records of a local file and the sha256 of its bytes.

    Args:
        where: what named the file, for the message.

    Raises:
        UserError: as ``read_records``.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError.single(
            where,
            f"{path} is none of {', '.join(READERS)}. Convert it, or give it its right ending.",
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError.single(
            where, f"{path} cannot be read: {error.strerror}. Name another file."
        ) from error
    if not content.strip():
        raise UserError.single(str(path), "the file is empty, expected rows. Name another file.")
    return reader(path, content), hashlib.sha256(content).hexdigest()


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError.single(
            f"{path}:{line}",
            f"byte {content[error.start]:#04x} is not UTF-8. Save the file as UTF-8.",
        ) from None


def _json_list(path: Path, content: bytes) -> list[Any]:
    try:
        loaded = _loads(_text(path, content))
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            raise UserError.single(
                f"{path}:{getattr(error, 'lineno', 1)}",
                "a second JSON value begins here. If each line is a row, rename it to .jsonl.",
            ) from None
        raise UserError.single(*_broken_json(path, error)) from None
    if not isinstance(loaded, list):
        raise UserError.single(
            str(path),
            f"expected a JSON list of rows, found {kind(loaded)}. Keep only the list, or rename "
            "the file to .jsonl if each line is a row.",
        )
    return loaded


def _json_lines(path: Path, content: bytes) -> list[Any]:
    text = _text(path, content)
    records, problems = [], []
    if text.lstrip().startswith("["):
        raise UserError.single(
            str(path), "begins with [, so it is a JSON list of rows. Rename the file to .json."
        )
    # Not splitlines: it also breaks at U+2028 and others, which may stand inside a JSON text.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(_loads(line))
        except (ValueError, RecursionError) as error:
            problems.append(Problem(*_broken_json(path, error, line=number)))
    if problems:
        raise UserError.first_of(problems)
    return records


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    loaded = dict(pairs)
    if len(loaded) == len(pairs):
        return loaded
    repeated = RepeatedKey(loaded)
    repeated.key = _repeated(key for key, _ in pairs) or ""
    return repeated


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that comes a second time."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def kind(value: object) -> str:
    """What a value is, in the words of JSON."""
    if value is None:
        return "nothing (null or absent)"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, str):
        return "text"
    if isinstance(value, bytes):
        return "binary data"
    if isinstance(value, Unreadable):
        return f"what cannot be read ({value.reason})"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"


def _broken_json(
    path: Path, error: ValueError | RecursionError, line: int | None = None
) -> tuple[str, str]:
    if isinstance(error, RecursionError):
        return f"{path}:{line or 1}", "nested too deeply to be a row. Correct the file."
    if not isinstance(error, json.JSONDecodeError):  # more digits than Python turns into a number
        return f"{path}:{line or 1}", "holds a number of thousands of digits. Correct the file."
    where = f"{path}:{line or error.lineno}"
    reason = error.msg.removesuffix(" at")
    return where, f"not JSON: {reason} at column {error.colno}. Correct the line."


def _csv(path: Path, content: bytes) -> list[Any]:
    """One record a line; each cell is text, and an empty cell is an empty text."""
    text = _text(path, content)
    csv.field_size_limit(MAX_CHARACTERS + 1)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[Any] = []
    problems = []
    header: list[str] = []
    while True:
        begins = lines.line_num + 1
        try:
            cells = next(lines, None)
        except csv.Error as error:
            # Behind a broken quote nothing can be told apart any more.
            too_long = "field limit" in str(error)
            what = "Split or remove the row" if too_long else "Correct the quotes of the line"
            message = f"not CSV: {error}. {what}."
            problems.append(Problem(f"{path}:{begins}", message))
            break
        if cells is None:
            break
        if not header:
            header = _header(path, cells)
        elif len(cells) == len(header):
            records.append(dict(zip(header, cells, strict=True)))
        elif cells:
            message = (
                f"expected {len(header)} cells as in the header, found {len(cells)}. Correct the "
                "line; a cell with a comma or a line break needs double quotes."
            )
            problems.append(Problem(f"{path}:{begins}", message))
    if problems:
        raise UserError.first_of(problems)
    return records


def _header(path: Path, cells: list[str]) -> list[str]:
    twice = _repeated(cells)
    if twice is not None:
        raise UserError.single(f"{path}:1", f"the header names {twice!r} twice. Rename one.")
    return cells


def _parquet(path: Path, content: bytes) -> list[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(pyarrow.BufferReader(content))
        columns = {name: _values(table[at]) for at, name in enumerate(table.column_names)}
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, RecursionError) as error:
        reason = (
            str(error).strip().split("\n")[0].rstrip(".").replace("'<Buffer>'", repr(path.name))
        )
        raise UserError.single(
            str(path), f"not readable as Parquet: {reason}. Write the file again."
        ) from error
    names = tuple(columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _values(column: Any) -> list[Any]:
    """The values of an Arrow column. One that nobody needs may hold what Python cannot, such as
    dates beyond the year 9999 or a time zone that nobody knows.
    """
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, KeyError):
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, KeyError) as error:
        return Unreadable(str(error))


def _from_hub(settings: DataSettings) -> tuple[list[Any], str]:
    # A local file needs none of this library, and importing it costs a second.
    import datasets

    try:
        dataset = datasets.load_dataset(settings.path, split=settings.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError.single(
            "data.path",
            f"{settings.path} is no local file, and as a hub data set it could not be loaded "
            f"({reason}). Correct the name, log in with `hf auth login`, or name a local file.",
        ) from error
    records = dataset.to_list()
    canonical = json.dumps(records, sort_keys=True, ensure_ascii=False, default=str).encode(
        errors="surrogatepass"
    )
    return records, hashlib.sha256(canonical).hexdigest()


READERS: dict[str, Callable[[Path, bytes], list[Any]]] = {
    ".json": _json_list,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
