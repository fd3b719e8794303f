"""FLUX.1-dev: guidance-distilled, 2x2 patches as tokens with rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swd.diffusion import Process, RectifiedFlow
from swd.modules.backbones.base import Backbone, NetworkLimits
from swd.modules.encoders import Encoders
from swd.scheduler import pack, position_ids, unpack
from swd.types import Conditioning


class FluxEncoders(Encoders):
    """CLIP (pooled) and T5; 8x VAE of 16 channels."""

    longest: ClassVar[tuple[tuple[str, bool], ...]] = (("tokenizer_2", True), ("tokenizer", False))
    most_text_tokens: ClassVar[int] = 512

    def text(self, prompts: Sequence[str]) -> Conditioning:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), prompt_2=None, device=self.device, max_sequence_length=self.max_text_tokens
        )
        return Conditioning(embeds, pooled)


class FluxBackbone(Backbone):
    """`FluxTransformer2DModel`: velocity prediction; features are those of the double-stream blocks."""

    process: ClassVar[Process] = RectifiedFlow()
    network_type: ClassVar[str] = "FluxTransformer2DModel"
    pipeline_type: ClassVar[str] = "FluxPipeline"
    pipeline_aliases: ClassVar[tuple[str, ...]] = ("FluxImg2ImgPipeline", "FluxInpaintPipeline")
    encoders_type: ClassVar[type[Encoders]] = FluxEncoders
    comfyui: ClassVar[bool] = True
    layout: ClassVar[str] = "tokens"
    narrows: ClassVar[bool] = True
    last_norm: ClassVar[str | None] = "norm_out"
    text_mlp: ClassVar[str | None] = "ff_context"

    @staticmethod
    def limits_of(config: dict[str, Any]) -> NetworkLimits:
        return NetworkLimits(
            divisor=2,
            max_side=None,
            blocks=config["num_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            channels=config["in_channels"] // 4,
            native=(128, 128),
        )

    @staticmethod
    def sampling_arguments(max_text_tokens: int, guidance: float | None) -> dict[str, Any]:
        return {"guidance_scale": guidance, "max_sequence_length": max_text_tokens}

    @staticmethod
    def guidance_arguments(scale: float) -> dict[str, Any]:
        """FLUX's `guidance_scale` is an input of its network; guidance between two passes has arguments of its own."""
        return {"true_cfg_scale": scale, "negative_prompt": ""}

    @staticmethod
    def conditioning_widths(config: dict[str, Any]) -> tuple[int, int | None]:
        return config["joint_attention_dim"], config["pooled_projection_dim"]

    @property
    def block_list(self) -> Sequence[nn.Module]:
        return self.module_list("transformer_blocks")

    @property
    def repeated_blocks(self) -> Sequence[nn.Module]:
        return [*self.block_list, *self.module_list("single_transformer_blocks")]

    def image_stream(self, output: Any) -> Tensor:
        tensor: Tensor = output[1]  # (text tokens, image tokens)
        return tensor

    def call(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.pooled is not None  # this family's encoders always return one
        size = x_t.shape[2:]
        dtype = self.dtype
        # As in the stock pipeline, the timestep is rounded to the network's dtype on the scale of 1000, then divided.
        timestep = self.timestep(x_t, sigma).to(dtype) / 1000
        guidance = None
        if self.diffusers_model.config["guidance_embeds"]:
            assert self.guidance is not None  # checked with the configuration
            guidance = torch.full((len(x_t),), self.guidance, device=x_t.device, dtype=torch.float32)
        tokens: Tensor = self.network(
            hidden_states=pack(x_t.to(dtype)),
            timestep=timestep,
            guidance=guidance,
            encoder_hidden_states=conditioning.embeds.to(dtype),
            pooled_projections=conditioning.pooled.to(dtype),
            txt_ids=torch.zeros(conditioning.embeds.shape[1], 3, device=x_t.device, dtype=dtype),
            img_ids=position_ids(size, x_t.device, dtype),
            return_dict=False,
        )[0]
        return unpack(tokens, size)
