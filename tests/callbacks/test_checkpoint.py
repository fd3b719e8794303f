"""When checkpoints are written while a run trains, and by whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning import Callback
from tiny import composed, overrides

from swd.callbacks import checkpoint as module
from swd.callbacks.checkpoint import Checkpoint
from swd.commands.train import fit
from swd.types import UserError


class Clock(Callback):
    """A clock that an iteration moves by so many minutes."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def on_train_batch_start(self, *args: Any) -> None:
        self.seconds += 60 * self.minutes


class Asking(Callback):
    """Asks for a checkpoint after one iteration, twice."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.iteration:
            (callback,) = (c for c in trainer.callbacks if isinstance(c, Checkpoint))
            for _ in range(2):
                callback.save(trainer)


def iterations(run: Path) -> list[int]:
    return sorted(int(file.stem.removeprefix("iteration-")) for file in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("every", "minutes", "asked", "expected"),
    [
        (100, 10, 0, [3, 6, 7]),  # iterations of 4 minutes
        (5, 10, 0, [3, 5, 7]),  # the next ten minutes begin at iteration 5, and end after the run
        (100, "null", 0, [7]),
        (100, 10, 2, [2, 5, 7]),
    ],
)
def test_checkpoints_come_every_so_many_iterations_and_minutes_and_when_asked_for(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    minutes: Any,
    asked: int,
    expected: list[int],
) -> None:
    """A file that another process wrote into the folder counts among those that are kept."""
    stale = tmp_path / "checkpoints" / "iteration-1.ckpt"
    stale.parent.mkdir()
    stale.write_text("of an earlier process")
    clock = Clock(4)
    monkeypatch.setattr(module, "time", clock)
    given = [
        f"callbacks.checkpoint.{k}={v}" for k, v in {"every": every, "minutes": minutes, "keep": len(expected)}.items()
    ]
    fit(composed([*overrides(tiny_model, tmp_path, loss="mmd", trainer__max_steps=7), *given]), clock, Asking(asked))
    assert iterations(tmp_path) == expected


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_no_time_at_all_is_refused(minutes: float) -> None:
    with pytest.raises(UserError, match=r"callbacks\.checkpoint\.minutes="):
        Checkpoint(minutes=minutes)
