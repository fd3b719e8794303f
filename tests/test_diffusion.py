"""The diffusion process against closed forms in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch.testing import assert_close

from swd.diffusion import RectifiedFlow, VariancePreserving, expand, rectified_flow_table

PROCESS = RectifiedFlow()


def sample(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_table_is_a_line_shifted_twice() -> None:
    def shift(t: np.ndarray) -> np.ndarray:
        return 3 * t / (1 + 2 * t)

    line = np.linspace(1.0, shift(np.array(0.001)), 28)
    expected = np.append(shift(line), 0.0)
    assert_close(rectified_flow_table().double(), torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_levels_are_table_entries() -> None:
    index = torch.tensor([0, 27, 14, 28])
    assert torch.equal(PROCESS.level(index), rectified_flow_table()[index])
    for low, high in PROCESS.ranges:
        assert 0 <= low <= high < 28


def test_a_familys_shift_moves_the_levels_and_the_ranges_follow_the_levels() -> None:
    assert PROCESS.ranges == ((0, 27), (12, 27), (18, 27))
    for shift in (1.8, 3.0, 6.4):
        process = RectifiedFlow(shift)

        def shifted(t: torch.Tensor, s: float = shift) -> torch.Tensor:
            return s * t / (1 + (s - 1) * t)

        even = torch.linspace(1.0, float(shifted(torch.tensor(0.001))), 28, dtype=torch.float64)
        assert_close(process.table[:-1].double(), shifted(even), rtol=0, atol=1e-5)
        for (first, last), bound in zip(process.ranges[1:], (0.795, 0.61), strict=True):
            assert last == 27 and process.table[first] < bound <= process.table[first - 1]
    assert RectifiedFlow(6.4).ranges.renoise == (17, 27) and RectifiedFlow(1.8).ranges.features == (15, 27)


@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (5, 4, 2, 3, 3)])
def test_add_noise_is_a_straight_line(shape: tuple[int, ...]) -> None:
    x0, eps, sigma = sample(*shape), sample(*shape, seed=1), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    s = sigma.double().view(-1, *[1] * (len(shape) - 1))
    x_t = PROCESS.add_noise(x0, eps, sigma)
    assert_close(x_t.double(), (1 - s) * x0.double() + s * eps.double(), rtol=0, atol=1e-6)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[-1], eps[-1])


def test_the_true_velocity_gives_back_the_data() -> None:
    table = rectified_flow_table()
    x0, eps = sample(29, 4, 6, 6), sample(29, 4, 6, 6, seed=1)
    x_t = PROCESS.add_noise(x0, eps, table)
    assert_close(PROCESS.to_x0(x_t, eps - x0, table), x0, rtol=0, atol=1e-6)


def test_inputs_of_low_precision_are_computed_in_float32() -> None:
    x0, eps, sigma = sample(2, 4, 6, 6).bfloat16(), sample(2, 4, 6, 6, seed=1).bfloat16(), torch.tensor([0.3, 0.7])
    x_t = PROCESS.add_noise(x0, eps, sigma)
    assert x_t.dtype == PROCESS.to_x0(x0, eps, sigma).dtype == torch.float32
    assert torch.equal(x_t, PROCESS.add_noise(x0.float(), eps.float(), sigma))
    one = torch.tensor(0.3)  # a tensor without axes does not promote its partner
    assert torch.equal(PROCESS.add_noise(x0, eps, one)[0], x_t[0])
    assert torch.equal(PROCESS.to_x0(x0, eps, one)[0], PROCESS.to_x0(x0, eps, sigma)[0])


@pytest.mark.parametrize("like", [torch.zeros(3, 4), torch.zeros(3, 4, 5, 5), torch.zeros(3, 4, 2, 5, 5)])
def test_levels_broadcast_over_samples(like: torch.Tensor) -> None:
    sigma = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    view = expand(sigma, like)
    assert view.shape == (3, *[1] * (like.ndim - 1)) and view.dtype == torch.float32
    assert torch.equal((like + view).flatten(1)[:, 0], sigma.float())
    assert expand(torch.tensor(0.5), like).shape == ()


def abar() -> np.ndarray:
    """Signal levels of Stable Diffusion's 1000 steps in float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas)


def test_variance_preserving_levels() -> None:
    """SDXL's timestep and signal at each level: `t = min(round(1000 sigma), 999)`, signal 0.068 at the first step."""
    process, ones, zeros = VariancePreserving(), torch.ones(6, 1, 1, 1), torch.zeros(6, 1, 1, 1)
    sigma, t = torch.tensor([1.0, 0.999, 0.8, 0.6, 0.4, 0.0]), [999, 999, 800, 600, 400, 0]
    assert process.timestep(sigma).tolist() == t
    signal, noise = process.add_noise(ones, zeros, sigma).flatten(), process.add_noise(zeros, ones, sigma).flatten()
    assert_close(signal.double(), torch.from_numpy(abar()[t] ** 0.5), rtol=1e-5, atol=1e-6)
    assert_close(noise.double(), torch.from_numpy((1 - abar()[t]) ** 0.5), rtol=1e-5, atol=1e-6)
    assert signal[0].item() == pytest.approx(0.068, abs=5e-4)
    index = torch.tensor([0, 399, 790, 999])
    assert process.timestep(process.level(index)).tolist() == index.tolist()


def test_variance_preserving_noise_is_that_of_diffusers() -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    process, t = VariancePreserving(), torch.tensor([0, 200, 400, 790, 999])
    x0, eps = sample(5, 4, 6, 6), sample(5, 4, 6, 6, seed=1)
    x_t = process.add_noise(x0, eps, process.level(t))
    assert_close(x_t, scheduler.add_noise(x0, eps, t), rtol=1e-4, atol=1e-5)
    for i, step in enumerate(t):
        expected = scheduler.step(eps[i : i + 1], int(step), x_t[i : i + 1]).pred_original_sample
        actual = process.to_x0(x_t[i : i + 1], eps[i : i + 1], process.level(step[None]))
        assert_close(actual.clamp(-1, 1), expected, rtol=1e-3, atol=1e-4)
    assert_close(process.to_x0(x_t, eps, process.level(t)), x0, rtol=1e-3, atol=2e-4)
