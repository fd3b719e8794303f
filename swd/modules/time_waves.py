"""Sines and cosines of timesteps, as diffusers' networks embed them, with frequencies that are computed once."""

from __future__ import annotations

import math

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

CHANNELS = 256
"""Sines and cosines together, as in DiT (arXiv 2212.09748) and so in most diffusion transformers."""
LONGEST = 10_000
"""The highest frequency is nearly so many times the lowest one (diffusers, after DDPM, arXiv 2006.11239)."""
HALF = CHANNELS // 2
FREQUENCIES = torch.exp(-math.log(LONGEST) * torch.arange(HALF, dtype=torch.float32, device="cpu") / HALF)
"""`[128]` on the CPU; made on import, because a first call may run within a mode of fake tensors."""


class TimeWaves(Timesteps):
    """Diffusers' layer, whose values it gives bit for bit; `install_waves` makes these of diffusers' own."""

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embeddings `[B, 256]` float32 of timesteps `[B]`. On other devices than the CPU diffusers' own layer runs."""
        if type(timesteps) is not Tensor or not timesteps.is_cpu:
            waves: Tensor = super().forward(timesteps)
            return waves
        angles = timesteps.float().unsqueeze(1) * FREQUENCIES
        return torch.cat((angles.cos(), angles.sin()), 1)


def install_waves(network: nn.Module) -> None:
    """Turn diffusers' layers of these frequencies in a network into `TimeWaves`, in place."""
    for module in network.modules():
        if type(module) is Timesteps and _settings(module) == (CHANNELS, True, 0, 1):
            module.__class__ = TimeWaves


def _settings(layer: Timesteps) -> tuple[int, bool, float, float]:
    return layer.num_channels, layer.flip_sin_to_cos, layer.downscale_freq_shift, layer.scale
