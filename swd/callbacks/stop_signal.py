"""Ends a training that a signal asks to end: at the end of the iteration, on all processes, with everything saved."""

from __future__ import annotations

from signal import Signals
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer

from swd.callbacks.checkpoint import Checkpoint
from swd.callbacks.students import SaveAdapter
from swd.io import signals
from swd.io.signals import Stopped
from swd.modules.finite import last_checkpoint


class StopOnSignal(Callback):
    """Finish the iteration, write its checkpoint and its student, and raise `Stopped`.

    What would be drawn or measured at that iteration is left out: schedulers kill a job some time after the signal.
    A signal before the first iteration has nothing to save and ends the run at once.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signals.postpone()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        number = agreed(trainer, signals.requested())
        if number is None or trainer.global_step >= trainer.max_steps:  # a run that is done ends by itself
            return
        save_now(trainer, pl_module)
        signals.close()
        raise Stopped(number, stop_line(trainer, number))


def agreed(trainer: Trainer, number: int | None) -> int | None:
    """The signal that any process got, the same on all of them; one process alone exchanges nothing."""
    if trainer.world_size == 1:
        return number
    found = torch.tensor(float(number or 0), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(found, reduce_op="max")) or None


def save_now(trainer: Trainer, task: LightningModule) -> None:
    """Write the checkpoint and the student of the iteration that has just ended, by the callbacks that the run has."""
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    for callback in callbacks:
        if isinstance(callback, Checkpoint):
            callback.save(trainer)
    for callback in callbacks:
        if isinstance(callback, SaveAdapter):
            callback.write(trainer, task)


def stop_line(trainer: Trainer, number: int) -> str:
    """The sentence that the run ends with."""
    start = f"stopped by {Signals(number).name} after iteration {trainer.global_step} of {trainer.max_steps}"
    if not any(isinstance(callback, Checkpoint) for callback in cast(Any, trainer).callbacks):
        return f"{start}; nothing was saved, since callbacks.checkpoint is left out"
    return f"{start}; the same command with resume=auto goes on from {last_checkpoint(trainer)}"
