"""What the training tasks share: weight averages, the learning-rate curve, safe replacement of a model's files."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of `model`'s parameters that forgets its start: decay is at most (1+n)/(10+n)."""

    @torch.no_grad()
    def update(average: Any, current: Any, count: Tensor | int) -> None:
        n = int(count)
        torch._foreach_lerp_(average, current, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=update).requires_grad_(False)


def warmup_cosine(warmup: int, total: int, floor: float = 0.0) -> Callable[[int], float]:
    """The factor on the learning rate at a step: linear up over `warmup` steps, then half a cosine to `floor`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def replace_files(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a fresh folder, then move its files over those in `folder`, each in one atomic step.

    A reader therefore finds whole files only, old or new, and a crash while writing leaves the old ones.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        write(fresh)
        for path in sorted(fresh.iterdir()):
            path.chmod(0o644)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
