"""YAML 1.2 core values, and one problem with its line for everything that is not plain data."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.settings.problem import UserError
from recipe.settings.yaml_text import parse, plain_scalar, read, read_value

SCALARS = [
    ("3e-4", 3e-4),
    ("1e-4", 1e-4),
    ("1E5", 1e5),
    ("1.5e+3", 1500.0),
    (".5", 0.5),
    ("5.", 5.0),
    ("-0.25", -0.25),
    ("010.5", 10.5),
    ("0", 0),
    ("-7", -7),
    ("+7", 7),
    ("200", 200),
    ("true", True),
    ("True", True),
    ("TRUE", True),
    ("false", False),
    ("null", None),
    ("~", None),
    ("", None),
    ("no", "no"),
    ("No", "No"),
    ("off", "off"),
    ("on", "on"),
    ("yes", "yes"),
    ("y", "y"),
    ("2024-01-01", "2024-01-01"),
    ("12:30:45", "12:30:45"),
    ("0:200", "0:200"),
    ("0x10", "0x10"),
    ("0o17", "0o17"),
    ("1_000", "1_000"),
    ("nan", "nan"),
    ("1e", "1e"),
    (".", "."),
    ("'3e-4'", "3e-4"),
    ('"true"', "true"),
    ("[q, 1, no]", ["q", 1, "no"]),
    ("{a: {b: 1}}", {"a": {"b": 1}}),
    ("=", "="),
]


@pytest.mark.parametrize(("text", "value"), SCALARS, ids=[text or "empty" for text, _ in SCALARS])
def test_value(text: str, value: object) -> None:
    parsed = parse(f"key: {text}", name="c.yaml")["key"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_not_finite_numbers_are_read_and_left_to_the_schema() -> None:
    values = parse("a: .nan\nb: .inf\nc: -.INF\nd: 1e999", name="c.yaml")
    assert math.isnan(values["a"])
    assert (values["b"], values["c"], values["d"]) == (math.inf, -math.inf, math.inf)


# What the lines of the report start with, as regular expressions.
WRONG = [
    ("empty", "", ["c.yaml:1: expected sections"]),
    ("only a comment", "# nothing\n", ["c.yaml:1: expected sections"]),
    ("list", "- 1\n", ["c.yaml:1: expected sections"]),
    ("scalar", "text", ["c.yaml:1: expected sections"]),
    ("null document", "---\n", ["c.yaml:1: expected sections"]),
    ("leading zero", "a:\n  b: 010\n", ["c.yaml:2: a.b: 010 starts with 0, which is octal"]),
    ("endless integer", f"a: {'9' * 5000}", ["c.yaml:1: a: a number of 5000 digits"]),
    ("duplicate", "a: 1\nb: 2\na: 3\n", ["c.yaml:3: a: stands twice, first on line 1"]),
    (
        "every duplicate",
        "a: 1\na: 2\nb:\n  c: 1\n  c: 2\n",
        ["c.yaml:2: a: stands twice", "c.yaml:5: b.c: stands twice"],
    ),
    ("python tag", "a: !!python/object/apply:os.system [ls]", ["c.yaml:1: a: tag"]),
    ("core tag", "a: !!str 5", ["c.yaml:1: a: tag"]),
    ("local tag", "a: !mine {b: 1}", ["c.yaml:1: a: tag '!mine'"]),
    ("anchor", "a: &x 1", ["c.yaml:1: a: anchor &x"]),
    ("alias", "a: &x 1\nb: *x", ["c.yaml:1: a: anchor &x", r"c.yaml:2: b: alias \*x"]),
    ("unknown alias", "b: *x", [r"c.yaml:1: b: alias \*x"]),
    ("alias as key", "*x : 1", [r"c.yaml:1: alias \*x"]),
    ("merge key", "a: &x {b: 1}\nc: {<<: *x}", ["c.yaml:1: a: anchor", "c.yaml:2: c.<<: alias"]),
    ("two documents", "a: 1\n---\nb: 2\n", ["c.yaml:2: a second document"]),
    ("number as key", "a:\n  1: x", ["c.yaml:2: a: the key 1 is no text"]),
    ("null as key", "~: x", ["c.yaml:1: the key None is no text"]),
    ("list as key", "? [a, b]\n: 1", [r"c.yaml:1: the key \['a', 'b'\] is no text"]),
    ("tab", "a:\n\tb: 1", ["c.yaml:2: not valid YAML: .*Indent with spaces"]),
    ("open list", "a: [1, 2\nb: 3\n", ["c.yaml:2: not valid YAML"]),
    ("colon in value", "a: b: c", ["c.yaml:1: not valid YAML"]),
    ("indentation", "a: 1\n  b: 2\n", ["c.yaml:2: not valid YAML"]),
    ("at sign", "a: @x", ["c.yaml:1: not valid YAML: .*in quotes"]),
    ("NUL", "a: 1\nb: x\0y\n", ["c.yaml:2: control character U[+]0000"]),
    (
        "two control characters",
        "a: \x01\nb: \x7f\n",
        ["c.yaml:1: control character U[+]0001", "c.yaml:2: control character U[+]007F"],
    ),
    ("escaped NUL", 'a: "x\\0y"', ["c.yaml:1: a: control character U[+]0000"]),
    ("lone surrogate", 'a: "\\uD800"', ["c.yaml:1: a: control character U[+]D800"]),
    ("no such character", 'a: "\\UFFFFFFFF"', ["c.yaml:1: no such character"]),
    ("deep lists", "a: " + "[" * 10_000, ["c.yaml:1: a: nested deeper than 20"]),
    ("deep mappings", "a: " + "{b: " * 30, ["c.yaml:1: a.b.b.*: nested deeper than 20"]),
    ("YAML 2", "%YAML 2.0\n---\na: 1", ["c.yaml:1: not valid YAML"]),
]


@pytest.mark.parametrize(
    ("text", "expected"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG]
)
def test_wrong_text(text: str, expected: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(text, name="c.yaml")
    lines = str(error.value).splitlines()
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.match(pattern, line), line


def test_a_document_with_duplicates_is_still_read() -> None:
    document = read("a:\n  b: 1\n  b: 2\n  c: 010\n", name="c.yaml")
    assert document.values == {"a": {"b": 1}}
    assert document.unreadable == {("a", "c")}
    assert document.whole


def test_lines_of_keys() -> None:
    document = read("a:\n  b: [{c: 1}]\n\n  d: 2\n", name="c.yaml")
    assert document.lines == {("a",): 1, ("a", "b"): 2, ("a", "d"): 4}


def test_windows_line_ends_and_byte_order_mark() -> None:
    assert parse("\ufeffa: 1\r\nb:\r\n  c: no\r\n", name="c.yaml") == {"a": 1, "b": {"c": "no"}}


def test_single_value() -> None:
    assert read_value("[q_proj,v_proj]", where="override x") == ["q_proj", "v_proj"]
    with pytest.raises(UserError, match=r"override x: '#3' would not be read"):
        read_value("run #3", where="override x")


def outcome(text: str) -> object:
    try:
        return parse(text, name="c.yaml")
    except UserError as error:
        return error


@given(st.text() | st.text(alphabet="ab:-?[]{},&*!|>'\"%@#\\ \n\t01.~xU"))
def test_any_text_gives_a_mapping_or_problems_of_one_line(text: str) -> None:
    result = outcome(text)
    if isinstance(result, UserError):
        assert len(str(result).splitlines()) == len(result.problems) > 0
    else:
        assert isinstance(result, dict)


@given(st.from_regex(r"[-+]?[0-9._:exo]{1,12}", fullmatch=True))
def test_scalars_of_digits_are_text_or_plain_numbers(text: str) -> None:
    try:
        value = plain_scalar(text)
    except ValueError:
        assert text.lstrip("+-").startswith("0")
    else:
        assert value == text or value == float(text)
