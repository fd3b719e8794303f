"""Numbers that watch a distillation, against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from swd.diffusion import Process, RectifiedFlow, VariancePreserving
from swd.modules.statistics import cosine, inner_range, prediction_statistics, rms, similarity, spread, velocity


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_predictions_that_are_scaled_data() -> None:
    real = normal(8, 4, 16, 16)
    same, double = (prediction_statistics(factor * real, real) for factor in (1, 2))
    assert_close(same["monitor/x0_std"], torch.tensor(1.0))
    assert_close(double["monitor/x0_std"], torch.tensor(2.0))
    assert_close(double["monitor/x0_spread"], torch.tensor(2.0))
    assert same["monitor/saturation"] == pytest.approx(0.001, rel=0.1)
    # Beyond 3.29 / 2 standard deviations of a Gaussian; 16 values on each side decide where the range ends.
    assert double["monitor/saturation"] == pytest.approx(0.1, rel=0.25)


def test_one_picture_for_all_prompts_has_no_spread_but_a_std() -> None:
    real = normal(6, 4, 8, 8)
    found = prediction_statistics(real[:1].expand_as(real), real)
    assert found["monitor/x0_spread"] == pytest.approx(0, abs=1e-6)
    assert found["monitor/x0_std"] == pytest.approx(1, rel=0.1)
    assert "monitor/x0_spread" not in prediction_statistics(real[:1], real[:1])


def test_the_spread_is_the_square_root_of_the_mean_variance() -> None:
    assert_close(spread(torch.tensor([[1.0, 0.0], [3.0, 0.0]])), torch.tensor(0.5).sqrt())


def test_the_spread_is_over_the_samples_of_all_processes() -> None:
    # Each of four processes predicts one picture for its own two prompts: alone none has a spread.
    shares = normal(4, 1, 3, 8, 8).expand(-1, 2, -1, -1, -1)
    real = normal(8, 3, 8, 8, seed=1)
    rounds = [[share.mean(0) for share in shares]]
    rounds.append([(share - shares.mean((0, 1))).square().mean() for share in shares])
    for rank, share in enumerate(shares):
        assert spread(share) == pytest.approx(0, abs=1e-6)
        asked = iter(rounds)

        def average(values: torch.Tensor, asked: Any = asked, rank: int = rank) -> torch.Tensor:
            theirs = next(asked)
            assert_close(values, theirs[rank])
            return torch.stack(theirs).mean(0)

        assert_close(spread(share, average), spread(shares.flatten(0, 1)))
    # One sample on each of two processes is a batch of two.
    assert "monitor/x0_spread" in prediction_statistics(real[:1], real[1:2], processes=2)


@pytest.mark.parametrize("count", [1000, 2**16 + 1, 3 * 2**16])
def test_the_range_leaves_out_a_thousandth(count: int) -> None:
    values = torch.arange(count)[torch.randperm(count, generator=torch.Generator().manual_seed(0))].float()
    low, high = inner_range(values)
    assert low == pytest.approx(0.0005 * count, abs=0.0006 * count) and high >= low
    assert ((values < low) | (values > high)).float().mean() == pytest.approx(0.001, abs=0.0015)


def test_similarity_of_equal_opposite_and_independent_drawings() -> None:
    x = normal(1, 3, 4, 32, 32)
    assert_close(similarity(x.expand(5, -1, -1, -1, -1)), torch.tensor(1.0))
    assert_close(similarity(torch.cat([x, -x])), torch.tensor(-1.0))
    assert similarity(normal(5, 3, 4, 32, 32)) == pytest.approx(0, abs=0.02)
    # Pairs of the same prompt alone are compared; a colour that all have in common counts for nothing.
    assert similarity(normal(5, 3, 4, 32, 32) + 100) == pytest.approx(0, abs=0.02)
    three = torch.cat([x, x, -x])
    assert_close(similarity(three), torch.tensor(-1 / 3))


@pytest.mark.parametrize("process", [RectifiedFlow(), VariancePreserving()])
def test_the_velocity_is_noise_minus_data(process: Process) -> None:
    x0, eps, sigma = normal(3, 4, 8, 8), normal(3, 4, 8, 8, seed=1), torch.tensor([0.3, 0.6, 0.9])
    x_t = process.add_noise(x0, eps, sigma)
    assert_close(velocity(process, x_t, x0, sigma), eps - x0, rtol=1e-4, atol=1e-4)


def test_rms_and_cosine_are_of_each_sample() -> None:
    a = torch.tensor([[[3.0, 4.0]], [[1.0, 1.0]]])
    assert_close(rms(a), torch.tensor([12.5**0.5, 1.0]))
    assert_close(cosine(a, torch.tensor([[[4.0, -3.0]], [[-2.0, -2.0]]])), torch.tensor([0.0, -1.0]))
