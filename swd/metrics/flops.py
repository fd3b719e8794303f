"""Cost of a network's forward pass, counted on the meta device, without weights or arithmetic."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from swd.modules.pretrained import Pretrained
from swd.types import Conditioning, Size


def forward_gflop(model: Pretrained, size: Size, conditioning: Conditioning) -> float:
    """GFLOP of one forward pass of the bare denoising network on one sample; a multiply-add counts as two.

    LoRA is not counted: a student's adapter is merged into the weights when it is used. The count is of matrix
    products, convolutions and attention; the meta device is needed because on the CPU attention would be left out.

    Args:
        model: whose network.
        size: latent (H, W) or (F, H, W).
        conditioning: any rows; only their shapes matter.
    """
    backbone = model.backbone_class(model.meta_network, model.embedded_guidance)
    x_t = torch.empty(1, model.channels, *size, device="meta")
    sigma = torch.ones(1, device="meta")
    row = conditioning.map(lambda tensor: torch.empty_like(tensor[:1], device="meta"))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        backbone.call(x_t, sigma, row)
    return counter.get_total_flops() / 1e9
