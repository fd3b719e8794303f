"""Distances of several models' pictures to rendered ones, and which differences between models mean something.

The Fréchet distance of 512 pictures to 512 others is about as large for rendered pictures as for a good student's. Its
expectation falls with the number of pictures, and a few of the judge's features have most of its variance. The kernel
distance of whitened features has neither fault.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from swd.metrics.bootstrap import Interval, Resamples, interval, mean_of, paired
from swd.metrics.functional import (
    frechet_infinity,
    frechet_parts,
    gaussian,
    mmd_parts,
    polynomial_kernel,
    whitening,
)


@dataclass(frozen=True)
class Distances:
    """Of one model's pictures.

    Attributes:
        kid: unbiased kernel distance of whitened features to rendered pictures'; about 0 for rendered ones.
        kid_over_first: that less the first model's, on the same prompts and seeds; None for the first model.
        fid_inf: Fréchet distance extrapolated to infinitely many pictures; its interval is the distance's, moved.
    """

    kid: Interval
    kid_over_first: Interval | None
    fid_inf: Interval | None


def distances(models: Sequence[Tensor], reference: Tensor, prompts: Sequence[Hashable]) -> list[Distances | None]:
    """Distances of each model, in their order; None for all where there are too few rendered pictures to tell.

    Args:
        models: features `[N, D]` of the pictures of each model, which drew the same prompts and seeds.
        reference: features `[R, D]` of rendered pictures.
        prompts: the prompt of each of the N pictures.
    """
    if len(reference) < 2 * reference.shape[1] or len(set(prompts)) < 2:
        return [None] * len(models)
    white, resamples = whitening(reference), Resamples(prompts)
    kernels = [
        mean_of(mmd_parts(white(features), white(reference), polynomial_kernel, unbiased=True)) for features in models
    ]
    return [
        Distances(
            kid=interval(kernel, resamples),
            kid_over_first=paired(kernel, kernels[0], resamples) if number else None,
            fid_inf=extrapolated(features, reference, resamples),
        )
        for number, (features, kernel) in enumerate(zip(models, kernels, strict=True))
    ]


def extrapolated(features: Tensor, reference: Tensor, resamples: Resamples) -> Interval | None:
    """The Fréchet distance of infinitely many pictures; None for too few to extrapolate from."""
    real = gaussian(reference)
    value = frechet_infinity(real, features)
    if value is None:
        return None
    found = interval(mean_of(frechet_parts(real, features)), resamples)
    moved = value - found.value
    return replace(found, value=value, low=found.low + moved, high=found.high + moved)
