"""GFLOP counts against counts by hand."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel

from swd.metrics.flops import forward_gflop
from swd.modules.backbones.sd3 import SD3Backbone

CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": tiny.TEXT_WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": tiny.POOLED_WIDTH,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}


class Model:
    with torch.device("meta"):
        meta_network = SD3Transformer2DModel.from_config(CONFIG).eval()
    backbone_class = SD3Backbone
    channels = 4
    embedded_guidance = None


def by_hand(side: int, text: int) -> float:
    """Multiply-adds of the network of CONFIG, twice, in GFLOP: every linear layer and both products of attention."""
    width, patch, channels, blocks = 16, 2, 4, 2
    tokens = (side // patch) ** 2
    embed = tokens * channels * patch**2 * width + text * tiny.TEXT_WIDTH * width
    time = 256 * width + width * width + tiny.POOLED_WIDTH * width + width * width
    total = embed + time
    for block in range(blocks):
        last = block == blocks - 1  # the last block returns no text, so it lacks the text's output and MLP
        modulation = width * 6 * width + width * (2 if last else 6) * width
        qkv = 3 * (tokens + text) * width * width
        attention = 2 * (tokens + text) ** 2 * width
        out_and_mlp = (tokens if last else tokens + text) * (1 + 8) * width * width
        total += modulation + qkv + attention + out_and_mlp
    total += width * 2 * width + tokens * width * patch**2 * channels
    return 2 * total / 1e9


@pytest.mark.parametrize("side", [4, 8, 16])
def test_equals_a_count_by_hand(side: int) -> None:
    conditioning = tiny.build_conditioning(batch=3)
    assert forward_gflop(Model(), (side, side), conditioning) == pytest.approx(by_hand(side, tiny.TEXT_TOKENS))


def test_scale_wise_is_the_sum_of_its_sizes_and_cheaper() -> None:
    conditioning = tiny.build_conditioning()
    costs = [forward_gflop(Model(), (side, side), conditioning) for side in (4, 8, 12, 16)]
    hand = [by_hand(side, tiny.TEXT_TOKENS) for side in (4, 8, 12, 16)]
    assert sum(costs) / (4 * costs[-1]) == pytest.approx(sum(hand) / (4 * hand[-1]))
    assert sum(costs) < 4 * costs[-1]


def test_leaves_the_conditioning_and_the_default_device_alone() -> None:
    conditioning = tiny.build_conditioning()
    before = conditioning.embeds.clone()
    forward_gflop(Model(), (4, 4), conditioning)
    assert torch.equal(conditioning.embeds, before)
    assert torch.empty(1).device.type == "cpu"
