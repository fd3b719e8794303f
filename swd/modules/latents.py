"""Latents of each kind of VAE: channels, pixels per latent and normalisation, written once for all families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class PlainLatents:
    """`AutoencoderKL` (SD3, FLUX.1, SDXL) and `AutoencoderTiny`: one shift and one scale for all channels."""

    @staticmethod
    def posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `[B, C, *size]` of the VAE's own latents, float32."""
        distribution = vae.encode(pixels.to(vae.dtype)).latent_dist
        return distribution.mean.float(), distribution.std.float()

    @staticmethod
    def decode(vae: Any, latents: Tensor) -> Tensor:
        """Pixels `[B, 3, *pixels]` of the VAE's own latents, float32."""
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return pixels.float()

    @staticmethod
    def shift_and_scale(vae: Any, latents: Tensor) -> tuple[Any, Any]:
        """Shift and scale that turn the VAE's latents into the network's: `(latents - shift) * scale`.

        Args:
            vae: the VAE.
            latents: the latents, `[B, C, *size]`, whose device and size count.
        """
        return vae.config.shift_factor or 0.0, vae.config.scaling_factor


class DeterministicLatents(PlainLatents):
    """`AutoencoderDC` (SANA): one scale, and latents without a spread."""

    @staticmethod
    def posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        latents: Tensor = vae.encode(pixels.to(vae.dtype)).latent.float()
        return latents, torch.zeros_like(latents)

    @staticmethod
    def shift_and_scale(vae: Any, latents: Tensor) -> tuple[Any, Any]:
        return 0.0, vae.config.scaling_factor


class ChannelLatents(PlainLatents):
    """`AutoencoderKLWan`: a mean and a standard deviation for each channel, of latents `[B, C, F, H, W]`.

    So has `TinyVideoDecoder`, which takes its place: 0 and 1, since it decodes the network's own latents.
    """

    @staticmethod
    def shift_and_scale(vae: Any, latents: Tensor) -> tuple[Any, Any]:
        config = vae.config
        shape = (1, -1, *[1] * (latents.ndim - 2))
        mean, std = (
            torch.tensor(v, device=latents.device).view(shape) for v in (config.latents_mean, config.latents_std)
        )
        return mean, 1 / std


class PictureOfVideoLatents(ChannelLatents):
    """`AutoencoderKLQwenImage`: a video VAE for pictures; they are its videos of one frame, `[B, C, H, W]` outside."""

    @staticmethod
    def posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = ChannelLatents.posterior(vae, pixels.unsqueeze(2))
        return mean.squeeze(2), std.squeeze(2)

    @staticmethod
    def decode(vae: Any, latents: Tensor) -> Tensor:
        return ChannelLatents.decode(vae, latents.unsqueeze(2)).squeeze(2)


class PatchLatents(PlainLatents):
    """`AutoencoderKLFlux2`: the statistics of a batch norm over 2x2 patches of 32 channels, so that sides are even.

    In a map they repeat every two rows and columns. The pipelines compute with the statistics and never call the batch
    norm, which in training mode would change them.
    """

    @staticmethod
    def shift_and_scale(vae: Any, latents: Tensor) -> tuple[Any, Any]:
        height, width = latents.shape[-2:]
        mean = vae.bn.running_mean
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        # A patch's values lie in the order channel, row, column.
        mean, std = (
            v.float().to(latents.device).view(1, -1, 2, 2).repeat(1, 1, height // 2, width // 2) for v in (mean, std)
        )
        return mean, 1 / std


KINDS: dict[str, type[PlainLatents]] = {
    "AutoencoderDC": DeterministicLatents,
    "AutoencoderKLWan": ChannelLatents,
    "AutoencoderKLQwenImage": PictureOfVideoLatents,
    "AutoencoderKLFlux2": PatchLatents,
    "TinyVideoDecoder": ChannelLatents,
}
"""Kinds of latents by the VAE's class; those of other classes are plain."""


def kind_of(vae: Any) -> type[PlainLatents]:
    """The kind of a VAE's latents."""
    return next((KINDS[base.__name__] for base in type(vae).__mro__ if base.__name__ in KINDS), PlainLatents)


def channels(config: Mapping[str, Any]) -> int | None:
    """Number of latent channels by the VAE's configuration; None if it does not say."""
    number: int | None = config.get("latent_channels", config.get("z_dim"))
    return number


def factors(config: Mapping[str, Any]) -> tuple[int, int]:
    """Frames per latent frame beyond the first one, and pixels per latent along a side, by the VAE's configuration."""
    for key in ("encoder_block_out_channels", "block_out_channels"):
        if key in config:
            return 1, int(2 ** (len(config[key]) - 1))
    return int(config.get("scale_factor_temporal", 4)), int(config.get("scale_factor_spatial", 8))
