"""Trainings in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def train_on_two(arguments: Sequence[str], folder: Path) -> None:
    """`train.py` on two gloo processes, started in `folder`."""
    environment = {key: value for key, value in os.environ.items() if key != "SWD_COMMAND"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), f"output={folder}", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        cwd=folder,
        check=False,
    )
    assert result.returncode == 0, result.stderr
