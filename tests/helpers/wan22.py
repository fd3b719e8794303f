"""Tiny random pipelines of Wan2.2: TI2V-5B with the VAE of 16x, and A14B with its two experts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

CHANNELS_5B = 48


def transformer(channels: int, seed: int = 0) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def vae_5b() -> AutoencoderKLWan:
    """Residual blocks on 2x2 patches, so that the sides shrink 16 times; statistics other than 0 and 1."""
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=CHANNELS_5B,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
        latents_mean=[0.02 * (i - 24) for i in range(CHANNELS_5B)],
        latents_std=[0.4 + 0.02 * i for i in range(CHANNELS_5B)],
    )


def wan22_a14b(encoder: Any, pieces: Any, vae: Any) -> WanPipeline:
    """T2V-A14B: two networks of different weights, which divide the noise levels at 0.875.

    Args:
        encoder: its UMT5.
        pieces: its tokenizer.
        vae: Wan2.1's.
    """
    return WanPipeline(
        transformer=transformer(16),
        transformer_2=transformer(16, seed=1),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=vae,
        text_encoder=encoder,
        tokenizer=pieces,
        boundary_ratio=0.875,
    )


def wan22_5b(encoder: Any, pieces: Any) -> WanPipeline:
    """TI2V-5B: one timestep a token.

    Args:
        encoder: its UMT5.
        pieces: its tokenizer.
    """
    return WanPipeline(
        transformer=transformer(CHANNELS_5B),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        vae=vae_5b(),
        text_encoder=encoder,
        tokenizer=pieces,
        expand_timesteps=True,
    )
