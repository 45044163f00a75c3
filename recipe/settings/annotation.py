"""An annotation in a library's source → a type that pydantic validates."""

import ast
import functools
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Strict, StringConstraints

from recipe.settings.option import Shown
from recipe.settings.source import Module, enum_values, find_class, is_dataclass

_BUILTIN: Mapping[str, Any] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "dict": dict[str, Any],
    "Dict": dict[str, Any],
    "Mapping": dict[str, Any],
    "list": list[Any],
    "List": list[Any],
    "Any": Any,
    "None": None,
}
_LISTS = ("list", "List", "Sequence", "Iterable")
_MAPPINGS = ("dict", "Dict", "Mapping")
# YAML has lists only, so these must not be strict about the container.
_OTHER_CONTAINERS: Mapping[str, Any] = {"set": set, "Set": set, "tuple": tuple, "Tuple": tuple}
# Special forms are subscripted with computed arguments here, which a type checker cannot follow.
_LITERAL: Any = Literal
_ANNOTATED: Any = Annotated


@dataclass(frozen=True)
class Resolved:
    """``dataclass_name`` is set where a mapping stands for that class of the library."""

    type: Any
    dataclass_name: str | None = None


def resolve(node: ast.expr, module: Module) -> Resolved:
    """The type of an annotation. Names that cannot be followed accept any value.

    An enum becomes the literals of its values; the ``| str`` beside it is dropped, because the
    library turns the string into the enum and refuses all others.
    """
    members = [_unquoted(member) for member in _union_members(node)]
    enums = [member for member in members if _enum(member, module)]
    types, name = [], None
    for member in members:
        if enums and isinstance(member, ast.Name) and member.id == "str":
            continue
        types.append(_single(member, module))
        if isinstance(member, ast.Name) and _is_dataclass_name(member.id, module):
            name = member.id
    return Resolved(union(types), name)


def union(types: list[Any]) -> Any:
    """The union of computed types; one that accepts anything swallows the others."""
    if Any in types:
        return Any
    return functools.reduce(operator.or_, dict.fromkeys(types))


def literal(values: tuple[object, ...]) -> Any:
    """``Literal`` of computed values.

    "pissa_niter_[number of iters]", as peft writes it, becomes a pattern.
    """
    patterns = [value for value in values if isinstance(value, str) and "[" in value]
    plain = tuple(value for value in values if value not in patterns)
    types = [_LITERAL[plain]] if plain else []
    for pattern in patterns:
        expression = re.sub(r"\\\[.*?\\\]", r"[0-9]+", re.escape(pattern))
        constraint = StringConstraints(pattern=f"^{expression}$")
        types.append(_ANNOTATED[str, constraint, Shown(f"'{pattern}'")])
    return union(types)


def _union_members(node: ast.expr) -> list[ast.expr]:
    node = _unquoted(node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_union_members(node.left), *_union_members(node.right)]
    if isinstance(node, ast.Subscript):
        name, arguments = _subscript(node)
        if name == "Optional":
            return [*_union_members(node.slice), ast.Constant(None)]
        if name == "Union":
            return [member for argument in arguments for member in _union_members(argument)]
    return [node]


def _single(node: ast.expr, module: Module) -> Any:
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.Attribute):
        # torch.dtype, which every library call takes by its name too.
        return str if node.attr == "dtype" else Any
    if isinstance(node, ast.Subscript):
        return _container(node, module)
    if not isinstance(node, ast.Name):
        return Any
    if node.id in _BUILTIN:
        return _BUILTIN[node.id]
    if node.id in _OTHER_CONTAINERS:
        return _ANNOTATED[_OTHER_CONTAINERS[node.id], Strict(False)]
    if values := _enum(node, module):
        return literal(values)
    return dict[str, Any] if _is_dataclass_name(node.id, module) else Any


def _container(node: ast.Subscript, module: Module) -> Any:
    name, arguments = _subscript(node)
    if name == "Literal":
        values = [argument.value for argument in arguments if isinstance(argument, ast.Constant)]
        return literal(tuple(values))
    if name == "Annotated":
        return resolve(arguments[0], module).type
    inner = [_item(argument, module) for argument in arguments]
    if name in _LISTS:
        return list[inner[0]]  # type: ignore[valid-type]
    if name in _MAPPINGS:
        return dict[inner[0], inner[1]]  # type: ignore[valid-type]
    if name in _OTHER_CONTAINERS:
        return _ANNOTATED[_OTHER_CONTAINERS[name][tuple(inner)], Strict(False)]
    return Any


def _item(node: ast.expr, module: Module) -> Any:
    """One argument of a container; ``...`` of ``tuple[int, ...]`` stands for itself."""
    if isinstance(node, ast.Constant) and node.value is ...:
        return ...
    return resolve(node, module).type


def _subscript(node: ast.Subscript) -> tuple[str, list[ast.expr]]:
    name = ast.unparse(node.value).rpartition(".")[2]
    return name, list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]


def _unquoted(node: ast.expr) -> ast.expr:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return ast.parse(node.value, mode="eval").body
    return node


def _enum(node: ast.expr, module: Module) -> tuple[object, ...]:
    found = find_class(module, node.id) if isinstance(node, ast.Name) else None
    return enum_values(found[1]) if found else ()


def _is_dataclass_name(name: str, module: Module) -> bool:
    found = find_class(module, name)
    return found is not None and is_dataclass(found[1])
