"""Data files with one mistake each, and what is said of it.

A case is a file's name, its bytes, settings of ``data:``, the problems there are, where the first
one is and what its message says: found, expected, remedy.
"""

import io
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow
from pyarrow import parquet

MEGABYTES_10 = 10_000_000
ROW = {"instruction": "Name a fruit.", "output": "Apple"}
ROW_TEXT = json.dumps(ROW)


class Wrong(NamedTuple):
    file: str
    content: bytes | Callable[[], bytes]
    where: str
    said: tuple[str, ...]
    problems: int = 1
    data: dict[str, Any] = {}  # noqa: RUF012, nobody changes it

    @property
    def bytes(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content()


def rows(*records: Any) -> bytes:
    return json.dumps(records).encode()


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def columns(**values: Any) -> bytes:
    """A Parquet file."""
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(values), file)
    return file.getvalue()


def damaged(content: bytes) -> bytes:
    """The footer stays as it is; the pages in front of it do not."""
    return content[:4] + b"\xff" * 200 + content[204:]


def not_utf8() -> Any:
    offsets = b"\0\0\0\0\2\0\0\0"
    buffers = pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"\xff\xfe")
    return pyarrow.StringArray.from_buffers(1, *buffers)


JSON = {
    "JSON lines under the name of a list": Wrong(
        "d.JSON", rows(ROW)[1:-1], "d.JSON", ("found an object", "rename the file to .jsonl")
    ),
    "no JSON": Wrong("d.json", b"[{]", "d.json:1", ("not JSON", "column 3", "Correct the line.")),
    "broken on line 3": Wrong(
        "d.json",
        b'[{"instruction": "a",\n "output": "b"},\n {"output": }]',
        "d.json:3",
        ("not JSON",),
    ),
    "ends too early": Wrong("d.json", rows(ROW, ROW)[:-9], "d.json:1", ("not JSON",)),
    "comma behind the last": Wrong(
        "d.json", b"[%s,]" % ROW_TEXT.encode(), "d.json:1", ("not JSON",)
    ),
    "Python's quotes": Wrong("d.json", repr([ROW]).encode(), "d.json:1", ("in double quotes",)),
    "0 bytes": Wrong("d.json", b"", "d.json", ("is empty", "expected rows", "another file.")),
    "spaces": Wrong("d.json", b" \n\t\r\n", "d.json", ("is empty", "expected rows")),
    "only a byte order mark": Wrong("d.json", b"\xef\xbb\xbf", "d.json:1", ("not JSON",)),
    "empty list": Wrong("d.json", b"[]", "data.path", ("d.json holds no rows", "another file.")),
    "object": Wrong("d.json", b'{"data": []}', "d.json", ("expected a JSON list", "an object")),
    "text": Wrong("d.json", b'"rows"', "d.json", ("expected a JSON list of rows", "found text")),
    "number": Wrong("d.json", b"7", "d.json", ("expected a JSON list of rows", "found a number")),
    "null": Wrong("d.json", b"null", "d.json", ("a JSON list of rows", "found nothing (null")),
    "NaN": Wrong("d.json", b"NaN", "d.json", ("a JSON list of rows", "found a number")),
    "is JSONL": Wrong("d.json", lines(ROW, ROW), "d.json:2", ("second JSON value", "to .jsonl.")),
    "two lists": Wrong("d.json", rows(ROW) + rows(ROW), "d.json:1", ("second JSON value",)),
    "not UTF-8": Wrong("d.json", b'[\n"\xff"]', "d.json:2", ("byte 0xff is not UTF-8", "Save")),
    "Latin-1": Wrong(
        "d.json",
        '[{"instruction": "café", "output": "b"}]'.encode("latin-1"),
        "d.json:1",
        ("0xe9",),
    ),
    "UTF-16": Wrong("d.json", ROW_TEXT.encode("utf-16"), "d.json:1", ("0xff is not UTF-8",)),
    "UTF-32": Wrong("d.json", ROW_TEXT.encode("utf-32"), "d.json:1", ("0xff is not UTF-8",)),
    "raw NUL": Wrong("d.json", b'["\0"]', "d.json:1", ("not JSON: Invalid control character",)),
    "only NULs": Wrong("d.json", bytes(4096), "d.json:1", ("not JSON",)),
    "100,000 brackets": Wrong("d.json", b"[" * 100_000, "d.json:1", ("nested too deeply",)),
    "100,000 objects": Wrong("d.json", b'[{"a":' * 100_000, "d.json:1", ("nested too deeply",)),
    "5,000 digits": Wrong("d.json", b"[%s]" % (b"7" * 5000), "d.json:1", ("thousands of digits",)),
    "gzip": Wrong("d.json", b"\x1f\x8b\x08\x00", "d.json:1", ("byte 0x8b is not UTF-8",)),
}
JSON_LINES = {
    "is JSON": Wrong("d.jsonl", rows(ROW), "d.jsonl", ("a JSON list of rows", "to .json.")),
    "half a last line": Wrong(
        "d.jsonl", lines(ROW, ROW)[:-20], "d.jsonl:2", ("not JSON", "Correct the line.")
    ),
    "three broken lines": Wrong(
        "d.jsonl", b"{\n" + lines(ROW) + b"[1\n\n'a'\n", "d.jsonl:1", ("not JSON",), problems=3
    ),
    "25 broken lines": Wrong("d.jsonl", b"{\n" * 25, "d.jsonl:1", ("not JSON",), problems=11),
    "two objects in a line": Wrong(
        "d.jsonl", ROW_TEXT.encode() * 2, "d.jsonl:1", ("not JSON: Extra data",)
    ),
    "only line ends": Wrong("d.jsonl", b"\n" * 50, "d.jsonl", ("is empty",)),
    "only a byte order mark, lines": Wrong(
        "d.jsonl", b"\xef\xbb\xbf\n", "data.path", ("holds no rows",)
    ),
    "numbers": Wrong("d.jsonl", b"1\n2\n", "d.jsonl", ("columns none found", "expected those")),
    "NaN line": Wrong(
        "d.jsonl", lines(ROW) + b"NaN\n", "d.jsonl: row 1", ("expected an object", "a number")
    ),
    "null line": Wrong(
        "d.jsonl", lines(ROW, None), "d.jsonl: row 1", ("expected an object", "found nothing")
    ),
    "list line": Wrong("d.jsonl", lines(ROW, ["a"]), "d.jsonl: row 1", ("object", "found a list")),
    "deep line": Wrong(
        "d.jsonl", lines(ROW) + b"[" * 100_000, "d.jsonl:2", ("nested too deeply", "Correct")
    ),
    "5,000 digits in a line": Wrong(
        "d.jsonl", lines(ROW) + b'{"instruction": %s}' % (b"7" * 5000), "d.jsonl:2", ("digits",)
    ),
    "10 MB line": Wrong(
        "d.jsonl",
        lambda: lines(ROW, {**ROW, "output": "a" * MEGABYTES_10}),
        "d.jsonl: row 1: output",
        ("at most 1,000,000 characters", "found 10,000,000", "Split or remove the row."),
    ),
    "10 MB line without an end": Wrong(
        "d.jsonl", lambda: b'{"output": "' + b"a" * MEGABYTES_10, "d.jsonl:1", ("Unterminated",)
    ),
}
CSV = {
    "open quote": Wrong(
        "d.csv",
        b'instruction,output\na,b\n"c,d\ne,f\n',
        "d.csv:3",
        ("not CSV", "Correct the quotes"),
    ),
    "text behind a quote": Wrong("d.csv", b'instruction,output\n"a"b,c\n', "d.csv:2", ("not CSV",)),
    "short line": Wrong(
        "d.csv", b"instruction,output\na,b\nc\n", "d.csv:3", ("expected 2 cells", "found 1")
    ),
    "long line": Wrong(
        "d.csv", b"instruction,output\na,b,c\n", "d.csv:2", ("found 3", "needs double quotes.")
    ),
    "two ragged lines": Wrong(
        "d.csv", b"instruction,output\na\nb,c\n\nd,e,f\n", "d.csv:2", ("found 1",), problems=2
    ),
    "header twice": Wrong(
        "d.csv", b"output,output\na,b\n", "d.csv:1", ("names 'output' twice", "Rename one.")
    ),
    "only a header": Wrong("d.csv", b"instruction,output\n", "data.path", ("holds no rows",)),
    "no header": Wrong("d.csv", b"Name a fruit.,Apple\nb,c\n", "d.csv", ("columns Apple, Name",)),
    "semicolons": Wrong("d.csv", b"instruction;output\na;b\n", "d.csv", ("instruction;output",)),
    "tabs": Wrong(
        "d.csv", b"instruction\toutput\na\tb\n", "d.csv", ("expected those of a format",)
    ),
    "empty cell": Wrong(
        "d.csv", b"instruction,output\n,b\n", "d.csv: row 0: instruction", ("text",)
    ),
    "UTF-16 sheet": Wrong("d.csv", "instruction,output\n".encode("utf-16"), "d.csv:1", ("0xff",)),
    "NUL cell": Wrong("d.csv", b"instruction,output\na,b\0\n", "d.csv: row 0: output", ("NUL",)),
    "messages in a cell": Wrong(
        "d.csv",
        b'messages\n"[{""role"": ""user""}]"\n',
        "d.csv: row 0: messages",
        ("expected a list of turns", "found text", "use JSONL or Parquet."),
    ),
    "10 MB cell": Wrong(
        "d.csv",
        lambda: b"instruction,output\na," + b"b" * MEGABYTES_10,
        "d.csv:2",
        ("field larger than",),
    ),
    "10 MB of commas": Wrong(
        "d.csv", lambda: b"," * MEGABYTES_10, "d.csv:1", ("names '' twice", "Rename one.")
    ),
}
PARQUET = {
    "truncated": Wrong(
        "d.parquet",
        lambda: columns(instruction=["a"], output=["b"])[:-30],
        "d.parquet",
        ("not readable as Parquet", "Write the file again."),
    ),
    "is JSONL": Wrong("d.parquet", lines(ROW), "d.parquet", ("not readable as Parquet", "again.")),
    "only its marks": Wrong("d.parquet", b"PAR1" * 3, "d.parquet", ("not readable as Parquet",)),
    "middle overwritten": Wrong(
        "d.parquet",
        lambda: damaged(columns(instruction=["a"] * 99, output=[str(n) for n in range(99)])),
        "d.parquet",
        ("not readable as Parquet", "Write the file again."),
    ),
    "numbers": Wrong(
        "d.parquet",
        lambda: columns(instruction=["a"], output=[1]),
        "d.parquet: row 0: output",
        ("expected text", "found a number", "Correct or remove the row."),
    ),
    "bytes": Wrong(
        "d.parquet",
        lambda: columns(instruction=["a"], output=[b"b"]),
        "d.parquet: row 0: output",
        ("expected text", "found binary data"),
    ),
    "null": Wrong(
        "d.parquet",
        lambda: columns(instruction=["a", "b"], output=["b", None]),
        "d.parquet: row 1: output",
        ("expected text", "found nothing (null or absent)"),
    ),
    "list": Wrong(
        "d.parquet",
        lambda: columns(instruction=["a"], output=[["b"]]),
        "d.parquet: row 0: output",
        ("expected text", "found a list"),
    ),
    "text that is no UTF-8": Wrong(
        "d.parquet",
        lambda: columns(instruction=["a"], output=not_utf8()),
        "d.parquet: row 0: output",
        ("found what cannot be read", "byte 0xff", "Correct or remove the row."),
    ),
    "date beyond the calendar": Wrong(
        "d.parquet",
        lambda: columns(instruction=["a"], output=pyarrow.array([2**30], pyarrow.date32())),
        "d.parquet: row 0: output",
        ("found what cannot be read (", "magnitude"),
    ),
    "no rows": Wrong(
        "d.parquet", lambda: columns(instruction=[], output=[]), "data.path", ("holds no rows",)
    ),
    "no columns": Wrong("d.parquet", lambda: columns(), "data.path", ("holds no rows",)),
    "other columns": Wrong(
        "d.parquet",
        lambda: columns(text=["a"]),
        "d.parquet",
        ("columns text found", "Rename them."),
    ),
    "turns of numbers": Wrong(
        "d.parquet",
        lambda: columns(messages=[[{"role": "user", "content": 1}]]),
        "d.parquet: row 0: messages[0].content",
        ("expected text", "found a number"),
    ),
}
PATHS = {
    "suffix .txt": Wrong("d.txt", lines(ROW), "data.path", ("d.txt is none of .json, .jsonl",)),
    "suffix .tsv": Wrong("d.tsv", b"instruction\toutput\n", "data.path", ("Convert it, or give",)),
    "suffix .pkl": Wrong("d.pkl", b"\x80\x04.", "data.path", ("none of .json, .jsonl, .csv",)),
    "no suffix": Wrong("d", lines(ROW), "data.path", ("d is none of", "its right ending.")),
    "JSON zipped": Wrong("d.json.gz", b"\x1f\x8b", "data.path", ("d.json.gz is none of",)),
    "absent": Wrong(
        "d.json", rows(ROW), "data.path", ("no file", "e.json"), data={"path": "e.json"}
    ),
    "absent, absolute": Wrong(
        "d", rows(ROW), "data.path", ("no file /absent/d", "Correct"), data={"path": "/absent/d"}
    ),
    "endless name": Wrong(
        "d.json",
        rows(ROW),
        "data.path",
        ("xxx.json cannot be read: File name too long.", "Correct"),
        data={"path": "x" * 5000 + ".json"},
    ),
    "line end in the name": Wrong(
        "d.json", rows(ROW), "data.path", ("no file", "Correct"), data={"path": "a\u2028b.json"}
    ),
    "a folder": Wrong(
        "d.json", rows(ROW), "data.path", ("is a folder",), data={"path": "folder.json/"}
    ),
    "a folder named as a file": Wrong(
        "d.json", rows(ROW), "data.path", ("is a folder",), data={"path": "folder.json"}
    ),
    "split of a file": Wrong(
        "d.json",
        rows(ROW),
        "data.split",
        ("test is of a hub data set", "d.json is a file", "Leave it out."),
        data={"split": "test"},
    ),
    "no hub data set": Wrong(
        "d.json",
        rows(ROW),
        "data.path",
        ("nobody/nothing is no local file", "could not be loaded", "Correct the name"),
        data={"path": "nobody/nothing"},
    ),
}
