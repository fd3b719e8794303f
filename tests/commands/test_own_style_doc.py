"""The commands of docs/own_style.md against the configuration."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tiny import composed

from swd.commands import generate, sample
from swd.config import check, to_plain
from swd.modules.base_adapters import read_entries

DOC = (Path(__file__).parents[2] / "docs" / "own_style.md").read_text()
LINES = [line for block in re.findall(r"```\n(.*?)```", DOC, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("line", LINES)
def test_commands_compose(line: str) -> None:
    words = shlex.split(line)
    command = words[1] if words[0] == "swd" else "train"
    arguments = [*words[2:], *(["folder=x", "name=y"] if command != "generate" else [])]
    cfg = composed(arguments, command)
    check(cfg, {"generate": generate.ROOT, "sample": sample.ROOT}.get(command))
    entries = read_entries(to_plain(cfg.model).get("adapters"))
    assert bool(entries) == ("model.adapters" in line)
    assert [entry.weight for entry in entries] == ([1.0, 0.6] if "weight:0.6" in line else [1.0] * len(entries))
