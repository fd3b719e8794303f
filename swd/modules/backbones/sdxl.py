"""Stable Diffusion XL: a UNet that predicts noise under variance-preserving diffusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swd.diffusion import Process, VariancePreserving
from swd.modules.backbones.base import Backbone, NetworkLimits
from swd.modules.encoders import Encoders
from swd.types import Conditioning, Size


class SDXLEncoders(Encoders):
    """Two CLIP encoders; 8x VAE of 4 channels. The conditioning holds the *final* size in pixels at every step."""

    longest: ClassVar[tuple[tuple[str, bool], ...]] = (("tokenizer", False), ("tokenizer_2", False))
    vae_dtype: ClassVar[torch.dtype | None] = torch.float32  # it overflows in half precision

    def text(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return Conditioning(embeds, pooled)

    def with_size(self, conditioning: Conditioning, final_size: Size | None) -> Conditioning:
        height, width = self.pixel_size(final_size or (128, 128))
        embeds = conditioning.embeds
        ids = torch.tensor([[height, width, 0, 0, height, width]], device=embeds.device, dtype=embeds.dtype)
        return replace(conditioning, time_ids=ids.repeat(len(conditioning), 1))


class SDXLBackbone(Backbone):
    """`UNet2DConditionModel` of SDXL: noise prediction; its one block of features is the middle block's map."""

    process: ClassVar[Process] = VariancePreserving()
    subfolder: ClassVar[str] = "unet"
    network_type: ClassVar[str] = "UNet2DConditionModel"
    pipeline_type: ClassVar[str] = "StableDiffusionXLPipeline"
    # The img2img pipeline is not listed: the refiner is published under its name, with other text and size inputs.
    pipeline_aliases: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPAGPipeline",)
    encoders_type: ClassVar[type[Encoders]] = SDXLEncoders
    comfyui: ClassVar[bool] = True
    has_refiner: ClassVar[bool] = True
    narrows: ClassVar[bool] = True
    poor_at_low_resolution: ClassVar[bool] = True  # SwD paper, appendix B

    @staticmethod
    def limits_of(config: dict[str, Any]) -> NetworkLimits:
        channels = config["block_out_channels"]
        return NetworkLimits(
            divisor=2 ** (len(channels) - 1),  # odd maps inside the UNet would be resized on the way up
            max_side=None,
            blocks=1,
            width=channels[-1],
            channels=config["in_channels"],
            native=(config["sample_size"],) * 2,
        )

    @staticmethod
    def sampling_arguments(max_text_tokens: int, guidance: float | None) -> dict[str, Any]:
        return {"guidance_scale": 1.0}

    @staticmethod
    def unconditional(empty: Conditioning, pipeline_config: Mapping[str, Any]) -> Conditioning:
        """Zeros instead of an encoded empty prompt, where the pipeline says `force_zeros_for_empty_prompt`.

        SDXL's base was trained with zeros in place of the text embeddings of dropped captions. It is published with
        this setting, which is also the pipeline's default. The micro-conditioning is kept.
        """
        if not pipeline_config.get("force_zeros_for_empty_prompt", True):
            return empty
        assert empty.pooled is not None  # this family's encoders always return one
        return replace(empty, embeds=torch.zeros_like(empty.embeds), pooled=torch.zeros_like(empty.pooled))

    @staticmethod
    def comfy_key(module: str) -> str:
        """The module's name in kohya's layout."""
        return f"lora_unet_{module.replace('.', '_')}"

    @classmethod
    def comfy_weights(cls, module: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """LoRA weights of a module in kohya's layout, which stores alpha beside them: the rank, for a scale of 1."""
        name = cls.comfy_key(module)
        alpha = torch.tensor(float(down.shape[0]))
        return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}

    @staticmethod
    def conditioning_widths(config: dict[str, Any]) -> tuple[int, int | None]:
        # `add_embedding` takes the pooled text and the embeddings of six time ids.
        rest = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return config["cross_attention_dim"], rest

    @classmethod
    def random_conditioning(cls, config: dict[str, Any], batch: int, tokens: int, seed: int = 0) -> Conditioning:
        plain = super().random_conditioning(config, batch, tokens, seed)
        return replace(plain, time_ids=torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]]).repeat(batch, 1))

    @property
    def block_list(self) -> Sequence[nn.Module]:
        return [self.network.get_submodule("mid_block")]

    @property
    def repeated_blocks(self) -> Sequence[nn.Module]:
        """Residual and transformer blocks; `modules()` has them in another order than that in which they run."""
        parts = [*self.module_list("down_blocks"), self.network.get_submodule("mid_block")]
        found: list[nn.Module] = []
        for part in [*parts, *self.module_list("up_blocks")]:
            stages: Any = part
            # In each part a residual block comes first, then an attention in turn with them.
            for pair in zip_longest(stages.resnets, getattr(stages, "attentions", ())):
                for stage in pair:
                    found += [] if stage is None else list(getattr(stage, "transformer_blocks", [stage]))
        return found

    def behind(self, block: int) -> Sequence[nn.Module]:
        return self.module_list("up_blocks")

    def rows_of(self, value: Any, rows: int) -> Any:
        """What a block on the way up is given: tensors, and a tuple of maps from the way down."""
        if isinstance(value, tuple):
            return tuple(tensor[:rows] for tensor in value)
        return super().rows_of(value, rows)

    def image_stream(self, output: Any) -> Tensor:
        tokens: Tensor = output.flatten(2).transpose(1, 2)  # [B, D, H, W] to [B, H * W, D]
        return tokens

    def call(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.pooled is not None  # this family's encoders always return one
        timestep = self.timestep(x_t, sigma)
        prediction: Tensor = self.network(
            x_t.to(self.dtype),
            timestep,
            encoder_hidden_states=conditioning.embeds.to(self.dtype),
            added_cond_kwargs={
                "text_embeds": conditioning.pooled.to(self.dtype),
                "time_ids": conditioning.time_ids,
            },
            return_dict=False,
        )[0]
        return prediction
