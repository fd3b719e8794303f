"""Parameters of classes that a configuration may build, read from source files: nothing is imported.

Importing a training's classes takes seconds, and a misspelt key can be named without it. What cannot be read here, such
as a base's constructor or a type that is made at run time, is left to the check that imports.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Optional, Union

from swd.config import ALLOWED, MOVED, Parameters, is_ours

PLAIN: Mapping[str, Any] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "list": list,
    "tuple": tuple,
    "dict": dict,
    "set": set,
    "List": list,
    "Tuple": tuple,
    "Dict": dict,
    "Sequence": Sequence,
    "Mapping": Mapping,
    "Literal": Literal,
    "Union": Union,
    "Optional": Optional,
}
"""Names in annotations that mean the same everywhere."""


def parameters_in_source(name: Any, path: str = "") -> Parameters | None:
    """The parameters of a `_target_`; None where they cannot be read, or it is not on the list of what may be built.

    Args:
        name: dotted, of the package that lists it or of the module that defines it.
        path: of the node in the configuration; not read.
    """
    name = MOVED.get(name, name) if isinstance(name, str) else ""
    module, _, own = name.rpartition(".")
    for package, classes in ALLOWED.items():
        if own in classes and (module == package or module.startswith(f"{package}.")):
            found = _definition(module, own)
            return None if found is None else _of_class(*found)
    return None


def _of_class(module: str, definition: ast.stmt) -> Parameters | None:
    """The parameters of a class by its own `__init__`; None if it inherits that, or a decorator makes it."""
    if not isinstance(definition, ast.ClassDef):
        return None
    own = [each for each in definition.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    if not own:
        return None
    arguments = own[0].args
    plain = [*arguments.posonlyargs, *arguments.args][1:]  # without self
    with_default = {each.arg for each in plain[len(plain) - len(arguments.defaults) :]} if arguments.defaults else set()
    with_default |= {
        each.arg for each, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value is not None
    }
    named = [*plain, *arguments.kwonlyargs]
    return Parameters(
        tuple(each.arg for each in named),
        tuple(each.arg for each in named if each.arg not in with_default),
        {each.arg: _hint(each.annotation, module) for each in named if each.annotation is not None},
        arguments.kwarg is not None,
        is_ours(module),
    )


def _hint(node: ast.expr, module: str) -> Any:
    """The type that an annotation means, with `Any` for what is not known here."""
    if isinstance(node, ast.Constant):
        return None if node.value is None else Any
    if isinstance(node, ast.Name):
        return PLAIN.get(node.id) or _alias(module, node.id)
    if isinstance(node, ast.BinOp):
        return PLAIN["Union"][_hint(node.left, module), _hint(node.right, module)]
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
        return Any
    if node.value.id == "Literal":
        return PLAIN["Literal"][ast.literal_eval(node.slice)]
    outer = PLAIN.get(node.value.id)
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    arguments = tuple(... if ast.unparse(each) == "..." else _hint(each, module) for each in inner)
    return Any if outer is None else outer[arguments if len(arguments) > 1 else arguments[0]]


def _alias(module: str, name: str) -> Any:
    """The type that a module gives a name to, as in `Precision = Literal["fp32", "bf16"]`."""
    found = _definition(module, name)
    if found is None or not isinstance(found[1], ast.Assign):
        return Any
    return _hint(found[1].value, found[0])


def _definition(module: str, name: str) -> tuple[str, ast.stmt] | None:
    """The statement that defines a name of a module, with the module that it stands in; imports are followed."""
    for statement in _statements(module):
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return module, statement
        if isinstance(statement, ast.Assign) and any(ast.unparse(target) == name for target in statement.targets):
            return module, statement
        if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            for each in statement.names:
                if (each.asname or each.name) == name:
                    return _definition(statement.module, each.name)
    return None


@cache
def _statements(module: str) -> list[ast.stmt]:
    """The statements at the top of a module's file; empty if there is none."""
    package, *inner = module.split(".")
    spec = importlib.util.find_spec(package)  # of a package at the top, which is not imported for it
    if spec is None or not spec.submodule_search_locations:
        return []
    base = Path(spec.submodule_search_locations[0]).joinpath(*inner)
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8")).body
    return []
