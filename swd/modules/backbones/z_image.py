"""Z-Image: one stream of picture and text tokens, text of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from swd.diffusion import Process, RectifiedFlow
from swd.modules.backbones.base import Backbone, NetworkLimits
from swd.modules.encoders import Encoders, chat_lengths
from swd.types import Conditioning


class ZImageEncoders(Encoders):
    """Qwen3, its padding masked; 8x VAE of 16 channels (FLUX.1's)."""

    # Text positions go up to 1024 in the class's own default, in units of 32, and the picture has the one behind.
    most_text_tokens: ClassVar[int] = 992

    def text(self, prompts: Sequence[str]) -> Conditioning:
        rows, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_text_tokens,
        )
        # The pipeline cuts the padding away; batches and caches need texts of one length.
        whole = rows[0].new_zeros(self.max_text_tokens, rows[0].shape[1])
        embeds = pad_sequence([whole, *rows], batch_first=True)[1:]
        ones = [row.new_ones(len(row)) for row in rows]
        return Conditioning(embeds, mask=pad_sequence([whole[:, 0], *ones], batch_first=True)[1:])

    @classmethod
    def count_tokens(cls, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        """Each prompt stands in a template for chats, which leaves room for thinking."""
        return chat_lengths(tokenizer, prompts, thinking=True)


class ZImageBackbone(Backbone):
    """`ZImageTransformer2DModel`: the negative of the velocity, time from 0 (noise) to 1, lists in and out.

    Blocks are its main layers; refiners of picture and text come before them. A longer text moves the picture's first
    coordinate, as in the stock pipeline.
    """

    process: ClassVar[Process] = RectifiedFlow(shift=6.0)  # of its published scheduler
    network_type: ClassVar[str] = "ZImageTransformer2DModel"
    pipeline_type: ClassVar[str] = "ZImagePipeline"
    pipeline_aliases: ClassVar[tuple[str, ...]] = ("ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
    encoders_type: ClassVar[type[Encoders]] = ZImageEncoders
    masked_text: ClassVar[bool] = True
    float_latents: ClassVar[bool] = True
    called_with_first_size: ClassVar[bool] = True
    targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
    comfyui: ClassVar[bool] = True
    narrows: ClassVar[bool] = True

    _image_tokens = 0  # in the forward pass that runs

    @staticmethod
    def limits_of(config: dict[str, Any]) -> NetworkLimits:
        (patch,) = config["all_patch_size"]
        return NetworkLimits(
            divisor=patch,
            max_side=patch * min(config["axes_lens"][1:]),
            blocks=config["n_layers"],
            width=config["dim"],
            channels=config["in_channels"],
            native=(128, 128),
        )

    @staticmethod
    def conditioning_widths(config: dict[str, Any]) -> tuple[int, int | None]:
        return config["cap_feat_dim"], None

    @staticmethod
    def sampling_arguments(max_text_tokens: int, guidance: float | None) -> dict[str, Any]:
        return {"guidance_scale": 0.0, "max_sequence_length": max_text_tokens}

    @staticmethod
    def guidance_arguments(scale: float) -> dict[str, Any]:
        """The pipeline adds its scale times the difference to the conditional prediction, so that 0 is none."""
        return {"guidance_scale": scale - 1}

    @property
    def block_list(self) -> Sequence[nn.Module]:
        return self.module_list("layers")

    @property
    def repeated_blocks(self) -> Sequence[nn.Module]:
        return [*self.module_list("noise_refiner"), *self.module_list("context_refiner"), *self.block_list]

    def image_stream(self, output: Any) -> Tensor:
        tokens: Tensor = output[:, : self._image_tokens]  # padding and text come behind the picture
        return tokens

    def call(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self._image_tokens = x_t.shape[2] * x_t.shape[3] // self.limits.divisor**2
        predictions: list[Tensor] = self.network(
            list(x_t.to(self.dtype).unsqueeze(2)),
            (1000 - self.timestep(x_t, sigma)) / 1000,
            texts_of(conditioning, self.dtype),
            return_dict=False,
        )[0]
        return -torch.stack(predictions).squeeze(2).float()


def texts_of(conditioning: Conditioning, dtype: torch.dtype) -> list[Tensor]:
    """The text tokens `[T, D]` of each row, without masked ones; on the meta device, which has no values, all."""
    embeds, mask = conditioning.embeds.to(dtype), conditioning.mask
    if mask is None or mask.is_meta:
        return list(embeds)
    lengths: list[int] = mask.bool().sum(1).tolist()
    return [row[:length] for row, length in zip(embeds, lengths, strict=True)]
