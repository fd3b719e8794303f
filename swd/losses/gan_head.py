"""The discriminator head on a network's features."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from torch import Tensor, nn


class GANHead(nn.Module):
    """4 x (LayerNorm, GELU, Linear) with widths falling linearly from the feature width to 1 (released configuration).

    Args:
        width: feature width D.
        layers: number of (LayerNorm, GELU, Linear) stages.
    """

    def __init__(self, width: int, layers: int = 4) -> None:
        super().__init__()
        widths = [int(w) for w in np.linspace(width, 1, layers + 1)]
        stages = pairwise(widths)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(a), nn.GELU(), nn.Linear(a, b)) for a, b in stages)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[B, 1]` of token means `[B, D]`."""
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens
