"""Work and memory of an iteration at each size of a schedule, from a few updates without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from swd.losses.base import LossTerm
from swd.losses.update import trainers
from swd.modules.dry_run import DryRun, UpdateCost
from swd.modules.pretrained import Pretrained
from swd.schedule import ScaleSchedule

MEASURED = 3
"""Number of sizes that are run: as many as a quadratic has coefficients."""


@dataclass(frozen=True)
class IterationCost:
    """Cost of an iteration for each sample of its batches.

    Attributes:
        generator: of the generator update.
        critic: of each critic update; None without a critic.
        critic_updates: their number.
    """

    generator: UpdateCost
    critic: UpdateCost | None
    critic_updates: int

    @property
    def flop(self) -> float:
        """Floating-point operations of all its updates."""
        return self.generator.flop + (0.0 if self.critic is None else self.critic_updates * self.critic.flop)

    @property
    def peak(self) -> int:
        """Bytes of activations and other tensors for a time, in the update that needs most."""
        return max(self.generator.peak, 0 if self.critic is None else self.critic.peak)


def iteration_costs(
    model: Pretrained,
    schedule: ScaleSchedule,
    terms: Mapping[str, LossTerm],
    critic_updates: int,
    checkpointing: bool,
) -> list[IterationCost]:
    """Cost of an iteration at each step of the schedule, for a batch of one.

    At most `MEASURED` steps are run. Of the others the work follows exactly, since that of linear layers and
    convolutions grows with the number of latent pixels, and attention's with its square; memory between two sizes is
    on the line between them.

    Args:
        model: the teacher; only its configuration is read.
        schedule: noise levels and sizes.
        terms: the loss, settled and checked.
        critic_updates: of an iteration; without effect where no term trains a critic.
        checkpointing: whether activations are computed again in the backward pass.
    """
    dry = DryRun(model, terms, schedule, checkpointing)
    counts = [torch.Size(size).numel() for size in schedule.sizes]
    nodes = chosen(counts)
    steps = {count: counts.index(count) for count in nodes}

    def fitted(kind: str) -> Callable[[int], UpdateCost]:
        run = {n: dry.update("critic" if kind == "critic" else "generator", step) for n, step in steps.items()}
        return lambda n: UpdateCost(
            quadratic({m: cost.flop for m, cost in run.items()}, n),
            round(between({m: cost.peak for m, cost in run.items()}, n)),
        )

    generator = fitted("generator")
    critic = fitted("critic") if trainers(terms) else None
    return [IterationCost(generator(n), None if critic is None else critic(n), critic_updates) for n in counts]


def chosen(counts: Sequence[int]) -> list[int]:
    """Those of the given numbers, in ascending order, that are run: the least, the largest, and one in the middle."""
    distinct = sorted(set(counts))
    if len(distinct) <= MEASURED:
        return distinct
    return [distinct[0], distinct[len(distinct) // 2], distinct[-1]]


def quadratic(known: Mapping[int, float], n: int) -> float:
    """Value at `n` of the polynomial through the known points (Lagrange's formula)."""
    total = 0.0
    for i, value in known.items():
        for j in known:
            value *= (n - j) / (i - j) if i != j else 1.0
        total += value
    return total


def between(known: Mapping[int, float], n: int) -> float:
    """Value at `n` on the lines that join neighbouring points; `n` lies among them."""
    points = sorted(known.items())
    for (a, low), (b, high) in pairwise(points):
        if a <= n <= b:
            return low + (high - low) * (n - a) / (b - a)
    return points[0][1]
