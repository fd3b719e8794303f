"""Two gloo processes on the CPU train what one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import assert_same_weights, composed, overrides

from swd.commands.train import fit

ROOT = Path(__file__).parents[2]


def launch(command: list[str], model: Path, folder: Path, **more: Any) -> None:
    """Train on two processes, in processes of their own."""
    arguments = overrides(model, folder, trainer="ddp_cpu", **more)
    environment = {k: v for k, v in os.environ.items() if k != "SWD_COMMAND"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, f"output={folder.parent}", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        cwd=folder.parent,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("loss", ["swd"])
def test_two_processes_equal_one_on_the_same_global_batch(tiny_model: Path, tmp_path: Path, loss: str) -> None:
    options: dict[str, Any] = {"loss": loss, "task__lr": 1e-4}
    fit(composed(overrides(tiny_model, tmp_path / "one", **options)))
    launch([sys.executable, str(ROOT / "train.py")], tiny_model, tmp_path / "two", **options)
    assert_same_weights(tmp_path / "two", tmp_path / "one")
    assert len(list((tmp_path / "two").glob("metrics.csv"))) == 1


@pytest.mark.slow
def test_the_installed_command_resumes_on_two_processes(tiny_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"loss": "dmd_mmd", "task__lr": 1e-4}
    fit(composed(overrides(tiny_model, tmp_path / "one", **options)))
    swd = [str(Path(sys.executable).with_name("swd")), "train"]
    runs = tmp_path / "runs"
    runs.mkdir()
    launch(swd, tiny_model, runs / "half", **options, trainer__max_steps=1)
    launch(swd, tiny_model, runs / "rest", **options, resume="auto")
    assert str(runs / "half") in (runs / "rest" / "run.json").read_text()
    assert_same_weights(runs / "rest", tmp_path / "one")
