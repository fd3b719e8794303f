"""Stable Diffusion 3 and 3.5 (the embedded shapes teacher is one too)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swd.diffusion import Process, RectifiedFlow
from swd.modules.backbones.base import Backbone, NetworkLimits
from swd.modules.encoders import Encoders
from swd.modules.fresh_weights import draw_normal
from swd.types import Conditioning


class SD3Encoders(Encoders):
    """Two CLIP encoders and T5, which may be left out (CLIP's length is the limit then); 8x VAE of 16 channels."""

    longest: ClassVar[tuple[tuple[str, bool], ...]] = (("tokenizer_3", True), ("tokenizer", False))
    most_text_tokens: ClassVar[int] = 512
    optional: ClassVar[tuple[str, ...]] = ("text_encoder_3", "tokenizer_3")

    @classmethod
    def text_tokens(cls, max_text_tokens: int, first: Mapping[str, Any]) -> int:
        return max_text_tokens + int(first.get("max_position_embeddings", 77))  # T5's after CLIP's

    def text(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_text_tokens,
        )
        return Conditioning(embeds, pooled)


class SD3Backbone(Backbone):
    """`SD3Transformer2DModel`: velocity prediction, timestep 0..1000, joint blocks of text and image tokens."""

    process: ClassVar[Process] = RectifiedFlow()
    network_type: ClassVar[str] = "SD3Transformer2DModel"
    pipeline_type: ClassVar[str] = "StableDiffusion3Pipeline"
    pipeline_aliases: ClassVar[tuple[str, ...]] = ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
    encoders_type: ClassVar[type[Encoders]] = SD3Encoders
    trains_from_scratch: ClassVar[bool] = True  # the embedded teacher
    comfyui: ClassVar[bool] = True
    narrows: ClassVar[bool] = True
    last_norm: ClassVar[str | None] = "norm_out"
    text_mlp: ClassVar[str | None] = "ff_context"

    @staticmethod
    def limits_of(config: dict[str, Any]) -> NetworkLimits:
        patch = config["patch_size"]
        return NetworkLimits(
            divisor=patch,
            max_side=config["pos_embed_max_size"] * patch,
            blocks=config["num_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            channels=config["in_channels"],
            native=(config["sample_size"],) * 2,
        )

    @staticmethod
    def conditioning_widths(config: dict[str, Any]) -> tuple[int, int | None]:
        return config["joint_attention_dim"], config["pooled_projection_dim"]

    @staticmethod
    @torch.no_grad()
    def initialise(network: nn.Module, seed: int) -> None:
        """adaLN-zero, as in DiT (arXiv 2212.09748, section 3.2)."""
        generator = torch.Generator().manual_seed(seed)
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear):
                modulation = ".norm1" in name or name.startswith("norm_out")
                fan_in = module.in_features
                fan_out = module.out_features
                std = 0.02 if "embedder" in name and "context" not in name else (2 / (fan_in + fan_out)) ** 0.5
                zero = (modulation and name.endswith("linear")) or name == "proj_out"
                draw_normal(module.weight, 0.0 if zero else std, generator)
                if module.bias is not None:
                    module.bias.zero_()

    @property
    def block_list(self) -> Sequence[nn.Module]:
        return self.module_list("transformer_blocks")

    def image_stream(self, output: Any) -> Tensor:
        tensor: Tensor = output[1]  # (text tokens, image tokens)
        return tensor

    def call(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.pooled is not None  # this family's encoders always return one
        timestep = self.timestep(x_t, sigma)
        prediction: Tensor = self.network(
            hidden_states=x_t.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=conditioning.embeds.to(self.dtype),
            pooled_projections=conditioning.pooled.to(self.dtype),
            return_dict=False,
        )[0]
        return prediction
