"""Prompts to conditioning, pixels to latents and back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swd.types import Conditioning, Draws, Size


class SD3Encoders(nn.Module):
    """Text encoders and VAE of a stock `StableDiffusion3Pipeline`, frozen.

    Args:
        pipeline: the pipeline; its transformer may be None.
        max_text_tokens: T5 tokens that reach the transformer.
        cache: how many encoded lists of prompts are kept in memory.
    """

    def __init__(self, pipeline: Any, max_text_tokens: int = 256, cache: int = 8) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.max_text_tokens, self.cache_size = max_text_tokens, cache
        self.vae = pipeline.vae.requires_grad_(False).eval()
        self.text = nn.ModuleList(
            encoder.requires_grad_(False).eval()
            for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
            if encoder is not None
        )
        self._known: OrderedDict[tuple[str, ...], Conditioning] = OrderedDict()

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def device(self) -> torch.device:
        """Where the encoders live."""
        device: torch.device = self.vae.device
        return device

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of B prompts, as the stock pipeline computes it; known lists come from memory.

        Whole lists, not single prompts: how many prompts are encoded together changes the last bits, and a resumed run
        has another history than the one it continues.
        """
        key = tuple(prompts)
        if key not in self._known:
            different = list(dict.fromkeys(key))
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=different,
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=False,
                device=self.device,
                max_sequence_length=self.max_text_tokens,
            )
            rows = [different.index(prompt) for prompt in key]
            self._known[key] = Conditioning(embeds[rows], pooled[rows])
        self._known.move_to_end(key)
        while len(self._known) > self.cache_size:
            self._known.popitem(last=False)
        return self._known[key]

    @torch.no_grad()
    def encode(self, pixels: Tensor, draws: Draws) -> Tensor:
        """Latents `[B, C, H/8, W/8]` of pictures `[B, 3, H, W]` in [-1, 1]: a posterior draw, scaled."""
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        x0 = mean + std * draws.noise(f"posterior/{tuple(mean.shape[2:])}", mean)
        return (x0 - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in [-1, 1], float32, of latents of any size."""
        z = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        pixels: Tensor = self.vae.decode(z, return_dict=False)[0]
        return pixels.float().clamp(-1, 1)

    def pixel_size(self, size: Size) -> Size:
        """(H, W) in pixels of a latent size."""
        return tuple(side * self.factor for side in size)
