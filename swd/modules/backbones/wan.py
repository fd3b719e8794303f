"""Wan2.1: text to video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from swd.diffusion import Process, RectifiedFlow
from swd.modules.backbones.base import Backbone, NetworkLimits
from swd.modules.encoders import Encoders
from swd.types import Conditioning

ORIGINAL_NAMES = {
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
"""Parts of the paths of linear layers, as diffusers has them, and those of the vendor's own checkpoints."""


class WanEncoders(Encoders):
    """UMT5; causal video VAE, 8x (of Wan2.2 TI2V-5B 16x) in space and 4x in time, its first frame by itself."""

    vae_dtype: ClassVar[torch.dtype | None] = torch.float32  # as diffusers recommends

    @staticmethod
    def cleaned(prompt: str) -> str:
        cleaned: str = prompt_clean(prompt)
        return cleaned

    def text(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(
            prompt=list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_text_tokens,
            device=self.device,
        )
        return Conditioning(embeds)


class WanBackbone(Backbone):
    """`WanTransformer3DModel`: velocity prediction on latents `[B, C, F, H, W]`, timestep 0..1000."""

    process: ClassVar[Process] = RectifiedFlow()
    network_type: ClassVar[str] = "WanTransformer3DModel"
    pipeline_type: ClassVar[str] = "WanPipeline"
    pipeline_aliases: ClassVar[tuple[str, ...]] = ("WanVideoToVideoPipeline",)
    encoders_type: ClassVar[type[Encoders]] = WanEncoders
    unknown_settings: ClassVar[tuple[str, ...]] = ("boundary_ratio", "expand_timesteps")  # of Wan2.2
    comfyui: ClassVar[bool] = True
    video: ClassVar[bool] = True
    float_latents: ClassVar[bool] = True
    narrows: ClassVar[bool] = True
    poor_at_low_resolution: ClassVar[bool] = True  # SwD paper, appendix B

    @staticmethod
    def limits_of(config: dict[str, Any]) -> NetworkLimits:
        frames, height, width = config["patch_size"]
        assert frames == 1 and height == width, "Wan's patches are (1, 2, 2)"
        return NetworkLimits(
            divisor=height,
            max_side=config["rope_max_seq_len"] * height,
            blocks=config["num_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            channels=config["in_channels"],
            native=(21, 60, 104),
            max_frames=config["rope_max_seq_len"],
        )

    @staticmethod
    def comfy_key(module: str) -> str:
        """ComfyUI keeps the original checkpoint's names."""
        for ours, theirs in ORIGINAL_NAMES.items():
            module = module.replace(ours, theirs)
        return f"diffusion_model.{module}"

    @staticmethod
    def conditioning_widths(config: dict[str, Any]) -> tuple[int, int | None]:
        return config["text_dim"], None

    @property
    def block_list(self) -> Sequence[nn.Module]:
        return self.module_list("blocks")

    def call(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        prediction: Tensor = self.network(
            hidden_states=x_t.to(self.dtype),
            timestep=self.timestep(x_t, sigma),
            encoder_hidden_states=conditioning.embeds.to(self.dtype),
            return_dict=False,
        )[0]
        return prediction
