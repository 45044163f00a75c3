"""What a library's classes declare, read from its installed source without importing it.

Importing TrainingArguments or LoraConfig takes seconds because torch comes along; parsing the
files that define them takes hundredths of one.
"""

import ast
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recipe.settings.option import Absent
from recipe.settings.problem import UserError

# A re-export (peft.utils -> peft.utils.peft_types) is one hop; a circle of imports must end.
_MAX_HOPS = 4


@dataclass(frozen=True)
class Module:
    """A source file of the package whose folder is ``root``."""

    root: Path
    path: Path


@dataclass(frozen=True)
class Declared:
    """A field or parameter as written; names in ``annotation`` belong to ``module``."""

    name: str
    annotation: ast.expr | None
    default: object
    choices: tuple[object, ...]
    help: str
    module: Module


@functools.cache
def installed(package: str, relative: str) -> Module:
    """The file ``relative`` of an installed package.

    Raises:
        UserError: it is not there.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError.single(package, "not installed. Run pip install -e . in the repository.")
    root = Path(spec.origin).parent
    if not (root / relative).is_file():
        raise _unsupported(package, relative)
    return Module(root, root / relative)


def dataclass_fields(module: Module, name: str) -> dict[str, Declared]:
    """What ``__init__`` of a dataclass takes, with the fields of its bases in the same package."""
    home, definition = _defined(module, name)
    fields: dict[str, Declared] = {}
    for base in definition.bases:
        if isinstance(base, ast.Name) and find_class(home, base.id):
            fields |= dataclass_fields(home, base.id)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            declared = _field(node, node.target.id, home)
            if declared is not None:
                fields[declared.name] = declared
    return fields


def init_parameters(module: Module, name: str) -> dict[str, Declared]:
    """The named parameters of a class's ``__init__``."""
    home, definition = _defined(module, name)
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = node.args.args[1:]
            padding: list[ast.expr | None] = [None] * (len(arguments) - len(node.args.defaults))
            defaults = [*padding, *node.args.defaults]
            named = [*zip(arguments, defaults, strict=True)]
            named += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            return {
                argument.arg: Declared(
                    argument.arg, argument.annotation, _literal(default), (), "", home
                )
                for argument, default in named
            }
    raise _unsupported(home.root.name, f"{name}.__init__")


def find_class(
    module: Module, name: str, *, hops: int = _MAX_HOPS
) -> tuple[Module, ast.ClassDef] | None:
    """A class of this module, or one that it imports from its own package."""
    for node in _tree(module.path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and hops:
            for alias in node.names:
                target = _imported(module, node) if name in (alias.name, alias.asname) else None
                if target is not None:
                    return find_class(target, alias.name, hops=hops - 1)
    return None


def enum_values(definition: ast.ClassDef) -> tuple[object, ...]:
    """The values of an enum class; empty if it is none."""
    if not any(ast.unparse(base).endswith("Enum") for base in definition.bases):
        return ()
    members = (node.value for node in definition.body if isinstance(node, ast.Assign))
    return tuple(member.value for member in members if isinstance(member, ast.Constant))


def is_dataclass(definition: ast.ClassDef) -> bool:
    """Whether the class is decorated as one."""
    return any("dataclass" in ast.unparse(decorator) for decorator in definition.decorator_list)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _defined(module: Module, name: str) -> tuple[Module, ast.ClassDef]:
    found = find_class(module, name)
    if found is None:
        raise _unsupported(module.root.name, name)
    return found


def _unsupported(package: str, missing: str) -> UserError:
    return UserError.single(
        package,
        f"the installed version has no {missing}, so it is newer or older than this recipe "
        "knows. Run pip install -e . in the repository.",
    )


def _imported(module: Module, node: ast.ImportFrom) -> Module | None:
    """The file that ``from … import`` reads, if it is in the same package."""
    parts = node.module.split(".") if node.module else []
    if node.level:
        base = module.path.parents[node.level - 1]
    elif parts and parts[0] == module.root.name:
        base, parts = module.root, parts[1:]
    else:
        return None
    target = base.joinpath(*parts)
    for path in (target.with_name(f"{target.name}.py"), target / "__init__.py"):
        if path.is_file():
            return Module(module.root, path)
    return None


def _field(node: ast.AnnAssign, name: str, module: Module) -> Declared | None:
    if "ClassVar" in ast.unparse(node.annotation):
        return None
    if not (isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith("field")):
        default = Absent.REQUIRED if node.value is None else _literal(node.value)
        return Declared(name, node.annotation, default, (), "", module)
    given = {keyword.arg: keyword.value for keyword in node.value.keywords}
    if "init" in given and _literal(given["init"]) is False:
        return None
    metadata = dict(_items(given.get("metadata")))
    choices, help_text = _literal(metadata.get("choices")), _literal(metadata.get("help"))
    return Declared(
        name,
        node.annotation,
        _default(given),
        tuple(choices) if isinstance(choices, list | tuple) else (),
        help_text if isinstance(help_text, str) else "",
        module,
    )


def _default(given: dict[str | None, ast.expr]) -> object:
    if "default" in given:
        return _literal(given["default"])
    if "default_factory" in given:
        factory = ast.unparse(given["default_factory"])
        return {"list": [], "dict": {}}.get(factory, Absent.UNREAD)
    return Absent.REQUIRED


def _items(node: ast.expr | None) -> Iterator[tuple[object, ast.expr]]:
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                yield key.value, value


def _literal(node: ast.expr | None) -> object:
    try:
        return Absent.UNREAD if node is None else ast.literal_eval(node)
    except ValueError:
        return Absent.UNREAD
