"""Shared parts of the training tasks: weight averages, the learning-rate curve, safe replacement of a model's files."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import AveragedModel

from swd.io.files import clear_leftovers, in_use
from swd.modules.checkpoint_files import lost_settings, tensors
from swd.modules.finite import all_finite, step_or_stop, stop_unless_finite
from swd.types import Checks, UserError


class WatchedTask(L.LightningModule):
    """A task with one optimizer whose run stops at the first value that is not finite.

    Attributes:
        checks: by name of a term, whether it was finite in the last `training_step`.
        deed: description of the task for messages, e.g. "training the judge".
    """

    checks: Checks
    deed: str

    @property
    def target(self) -> Path:
        """The folder that `export` writes."""
        raise NotImplementedError

    def export(self) -> None:
        """Write the trained model."""
        raise NotImplementedError

    def update_average(self) -> None:
        """Take the weights, after a step of the optimizer, into their average. By default there is none."""

    def older_than(self, checkpoint: Path) -> bool:
        """Whether the files that `export` writes are missing or older than `checkpoint`."""
        times = [file.stat().st_mtime_ns for file in self.target.glob("*.safetensors")]
        return max(times, default=0) < checkpoint.stat().st_mtime_ns

    @property
    def _place(self) -> str:
        return f"iteration {self.global_step + 1}"

    def on_before_backward(self, loss: Tensor) -> None:
        self.checks = {**getattr(self, "checks", {}), "loss": loss.detach().isfinite()}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [p.grad for p in self._trained(optimizer) if p.grad is not None]
        checks = self.checks | {"gradient norm": get_total_norm(gradients).isfinite()}
        stop_unless_finite(self.trainer, checks, self._place, "no weight was changed by it")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        optimizer = kwargs.get("optimizer", args[2] if len(args) > 2 else None)
        step = partial(super().optimizer_step, *args, **kwargs)
        step_or_stop(step, self.trainer, self._trained(optimizer), "weights", self._place)
        self.update_average()  # here, since callbacks write checkpoints before the task's `on_train_batch_end`

    def misfit(self, checkpoint: Mapping[str, Any]) -> str | None:
        """Description of what a checkpoint lacks of the optimizer's state; None if it fits. Loads no weights."""
        states = checkpoint["optimizer_states"]
        if len(states) != 1:
            return f"it has {len(states)} optimizers rather than 1"
        shapes = {tuple(value.shape) for value in checkpoint["state_dict"].values()}
        moments = [part["state"] for part in states[0].get("parts", states)]
        if not all(moments):
            return "an optimizer has lost its moments"
        if lost := lost_settings(states[0].get("parts", states)[-1]):  # beside Muon, AdamW comes last
            return lost
        if any(tuple(value.shape) not in shapes | {()} for value in tensors(moments)):
            return "a moment of an optimizer has the shape of no weight"
        return None

    @staticmethod
    def _trained(optimizer: Any) -> list[Tensor]:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_finite(module: nn.Module, what: str) -> None:
    """Raise UserError if weights that will replace older files are not finite in the dtype that is written."""
    if not all_finite(module.state_dict().values()):
        raise UserError(f"{what} has weights that are not finite and was not written; try a lower task.lr")


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of `model`'s parameters; in update n the decay is at most (1 + n) / (10 + n)."""

    @torch.no_grad()
    def update(average: Any, current: Any, count: Tensor | int) -> None:
        n = int(count)
        torch._foreach_lerp_(average, current, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=update).requires_grad_(False)


def average_name(name: str) -> str:
    """The name in an average of a parameter: torch allows no dots in it."""
    return name.replace(".", "/")


def warmup_cosine(warmup: int, total: int, floor: float = 0.0) -> Callable[[int], float]:
    """The factor on the learning rate at a step: linear up over `warmup` steps, then half a cosine to `floor`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def replace_files(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then move its files over those in `folder`, each in one atomic step.

    A reader therefore finds only complete files, old or new, and a crash while writing leaves the old ones.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    fresh = Path(tempfile.mkdtemp(prefix=".new.", dir=folder))
    try:
        with in_use(fresh):
            write(fresh)
            for path in sorted(fresh.iterdir()):
                path.chmod(0o644)
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
