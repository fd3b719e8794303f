"""When callbacks that measure do so."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer


class Measurement(Callback):
    """Measures every `every` iterations and after the last one; subclasses say how.

    Attributes:
        every: number of iterations between measurements.
    """

    every: int

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            self.measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step % self.every:
            self.measure(trainer, pl_module)

    def measure(self, trainer: Trainer, task: LightningModule) -> dict[str, float]:
        """Measure on all processes, and log the values by name; empty if it failed."""
        raise NotImplementedError
