"""One update of a batch in parts, whose gradients add up to the gradient of the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor

from swd.losses.base import Metrics
from swd.modules.inputs import Inputs
from swd.types import Checks, Size

PIXELS_OF_TEXT = 8
"""Latent pixels that take the memory of one token of text, on the safe side: in iterations of SD3.5 Medium and Large,
counted without weights, 5 to 7 do."""


def parts_at(size: Size, largest: Size, text_tokens: int, accumulate: int) -> int:
    """Least number of parts of a batch, a divisor of `accumulate`, that take no more memory than at the largest size.

    Args:
        size: latent size of the step that is trained.
        largest: latent size of the schedule's last step.
        text_tokens: tokens of a prompt.
        accumulate: number of parts at the largest size.
    """
    weight, most = (math.prod(each) + PIXELS_OF_TEXT * text_tokens for each in (size, largest))
    # 1 / parts * weight <= 1 / accumulate * most
    fitting = (n for n in range(1, accumulate) if accumulate % n == 0 and accumulate * weight <= n * most)
    return next(fitting, accumulate)


@dataclass(frozen=True)
class BatchPart:
    """Results of a part of a batch, or of all of it.

    Attributes:
        loss: the part's own, with its graph; detached once that was used.
        x0_hat: the student's clean predictions `[b, C, *size]`, detached.
        metrics: detached scalars.
        checks: by name whether values are finite.
    """

    loss: Tensor
    x0_hat: Tensor
    metrics: Metrics
    checks: Checks

    @staticmethod
    def joined(parts: Sequence[BatchPart]) -> BatchPart:
        """All parts as one: losses and metrics are means, and a check holds if it does in every part."""
        first = parts[0]
        if len(parts) == 1:
            return first
        return BatchPart(
            torch.stack([part.loss for part in parts]).mean(),
            torch.cat([part.x0_hat for part in parts]),
            {name: torch.stack([part.metrics[name] for part in parts]).mean() for name in first.metrics},
            {name: torch.stack([part.checks[name] for part in parts]).all() for name in first.checks},
        )


def accumulate(
    inputs: Inputs,
    count: int,
    work: Callable[[Inputs], BatchPart],
    backward: Callable[[Tensor], None],
    strategy: Strategy,
) -> BatchPart:
    """Add the gradient of a batch to the parameters' own, part by part; only one part's graph is in memory.

    Args:
        inputs: of the whole batch.
        count: number of parts; it divides the batch.
        work: makes the loss of a part.
        backward: back-propagates a loss.
        strategy: of the run. DDP exchanges gradients with the last part; FSDP2 with each, and keeps its own part alone.

    Returns:
        Results of the whole batch, detached.
    """
    done: list[BatchPart] = []
    for part in inputs.parts(count):
        result = work(part)
        is_last = len(done) == count - 1
        with nullcontext() if is_last else without_exchange(strategy):
            backward(result.loss / count)
        done.append(BatchPart(result.loss.detach(), result.x0_hat, result.metrics, result.checks))
    return BatchPart.joined(done)


def without_exchange(strategy: Strategy) -> AbstractContextManager[None]:
    """Context in which DDP keeps gradients to itself."""
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
