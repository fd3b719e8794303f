"""Commands that are killed at any moment and given again end with the bytes of undisturbed ones, and leave nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import HELPERS, ROOT, Fork, environment

FEW = {"train": 1, "student": 1, "generate": 1, "import": 1}
MANY = {"train": 16, "student": 8, "generate": 6, "encode": 5, "import": 5}


def kill(model: Path, folder: Path, seed: int, counts: dict[str, int]) -> list[dict[str, Any]]:
    """The cases of `helpers/killing.py`, in one process whose imports all of them share."""
    command = [sys.executable, str(HELPERS / "killing.py"), str(model), str(folder), str(seed)]
    command += [f"{kind}={count}" for kind, count in counts.items()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    own = environment() | {"PYTHONPATH": f"{HELPERS}:{ROOT}"}
    process = Fork(command, own, folder.parent, folder.parent / "out.txt", folder.parent / "err.txt")
    out, err = process.communicate()
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def assert_whole(found: list[dict[str, Any]], counts: dict[str, int]) -> None:
    assert [(case["kind"], case["moments"], case["why"]) for case in found if not case["same"]] == []
    assert [case["kind"] for case in found] == [kind for kind, count in counts.items() for _ in range(count)]
    assert sum(len(case["moments"]) for case in found) >= sum(counts.values())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="moments are CPU time, read from /proc")
def test_some_kills(tiny_model: Path, tmp_path: Path) -> None:
    assert_whole(kill(tiny_model, tmp_path / "k", 0, FEW), FEW)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="moments are CPU time, read from /proc")
def test_forty_kills(tiny_model: Path, tmp_path: Path) -> None:
    found = kill(tiny_model, tmp_path / "k", 1, MANY)
    assert_whole(found, MANY)
    assert any(case["inside"] for case in found if case["kind"] == "student")
