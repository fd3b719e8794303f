"""Lets Lightning's EarlyStopping look at what it monitors while a run trains."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from swd.io.job_log import print_line


class CheckStopping(Callback):
    """Calls every EarlyStopping after each new value of the metric that it monitors.

    It would look at the end of an epoch or of a validation, and a run here is one epoch without a validation. Its
    `patience` therefore counts values: iterations for a loss, measurements for a metric that is taken now and then. A
    value that equals the one before is taken for the same one.

    A checkpoint is written before the values of its iteration are measured and looked at. A run that goes on from it
    first looks at them, in the `metrics.csv` of the run that the checkpoint is of, and stops where a straight run does.

    Args:
        checkpoint: the one that the run goes on from.
    """

    def __init__(self, checkpoint: str | None = None) -> None:
        self.checkpoint = checkpoint
        self._last: dict[int, float] = {}  # the value that each of them saw last, by its place in the list
        self._seen = 0  # the iteration whose values were looked at last

    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self._last), "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last = {int(number): float(value) for number, value in state_dict["last"].items()}
        self._seen = int(state_dict["seen"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.checkpoint is None or self._seen >= trainer.global_step:
            return
        earlier = Path(self.checkpoint).parent.parent / "metrics.csv"
        # The first process alone reads the file, since another one may not see it.
        row = row_of(earlier, trainer.global_step) if trainer.is_global_zero else {}
        row = trainer.strategy.broadcast(row)
        before = dict(trainer.callback_metrics)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in row.items()})
        self._look(trainer, pl_module)
        trainer.callback_metrics.clear()
        trainer.callback_metrics.update(before)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show every EarlyStopping the value that it monitors, if it is new."""
        self._seen = trainer.global_step
        callbacks: list[Callback] = cast(Any, trainer).callbacks
        for number, callback in enumerate(c for c in callbacks if isinstance(c, EarlyStopping)):
            value = trainer.callback_metrics.get(callback.monitor)
            if value is None or self._last.get(number) == float(value):
                continue
            self._last[number] = float(value)
            # By its `check_on_train_epoch_end` it acts in one of the two.
            callback.on_train_epoch_end(trainer, pl_module)
            callback.on_validation_end(trainer, pl_module)
            if callback.stopping_reason_message and trainer.is_global_zero:
                print_line(f"iteration {trainer.global_step} is the last: {callback.stopping_reason_message}")


def row_of(file: Path, iteration: int) -> dict[str, float]:
    """The values that a run logged of one iteration, by name; empty without the file, or where it has none."""
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("step") == str(iteration)]
    return {
        name: float(value) for row in rows for name, value in row.items() if value and name not in ("step", "epoch")
    }
