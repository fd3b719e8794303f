"""Two gloo processes on the CPU train what one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import composed, overrides
from torch import Tensor
from torch.testing import assert_close

from swd.commands.train import fit
from swd.modules.checkpoint_files import read_checkpoint

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


def weights(folder: Path, name: str = "iteration-2.ckpt") -> dict[str, Tensor]:
    state: dict[str, Tensor] = read_checkpoint(folder / "checkpoints" / name)["state_dict"]
    return state


def assert_equal_training(ours: Path, single: Path) -> None:
    expected, actual = weights(single), weights(ours)
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        assert_close(actual[key], value, rtol=0, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("loss", ["swd"])
def test_two_processes_equal_one_on_the_same_global_batch(tiny_model: Path, tmp_path: Path, loss: str) -> None:
    options: dict[str, Any] = {"loss": loss, "task__lr": 1e-4}
    fit(composed(overrides(tiny_model, tmp_path / "one", **options)))
    launch([sys.executable, str(ROOT / "train.py")], tiny_model, tmp_path / "two", **options)
    assert_equal_training(tmp_path / "two", tmp_path / "one")
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
    assert_equal_training(runs / "rest", tmp_path / "one")
