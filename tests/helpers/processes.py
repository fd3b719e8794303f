"""Trainings in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def train_on_two(arguments: Sequence[str], folder: Path, program: str | None = None) -> str:
    """`train.py` on two gloo processes, started in `folder`; its standard error.

    Args:
        arguments: of the command line.
        folder: where it runs, and where its runs lie unless the arguments say otherwise.
        program: a text to run in the place of `train.py`, for example one that breaks something first.
    """
    file = ROOT / "train.py"
    if program is not None:
        file = folder / "program.py"
        file.write_text(program)
    environment = {key: value for key, value in os.environ.items() if key != "SWD_COMMAND"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(file), f"output={folder}", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        cwd=folder,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr
