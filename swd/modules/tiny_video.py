"""A small decoder of Wan's and Qwen-Image's latents: TAEHV, the tiny autoencoder of videos.

Its weights and the architecture that they are for are published at https://github.com/madebyollin/taehv, under the MIT
licence; diffusers has no class for it. Only the decoder is here, since drawing needs no encoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional

STAGES = 3
"""Times that a decoder doubles the sides."""
BLOCKS = 3
"""Blocks with memory in each stage."""
BOUND = 3.0
"""Latents are squeezed into (-3, 3), smoothly, by decoders that are not wide."""


def convolution(channels: int, following: int, bias: bool = True) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(channels, following, 3, padding=1, bias=bias)


class MemoryBlock(nn.Module):
    """Adds to each frame what convolutions find in it and in the frame before it.

    Three of 3x3; in wide decoders one of 7x7 for each channel by itself, then a perceptron at each place.

    Args:
        channels: of a frame.
        wide: as of `TinyVideoDecoder`.
    """

    def __init__(self, channels: int, wide: bool) -> None:
        super().__init__()
        self.wide = wide
        if wide:
            layers: list[nn.Module] = [
                nn.Conv2d(2 * channels, 2 * channels, 7, padding=3, groups=2 * channels, bias=False),
                nn.Conv2d(2 * channels, 4 * channels, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(4 * channels, channels, 1, bias=False),
            ]
        else:
            layers = [
                convolution(2 * channels, channels),
                nn.ReLU(inplace=True),
                convolution(channels, channels),
                nn.ReLU(inplace=True),
                convolution(channels, channels),
            ]
        self.conv = nn.Sequential(*layers)

    def forward(self, frames: Tensor, before: Tensor) -> Tensor:
        """Frames `[N, C, H, W]`; `before`, of the same shape, holds the frame before each."""
        changed: Tensor = self.conv(torch.cat([frames, before], 1)) + frames
        return changed if self.wide else changed.relu_()


class Stage(nn.Module):
    """Blocks with memory, then twice the height and width, and `growth` times as many frames.

    Args:
        channels: of the stage's frames.
        following: channels of the next one's.
        growth: frames that one becomes.
        wide: as of `TinyVideoDecoder`.
    """

    def __init__(self, channels: int, following: int, growth: int, wide: bool) -> None:
        super().__init__()
        self.growth = growth
        self.wide = wide
        self.blocks = nn.ModuleList(MemoryBlock(channels, wide) for _ in range(BLOCKS))
        if wide:
            self.convolution = convolution(channels, 4 * following)
        else:
            self.convolution = convolution(channels, following, bias=False)
        grown = following if wide else channels
        self.grow = nn.Conv2d(grown, growth * grown, 1, bias=False)

    def forward(self, frames: Tensor, memory: Sequence[Tensor], skip: int = 0) -> tuple[Tensor, list[Tensor]]:
        """Frames `[B, growth F - skip, following, 2 H, 2 W]`, and the memory for those that come next.

        Args:
            frames: `[B, F, C, H, W]`.
            memory: for each block the frame `[B, 1, C, H, W]` that it took before these.
            skip: frames at the beginning of the result that are left out.
        """
        frames, kept = self.remember(frames, memory)
        return self.enlarge(frames, skip), kept

    def remember(self, frames: Tensor, memory: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Frames and memory after the blocks, in the shapes of those before them."""
        kept = []
        for block, last in zip(self.blocks, memory, strict=True):
            kept.append(frames[:, -1:].clone())  # alone, so that the other frames are freed
            before = torch.cat([last, frames[:, :-1]], 1)
            frames = block(frames.flatten(0, 1), before.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return frames, kept

    def enlarge(self, frames: Tensor, skip: int) -> Tensor:
        """Frames `[B, growth F - skip, following, 2 H, 2 W]` of `[B, F, C, H, W]`."""
        frames = frames[:, skip // self.growth :]
        batch, skip = len(frames), skip % self.growth
        x = frames.flatten(0, 1)
        if self.wide:
            x = functional.pixel_shuffle(self.convolution(x).relu_(), 2)
        else:
            x = functional.interpolate(x, scale_factor=2.0)
        x = self.grow(x)
        grown = x.reshape(batch, -1, x.shape[1] // self.growth, *x.shape[2:])[:, skip:]
        if self.wide:
            return grown
        return self.convolution(grown.flatten(0, 1)).unflatten(0, grown.shape[:2])


class TinyVideoDecoder(ModelMixin, ConfigMixin):
    """TAEHV's decoder in place of the VAE of a stock pipeline, which only decodes.

    It is causal: a frame depends on no later latent. The first latent is one frame, as the VAE has it: of the `growth`
    frames that it becomes, the last counts. The defaults are those of the file taew2_1.

    Args:
        latent_channels: channels of the latents.
        widths: channels of the frames in each stage, and behind the last one.
        growth: frames that one becomes in each stage.
        patch: sides of the patches of pixels that the last convolution gives.
        wide: the variant of the files `..._super`: wider, with other blocks.
        frames_at_once: latent frames that are decoded together; more changes nothing but memory and speed. The default
            is ours: one latent frame of a video of 480x832 pixels is four large pictures, enough work for a device.

    Attributes:
        config: as a VAE of Wan has it. The decoder takes latents as the denoising network has them, so their mean is 0
            and their standard deviation 1.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        widths: Sequence[int] = (256, 128, 64, 64),
        growth: Sequence[int] = (1, 2, 2),
        patch: int = 1,
        wide: bool = False,
        frames_at_once: int = 1,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.wide = wide
        self.widths = tuple(widths)
        self.lead = math.prod(growth) - 1
        if wide:
            self.first = nn.Conv2d(latent_channels, widths[0], 1, bias=False)
        else:
            self.first = convolution(latent_channels, widths[0])
        self.stages = nn.ModuleList(Stage(widths[i], widths[i + 1], growth[i], wide) for i in range(STAGES))
        self.last = convolution(widths[STAGES], 3 * patch**2)
        self.register_to_config(
            z_dim=latent_channels,
            latents_mean=[0.0] * latent_channels,
            latents_std=[1.0] * latent_channels,
            scale_factor_temporal=math.prod(growth),
            scale_factor_spatial=2**STAGES * patch,
        )

    @apply_forward_hook  # moves the weights, where they wait in main memory
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Videos `[B, 3, F', H', W']` in [-1, 1] of latents `[B, C, F, H, W]`; pictures `[B, 3, H', W']` of latents
        `[B, C, H, W]`."""
        latents = (z if z.ndim == 5 else z.unsqueeze(2)).transpose(1, 2)
        memory = self.no_memory(latents)
        parts: list[Tensor] = []
        for part in latents.split(self.config.frames_at_once, dim=1):
            frames, memory = self.step(part, memory, 0 if parts else self.lead)
            parts.append(frames)
        pixels = torch.cat(parts, 1).transpose(1, 2)
        pixels = pixels if z.ndim == 5 else pixels.squeeze(2)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def no_memory(self, latents: Tensor) -> list[list[Tensor]]:
        """What the blocks of each stage remember before the first of the latents `[B, F, C, H, W]`: zeros."""
        batch, _, _, height, width = latents.shape
        sizes = [(batch, 1, self.widths[i], height * 2**i, width * 2**i) for i in range(STAGES)]
        return [[latents.new_zeros(size) for _ in range(BLOCKS)] for size in sizes]

    def step(self, latents: Tensor, memory: Sequence[Sequence[Tensor]], skip: int) -> tuple[Tensor, list[list[Tensor]]]:
        """Frames `[B, F', 3, H', W']` in [-1, 1] of some latents `[B, F, C, H, W]`, and the memory for the next ones.

        Args:
            latents: the latents.
            memory: that of the latents before them.
            skip: frames at the beginning that are left out. They are computed as far as later ones need them.
        """
        x = latents.flatten(0, 1)
        x = self.first(x) if self.wide else self.first(torch.tanh(x / BOUND) * BOUND).relu_()
        frames = x.unflatten(0, latents.shape[:2])
        kept = []
        for i, stage in enumerate(self.stages):
            frames, remembered = stage(frames, memory[i], skip if i == STAGES - 1 else 0)
            kept.append(remembered)
        x = frames.flatten(0, 1)
        x = self.last(x if self.wide else x.relu_())
        pixels = functional.pixel_shuffle(x, self.patch).clamp_(0, 1) * 2 - 1
        return pixels.unflatten(0, frames.shape[:2]), kept
