"""Bootstrap intervals: prompts are drawn with replacement, and the pictures of one prompt stay together.

A statistic is a function of how often each picture occurs in a resample: counts `[R, N]` to values `[R]`, one for each
of R resamples. With all counts 1 it is the metric itself. Two models that drew the same prompts and seeds share the
counts, so what prompts do to both cancels in their difference (Efron and Tibshirani, An Introduction to the Bootstrap,
chapters 8 and 13).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from swd.metrics.functional import polynomial_kernel
from swd.types import UserError, check_shape

Statistic = Callable[[Tensor], Tensor]
"""Counts `[R, N]`, float64, to values `[R]`, float64."""

DRAWS = 1000
"""Resamples: Efron and Tibshirani, section 13.3, ask for 1,000 for the ends of a 95% interval."""
LEVEL = 0.95
BLOCK = 4096
"""Pictures whose kernels are held at once: a matrix of 134 MB."""


@dataclass(frozen=True)
class ConfidenceInterval:
    """A value with the interval that holds it in a share `level` of repetitions with other prompts."""

    value: float
    low: float
    high: float
    level: float = LEVEL

    @property
    def settles(self) -> bool:
        """Whether the interval leaves out 0, so that a difference has a sign."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high, "level": self.level}


# Resampling


@dataclass(frozen=True)
class Resamples:
    """Which resamples are drawn.

    Attributes:
        clusters: for each of N pictures, its prompt (a text or number), in the order of the pictures.
        draws: number of resamples.
        seed: of the generator.
    """

    clusters: Sequence[Hashable]
    draws: int = DRAWS
    seed: int = 0

    def __post_init__(self) -> None:
        if len(set(self.clusters)) < 2:
            raise UserError(f"an interval needs at least 2 prompts, got {len(set(self.clusters))}; draw more prompts")
        if self.draws < 2:
            raise UserError(f"draws={self.draws} is not valid; an interval needs at least 2 resamples")

    def counts(self) -> Tensor:
        """How often each picture occurs in each resample, `[draws, N]`, float64."""
        groups = numbers_of(self.clusters)
        n = int(groups.max()) + 1
        drawn = np.random.default_rng(self.seed).multinomial(n, np.full(n, 1 / n), size=self.draws)
        return torch.from_numpy(drawn).double()[:, groups]


def numbers_of(clusters: Sequence[Hashable]) -> Tensor:
    """Clusters as numbers 0, 1, ... in the order in which they occur first, `[N]` int64."""
    known: dict[Hashable, int] = {}
    return torch.tensor([known.setdefault(cluster, len(known)) for cluster in clusters])


def interval(
    statistic: Statistic, resamples: Resamples, level: float = LEVEL, centred: bool = False
) -> ConfidenceInterval:
    """The percentile interval of a statistic.

    Args:
        statistic: of one model's pictures.
        resamples: which resamples are drawn.
        level: share of repetitions that the interval holds, in (0, 1).
        centred: shift the resampled values so that their mean is the statistic's value. For statistics that grow when
            pictures repeat, as a Fréchet distance does: its resampled values have the bias of few pictures twice.
    """
    value = float(statistic(torch.ones(1, len(resamples.clusters), dtype=torch.float64)))
    return _percentiles(value, statistic(resamples.counts()), level, centred)


def paired(
    a: Statistic, b: Statistic, resamples: Resamples, level: float = LEVEL, centred: bool = False
) -> ConfidenceInterval:
    """The percentile interval of `a - b`, the difference of two models on the same prompts and seeds.

    Args:
        a: statistic of the first model's pictures.
        b: statistic of the second model's pictures, which have the same prompts and seeds in the same order.
        resamples: as in `interval`, as the arguments after it are.
    """
    return interval(lambda counts: a(counts) - b(counts), resamples, level, centred)


def ratio_parts(above: Tensor, below: Tensor) -> Tensor:
    """`[N, ...]` values whose means are the ratios `sum above / sum below` `[...]`, for the intervals of these ratios.

    Each is the ratio plus its derivative in the direction of the sample (the influence function):
    `r + (a_i - r b_i) / mean b`.

    Args:
        above: `[N, ...]`, a row for each sample.
        below: of the same shape; its sums are not 0.
    """
    ratio = above.sum(0) / below.sum(0)
    return ratio + (above - ratio * below) / below.mean(0)


def _percentiles(value: float, drawn: Tensor, level: float, centred: bool) -> ConfidenceInterval:
    if not 0 < level < 1:
        raise UserError(f"level={level} is not valid; use a number between 0 and 1, such as {LEVEL}")
    if centred:
        drawn = drawn - drawn.mean() + value
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(drawn, ends).tolist()
    return ConfidenceInterval(value, low, high, level)


# Statistics


def mean_of(values: Tensor) -> Statistic:
    """The mean of a value per picture `[N]`; pictures whose value is NaN do not count."""
    there, known = (~values.isnan()).double(), values.nan_to_num().double()
    return lambda counts: (counts @ known) / (counts @ there)


def of_rows(function: Callable[[Tensor], float], rows: Tensor) -> Statistic:
    """Any function of a set of rows `[M, ...]`, called once a resample with rows repeated as often as they were drawn.

    Args:
        function: such as a Fréchet distance to a reference.
        rows: features of N pictures `[N, ...]`.
    """

    def statistic(counts: Tensor) -> Tensor:
        sets = (rows.repeat_interleave(row.long(), dim=0) for row in counts)
        return torch.tensor([function(each) for each in sets], dtype=torch.float64)

    return statistic


def kernel_distance_of(
    features: Tensor, reference: Tensor, clusters: Sequence[Hashable], block: int = BLOCK
) -> Statistic:
    """The unbiased kernel distance to a fixed reference (KID, arXiv 1801.01401), from kernels computed once.

    `MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)` with
    `k(x, y) = (x.y / D + 1)^3`. A picture that was drawn twice is no pair with itself: pairs of pictures of two prompts
    count as often as both prompts were drawn, pairs within one prompt as often as that prompt was. So the resampled
    values scatter around the value itself.

    Args:
        features: `[N, D]` of the pictures that are judged.
        reference: `[M, D]`.
        clusters: the prompt of each picture.
        block: beyond so many pictures, only pairs within blocks of consecutive prompts enter the first mean.
    """
    check_shape("reference", reference, (None, features.shape[1]))
    features, reference = features.double(), reference.double()
    groups = numbers_of(clusters)
    cross = torch.cat([polynomial_kernel(part, reference).mean(1) for part in features.split(block)])
    within_reference = _off_diagonal_mean(reference, block)
    parts = [_PairSums.of(features, groups, chosen) for chosen in _blocks(groups, block)]

    def statistic(counts: Tensor) -> Tensor:
        sums, pairs = (torch.stack(each).sum(0) for each in zip(*(part(counts) for part in parts), strict=True))
        return sums / pairs + within_reference - 2 * (counts @ cross) / counts.sum(1)

    return statistic


def _off_diagonal_mean(rows: Tensor, block: int) -> float:
    n = len(rows)
    total = sum(float(polynomial_kernel(part, rows).sum()) for part in rows.split(block))
    diagonal = float(((rows.square().sum(1) / rows.shape[1] + 1) ** 3).sum())
    return (total - diagonal) / (n * (n - 1))


def _blocks(groups: Tensor, block: int) -> list[Tensor]:
    """Positions of pictures, in parts of whole prompts with about `block` pictures each."""
    order = torch.argsort(groups, stable=True)
    last = torch.cumsum(torch.bincount(groups), 0)
    part = (last - 1) // block
    return [order[part[groups[order]] == number] for number in part.unique()]


@dataclass(frozen=True)
class _PairSums:
    """Kernels of pairs of different pictures, summed over the pictures of each prompt.

    Attributes:
        first: position of each prompt's first picture `[C]`, where its count is read.
        between: sums over pairs from two prompts `[C, C]`, 0 on the diagonal.
        inside: sums over pairs within one prompt `[C]`.
        sizes: pictures of each prompt `[C]`.
    """

    first: Tensor
    between: Tensor
    inside: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, features: Tensor, groups: Tensor, chosen: Tensor) -> _PairSums:
        members = torch.nn.functional.one_hot(numbers_of(groups[chosen].tolist())).double()
        kernels = polynomial_kernel(features[chosen], features[chosen]).fill_diagonal_(0)
        sums = members.T @ kernels @ members
        return cls(chosen[members.argmax(0)], sums - sums.diag().diag(), sums.diag().clone(), members.sum(0))

    def __call__(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of kernels and numbers of pairs in each resample `[R]`."""
        drawn = counts[:, self.first]
        pictures = drawn * self.sizes
        sums = ((drawn @ self.between) * drawn).sum(1) + drawn @ self.inside
        pairs = pictures.sum(1) ** 2 - pictures.square().sum(1) + drawn @ (self.sizes * (self.sizes - 1))
        return sums, pairs
