"""Distances of features against closed forms, loops and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import KernelInceptionDistance

from swd.metrics import functional
from swd.metrics.base import Gaussian
from swd.metrics.fid import frechet_distance
from swd.types import UserError


def normal(rows: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def by_numpy(real: Tensor, drawn: Tensor) -> float:
    """FID in numpy, with the eigenvalues of the product of both covariances instead of symmetric roots."""
    a, b = real.numpy(), drawn.numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(s @ t).astype(complex)).sum().real
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s) + np.trace(t) - 2 * cross)


# Fréchet distance


def test_frechet_equals_numpy() -> None:
    a, b = normal(50, 7, 0), normal(40, 7, 1, shift=0.3) @ normal(7, 7, 2)
    assert frechet_distance(a, b) == pytest.approx(by_numpy(a, b), rel=1e-9)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(by_numpy(a, b), rel=1e-5)


def test_frechet_of_fewer_pictures_than_features() -> None:
    a, b = normal(5, 12, 0), normal(4, 12, 1, shift=1)
    assert frechet_distance(a, b) == pytest.approx(by_numpy(a, b), rel=1e-6)


def test_frechet_of_known_gaussians_is_the_closed_form() -> None:
    mu, scale = torch.tensor([1.0, -2.0]).double(), torch.tensor([4.0, 0.25]).double()
    real = Gaussian(torch.zeros(2).double(), torch.eye(2).double())
    drawn = Gaussian(mu, scale.diag())
    # |mu|^2 + sum (1 - s)^2 with s the deviations 2 and 0.5
    assert functional.frechet_of_gaussians(real, drawn) == pytest.approx(5 + 1 + 0.25)


def test_frechet_parts_are_the_derivative_of_the_distance() -> None:
    real, drawn = functional.gaussian(normal(200, 4, 0)), normal(60, 4, 1, shift=0.2) @ normal(4, 4, 3)
    parts = functional.frechet_parts(real, drawn)
    assert float(parts.mean()) == pytest.approx(by_numpy(normal(200, 4, 0), drawn), rel=1e-9)
    # A distance of weighted pictures, derived by autograd with respect to the weights.
    weights = torch.full((60,), 1 / 60, dtype=torch.float64, requires_grad=True)
    share = weights / weights.sum()
    mu = share @ drawn
    sigma = (drawn - mu).T @ ((drawn - mu) * share[:, None]) * 60 / 59
    values = torch.linalg.eigvals(real.sigma @ sigma).sqrt().real.sum()
    distance = (mu - real.mu).square().sum() + real.sigma.trace() + sigma.trace() - 2 * values
    (slope,) = torch.autograd.grad(distance, weights)
    torch.testing.assert_close(parts - parts.mean(), slope, rtol=1e-8, atol=1e-8)


def test_frechet_parts_have_the_spread_of_repeated_draws() -> None:
    real = functional.gaussian(normal(4000, 3, 0))
    sets = [normal(400, 3, seed, shift=0.3) for seed in range(1, 151)]
    repeated = torch.tensor([functional.frechet_of_gaussians(real, functional.gaussian(each)) for each in sets])
    predicted = torch.stack([functional.frechet_parts(real, each).std() / 20 for each in sets]).mean()
    assert float(predicted / repeated.std()) == pytest.approx(1, abs=0.15)


def test_extrapolation_removes_the_bias_of_few_pictures() -> None:
    real = Gaussian(torch.zeros(8).double(), torch.eye(8).double())
    plain, infinite = [], []
    for seed in range(20):
        drawn = normal(200, 8, seed, shift=0.5)
        plain.append(functional.frechet_of_gaussians(real, functional.gaussian(drawn)))
        infinite.append(functional.frechet_infinity(real, drawn))
    bias = np.mean(plain) - 8 * 0.25
    assert bias > 0.05
    assert abs(np.mean(infinite) - 8 * 0.25) < bias / 3
    assert functional.frechet_infinity(real, normal(15, 8, 0)) is None


@pytest.mark.parametrize(("count", "least"), [(200, 20), (60, 16), (20, 10)])
def test_extrapolation_is_a_line_through_subsets(count: int, least: int) -> None:
    real, drawn = normal(90, 8, 0), normal(count, 8, 1, shift=0.3)
    generator = torch.Generator().manual_seed(6)
    sizes = np.linspace(least, count, 4).astype(int)
    chosen = [torch.randperm(count, generator=generator)[: int(size)] for size in sizes]
    slope, at_zero = np.polyfit(1 / sizes, [by_numpy(real, drawn[each]) for each in chosen], 1)
    found = functional.frechet_infinity(functional.gaussian(real), drawn, points=4, seed=6)
    assert found == pytest.approx(at_zero, rel=1e-6)
    assert slope > 0


def test_extrapolation_is_seeded_and_leaves_the_global_generator_alone() -> None:
    real, drawn = functional.gaussian(normal(90, 3, 0)), normal(80, 3, 1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = functional.frechet_infinity(real, drawn, seed=1)
    again, other = (functional.frechet_infinity(real, drawn, seed=seed) for seed in (1, 2))
    assert first == pytest.approx(again, rel=1e-9) and first != pytest.approx(other, rel=1e-3)  # sums may be threaded
    assert torch.equal(torch.get_rng_state(), before)


def test_floor_is_of_two_disjoint_sets_as_large_as_the_drawn_one() -> None:
    real = normal(41, 3, 0)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(4))
    expected = by_numpy(real[order[:12]], real[order[12:24]])
    assert functional.frechet_floor(real, 12, seed=4) == pytest.approx(expected, rel=1e-9)
    halves = by_numpy(real[order[:20]], real[order[20:40]])
    assert functional.frechet_floor(real, 30, seed=4) == pytest.approx(halves, rel=1e-9)
    assert functional.frechet_floor(real, seed=4) == pytest.approx(halves, rel=1e-9)


# Kernel distances


def by_loops(x: Tensor, y: Tensor, unbiased: bool, kernel: str) -> float:
    def k(a: Tensor, b: Tensor) -> float:
        if kernel == "polynomial":
            return float((a @ b / len(a) + 1) ** 3)
        return float(torch.exp(-(a - b).square().sum() / (2 * 1.5**2)))

    def within(rows: Tensor) -> float:
        pairs = [k(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j or not unbiased]
        return sum(pairs) / len(pairs)

    across = [k(a, b) for a in x for b in y]
    return within(x) + within(y) - 2 * sum(across) / len(across)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", ["polynomial", "gaussian"])
@pytest.mark.parametrize("rows", [1024, 4])
def test_discrepancy_equals_loops(unbiased: bool, kernel: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "ROWS", rows)
    x, y = normal(9, 5, 0), normal(11, 5, 1, shift=0.4)
    function = functional.polynomial_kernel if kernel == "polynomial" else functional.gaussian_kernel(1.5)
    parts = functional.mmd_parts(x, y, function, unbiased)
    assert parts.shape == (9,)
    assert float(parts.mean()) == pytest.approx(by_loops(x, y, unbiased, kernel), rel=1e-10)


def test_discrepancy_parts_have_the_spread_of_repeated_draws() -> None:
    y = normal(500, 3, 0)
    sets = [normal(100, 3, seed, shift=0.5) for seed in range(1, 201)]
    parts = [functional.mmd_parts(x, y, functional.polynomial_kernel, unbiased=True) for x in sets]
    repeated = torch.stack([each.mean() for each in parts]).std()
    predicted = torch.stack([each.std() / 10 for each in parts]).mean()
    assert float(predicted / repeated) == pytest.approx(1, abs=0.15)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kernel_distance_equals_torchmetrics_on_all_pictures() -> None:
    x, y = normal(20, 6, 0).float(), normal(20, 6, 1, shift=0.5).float()
    metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=20)
    metric.update(y, real=True)
    metric.update(x, real=False)
    expected = float(metric.compute()[0])
    assert float(functional.kernel_distances(x, y, 1, 20)[0]) == pytest.approx(expected, rel=1e-4)


def test_kernel_distances_of_subsets_are_seeded_and_unbiased() -> None:
    x, y = normal(60, 4, 0), normal(80, 4, 1, shift=0.5)
    values = functional.kernel_distances(x, y, subsets=400, size=20, seed=3)
    assert torch.equal(values, functional.kernel_distances(x, y, subsets=400, size=20, seed=3))
    everything = by_loops(x, y, True, "polynomial")
    assert float(values.mean()) == pytest.approx(everything, abs=4 * float(values.std()) / 20)


# Precision and recall


def test_neighbourhoods_on_a_line() -> None:
    centres = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])[:, None]
    # Radii with two neighbours: 2, 1, 1, 2, 8. Together they reach from -2 to 18.
    points = torch.tensor([-2.1, -2.0, 0.5, 5.0, 18.0, 18.1])[:, None]
    found = functional.within_neighbourhoods(points, centres, neighbours=2)
    assert found.tolist() == [False, True, True, True, True, False]


def test_neighbourhoods_equal_loops() -> None:
    x, y = normal(30, 4, 0, shift=0.8), normal(25, 4, 1)
    inside = []
    for point in x:
        balls = []
        for i, centre in enumerate(y):
            others = sorted(float((centre - other).norm()) for j, other in enumerate(y) if j != i)
            balls.append(float((point - centre).norm()) <= others[2])
        inside.append(any(balls))
    found = functional.within_neighbourhoods(x, y, 3)
    assert found.tolist() == inside
    assert 0 < sum(inside) < 30


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(UserError, match="at least 2 pictures a side, got 1 and 4"):
        functional.mmd_parts(normal(1, 3, 0), normal(4, 3, 0), functional.polynomial_kernel, True)
    with pytest.raises(UserError, match="more than 3 pictures a side, got 3"):
        functional.within_neighbourhoods(normal(5, 3, 0), normal(3, 3, 0), 3)
    with pytest.raises(UserError, match="at least 2 pictures a side, got 1"):
        functional.frechet_floor(normal(3, 3, 0))
