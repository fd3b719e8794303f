"""Kinds of GPUs, and the numbers that `swd plan` is given about them; nothing large is imported for them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from omegaconf import DictConfig

from swd.commands.cli import nearest
from swd.io import limits
from swd.types import UserError

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        memory: bytes.
        peak: TFLOP/s of dense bf16 matrix products.
    """

    memory: float
    peak: float


GPUS = {
    "a100": Gpu(80 * GB, 312),
    "h100": Gpu(80 * GB, 989),
    "h200": Gpu(141 * GB, 989),
    "l40s": Gpu(48 * GB, 362),
    "rtx4090": Gpu(24 * GB, 165),
}
"""Kinds that can be named; from their makers' data sheets, the figures without sparsity."""


def checked_gpu(cfg: DictConfig) -> Gpu:
    """The GPU that the configuration names; checks the other numbers too.

    Raises:
        UserError: naming the value and the fix.
    """
    for key in ("n_gpus", "batch_size", "samples"):
        limits.whole(key, cfg[key], 1)
    limits.number("utilisation", cfg.utilisation, above=0, most=1)
    limits.number("spare", cfg.spare, 0, 0.9)
    limits.number("peak", cfg.peak, above=0)
    if cfg.batch_size % cfg.n_gpus:
        raise UserError(
            f"batch_size={cfg.batch_size} does not divide over {cfg.n_gpus} GPUs; use a multiple of {cfg.n_gpus}"
        )
    gpu = gpu_of(str(cfg.gpu))
    return Gpu(gpu.memory, gpu.peak if cfg.peak is None else cfg.peak)


def gpu_of(text: str) -> Gpu:
    """A kind of GPU by its name or its memory, which then has the peak of an A100.

    Raises:
        UserError: if it is neither.
    """
    name = text.strip().lower()
    if name in GPUS:
        return GPUS[name]
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gb)?", name)
    if found is None or not 1 <= float(found[1]) <= 10_000:
        close = nearest(name, GPUS)
        hint = f" (did you mean {close}?)" if close else ""
        raise UserError(f"gpu={text} is unknown{hint}; give its memory, as in gpu=80GB, or one of {', '.join(GPUS)}")
    return Gpu(float(found[1]) * GB, GPUS["a100"].peak)
