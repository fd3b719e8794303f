"""Distances with intervals: what equal models, worse models and rendered pictures get."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from swd.metrics.bootstrap import Resamples, mean_of, paired
from swd.metrics.functional import frechet_parts, gaussian, whitening
from swd.shapes import report
from swd.shapes.contest import ResultRow
from swd.shapes.distances import Distances, distances, extrapolated, mmd_to_rendered
from swd.types import UserError

WIDTH, COUNT = 8, 160
SCALES = torch.tensor([10.0, 3, 1, 1, 1, 1, 0.3, 0.1])
"""Deviations of the features: as of the judge's, a few have most of the variance."""


def draw(seed: int, count: int = COUNT) -> Tensor:
    return SCALES * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def models(seed: int, worse: float) -> list[Tensor]:
    """Two models that share what prompts decide; of the second, the last feature is moved."""
    prompts = 0.8 * draw(seed)
    first, second = prompts + 0.6 * draw(seed + 1), prompts + 0.6 * draw(seed + 2)
    second[:, -1] += worse * SCALES[-1]
    return [first, second]


def measured(sets: list[Tensor], reference: Tensor) -> list[Distances]:
    found = distances(sets, reference, range(len(sets[0])))
    return [each for each in found if each is not None]


def test_whitening_takes_out_affine_maps() -> None:
    real, drawn = draw(0).double(), draw(1).double() + 0.1
    white = whitening(real)
    torch.testing.assert_close(torch.cov(white(real).T), torch.eye(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(white(real).mean(0), torch.zeros(WIDTH, dtype=torch.float64))
    change = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    other = whitening(real @ change + 5)
    torch.testing.assert_close(torch.cov(other(real @ change + 5).T), torch.eye(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(
        mmd_to_rendered(drawn, real), mmd_to_rendered(drawn @ change + 5, real @ change + 5), rtol=1e-6, atol=1e-6
    )


def test_the_distance_is_its_definition() -> None:
    real, drawn = draw(0, 20).double(), draw(1, 10).double() + 0.1
    root = torch.linalg.inv(torch.linalg.cholesky(torch.cov(real.T)))  # whitens as well as any other root

    def kernel(x: Tensor, y: Tensor) -> float:
        return math.exp(-float((root @ (x - y)).square().sum()) / (2 * WIDTH))

    within = [kernel(x, y) for x, y in itertools.permutations(drawn, 2)]
    among = [kernel(x, y) for x, y in itertools.permutations(real, 2)]
    across = [kernel(x, y) for x, y in itertools.product(drawn, real)]
    expected = 1000 * (sum(within) / 90 + sum(among) / 380 - 2 * sum(across) / 200)
    assert mmd_to_rendered(drawn, real).mean().item() == pytest.approx(expected)


def test_equal_models_are_seldom_told_apart_and_rendered_pictures_are_at_0() -> None:
    reference = draw(0, 3 * COUNT)
    found = [measured(models(10 * trial + 10, worse=0), reference) for trial in range(20)]
    settled = sum(second.mmd_over_first.settles for _, second in found if second.mmd_over_first)
    assert settled <= 4  # 1 of 20 on average at 95%
    values = torch.tensor([first.mmd.value for first, _ in found])
    assert abs(values.mean().item()) < 3 * values.std().item() / 20**0.5


def test_a_worse_model_is_told_from_a_better_one_where_fid_cannot() -> None:
    reference = draw(0, 3 * COUNT)
    found, by_fid = 0, 0
    for trial in range(8):
        sets = models(10 * trial + 10, worse=0.7)
        over = measured(sets, reference)[1].mmd_over_first
        assert over is not None
        found += over.low > 0
        parts = [mean_of(frechet_parts(gaussian(reference), each)) for each in sets]
        by_fid += paired(parts[1], parts[0], Resamples(range(COUNT), draws=200)).low > 0
    assert found >= 7 and by_fid <= 2


def test_the_extrapolated_distance_is_that_of_the_distributions() -> None:
    # Moving one feature by c and keeping the covariance: the distance is c^2.
    reference = draw(0, 20_000)
    held = 0
    for trial in range(20):
        sample = draw(trial + 1, 1000) + torch.tensor([0, 4.0, 0, 0, 0, 0, 0, 0])
        found = extrapolated(sample, reference, Resamples(range(1000), draws=300))
        assert found is not None
        held += found.low <= 16 <= found.high
    assert held >= 16


def test_a_rows_distances_reach_the_report() -> None:
    found = measured(models(0, worse=2), draw(0, 3 * COUNT))
    rows = [ResultRow(f"model {i}", 4, 4, 1.0, 1.0, 1.0, 1.0, 1.0, distances=found[i]).as_dict() for i in range(2)]
    assert report.mmd_text(rows[1]).startswith(f"{found[1].mmd.value:.1f} ± ")
    assert report.difference_lines({"rows": rows})[0].endswith("over model 0 (worse)")


def test_few_rendered_pictures_give_no_distances() -> None:
    sets = models(0, 0)
    assert distances(sets, draw(0, 2 * WIDTH - 1), range(COUNT)) == [None, None]
    assert distances(sets, draw(0), ["one prompt"] * COUNT) == [None, None]
    few = distances([each[: 2 * WIDTH - 1] for each in sets], draw(0), range(2 * WIDTH - 1))
    assert few[0] is not None and few[0].fid_inf is None
    with pytest.raises(UserError, match="whitening 8 features needs 16 real pictures, got 15"):
        whitening(draw(0, 15))
    with pytest.raises(UserError, match="do not vary in some direction"):
        whitening(draw(0) * torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 0]))
