"""Distances with intervals: what equal models, worse models and rendered pictures get."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swd.metrics.bootstrap import Resamples, mean_of, paired
from swd.metrics.functional import frechet_parts, gaussian, mmd_parts, polynomial_kernel, whitening
from swd.shapes.distances import Distances, distances, extrapolated
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
    before = mmd_parts(white(drawn), white(real), polynomial_kernel, unbiased=True)
    after = mmd_parts(other(drawn @ change + 5), other(real @ change + 5), polynomial_kernel, unbiased=True)
    torch.testing.assert_close(before, after)


def test_equal_models_are_seldom_told_apart_and_rendered_pictures_are_at_0() -> None:
    reference = draw(0, 3 * COUNT)
    found = [measured(models(10 * trial + 10, worse=0), reference) for trial in range(20)]
    settled = sum(second.kid_over_first.settles for _, second in found if second.kid_over_first)
    assert settled <= 4  # 1 of 20 on average at 95%
    values = torch.tensor([first.kid.value for first, _ in found])
    assert abs(values.mean().item()) < 0.01 + 3 * values.std().item() / 20**0.5


def test_a_worse_model_is_told_from_a_better_one_where_fid_cannot() -> None:
    reference = draw(0, 3 * COUNT)
    found, by_fid = 0, 0
    for trial in range(8):
        sets = models(10 * trial + 10, worse=0.7)
        over = measured(sets, reference)[1].kid_over_first
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
