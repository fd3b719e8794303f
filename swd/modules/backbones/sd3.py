"""Stable Diffusion 3 and 3.5 (the embedded shapes teacher is one too)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from swd.diffusion import Process, RectifiedFlow
from swd.modules.backbones.base import Backbone, Limits
from swd.modules.encoders import Encoders
from swd.types import Conditioning


class SD3Encoders(Encoders):
    """Two CLIP encoders and T5, which may be left out (CLIP's length is the limit then); 8x VAE of 16 channels."""

    longest: ClassVar[tuple[tuple[str, bool], ...]] = (("tokenizer_3", True), ("tokenizer", False))
    most_text_tokens: ClassVar[int] = 512
    optional: ClassVar[tuple[str, ...]] = ("text_encoder_3", "tokenizer_3")

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

    @staticmethod
    def limits_of(config: dict[str, Any]) -> Limits:
        patch = config["patch_size"]
        return Limits(
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
