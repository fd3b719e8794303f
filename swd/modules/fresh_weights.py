"""Initial weights for training from scratch."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Overwrite a weight with Gaussian noise of deviation `std`."""
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)
