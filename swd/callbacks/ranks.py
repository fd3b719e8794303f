"""Work that callbacks divide over all processes, so that none waits for another and sharded networks can run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from lightning import Trainer
from torch import Tensor

from swd.config import one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Places of one process in a list of `total`: a run of them, equally many on every process.

    Networks that are sharded run only when all processes run them, so what is missing at the end of the last shares is
    made up by repeating the last place; `gather` drops it.

    Attributes:
        total: length of the list, at least 1.
        rank, world: this process and the number of processes.
    """

    total: int
    rank: int = 0
    world: int = 1

    @staticmethod
    def of(trainer: Trainer, total: int) -> Share:
        """The share of the process that this runs on."""
        return Share(total, trainer.global_rank, trainer.world_size)

    @property
    def places(self) -> list[int]:
        """The places, ascending."""
        size = -(-self.total // self.world)
        return [min(self.rank * size + i, self.total - 1) for i in range(size)]

    def batches(self, most: int) -> Iterator[list[int]]:
        """The places in batches of at most `most`, the same number of batches on every process."""
        places = self.places
        for start in range(0, len(places), most):
            yield places[start : start + most]


def gather(trainer: Trainer, rows: Tensor, total: int) -> Tensor:
    """The rows of all processes in order of their places, `[total, ...]`, on every process.

    Args:
        trainer: of the run.
        rows: one for each place of this process's `Share`, `[n, ...]`.
        total: length of the whole list.
    """
    if trainer.world_size == 1:
        return rows
    every = _all_gather(trainer, rows.to(trainer.strategy.root_device))
    return every.flatten(0, 1)[:total].to(rows.device)


def attempt(trainer: Trainer, work: Callable[[], T], what: str) -> T | None:
    """Do this process's part of work; what goes wrong on one process is a warning on all, and then none has a result.

    `work` must not exchange anything with other processes where it may fail on one alone: they would wait for it.

    Args:
        trainer: of the run.
        work: returns anything but None.
        what: what there is not if it fails, for the warning.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    reason = _first_reason(trainer, error)
    if reason is None:
        return result
    warnings.warn(f"no {what}: {reason}", stacklevel=2)
    return None


def _first_reason(trainer: Trainer, error: Exception | None) -> str | None:
    """The reason of the first process on which something failed; None if nothing did."""
    reason = None if error is None else one_line(error)
    if trainer.world_size == 1:
        return reason
    failed = torch.tensor([error is not None], dtype=torch.float32, device=trainer.strategy.root_device)
    flags = _all_gather(trainer, failed)
    if not flags.any():
        return None
    return trainer.strategy.broadcast(reason, src=int(flags.flatten().argmax()))


def _all_gather(trainer: Trainer, rows: Tensor) -> Tensor:
    """The tensors of all processes `[world, ...]`, which have one shape."""
    every: Any = trainer.strategy.all_gather(rows.contiguous())
    return cast(Tensor, every)
