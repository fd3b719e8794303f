"""Lines of a long job where its output is a file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from swd.callbacks import progress as callback
from swd.data import job
from swd.io import job_log
from swd.io.job_log import JobLog, duration, rate_text


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_job_says_what_it_does_every_thirty_seconds_and_when_it_ends(capfd: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with JobLog("drawing into out", 100, "picture", done=20, clock=clock) as progress:
        for _ in range(80):
            clock.now += 1.5
            progress.advance(note="loss 1")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "drawing into out: 100 pictures, 20 of them done before"
    assert lines[-1] == "done: 80 pictures in 2 min 0 s"
    # 80 pictures at 1.5 s each: a line after every 20th.
    assert [line.split()[1] for line in lines[1:-1]] == ["40/100", "60/100", "80/100", "100/100"]
    assert lines[1] == "picture 40/100 (40%), 1.5 s/picture, 1 min 30 s left; loss 1"


def test_a_job_tells_no_credentials(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HUB_TOKEN", "hf_0123456789")
    with JobLog("reading https://me:word@host/a.tar into hf_0123456789", 1, "sample"):
        pass
    job.say("listing s3://id:word@bucket/x")
    job_log.print_line("from https://host/x?token=word")
    assert capfd.readouterr().err.splitlines() == [
        "reading https://***@host/a.tar into ***: 1 sample",
        "done: 0 samples in 0 s",
        "listing s3://***@bucket/x",
        "from https://host/x?token=***",
    ]


def test_a_job_that_fails_does_not_say_that_it_is_done(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), JobLog("importing", 3, "row"):
        raise ValueError
    assert capfd.readouterr().err == "importing: 3 rows\n"


def test_other_processes_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with JobLog("importing", 3, shown=False, interval=0) as progress:
        progress.advance(3)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rate() -> None:
    assert rate_text(12.34, "picture") == "12.3 pictures/s"
    assert rate_text(0.25, "picture") == "4 s/picture"


class Task(L.LightningModule):
    """Takes a step of the clock at each update."""

    deed = "fitting"

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.weight = clock, torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.clock.now += 12
        self.last_metrics = {"loss": self.weight.detach().sum()}
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.0)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_training_tells_where_it_is_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(callback, "JobLog", partial(JobLog, clock=clock))
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    trainer = L.Trainer(max_steps=6, callbacks=[callback.Progress()], **quiet)
    trainer.fit(Task(clock), DataLoader(torch.ones(8, 1)))
    first, start, *lines, end = capsys.readouterr().err.splitlines()[-5:]
    assert first.startswith("loading") and start == f"fitting into {tmp_path}: 6 iterations"
    assert lines == [
        "iteration 3/6 (50%), 12 s/iteration, 36 s left; loss 1",
        "iteration 6/6 (100%), 12 s/iteration, 0 s left; loss 1",
    ]
    assert end == "done: 6 iterations in 1 min 12 s"
