"""Stops training at the first value that is not finite, before it reaches weights, checkpoints or a saved student."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from swd.modules.layouts import local_part
from swd.types import Checks, UserError

SMALL = 2**16
"""Elements of a tensor up to which it is cheaper to copy it into another one than to look at it by itself."""
FEW = 4
"""Small tensors up to which that gains nothing."""


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether no element of any tensor is infinite or NaN: a boolean scalar, computed where the tensors are.

    Of tensors that are divided over processes, each looks at its own part.
    """
    parts = [local_part(tensor) for tensor in tensors if tensor.is_floating_point()]
    parts = [part for part in parts if part.numel()]
    if not parts:
        return torch.tensor(True)
    # The extremes of each: one pass over all tensors, and as finite as they are.
    if all(part.is_cpu for part in parts):  # where a norm takes up to eight times as long
        parts = _joined(parts)
        extremes = [extreme for part in parts for extreme in part.aminmax()]
    else:
        extremes = list(torch._foreach_norm(parts, torch.inf))
    first = parts[0]
    if all(part.dtype == first.dtype and part.device == first.device for part in parts):
        return torch.stack(extremes).isfinite().all()
    # An optimizer keeps its step counter on the CPU and its moments on the device.
    return torch.stack([each.isfinite().to(first.device) for each in extremes]).all()


def _joined(parts: list[Tensor]) -> list[Tensor]:
    """Tensors with the same values, of which the small ones are copied into one: a call takes longer than they do."""
    small = [part for part in parts if part.numel() <= SMALL]
    if len(small) <= FEW:
        return parts
    large = [part for part in parts if part.numel() > SMALL]
    return [torch.cat([part.flatten() for part in small]), *large]


def failed_checks(trainer: Trainer, checks: Checks) -> list[str]:
    """Names of the checks that failed on any process: the same list on all of them.

    Args:
        trainer: of the run.
        checks: by name whether a value is as it should be; the same names on all processes.
    """
    device = trainer.strategy.root_device
    failed = (~torch.stack([check.to(device) for check in checks.values()])).float()
    # All processes decide alike: if one stopped alone, the others would wait for it in the next exchange of gradients.
    failed = trainer.strategy.reduce(failed, reduce_op="max")
    if not failed.any():
        return []
    return [name for name, flag in zip(checks, failed.tolist(), strict=True) if flag]


def stop_unless_finite(trainer: Trainer, checks: Checks, place: str, state: str) -> None:
    """End the run, on all processes at the same update, if a check failed on any of them.

    Args:
        trainer: of the run.
        checks: by name whether a value is finite; the same names on all processes.
        place: iteration, step of the schedule and update, for the message.
        state: description of the state that is kept, for the message.

    Raises:
        UserError: with the place, everything that was not finite, and the last good checkpoint.
    """
    names = failed_checks(trainer, checks)
    if names:
        raise UserError(stop_text(trainer, place, f"not finite: {', '.join(names)}", state))


def stop_text(trainer: Trainer, place: str, reason: str, state: str) -> str:
    """The line that a run ends with: where, why, the state that is kept, and what to try."""
    checkpoint = last_checkpoint(trainer)
    kept = f"last good checkpoint: {checkpoint}" if checkpoint else "no checkpoint had been written"
    return f"training stopped at {place}: {reason}; {state}; {kept}; try a lower task.lr, or look for broken data"


@dataclass(frozen=True)
class Stepped:
    """An optimizer step whose weights are not looked at yet: reading a value of a GPU waits for all that it has to do.

    Attributes:
        place: see `stop_unless_finite`.
        checks: by the name of the weights whether they are finite.
    """

    place: str
    checks: Checks

    def stop_if(self, trainer: Trainer, failed: Iterable[str]) -> None:
        """Raise UserError, as `stop_unless_finite` does, if the weights are among the checks that failed."""
        names = [name for name in failed if name in self.checks]
        if names:
            raise UserError(
                stop_text(trainer, self.place, f"not finite: {', '.join(names)}", "nothing was saved since")
            )


def stepped(step: Callable[[], Any], parameters: Iterable[Tensor], name: str, place: str) -> Stepped:
    """One optimizer step; nothing may be saved before its weights are looked at.

    Args:
        step: a call that makes the step.
        parameters: the weights that the step changes.
        name: name of the weights, for the message.
        place: see `stop_unless_finite`.
    """
    overflow = False
    try:
        step()
    except RuntimeError as error:  # torch raises if a factor of the step exceeds the range of the weights' type
        if "without overflow" not in str(error):
            raise
        overflow = True
    return Stepped(place, {name: all_finite(parameters) & torch.tensor(not overflow)})


def step_or_stop(
    step: Callable[[], Any], trainer: Trainer, parameters: Iterable[Tensor], name: str, place: str
) -> None:
    """One optimizer step, after which the weights must still be finite; the arguments are those of `stepped`.

    Raises:
        UserError: as `stop_unless_finite`.
    """
    done = stepped(step, parameters, name, place)
    done.stop_if(trainer, failed_checks(trainer, done.checks))


def last_checkpoint(trainer: Trainer) -> str | None:
    """The newest checkpoint that this run wrote, else the one that it was resumed from, else None."""
    written = (Path(trainer.default_root_dir) / "checkpoints").glob("iteration-*.ckpt")
    newest = max(written, key=lambda file: file.stat().st_mtime_ns, default=None)
    return str(newest or trainer.ckpt_path or "") or None
