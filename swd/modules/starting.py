"""Latents of real pictures, enlarged and noised to some level, from which a model draws on.

It compares the two places where a scale-wise sampler could enlarge a latent: before it is noised, or after (SwD paper,
section 4.1, Tables 1 and 11).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from swd.diffusion import Process
from swd.schedule import downscale, upsample
from swd.types import Size

Upsampled = Literal["clean", "noisy"]
"""Which latent is enlarged: the clean one, which is then noised, or the one that is noised already."""


@dataclass(frozen=True)
class NoisedStart:
    """Where drawing starts, instead of from pure noise.

    Attributes:
        level: noise level, in (0, 1).
        source: latent size (H, W) at which pictures are encoded.
        target: latent size (H, W) from which the model draws on; at least `source`.
        upsampled: the latent that is enlarged.
    """

    level: float
    source: Size
    target: Size
    upsampled: Upsampled = "clean"

    def noised(self, x0: Tensor, process: Process, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Noised latents `[B, C, *target]`, float32, of clean ones `[B, C, *source]`.

        Args:
            x0: the clean latents.
            process: the model's diffusion process.
            draw: standard Gaussian noise of the shape of its argument.
        """
        sigma = torch.tensor(self.level)
        if self.upsampled == "clean":
            z = upsample(x0, self.target)
            return process.add_noise(z, draw(z), sigma)
        return upsample(process.add_noise(x0, draw(x0), sigma), self.target)


def encode_start(encoders: Any, process: Process, pixels: Tensor, seeds: Sequence[int], start: NoisedStart) -> Tensor:
    """Noised latents `[B, C, *target]`, float32, of pictures.

    Pictures are shrunk in pixel space to the size that `source` decodes to (area), then encoded, as in training (SwD
    paper, section 4.1). Posterior and noise of a picture come from a generator of its own seed, in this order, so it
    depends neither on its batch nor on its device.

    Args:
        encoders: `Encoders` of the model's pipeline.
        process: the model's diffusion process.
        pixels: `[B, 3, H, W]` in [-1, 1], at least as large as `source` decodes to.
        seeds: of the B pictures.
        start: where drawing starts.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(like: Tensor) -> Tensor:
        rows = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
        return torch.stack(rows).to(like.device)

    small = downscale(pixels, encoders.pixel_size(start.source))
    mean, std = encoders.distribution(small.to(encoders.device))
    x0 = mean.float() + std.float() * draw(mean)
    return start.noised(x0, process, draw)
