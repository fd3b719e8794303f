"""Initial weights for training from scratch."""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn


def fill(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Overwrite a weight with Gaussian noise of deviation `std`."""
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)


@torch.no_grad()
def initialise_transformer(transformer: SD3Transformer2DModel, seed: int = 0) -> None:
    """Set initial weights for training from scratch: adaLN-zero, as in DiT (arXiv 2212.09748, section 3.2)."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            modulation = ".norm1" in name or name.startswith("norm_out")
            fan_in = module.in_features
            fan_out = module.out_features
            std = 0.02 if "embedder" in name and "context" not in name else (2 / (fan_in + fan_out)) ** 0.5
            zero = (modulation and name.endswith("linear")) or name == "proj_out"
            fill(module.weight, 0.0 if zero else std, generator)
            if module.bias is not None:
                module.bias.zero_()
