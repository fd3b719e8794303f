"""Encodes prompts to conditioning and pixels to latents, and decodes latents."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swd.modules.latents import factors as latent_factors
from swd.modules.latents import kind_of
from swd.types import Conditioning, Draws, Size


class Encoders(nn.Module):
    """Text encoders and VAE of a stock pipeline, frozen. Families implement `text`; the VAE's latents are known by its
    class (`swd.modules.latents`), and a family may replace `posterior` and `shift_and_scale`.

    Args:
        pipeline: the pipeline; its denoising network may be None.
        max_text_tokens: number of text tokens for the network, in pipelines that take it as an argument.
        cache: how many encoded lists of prompts are kept in memory.

    Attributes:
        longest: tokenizers, the one with the highest limit first: the part's name, and whether its limit is
            `max_text_tokens` (else the tokenizer's own). The first that a pipeline has limits the length of prompts.
        most_text_tokens: largest `max_text_tokens`: the pipeline's limit, or eight times the number in training.
        optional: parts of the pipeline that it can do without; zeros stand for the text of a missing encoder.
        vae_dtype: dtype of the VAE; None: that of the base.
        at_once: largest number of pixels in one call of the VAE, 8 pictures of 1024x1024; a larger sample has a call of
            its own.
        at_once_on_cpu: the same where the VAE is on the CPU, whose caches hold little: 8 pictures of 128x128. Measured
            with the embedded VAE, in CPU time: 32 of them take 0.27 s encoded in calls of 8, and 0.48 s in one.
    """

    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    longest: ClassVar[tuple[tuple[str, bool], ...]] = (("tokenizer", True),)
    most_text_tokens: ClassVar[int] = 4096
    optional: ClassVar[tuple[str, ...]] = ()
    vae_dtype: ClassVar[torch.dtype | None] = None
    at_once: ClassVar[int] = 8 * 1024**2
    at_once_on_cpu: ClassVar[int] = 8 * 128**2

    def __init__(self, pipeline: Any, max_text_tokens: int = 256, cache: int = 8) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.max_text_tokens = max_text_tokens
        self.cache_size = cache
        self.vae = pipeline.vae.requires_grad_(False).eval()
        found = (getattr(pipeline, name, None) for name in self.text_encoders)
        self.text_models = nn.ModuleList(
            encoder.requires_grad_(False).eval() for encoder in found if encoder is not None
        )
        self._known: OrderedDict[tuple[str, ...], Conditioning] = OrderedDict()

    @staticmethod
    def factors(config: Mapping[str, Any]) -> tuple[int, int]:
        """Frames per latent frame beyond the first one, and pixels per latent along a side; `config` is the VAE's."""
        return latent_factors(config)

    @classmethod
    def vae_precision(cls, config: Mapping[str, Any], base: torch.dtype, kept: bool = False) -> torch.dtype:
        """The dtype that the VAE computes in.

        Args:
            config: the VAE's configuration.
            base: the base's dtype.
            kept: whether the VAE's output is training data; only then, and where the base is in half precision, whose
                range is small, does `force_upcast` in the VAE's configuration mean float32. Other samples for viewing
                are computed faster.
        """
        if (kept or base == torch.float16) and config.get("force_upcast"):
            return torch.float32
        return cls.vae_dtype or base

    @property
    def device(self) -> torch.device:
        """The device of the encoders."""
        device: torch.device = self.vae.device
        return device

    # Text

    @classmethod
    def text_tokens(cls, max_text_tokens: int, first: Mapping[str, Any]) -> int:
        """Number of text tokens that the network sees.

        Args:
            max_text_tokens: as of the class.
            first: configuration of the pipeline's first text encoder; empty if it has none.
        """
        return max_text_tokens

    @staticmethod
    def cleaned(prompt: str) -> str:
        """The prompt after the stock pipeline's own cleaning, which precedes the tokenizer."""
        return prompt

    @classmethod
    def count_tokens(cls, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        """Number of tokens of each of B prompts, including those that the stock pipeline adds; none are cut."""
        cleaned = [cls.cleaned(prompt) for prompt in prompts]
        found = tokenizer(cleaned, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        return [len(tokens) for tokens in found]

    def text(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of B prompts as the stock pipeline computes it, without sizes."""
        raise NotImplementedError

    def with_size(self, conditioning: Conditioning, final_size: Size | None) -> Conditioning:
        """The conditioning with the size of finished pictures, in families that have it there; unchanged in others."""
        return conditioning

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], final_size: Size | None = None) -> Conditioning:
        """Conditioning of B prompts; the last few lists of prompts are remembered.

        Whole lists are remembered rather than single prompts: the last bits of a result depend on how many prompts are
        encoded together, and must not depend on which lists came before, which differs after a run is resumed.

        Args:
            prompts: B texts.
            final_size: latent size of finished pictures, for families whose conditioning holds it; None: the size
                that the family was trained for.
        """
        key = tuple(prompts)
        if key not in self._known:
            different = list(dict.fromkeys(prompts))
            rows = [different.index(prompt) for prompt in prompts]
            self._known[key] = self.text(different).rows(rows)
        self._known.move_to_end(key)
        while len(self._known) > self.cache_size:
            self._known.popitem(last=False)
        return self.with_size(self._known[key], final_size)

    # Pixels

    @torch.no_grad()
    def encode(self, pixels: Tensor, draws: Draws) -> Tensor:
        """Latents `[B, C, *size]` of pictures or videos `[B, 3, *pixels]` in [-1, 1], drawn from `distribution`."""
        return draw_latents(*self.distribution(pixels), draws)

    @torch.no_grad()
    def distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `[B, C, *size]` of the network's latents, for pixels `[B, 3, *pixels]`."""
        rows = self._rows(pixels.shape[2:])
        parts = [self.posterior(part) for part in pixels.split(rows)]
        mean, std = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        shift, scale = self.shift_and_scale(mean)
        return (mean - shift) * scale, std * scale

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's own latents, float32."""
        return kind_of(self.vae).posterior(self.vae, pixels)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures or videos in [-1, 1], float32, of latents `[B, C, *size]` of any size."""
        shift, scale = self.shift_and_scale(latents)
        z = (latents.float() / scale + shift).to(self.vae.dtype)
        rows = self._rows(self.pixel_size(tuple(latents.shape[2:])))
        kind = kind_of(self.vae)
        parts = [kind.decode(self.vae, part) for part in z.split(rows)]
        return torch.cat(parts).clamp(-1, 1)

    def _rows(self, pixels: Size) -> int:
        """Number of pictures or videos of a size in pixels in one call of the VAE."""
        limit = min(self.at_once, self.at_once_on_cpu) if self.device.type == "cpu" else self.at_once
        return max(1, limit // math.prod(pixels))

    def shift_and_scale(self, latents: Tensor) -> tuple[Any, Any]:
        """Shift and scale that turn the VAE's latents into the network's: `(latents - shift) * scale`."""
        return kind_of(self.vae).shift_and_scale(self.vae, latents)

    def pixel_size(self, size: Size) -> Size:
        """Size in pixels of a latent size."""
        return pixel_size(size, self.factors(self.vae.config))


def chat_lengths(tokenizer: Any, prompts: Sequence[str], thinking: bool) -> list[int]:
    """Number of tokens of each prompt in a template for chats, with or without room for thinking."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    options = {"add_generation_prompt": True, "enable_thinking": thinking, "return_dict": False}
    return [len(tokens) for tokens in tokenizer.apply_chat_template(chats, **options)]


def channels_last(vae: Any) -> None:
    """Lay out the weights of a VAE of pictures so that its convolutions run faster, in place; results are rounded in
    another way. Measured on a CPU: a quarter of the time of the embedded VAE. VAEs of videos are left alone.
    """
    if all(parameter.ndim < 5 for parameter in vae.parameters()):
        vae.to(memory_format=torch.channels_last)


def pixel_size(size: Size, factors: tuple[int, int]) -> Size:
    """Size in pixels of a latent size, (H, W) or (F, H, W); `factors` as of `Encoders.factors`."""
    frames, side = factors
    sides = tuple(length * side for length in size[-2:])
    return sides if len(size) == 2 else ((size[0] - 1) * frames + 1, *sides)


def draw_latents(mean: Tensor, std: Tensor, draws: Draws) -> Tensor:
    """Latents `[B, C, *size]`, float32, drawn from their distribution."""
    mean = mean.float()
    return mean + std.float() * draws.noise(f"posterior/{tuple(mean.shape[2:])}", mean)
