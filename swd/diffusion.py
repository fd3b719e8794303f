"""The diffusion processes: how data is noised, and how a network's prediction turns back into clean data.

A process knows three things: `add_noise`, `to_x0`, and its table of noise levels from which losses draw by index. All
arithmetic is float32, whatever the inputs' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from swd.scheduler import BETAS, vp_scales, vp_timestep

SHIFT = 3.0
"""Shift of rectified flow's table of noise levels (released configuration)."""
RENOISE_BELOW = 0.795
"""Noise level of rectified flow below which the student's pictures are noised again: 0.79 in two digits, of which the
largest is 0.7904 in the released code's table."""
FEATURES_BELOW = 0.61
"""Noise level of rectified flow below which features are compared (SwD paper, section 4.2)."""

IndexRange = tuple[int, int]
"""Table indices of noise levels, inclusive at both ends."""


class Ranges(NamedTuple):
    """Noise levels that losses draw from by default, by purpose.

    Attributes:
        whole: all levels, on which the fake score and the discriminator's head are trained.
        renoise: levels to which the student's pictures are noised again before fake score, teacher or discriminator
            judge them.
        features: levels at which features of generated and real latents are compared without a discriminator.
    """

    whole: IndexRange
    renoise: IndexRange
    features: IndexRange


class Process(Protocol):
    """Interface of a diffusion process.

    Attributes:
        prediction_type: "flow" where networks predict the velocity, "epsilon" where they predict the noise.
        trained_on: settings of a model's scheduler that give this process's noise levels; settings that the scheduler's
            file leaves out are not compared.
    """

    prediction_type: ClassVar[str]
    trained_on: ClassVar[Mapping[str, Any]]

    @property
    def ranges(self) -> Ranges:
        """Noise levels that losses draw from."""
        ...

    def covers(self, sigma: float) -> bool:
        """Whether the networks take a noise level: all but for one of several experts."""
        ...

    def level(self, index: Tensor) -> Tensor:
        """Noise level sigma `[B]` of table indices `[B]`."""
        ...

    def timestep(self, sigma: Tensor) -> Tensor:
        """The networks' timestep input for `sigma`, on a scale of 0 to 1000."""
        ...

    def snr(self, sigma: Tensor) -> Tensor:
        """Signal-to-noise ratio `[B]`: squared share of `x0` in the noised latent by that of the noise, float32."""
        ...

    def add_noise(self, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """The noised latent `x_t`, float32."""
        ...

    def to_x0(self, x_t: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        """The clean latent that `prediction` implies, float32."""
        ...


class RectifiedFlow:
    """Rectified flow (SD3.5, FLUX, Wan): networks predict the velocity `eps - x0` (arXiv 2209.03003).

    Of the ranges, `renoise` is sigma up to 0.7904 (released code), `features` up to 0.6022 (SwD paper, section 4.2).

    Args:
        shift: of the levels that losses draw from, see `rectified_flow_table`. The default is that of the released
            configuration; a family that was trained with far more or less noise names its own.
        least: lowest noise level that the networks take: 0, but for an expert for the higher ones.
        below: lowest noise level above those that the networks take: infinity, but for an expert for the lower ones.

    An expert sees no level of another's: all three ranges lie within its own. Where `renoise` or `features` would have
    no level there, it has all of the expert's but 1, where a noised picture has nothing left of the picture (ours).
    """

    prediction_type: ClassVar[str] = "flow"
    trained_on: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, shift: float = SHIFT, least: float = 0.0, below: float = math.inf) -> None:
        self.shift = shift
        self.least = least
        self.below = below
        levels = self.table[:-1].tolist()  # the level behind them is 0
        inside = [index for index, sigma in enumerate(levels) if self.covers(sigma)]
        first, last = inside[0], inside[-1]

        def up_to(start: int) -> IndexRange:
            return (max(first, start), last) if start <= last else (max(first, 1), last)

        renoise = int((self.table >= RENOISE_BELOW).sum())
        features = int((self.table >= FEATURES_BELOW).sum())
        self.ranges = Ranges(whole=(first, last), renoise=up_to(renoise), features=up_to(features))

    @property
    def table(self) -> Tensor:
        """The 29 noise levels from 1 to 0, float32."""
        return rectified_flow_table(self.shift)

    def covers(self, sigma: float) -> bool:
        return self.least <= sigma < self.below

    def level(self, index: Tensor) -> Tensor:
        return self.table[index]

    def timestep(self, sigma: Tensor) -> Tensor:
        return 1000 * sigma.float()

    def snr(self, sigma: Tensor) -> Tensor:
        return ((1 - sigma.float()) / sigma.float()).square()

    def add_noise(self, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        return torch.lerp(x0.float(), eps.float(), expand(sigma, x0))

    def to_x0(self, x_t: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        return torch.addcmul(x_t.float(), expand(sigma, x_t), prediction.float(), value=-1)


class VariancePreserving:
    """Discrete variance-preserving diffusion (SDXL): networks predict the noise `eps`.

    The level is `sigma = t / 1000`; `t = min(round(1000 sigma), 999)` indexes the signal levels `abar` of Stable
    Diffusion's scaled-linear table of betas and feeds the network. Index ranges are in units of t: `renoise` is t up to
    790 (ours, after the released code's sigma below 0.79), `features` t below 400 (SwD paper, section 4.2).
    """

    ranges: ClassVar[Ranges] = Ranges(whole=(0, 999), renoise=(0, 790), features=(0, 399))
    prediction_type: ClassVar[str] = "epsilon"
    trained_on: ClassVar[Mapping[str, Any]] = {**BETAS, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}

    def covers(self, sigma: float) -> bool:
        return True

    def level(self, index: Tensor) -> Tensor:
        return index.float() / 1000

    def timestep(self, sigma: Tensor) -> Tensor:
        return vp_timestep(sigma)

    def snr(self, sigma: Tensor) -> Tensor:
        signal, noise = vp_scales(vp_timestep(sigma))
        return (signal.float() / noise.float()).square()

    def add_noise(self, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        signal, noise = self._scales(sigma, x0)
        return signal * x0.float() + noise * eps.float()

    def to_x0(self, x_t: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        signal, noise = self._scales(sigma, x_t)
        return (x_t.float() - noise * prediction.float()) / signal

    def _scales(self, sigma: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        signal, noise = vp_scales(vp_timestep(sigma))
        return expand(signal, like), expand(noise, like)


@cache
def rectified_flow_table(shift: float = SHIFT) -> Tensor:
    """Noise levels of rectified flow, `[29]` float32 from 1 to 0.

    It is diffusers' Euler scheduler at 28 steps, which applies the shift twice (released configuration).

    Args:
        shift: s in `s t / (1 + (s - 1) t)`, where t falls evenly; more of it puts more levels near 1.
    """
    return rectified_flow_levels(28, shift)


def rectified_flow_levels(steps: int, shift: float = SHIFT) -> Tensor:
    """Noise levels of that Euler scheduler at another number of steps, `[steps + 1]` float32 from 1 to 0."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.to(torch.float32)


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """View `sigma` `[B]` or a scalar so that it broadcasts over `like` `[B, ...]`, float32 on its device."""
    sigma = sigma.to(device=like.device, dtype=torch.float32, non_blocking=True)
    return sigma.reshape(-1, *([1] * (like.ndim - 1))) if sigma.ndim else sigma
