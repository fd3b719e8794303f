"""A job that SLURM queues again goes on in its own folder, and asks for it when its time is over."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from tiny import composed, overrides

from swd.commands.requeue import earlier_run
from swd.commands.train import fit
from swd.io.signals import Stopped
from swd.modules.checkpoint_files import read_checkpoint

CALLBACKS = "callbacks=[checkpoint,adapter]"


class Usr1(Callback):
    """SLURM's announcement that the time of the job is over."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that notes what it is asked; the environment is that of a SLURM job."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_NAME", "distil")
    return tmp_path / "asked"


def train(model: Path, folder: Path, *more: Callback, **options: Any) -> Any:
    kept = {"loss": "mmd", "callbacks__checkpoint__every": 2, "trainer__max_steps": 5} | options
    return fit(
        composed([*(a for a in overrides(model, folder, **kept) if not a.startswith("callbacks=")), CALLBACKS]), *more
    )


def test_a_requeued_run_goes_on_in_its_folder_to_the_same_bytes(
    tiny_model: Path, tmp_path: Path, scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The job's time is over within its third iteration.
    runs = tmp_path / "runs"
    with pytest.raises(Stopped, match="stopped by SIGUSR1 after iteration 3 of 5") as stop:
        train(tiny_model, runs / "first", Usr1(at=2))
    assert stop.value.code == 138
    assert scontrol.read_text() == "requeue 4711\n"
    first = runs / "first"
    assert not list(first.glob("hpc_ckpt*")) and not (first / ".running.json").exists()
    # As after a kill that came later: rows of iterations that are done again, and the lock of a process that is gone.
    with (first / "metrics.csv").open("a") as stream:
        stream.write((first / "metrics.csv").read_text().splitlines()[-1].rpartition(",")[0] + ",4\n")
    (first / ".running.json").write_text(json.dumps({"host": "x"}))

    # SLURM starts the same command once more, which has a folder of its own by now.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    _, trainer = train(tiny_model, runs / "second")
    assert trainer.global_step == 5 and not (runs / "second").exists()
    assert sorted(f.name for f in (first / "checkpoints").iterdir()) == [
        "iteration-4.ckpt",
        "iteration-5.ckpt",
    ]
    assert "iteration-3.ckpt" in json.loads((first / "run.json").read_text())["resumed_from"]
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    train(tiny_model, tmp_path / "other" / "straight")
    straight = tmp_path / "other" / "straight"
    assert (first / "metrics.csv").read_text() == (straight / "metrics.csv").read_text()
    ours, theirs = (
        read_checkpoint(folder / "checkpoints" / "iteration-5.ckpt")["state_dict"] for folder in (first, straight)
    )
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_only_a_requeued_job_and_the_same_command_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {}
    for name, record in {
        "old": {"slurm_job": "1", "command": "train.py a=1"},
        "new": {"slurm_job": "2", "command": "train.py a=1"},
        "mine": {"slurm_job": "1", "command": "train.py a=1"},
        "other": {"slurm_job": "1", "command": "train.py a=2"},
    }.items():
        runs[name] = tmp_path / "runs" / name
        runs[name].mkdir(parents=True)
        (runs[name] / "run.json").write_text(json.dumps(record))
        os.utime(runs[name] / "run.json", (1e9 + len(runs), 1e9 + len(runs)))
    (tmp_path / "runs" / "damaged").mkdir()
    (tmp_path / "runs" / "damaged" / "run.json").write_text("[")

    def found(command: str = "train.py a=1", **environment: str) -> str | None:
        for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
            monkeypatch.delenv(key, raising=False)
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        run = earlier_run(tmp_path / "runs" / "fresh", command)
        return None if run is None else run.name

    assert found() is None
    assert found(SLURM_JOB_ID="1") is None
    assert found(SLURM_JOB_ID="1", SLURM_RESTART_COUNT="0") is None
    assert found(SLURM_JOB_ID="1", SLURM_RESTART_COUNT="2") == "mine"
    assert found(SLURM_JOB_ID="2", SLURM_RESTART_COUNT="2") == "new"
    assert found(SLURM_JOB_ID="3", SLURM_RESTART_COUNT="2") is None
    assert found("train.py a=2", SLURM_JOB_ID="1", SLURM_RESTART_COUNT="1") == "other"
    assert found("train.py a=3", SLURM_JOB_ID="1", SLURM_RESTART_COUNT="1") is None


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, "requeue 4711\n"),
        ({"SLURM_ARRAY_JOB_ID": "46", "SLURM_ARRAY_TASK_ID": "3"}, "requeue 46_3\n"),
        ({"SLURM_JOB_NAME": "bash"}, None),
        ({"SLURM_JOB_ID": "4711; rm -r x"}, None),
    ],
)
def test_what_slurm_is_asked(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], asked: str | None
) -> None:
    from swd.commands.requeue import requeue

    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    requeue(Stopped(signal.SIGTERM))
    assert not scontrol.exists()
    requeue(Stopped(signal.SIGUSR1))
    assert (scontrol.read_text() if scontrol.exists() else None) == asked


def test_a_refused_requeue_is_a_warning(scontrol: Path, tmp_path: Path) -> None:
    from swd.commands.requeue import requeue

    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho Requested operation is disabled >&2\nexit 1\n")
    with pytest.warns(
        UserWarning, match="did not queue job 4711 again .Requested operation is disabled.; give the same"
    ):
        requeue(Stopped(signal.SIGUSR1))
