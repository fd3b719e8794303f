"""Files, modules and names that the documentation mentions exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/*.md", "assets/*/*.md", "tests/data/*.md", "tests/data/*/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # it also names what was moved
)
FOLDERS = ("swd", "conf", "docs", "tests", "assets", "benchmarks")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w.*<>/-]*")
PLACEHOLDER = re.compile(r"NAME|<\w+>")
DOTTED = re.compile(r"(?<![\w./-])swd(?:\.[A-Za-z_]\w*)+")


def found(pattern: re.Pattern[str]) -> list[tuple[str, str]]:
    """Every mention of a pattern, with the text that it stands in."""
    mentions = {
        (str(text), name.rstrip("."))
        for text in TEXTS
        for name in pattern.findall((ROOT / text).read_text(encoding="utf-8"))
    }
    return sorted(mentions)


def resolve(name: str) -> Any:
    """The module or the object of a dotted name."""
    module, _, inner = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(resolve(module), inner)


@pytest.mark.parametrize(("text", "path"), found(PATH))
def test_a_path_exists(text: str, path: str) -> None:
    assert any(ROOT.glob(PLACEHOLDER.sub("*", path).strip("/"))), f"{text} names {path}, which is not there"


@pytest.mark.parametrize(("text", "link"), found(re.compile(r"\]\((?!https?:|#)([^)#]+)")))
def test_a_link_leads_to_a_file(text: str, link: str) -> None:
    assert (ROOT / text).parent.joinpath(link).exists(), f"{text} links to {link}, which is not there"


@pytest.mark.parametrize(("text", "name"), found(DOTTED))
def test_a_name_exists(text: str, name: str) -> None:
    assert resolve(name) is not None, f"{text} names {name}"
