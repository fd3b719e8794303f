"""One way for values of a run to reach its loggers and its callbacks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning import Trainer
from torch import Tensor


def log_values(trainer: Trainer, row: Mapping[str, Tensor | float]) -> None:
    """Log values with the iteration as x axis, and put them into `trainer.callback_metrics`.

    May be called from every hook. `self.log` may not, and it hands a row to the loggers only after the callbacks: a run
    killed while they draw would lose the row of an iteration whose checkpoint it wrote, and the run that goes on from
    there does not write it again.

    Args:
        trainer: of the run.
        row: scalars by name, equal on all processes.
    """
    values = {name: torch.as_tensor(value).detach() for name, value in row.items()}
    trainer.callback_metrics.update(values)
    for logger in trainer.loggers:
        logger.log_metrics({name: float(value) for name, value in values.items()}, step=trainer.global_step)
        logger.save()
