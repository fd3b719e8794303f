"""SANA 1.0/1.5: linear attention over the latents of a 32x autoencoder, text of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from swd.diffusion import Process, RectifiedFlow
from swd.modules.backbones.base import Backbone, NetworkLimits
from swd.modules.encoders import Encoders
from swd.types import Conditioning


class SanaEncoders(Encoders):
    """Gemma 2, its padding masked; a deterministic 32x autoencoder of 32 channels."""

    @staticmethod
    def cleaned(prompt: str) -> str:
        return prompt.lower().strip()

    def text(self, prompts: Sequence[str]) -> Conditioning:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_text_tokens,
            complex_human_instruction=None,
        )
        return Conditioning(embeds, mask=mask)


class SanaBackbone(Backbone):
    """`SanaTransformer2DModel`: velocity prediction, timestep 0..1000, text by cross-attention."""

    process: ClassVar[Process] = RectifiedFlow()
    network_type: ClassVar[str] = "SanaTransformer2DModel"
    pipeline_type: ClassVar[str] = "SanaPipeline"
    pipeline_aliases: ClassVar[tuple[str, ...]] = ("SanaPAGPipeline",)
    encoders_type: ClassVar[type[Encoders]] = SanaEncoders
    masked_text: ClassVar[bool] = True
    float_latents: ClassVar[bool] = True
    narrows: ClassVar[bool] = True
    targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")  # its MLP is made of convolutions

    @staticmethod
    def limits_of(config: dict[str, Any]) -> NetworkLimits:
        # Without a scale for interpolation there is no positional embedding, and so no limit.
        bounded = config.get("interpolation_scale") is not None
        return NetworkLimits(
            divisor=config["patch_size"],
            max_side=config["sample_size"] if bounded else None,
            blocks=config["num_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            channels=config["in_channels"],
            native=(config["sample_size"],) * 2,
        )

    @staticmethod
    def conditioning_widths(config: dict[str, Any]) -> tuple[int, int | None]:
        return config["caption_channels"], None

    @staticmethod
    def sampling_arguments(max_text_tokens: int, guidance: float | None) -> dict[str, Any]:
        return {
            "guidance_scale": 1.0,
            "max_sequence_length": max_text_tokens,
            "complex_human_instruction": None,
            "use_resolution_binning": False,
        }

    @property
    def block_list(self) -> Sequence[nn.Module]:
        return self.module_list("transformer_blocks")

    def call(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        timestep = self.timestep(x_t, sigma)
        prediction: Tensor = self.network(
            x_t.to(self.dtype),
            encoder_hidden_states=conditioning.embeds.to(self.dtype),
            encoder_attention_mask=conditioning.mask,
            timestep=timestep * self.diffusers_model.config["timestep_scale"],
            return_dict=False,
        )[0]
        return prediction.float()
