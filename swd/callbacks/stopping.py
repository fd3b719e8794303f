"""Lets Lightning's EarlyStopping look at what it monitors while a run trains."""

from __future__ import annotations

from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from swd.io.job_log import print_line


class CheckStopping(Callback):
    """Calls every EarlyStopping after each new value of the metric that it monitors.

    It would look at the end of an epoch or of a validation, and a run here is one epoch without a validation. Its
    `patience` therefore counts values: iterations for a loss, measurements for a metric that is taken now and then. A
    value that equals the one before is taken for the same one.
    """

    def __init__(self) -> None:
        self._last: dict[int, float] = {}  # the value that each of them saw last, by its place in the list

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
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
