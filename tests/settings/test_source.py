"""Annotations and defaults of a made-up library, in every form that the real ones use."""

from pathlib import Path
from typing import Any

import pytest

from recipe.settings import Absent, Option, UserError, library
from recipe.settings.source import Module, dataclass_fields, find_class, init_parameters

LIBRARY = {
    "__init__.py": "raise ImportError('this package must never be imported')",
    "enums/__init__.py": "from .colour import Colour\nfrom .missing import Missing",
    "enums/colour.py": (
        "import enum\n"
        "class Colour(str, enum.Enum):\n"
        "    '''Docstring.'''\n"
        "    RED = 'red'\n"
        "    BLUE = 'blue'\n"
        "    def hidden(self):\n"
        "        return 1\n"
    ),
    "base.py": (
        "from dataclasses import dataclass, field\n"
        "@dataclass\n"
        "class Base:\n"
        "    inherited: int\n"
        "    replaced: int = 1\n"
        "    derived: int = field(init=False)\n"
        "    shared: ClassVar[int] = 3\n"
    ),
    "config.py": """
from typing import Optional, Union, Literal
from dataclasses import dataclass, field
from library.base import Base
from .enums import Colour
from elsewhere import Stranger
import torch

@dataclass
class Inner:
    depth: int = 1
    width: Optional[int] = None

@dataclass
class Config(Base, Stranger):
    replaced: str = "now text"
    optional: Optional[Union[list[str], str]] = field(default=None, metadata={"help": "a\\n  b"})
    quoted: "int | None" = None
    colour: Colour | str = field(default="red")
    optional_colour: Optional[Union[str, Colour]] = None
    colours: str | list[Colour] = ""
    chosen: str | None = field(default=None, metadata={"choices": ["x", "y"], "help": f"{1}"})
    computed: str = field(default=DEFAULT, metadata={"choices": LEVELS.keys()})
    pattern: bool | Literal["a", "b_[number of c]"] = True
    unordered: set[int] = field(default_factory=set)
    pair: tuple[int, str] = (1, "a")
    row: tuple[int, ...] = ()
    pairs: Optional[list[tuple[int, int]]] = None
    weights: dict[str, float] = field(default_factory=dict)
    dtype: torch.dtype = None
    device: torch.device = None
    unknown: Stranger | None = None
    listed_unknown: list[Stranger] = field(default_factory=list)
    inner: Inner | dict | None = None
    annotated: Annotated[int, "x"] = 1
    callable: Callable[[int], str] = None
    constant = 5

class Plain:
    def __init__(self, a, b=False, c=1.5, d=None, *, e: int = 3, **kwargs):
        pass
""",
}


@pytest.fixture
def module(tmp_path: Path) -> Module:
    root = tmp_path / "library"
    for name, text in LIBRARY.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Module(root, root / "config.py")


@pytest.fixture
def options(module: Module) -> dict[str, Option]:
    return dict(library._options(module, "Config", limits={}, types={}))


def test_fields_are_those_that_init_takes(options) -> None:
    assert list(options)[:3] == ["inherited", "replaced", "optional"]
    assert not {"derived", "shared", "constant"} & options.keys()


def test_defaults(options) -> None:
    assert options["inherited"].default is Absent.REQUIRED
    assert options["replaced"].default == "now text"
    assert options["computed"].default is Absent.UNREAD
    assert options["unordered"].default is Absent.UNREAD
    assert options["weights"].default == {}
    assert options["listed_unknown"].default == []


def test_help_is_one_line(options) -> None:
    assert options["optional"].help == "a b"
    assert options["chosen"].help == ""


EXPECTED = {
    "inherited": "a whole number",
    "replaced": "text",
    "optional": "a list (each item: text), text or null",
    "quoted": "a whole number or null",
    "colour": "'red' or 'blue'",
    "optional_colour": "'red', 'blue' or null",
    "colours": "text or a list (each item: 'red' or 'blue')",
    "chosen": "'x', 'y' or null",
    "computed": "text",
    "pattern": "true, false, 'a' or 'b_[number of c]'",
    "weights": "a mapping (each value: a number)",
    "unknown": "anything",
    "device": "anything",
    "callable": "anything",
    "dtype": "text",
    "annotated": "a whole number",
    "inner": "a mapping or null",
}


@pytest.mark.parametrize(("name", "words"), EXPECTED.items(), ids=EXPECTED.keys())
def test_types_in_words(options, name: str, words: str) -> None:
    assert options[name].expected == words


VALUES = [
    ("inherited", [3], [3.0, "3", True, None, float("nan")]),
    ("colour", ["red"], ["green", "Colour.RED", None]),
    ("pattern", [True, "a", "b_16"], ["b_", "b_[number of c]", "c", 1]),
    ("unordered", [[1, 2], []], [["1"], 3, "12"]),
    ("pair", [[1, "a"]], [[1], ["a", 1], [1, "a", 2]]),
    ("row", [[1, 2, 3], []], [["a"]]),
    ("pairs", [[[0, 4], [2, 5]], None], [[[0, 4, 5]], [0, 4]]),
    ("weights", [{"a": 1, "b": 0.5}, {}], [{"a": "1"}, {"a": float("inf")}, []]),
    ("dtype", ["float32"], [32]),
    ("unknown", [None, 3, "x", [1]], [float("nan"), [float("inf")]]),
    ("listed_unknown", [[1, "a"]], ["a"]),
]


@pytest.mark.parametrize(("name", "right", "wrong"), VALUES, ids=[case[0] for case in VALUES])
def test_values(options, name: str, right: list[Any], wrong: list[Any]) -> None:
    for value in right:
        assert options[name].objection(value) is None, value
    for value in wrong:
        assert options[name].objection(value) is not None, value


def test_a_dataclass_has_keys_of_its_own(options) -> None:
    inner = options["inner"].inner
    assert inner is not None
    assert {name: option.expected for name, option in inner.items()} == {
        "depth": "a whole number",
        "width": "a whole number or null",
    }
    assert options["optional"].inner is None


def test_parameters_of_init(module: Module) -> None:
    declared = init_parameters(module, "Plain")
    assert {name: item.default for name, item in declared.items()} == {
        "a": Absent.UNREAD,
        "b": False,
        "c": 1.5,
        "d": None,
        "e": 3,
    }


def test_a_class_that_is_gone(module: Module) -> None:
    with pytest.raises(UserError, match="library: the installed version has no Gone"):
        dataclass_fields(module, "Gone")
    with pytest.raises(UserError, match=r"has no Inner\.__init__"):
        init_parameters(module, "Inner")


def test_a_circle_of_imports_ends(tmp_path: Path) -> None:
    root = tmp_path / "library"
    root.mkdir()
    (root / "a.py").write_text("from .b import X")
    (root / "b.py").write_text("from .a import X")
    assert find_class(Module(root, root / "a.py"), "X") is None
