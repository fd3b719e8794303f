"""Files as TAEHV publishes them, with random weights and few channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from swd.modules.tiny_video import TinyVideoDecoder

WAN21 = {"latent_channels": 16, "patch": 1, "wide": False, "widths": (12, 8, 6, 6)}
WAN22 = {"latent_channels": 48, "patch": 2, "wide": False, "widths": (12, 8, 6, 6)}
WAN22_SUPER = {"latent_channels": 48, "patch": 2, "wide": True, "widths": (12, 8, 6, 6)}

LAYERS = {
    False: {
        "decoder.1": "first",
        "decoder.3": "stages.0.blocks.0",
        "decoder.4": "stages.0.blocks.1",
        "decoder.5": "stages.0.blocks.2",
        "decoder.7.conv": "stages.0.grow",
        "decoder.8": "stages.0.convolution",
        "decoder.9": "stages.1.blocks.0",
        "decoder.10": "stages.1.blocks.1",
        "decoder.11": "stages.1.blocks.2",
        "decoder.13.conv": "stages.1.grow",
        "decoder.14": "stages.1.convolution",
        "decoder.15": "stages.2.blocks.0",
        "decoder.16": "stages.2.blocks.1",
        "decoder.17": "stages.2.blocks.2",
        "decoder.19.conv": "stages.2.grow",
        "decoder.20": "stages.2.convolution",
        "decoder.22": "last",
    },
    True: {
        "decoder.0": "first",
        "decoder.1": "stages.0.blocks.0",
        "decoder.2": "stages.0.blocks.1",
        "decoder.3": "stages.0.blocks.2",
        "decoder.4": "stages.0.convolution",
        "decoder.7.conv": "stages.0.grow",
        "decoder.8": "stages.1.blocks.0",
        "decoder.9": "stages.1.blocks.1",
        "decoder.10": "stages.1.blocks.2",
        "decoder.11": "stages.1.convolution",
        "decoder.14.conv": "stages.1.grow",
        "decoder.15": "stages.2.blocks.0",
        "decoder.16": "stages.2.blocks.1",
        "decoder.17": "stages.2.blocks.2",
        "decoder.18": "stages.2.convolution",
        "decoder.21.conv": "stages.2.grow",
        "decoder.22": "last",
    },
}
"""Names of layers with weights in files whose decoder is not wide, and in those of a wide one, with ours."""


def decoder(**settings: Any) -> TinyVideoDecoder:
    """A decoder with seeded weights whose pixels spread over (-1, 1) and beyond, so that little is hidden by limits."""
    made = TinyVideoDecoder(**settings).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    for parameter in made.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 10
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
    # Blocks of wide decoders have no nonlinearity around their sum, and grow it.
    made.last.weight.mul_(0.2 if settings.get("wide") else 1.2)
    made.last.bias.fill_(0.5)
    return made


def in_file(made: TinyVideoDecoder) -> dict[str, Tensor]:
    """The weights under the names of the files, with some of an encoder."""
    state = made.state_dict()
    weights = {
        key.replace(ours, theirs, 1): value.contiguous()
        for theirs, ours in LAYERS[made.wide].items()
        for key, value in state.items()
        if key.startswith(f"{ours}.")
    }
    return weights | {"encoder.0.weight": torch.full((4, 3, 3, 3), torch.nan)}


def save(file: Path, **settings: Any) -> Path:
    """Write a file with the weights of `decoder`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(in_file(decoder(**settings)), file)
    return file
