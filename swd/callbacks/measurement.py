"""When callbacks that work every so many iterations do so."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer


class Recurring(Callback):
    """Works every `every` iterations and after the last one; subclasses say at what.

    Attributes:
        every: number of iterations from one time to the next.
    """

    every: int

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            self.work(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step % self.every:
            self.work(trainer, pl_module)

    def work(self, trainer: Trainer, task: LightningModule) -> object:
        """Do what is due at the current iteration, on all processes."""
        raise NotImplementedError


class Measurement(Recurring):
    """Measures every `every` iterations and after the last one; subclasses say how."""

    def work(self, trainer: Trainer, task: LightningModule) -> object:
        return self.measure(trainer, task)

    def measure(self, trainer: Trainer, task: LightningModule) -> dict[str, float]:
        """Measure on all processes, and log the values by name; empty if it failed."""
        raise NotImplementedError
