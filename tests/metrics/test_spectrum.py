"""Spectra: white noise is flat, a power law is recovered exactly, noised latents have the power that is said."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from swd.diffusion import Process, RectifiedFlow, VariancePreserving
from swd.metrics.spectrum import noised, power_in_space, power_in_time


def white(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def radius(height: int, width: int) -> Tensor:
    """Cycles over the shorter side of every frequency `[H, W]`."""
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) * min(height, width) for side in (height, width))
    return (rows[:, None].square() + columns.square()).sqrt()


def power_law(exponent: float, *shape: int) -> Tensor:
    """Random pictures whose power at each frequency r is exactly r to the `exponent`; 1 where r is 0."""
    transformed = torch.fft.fft2(white(*shape))
    wanted = radius(*shape[-2:]).clamp(min=1e-9).pow(exponent / 2)
    wanted[0, 0] = 1.0
    return torch.fft.ifft2(transformed / transformed.abs() * wanted, norm="ortho").real


@pytest.mark.parametrize("shape", [(64, 4, 16, 16), (64, 4, 16, 24), (64, 4, 15, 9), (16, 4, 3, 16, 16)], ids=str)
def test_white_noise_has_the_power_one_everywhere(shape: tuple[int, ...]) -> None:
    power = power_in_space(white(*shape))
    assert len(power) == min(shape[-2:]) // 2 + 1
    planes = math.prod(shape[:-2])
    # The power at a frequency has the deviation 1 (of the frequency 0: sqrt 2), and at least 256 planes are averaged.
    assert_close(power, torch.ones_like(power), rtol=0, atol=4 * math.sqrt(2 / planes))
    assert_close(power_in_space(3 * white(*shape)), 9 * power)


def test_white_noise_is_flat_in_time() -> None:
    for frames in (21, 8):
        power = power_in_time(white(4, 4, frames, 12, 12))
        assert len(power) == frames // 2 + 1
        assert_close(power, torch.ones_like(power), rtol=0, atol=4 * math.sqrt(2 / (4 * 4 * 144)))


@pytest.mark.parametrize("exponent", [-1.0, -2.0, -3.0])
@pytest.mark.parametrize("sides", [(32, 32), (24, 40)], ids=str)
def test_a_power_law_is_recovered(exponent: float, sides: tuple[int, int]) -> None:
    power = power_in_space(power_law(exponent, 2, 3, *sides))
    r = radius(*sides)
    for k in range(1, len(power)):
        assert_close(power[k], r[r.round() == k].pow(exponent).mean(), rtol=1e-9, atol=0)
    k = torch.arange(4, len(power)).double()
    slope = (power[4:].log()[-1] - power[4].log()) / (k[-1] / k[0]).log()
    assert slope.item() == pytest.approx(exponent, abs=0.05)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_a_wave_is_at_its_frequency_alone(k: int) -> None:
    across = torch.cos(2 * torch.pi * k * torch.arange(16, dtype=torch.float64) / 16).expand(1, 1, 16, 16)
    for x in (across, across.mT):
        power = power_in_space(x)
        assert int(power.argmax()) == k and power.sum() - power[k] < 1e-20
        # All of the energy, over the frequencies of its ring.
        assert_close(power[k] * (radius(16, 16).round() == k).sum(), x.square().sum())
    frames = across[0, 0, 0].view(1, 1, 16, 1, 1).expand(1, 1, 16, 4, 4)
    assert int(power_in_time(frames).argmax()) == k and (power_in_space(frames)[1:] < 1e-20).all()


@pytest.mark.parametrize("process", [RectifiedFlow(), VariancePreserving()], ids=["flow", "variance preserving"])
@pytest.mark.parametrize("level", [0.25, 0.6, 0.8])
def test_noised_latents_have_the_power_that_is_said(process: Process, level: float) -> None:
    x0 = power_law(-2.0, 400, 4, 16, 16)
    said = noised(power_in_space(x0), process, level)
    x_t = process.add_noise(x0.float(), white(*x0.shape, seed=1).float(), torch.full((len(x0),), level))
    assert_close(power_in_space(x_t), said.total, rtol=0.1, atol=0)
    if isinstance(process, RectifiedFlow):
        assert said.noise == pytest.approx(level**2) and said.signal[1] == pytest.approx((1 - level) ** 2, rel=0.3)
    else:
        assert said.noise + said.signal[0].item() == pytest.approx(1, abs=1e-6)


def test_the_size_that_is_enough_is_where_signal_and_noise_cross() -> None:
    """Signal (1 - s)^2 (c / k)^2 against noise s^2: equal at k = c (1 - s) / s."""
    k = torch.arange(65).double()
    power = (30.5 / k.clamp(min=1)).square()
    for level, frequency in ((0.8, 7), (0.6, 20), (0.4, 45), (0.25, 64), (0.99, 0)):
        assert noised(power, RectifiedFlow(), level).enough == max(1, 2 * frequency), level
    # A frequency above the noise counts, though smaller ones are below it.
    power[50] = 1e4
    assert noised(power, RectifiedFlow(), 0.8).enough == 100
