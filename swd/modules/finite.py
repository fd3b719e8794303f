"""Training stops at the first value that is not finite, before weights, checkpoints or a student take it on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from swd.types import Checks, UserError


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether no element of any tensor is infinite or NaN: a boolean scalar, computed where the tensors are."""
    found = [tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    # Steps of an optimizer are on the CPU, its moments are not.
    return torch.stack([each.to(found[0].device) for each in found]).all() if found else torch.tensor(True)


def stop_unless_finite(trainer: Trainer, checks: Checks, place: str, state: str) -> None:
    """End the run, on all processes at the same update, if a check failed on any of them.

    Args:
        trainer: of the run.
        checks: what was looked at; the same names on all processes.
        place: iteration, step of the schedule and update, for the message.
        state: what has not happened yet, for the message.

    Raises:
        UserError: with the place, everything that was not finite, and the last good checkpoint.
    """
    device = trainer.strategy.root_device
    failed = torch.stack([(~check).to(device, torch.float32) for check in checks.values()])
    # One process alone must not raise: the others would wait for it in the next exchange of gradients.
    failed = trainer.strategy.reduce(failed, reduce_op="max")
    if not failed.any():
        return
    names = [name for name, flag in zip(checks, failed.tolist(), strict=True) if flag]
    checkpoint = last_checkpoint(trainer)
    kept = f"last good checkpoint: {checkpoint}" if checkpoint else "no checkpoint had been written"
    raise UserError(
        f"training stopped at {place}: not finite: {', '.join(names)}; {state}; {kept}; "
        "try a lower task.lr, or look for broken data"
    )


def step_or_stop(
    step: Callable[[], Any], trainer: Trainer, parameters: Iterable[Tensor], name: str, place: str
) -> None:
    """One optimizer step, after which the weights must still be finite.

    Args:
        step: makes the step.
        trainer: of the run.
        parameters: its weights.
        name: of the weights, for the message.
        place: see `stop_unless_finite`.

    Raises:
        UserError: as `stop_unless_finite`.
    """
    overflow = False
    try:
        step()
    except RuntimeError as error:  # torch's words where a factor of the step exceeds the weights' type
        if "without overflow" not in str(error):
            raise
        overflow = True
    finite = all_finite(parameters) & torch.tensor(not overflow)
    stop_unless_finite(trainer, {name: finite}, place, "nothing was saved since")


def last_checkpoint(trainer: Trainer) -> str | None:
    """The newest checkpoint that this run wrote, else the one that it was resumed from, else None."""
    written = (Path(trainer.default_root_dir) / "checkpoints").glob("iteration-*.ckpt")
    newest = max(written, key=lambda file: file.stat().st_mtime_ns, default=None)
    return str(newest or trainer.ckpt_path or "") or None
