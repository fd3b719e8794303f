"""Distances between two sets of features: tensors in, tensors out, in float64.

Every function takes features `[N, D]` of any floating type and computes in float64. Random choices come from `seed`
alone, so that equal features give equal numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from swd.metrics.base import Gaussian
from swd.types import UserError, check_shape

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Kernel values `[N, M]` of every pair of rows of `[N, D]` and `[M, D]`."""
ROWS = 1024
"""Rows that are compared with all others at a time, which bounds memory."""


# --- Fréchet distance --------------------------------------------------------------------------------------------


def gaussian(features: Tensor) -> Gaussian:
    """Mean and covariance (divided by N - 1) of features `[N, D]`.

    Raises:
        UserError: for fewer than two rows, which have no covariance.
    """
    if len(features) < 2:
        raise UserError(f"a Fréchet distance needs at least 2 pictures a side, got {len(features)}")
    features = features.double()
    mu = features.mean(0)
    centred = features - mu
    return Gaussian(mu, centred.T @ centred / (len(features) - 1))


def frechet_distance(real: Tensor, drawn: Tensor) -> float:
    """`|mu_r - mu_d|^2 + tr(S_r + S_d - 2 (S_r S_d)^1/2)` of Gaussians fitted to two sets of features.

    The distance of FID (arXiv 1706.08500). It falls with the number of samples even for two draws of one distribution,
    so compare only values that come from the same number of samples.

    Args:
        real: features `[N, D]` of the reference.
        drawn: features `[M, D]` of the pictures that are judged.

    Raises:
        UserError: with fewer than two samples on a side, which have no covariance.
    """
    check_shape("drawn", drawn, (None, real.shape[1]))
    return frechet_of_gaussians(gaussian(real), gaussian(drawn))


def frechet_of_gaussians(real: Gaussian, drawn: Gaussian) -> float:
    """`frechet_distance` of Gaussians that are known."""
    return _frechet(real, matrix_root(real.sigma), drawn)


def _frechet(real: Gaussian, root: Tensor, drawn: Gaussian) -> float:
    """`frechet_of_gaussians` with the root of the reference's covariance, which several calls may share.

    tr (S_r S_d)^1/2 is the sum of the roots of the eigenvalues of S_r^1/2 S_d S_r^1/2, which is symmetric.
    """
    cross = torch.linalg.eigvalsh(root @ drawn.sigma @ root).clamp_min(0).sqrt().sum()
    return float((real.mu - drawn.mu).square().sum() + real.sigma.trace() + drawn.sigma.trace() - 2 * cross)


def matrix_root(sigma: Tensor) -> Tensor:
    """The symmetric root of a covariance `[D, D]`; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(sigma)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_parts(real: Gaussian, drawn: Tensor) -> Tensor:
    """`[N]` values, one for each drawn picture, whose mean is the Fréchet distance.

    A picture's value is the distance plus the distance's derivative in the direction of that picture (the influence
    function), so the spread of the values' mean is that of the distance, to first order in 1 / sqrt(N):

        F + 2 (mu_d - mu_r) (x - mu_d) + (x - mu_d)^T (1 - T) (x - mu_d) N / (N - 1) - its mean,
        T = R (R S_d R)^-1/2 R,  R = S_r^1/2.

    Args:
        real: the reference.
        drawn: features `[N, D]`, N > D.
    """
    fitted = gaussian(drawn)
    root = matrix_root(real.sigma)
    values, vectors = torch.linalg.eigh(root @ fitted.sigma @ root)
    kept = values > values.max() * 1e-12  # directions in which neither set varies have no derivative
    inverse = torch.where(kept, values, 1).rsqrt() * kept
    half = root @ vectors * inverse.sqrt()
    centred = drawn.double() - fitted.mu
    quadratic = centred.square().sum(1) - (centred @ half).square().sum(1)
    slope = 2 * centred @ (fitted.mu - real.mu) + quadratic * len(drawn) / (len(drawn) - 1)
    return _frechet(real, root, fitted) + slope - slope.mean()


def frechet_infinity(real: Gaussian, drawn: Tensor, points: int = 15, seed: int = 0) -> float | None:
    """The Fréchet distance extrapolated to infinitely many drawn pictures (arXiv 1911.07023).

    The bias of a distance of n pictures falls as 1 / n: a line is fitted to the distances of `points` random subsets,
    whose sizes are evenly spaced, and read off at 1 / n = 0. The sizes go from a tenth of the pictures (the source's
    5,000 of 50,000) to all; where a tenth is less than 2 D, below which the bias is no line, from 2 D or half of the
    pictures. Then the line still takes away five sixths of the bias of 3 D pictures of a Gaussian, and 0.9 of 5 D.

    Args:
        real: the reference, whose own number of pictures is not extrapolated.
        drawn: features `[N, D]`.
        points: number of subsets; the source's.
        seed: of the choice of subsets.

    Returns:
        None for fewer than 2 D pictures, too few to extrapolate from.
    """
    count, width = drawn.shape
    if count < 2 * width:
        return None
    generator = torch.Generator().manual_seed(seed)
    root = matrix_root(real.sigma)
    least = max(count // 10, min(2 * width, count // 2))
    sizes = torch.linspace(least, count, points).long()
    distances = []
    for size in sizes.tolist():
        chosen = torch.randperm(count, generator=generator)[:size]
        distances.append(_frechet(real, root, gaussian(drawn[chosen.to(drawn.device)])))
    line = torch.stack([torch.ones(points), 1 / sizes], dim=1).double()
    fit = torch.linalg.lstsq(line, torch.tensor(distances, dtype=torch.float64)[:, None]).solution
    return float(fit[0, 0])


def frechet_floor(real: Tensor, count: int | None = None, seed: int = 0) -> float:
    """The Fréchet distance between two random disjoint sets of real pictures: no perfect model does better on average.

    Args:
        real: features `[R, D]` of the reference.
        count: pictures in each set, those that were drawn; at most, and by default, half of the reference.
        seed: of the choice.

    Raises:
        UserError: with fewer than four real pictures.
    """
    size = min(len(real) // 2, count or len(real))
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed)).to(real.device)
    return frechet_distance(real[order[:size]], real[order[size : 2 * size]])


def whitening(real: Tensor) -> Callable[[Tensor], Tensor]:
    """The affine map that gives real features mean 0 and covariance 1; also for other features of the same network.

    Distances of mapped features do not depend on an invertible affine map of the features before it, so a direction
    in which real pictures hardly vary counts as much as any other.

    Args:
        real: features `[R, D]`, R >= 2 D, since the covariance of fewer is mostly chance.

    Raises:
        UserError: for fewer real pictures, or features that do not vary in some direction.
    """
    count, width = real.shape
    if count < 2 * width:
        raise UserError(f"whitening {width} features needs {2 * width} real pictures, got {count}; give more")
    known = gaussian(real)
    values, vectors = torch.linalg.eigh(known.sigma)
    if values[0] <= 1e-9 * values[-1]:
        raise UserError("features of the real pictures do not vary in some direction; give more different pictures")
    return lambda features: (features.double() - known.mu) @ vectors / values.sqrt()


# --- kernel distances --------------------------------------------------------------------------------------------


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """`(x y / D + 1)^3`, the kernel of KID (arXiv 1801.01401)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(sigma: float) -> Kernel:
    """`exp(-|x - y|^2 / (2 sigma^2))`, the kernel of CMMD (arXiv 2401.09603)."""
    return lambda x, y: torch.exp(-squared_distances(x, y) / (2 * sigma**2))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """`|x - y|^2` of every pair of rows, `[N, M]`."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)


def mmd_parts(drawn: Tensor, real: Tensor, kernel: Kernel, unbiased: bool) -> Tensor:
    """`[N]` values, one for each drawn picture, whose mean is the squared maximum mean discrepancy.

    `mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`; a picture's value is that plus twice the picture's own deviation
    from the means over x (the influence function), so the spread of the values' mean is that of the discrepancy.

    Args:
        drawn: features x `[N, D]`.
        real: features y `[M, D]`.
        kernel: k.
        unbiased: leave pairs of a picture with itself out of the means; KID does, CMMD does not.

    Raises:
        UserError: for fewer than two pictures on a side.
    """
    if min(len(drawn), len(real)) < 2:
        raise UserError(f"a kernel distance needs at least 2 pictures a side, got {len(drawn)} and {len(real)}")
    check_shape("drawn", drawn, (None, real.shape[1]))
    x, y = drawn.double(), real.double()
    within = _row_means(x, x, kernel, without_self=unbiased)
    across = _row_means(x, y, kernel)
    value = within.mean() + _row_means(y, y, kernel, without_self=unbiased).mean() - 2 * across.mean()
    return value + 2 * (within - within.mean()) - 2 * (across - across.mean())


def _row_means(x: Tensor, y: Tensor, kernel: Kernel, without_self: bool = False) -> Tensor:
    """Mean of `kernel(x_i, y_j)` over j for each i; `without_self` (where x is y) leaves out j = i."""
    means = []
    for start in range(0, len(x), ROWS):
        values = kernel(x[start : start + ROWS], y)
        if without_self:
            values.diagonal(start).zero_()
        means.append(values.sum(1) / (len(y) - without_self))
    return torch.cat(means)


def kernel_distances(drawn: Tensor, real: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> Tensor:
    """Unbiased squared discrepancies `[subsets]` of random subsets, as KID is published: their mean is reported.

    Args:
        drawn: features `[N, D]`.
        real: features `[M, D]`.
        subsets: number of subsets, the common 100.
        size: pictures a side in each, the common 1,000, or as many as there are.
        seed: of the choice; sets of as many pictures get the same places, so their differences are paired.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(drawn), len(real))
    values = []
    for _ in range(subsets):
        x, y = (each[torch.randperm(len(each), generator=generator)[:size].to(each.device)] for each in (drawn, real))
        values.append(mmd_parts(x, y, polynomial_kernel, unbiased=True).mean())
    return torch.stack(values)


# --- precision and recall ----------------------------------------------------------------------------------------


def within_neighbourhoods(points: Tensor, centres: Tensor, neighbours: int = 3) -> Tensor:
    """Which points `[N]` lie in the set's estimated manifold (arXiv 1904.06991, eq. 1): true or false.

    That manifold is the union of balls around the centres, each as large as the distance to its nearest but
    `neighbours` - 1 of the other centres. Drawn pictures in the manifold of real ones are precision, real ones in that
    of drawn ones recall.

    Args:
        points: features `[N, D]`.
        centres: features `[M, D]`, M > neighbours.
        neighbours: the source's k, 3.

    Raises:
        UserError: for too few centres.
    """
    if len(centres) <= neighbours:
        raise UserError(f"precision and recall need more than {neighbours} pictures a side, got {len(centres)}")
    check_shape("points", points, (None, centres.shape[1]))
    points, centres = points.double(), centres.double()
    radii = torch.cat(
        # The nearest is the centre itself.
        [squared_distances(rows, centres).kthvalue(neighbours + 1, dim=1).values for rows in centres.split(ROWS)]
    )
    return torch.cat([(squared_distances(rows, centres) <= radii).any(1) for rows in points.split(ROWS)])
