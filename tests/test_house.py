"""Imports go one way, in the order that CONTRIBUTING.md states; and a public name means one thing."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "swd").rglob("*.py"))


def layers() -> list[list[str]]:
    """Layers of the package from the bottom up, each a list of modules or folders, as CONTRIBUTING.md writes them."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    line = re.search(r"^    (types →(?:.|\n)*?)\n\n", text, re.MULTILINE)
    assert line is not None, "CONTRIBUTING.md has no indented line that begins with 'types →'"
    return [re.findall(r"[\w.]+", layer) for layer in line.group(1).split("→")]


LAYERS = layers()


def layer_of(module: str) -> int:
    """The layer of `swd.a.b`: that of its longest listed beginning."""
    inner = module.removeprefix("swd").strip(".")
    found = [
        (len(name), i)
        for i, names in enumerate(LAYERS)
        for name in names
        if inner == name or inner.startswith(name + ".")
    ]
    assert found, f"{module} is in no layer of CONTRIBUTING.md"
    return max(found)[1]


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else node.module for name in inner]
        found |= {name for name in names if name.split(".")[0] == "swd" and name != "swd"}
    return found


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def name_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path) not in ("swd", "swd.__main__")], ids=str)
def test_no_import_runs_back_up(path: Path) -> None:
    here = name_of(path)
    above = {name for name in imports(path) if layer_of(name) > layer_of(here)}
    assert not above, f"{here} imports {sorted(above)}, which lies above it"


COMMON_NAMES = {
    "run": "every command has one, which `swd.commands.cli` calls",
    "prepare": "every command's checks before anything is loaded",
    "check_numbers": "a command's checks of its own numbers, called by its `prepare`",
    "main": "the function behind a console script or `python -m`",
}
"""Names that several modules may define, each with the convention behind it."""


def public_names(path: Path) -> list[str]:
    """Names of the classes and functions at the top level of a module, without those that begin with `_`."""
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    defined = [node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    return [name for name in dict.fromkeys(defined) if not name.startswith("_")]


def test_a_public_name_is_defined_in_one_module() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path in MODULES:
        for name in public_names(path):
            homes[name].append(name_of(path))
    shared = {name: modules for name, modules in homes.items() if len(modules) > 1}
    wrong = {name: modules for name, modules in shared.items() if name not in COMMON_NAMES}
    assert not wrong, f"two meanings of one name: {wrong}; rename one, or import it where it means the same"
    assert set(COMMON_NAMES) <= set(shared), f"no longer shared: {set(COMMON_NAMES) - set(shared)}"
