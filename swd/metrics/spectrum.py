"""Power of latents by frequency, beside the noise that covers it (SwD paper, section 3 and appendix E).

A latent that is noised to a level loses nothing by being smaller if noise is above the signal at all frequencies that
the smaller grid has not. White noise of unit variance has the power 1 at every frequency here, whatever the size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swd.diffusion import Process


def power_in_space(x: Tensor) -> Tensor:
    """Mean power `[K + 1]` at k cycles over the shorter side, k = 0 ... K = half of that side (the Nyquist limit).

    A grid of s cells holds the frequencies up to k = s / 2. Directions are averaged in rings, of which each holds the
    frequencies that round to its k; corners beyond K are left out.

    Args:
        x: latents `[B, C, H, W]` or `[B, C, F, H, W]`; the mean is over all but frequency.
    """
    *_, height, width = x.shape
    shorter = min(height, width)
    power = torch.fft.fft2(x.double(), norm="ortho").abs().square().flatten(0, -3).mean(0)
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) * shorter for side in (height, width))
    ring = (rows[:, None].square() + columns.square()).sqrt().round().long().flatten()
    inside = ring <= shorter // 2
    sums, counts = (
        torch.zeros(shorter // 2 + 1, dtype=torch.float64).index_add_(0, ring[inside], values[inside])
        for values in (power.flatten(), torch.ones(power.numel(), dtype=torch.float64))
    )
    return sums / counts


def power_in_time(x: Tensor) -> Tensor:
    """Mean power `[K + 1]` at k cycles over all frames, k = 0 ... K = half of their number.

    Args:
        x: latents of videos `[B, C, F, H, W]`; the mean is over all but frequency.
    """
    power = torch.fft.rfft(x.double(), dim=2, norm="ortho").abs().square()
    return power.mean((0, 1, 3, 4))


@dataclass(frozen=True)
class NoisedSpectrum:
    """A spectrum at a noise level.

    Attributes:
        level: sigma, between 0 and 1.
        signal: power of the clean latents' share `[K + 1]`.
        noise: power of the noise, the same at every frequency.
    """

    level: float
    signal: Tensor
    noise: float

    @property
    def total(self) -> Tensor:
        """Expected power `[K + 1]` of the noised latents: noise is independent of them."""
        return self.signal + self.noise

    @property
    def enough(self) -> int:
        """Cells along a side, or frames, that hold every frequency at which the signal is not below the noise."""
        above = (self.signal >= self.noise).nonzero()
        return max(1, 2 * int(above.max())) if len(above) else 1


def noised(power: Tensor, process: Process, level: float) -> NoisedSpectrum:
    """The spectrum of latents with the spectrum `power` `[K + 1]`, noised to a level by a diffusion process."""
    sigma, one, zero = torch.tensor([level]), torch.ones(1, 1), torch.zeros(1, 1)
    share, noise = (float(process.add_noise(*each, sigma).double().square()) for each in ((one, zero), (zero, one)))
    return NoisedSpectrum(level, share * power, noise)
