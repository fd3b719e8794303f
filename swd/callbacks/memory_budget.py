"""Recomputes activations only at the sizes at which they would not fit a device otherwise."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from swd.io.job_log import print_line
from swd.io.ranks import is_first
from swd.modules.device_memory import encoder_bytes, permanent_parts, usable
from swd.modules.distiller import Distiller
from swd.modules.dry_run import trained_on_meta
from swd.modules.iteration_cost import iteration_costs
from swd.modules.sharding import Sharded
from swd.types import UserError

GB = 1e9


class MemoryBudget(Callback):
    """Chooses activation checkpointing for each step of the schedule, from what `swd plan` counts.

    Args:
        memory: GB of 10^9 bytes of each device.

    Attributes:
        recomputed: for each step that is trained (`Distiller.steps`), whether activations are recomputed.
    """

    def __init__(self, memory: float) -> None:
        super().__init__()
        if not 0 < memory < math.inf:
            raise UserError(f"trainer.memory_gb={memory:g}; give the GB of each GPU, or null")
        self.memory = memory
        self.recomputed: list[bool] = []

    def check_fit(self, task: LightningModule, data: Any) -> None:
        """Raise UserError for a task that never recomputes."""
        if not isinstance(task, Distiller):
            raise UserError("trainer.memory_gb is for a distillation; leave it out")
        if not task.checkpointing:
            raise UserError(
                f"trainer.memory_gb={self.memory:g} chooses the sizes at which activations are recomputed, and "
                "task.checkpointing=false recomputes none; leave one of them out"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count what a step needs at each size, and choose."""
        assert isinstance(pl_module, Distiller)  # `check_fit`
        data: Any = cast(Any, trainer).datamodule
        free = usable(self.memory * GB) - permanent_bytes(trainer, pl_module, data)
        share = data.batch_size // trainer.world_size
        samples = [share // pl_module.parts_of(step) for step in pl_module.steps]
        terms = dict(pl_module.terms.items())
        costs = [
            iteration_costs(pl_module.model, pl_module.schedule, terms, pl_module.critic_updates, each)
            for each in (False, True)
        ]
        peaks = [
            [count * each[step].peak for count, step in zip(samples, pl_module.steps, strict=True)] for each in costs
        ]
        self.recomputed = [peak > free for peak in peaks[0]]
        if not is_first():
            return
        print_line(choice_text(pl_module, self.recomputed, samples, self.memory))
        if max(peaks[1]) > free:
            count = samples[peaks[1].index(max(peaks[1]))]
            warnings.warn(
                f"{count} samples at a time take about {(max(peaks[1]) - free) / GB:.3g} GB more than "
                f"trainer.memory_gb={self.memory:g} even where activations are recomputed; see swd plan, or give a "
                "larger task.accumulate",
                stacklevel=2,
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Set what this iteration does."""
        pl_module.networks.recompute = self.recomputed[pl_module.global_step % len(self.recomputed)]


def permanent_bytes(trainer: Trainer, task: Distiller, data: Any) -> int:
    """Bytes on a device for as long as the training runs: weights, gradients, moments, encoders where they are used."""
    networks, heads = trained_on_meta(task.model, dict(task.terms.items()))
    encoders = 0 if getattr(data, "is_cache", False) else sum(encoder_bytes(task.model).values())
    shards = trainer.strategy.device_mesh.size(-1) if isinstance(trainer.strategy, Sharded) else None
    parts = permanent_parts(networks, heads, trainer.world_size, shards, average=task.ema is not None)
    return encoders + sum(parts.values())


def choice_text(task: Distiller, recomputed: list[bool], samples: list[int], memory: float) -> str:
    """A line that says what was chosen."""
    sizes = ["x".join(map(str, task.schedule.sizes[step])) for step in task.steps]
    again = [size for size, each in zip(sizes, recomputed, strict=True) if each]
    chosen = "at no size" if not again else "at every size" if len(again) == len(sizes) else f"at {', '.join(again)}"
    least, most = min(samples), max(samples)
    part = f"{least}" if least == most else f"{least} to {most}"
    return f"activations are recomputed {chosen}: {part} samples at a time, trainer.memory_gb={memory:g}"
