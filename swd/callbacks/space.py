"""Compares the space that a run will take with the free space of its disk, before the first iteration."""

from __future__ import annotations

import shutil
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from swd.callbacks.checkpoint import Checkpoint, checkpoint_bytes
from swd.callbacks.students import SaveAdapter, Students
from swd.modules.distiller import Distiller
from swd.types import UserError


class CheckSpace(Callback):
    """Refuses a run whose checkpoints and students do not fit on the disk together."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare.

        Raises:
            UserError: on all processes, if there is too little room.
        """
        if not isinstance(pl_module, Distiller):
            return
        callbacks: list[Callback] = cast(Any, trainer).callbacks
        checkpoints = sum(checkpoints_beside(trainer, each) for each in callbacks if isinstance(each, Checkpoint))
        students = sum(students_of(trainer, each) for each in callbacks)
        needed = checkpoints * checkpoint_bytes(pl_module) + students * student_bytes(pl_module)
        free = trainer.strategy.broadcast(shutil.disk_usage(trainer.default_root_dir).free)
        if students and needed > free:
            raise UserError(
                f"{checkpoints} checkpoints and {students} students take about {needed / 1e9:.3g} GB in "
                f"{trainer.default_root_dir}, and {free / 1e9:.3g} GB are free; make room, give another output=, or "
                "set callbacks.students.keep to a number"
            )


def checkpoints_beside(trainer: Trainer, callback: Checkpoint) -> int:
    """Number of checkpoints that will lie beside each other: those that are kept, and the one being written."""
    remaining = trainer.max_steps // callback.every - trainer.global_step // callback.every
    return min(callback.keep + 1, remaining + (trainer.max_steps % callback.every != 0))


def students_of(trainer: Trainer, callback: Callback) -> int:
    """Number of students that a callback will leave."""
    if isinstance(callback, SaveAdapter):
        return 1
    if not isinstance(callback, Students):
        return 0
    written = trainer.max_steps // callback.every - trainer.global_step // callback.every
    return written if callback.keep is None else min(callback.keep + 1, written)


def student_bytes(task: Distiller) -> int:
    """Approximate bytes of a student: its trained weights, and their average if there is one."""
    each = sum(p.numel() * p.element_size() for p in task.networks.role_parameters("student"))
    return each * (1 if task.average is None else 2)
