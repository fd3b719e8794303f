"""Qwen-Image and Qwen-Image-2512: joint blocks over 2x2 patches and the text of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swd.diffusion import Process, RectifiedFlow
from swd.modules.backbones.base import Backbone, NetworkLimits
from swd.modules.encoders import Encoders
from swd.scheduler import pack, unpack
from swd.types import Conditioning

POSITIONS = 4096
"""Positions that the network has: for half of a picture's patches along a side, and behind these for the text."""
NOTHING = " "
"""What the vendor's README gives in place of a negative prompt; without one the pipeline does not guide at all."""


class QwenImageEncoders(Encoders):
    """Qwen2.5-VL, its padding masked; a video VAE of 16 channels for single pictures."""

    most_text_tokens: ClassVar[int] = 1024
    vae_dtype: ClassVar[torch.dtype | None] = torch.float32  # ours, as for Wan, whose VAE it is but for its weights

    @staticmethod
    def cleaned(prompt: str) -> str:
        return f"{prompt}<|im_end|>\n<|im_start|>assistant\n"  # the end of the chat counts as text, its head is cut

    def text(self, prompts: Sequence[str]) -> Conditioning:
        embeds, mask = self.pipeline.encode_prompt(
            [prompt or NOTHING for prompt in prompts],
            device=self.device,
            max_sequence_length=self.max_text_tokens,
        )
        if mask is None:  # all prompts have one length
            mask = embeds.new_ones(embeds.shape[:2], dtype=torch.int64)
        return Conditioning(embeds, mask=mask)


class QwenImageBackbone(Backbone):
    """`QwenImageTransformer2DModel`: velocity prediction, text and picture in one attention.

    The picture's positions are centred, and the text's begin at half of its longer side, so they move with the size.
    """

    # Of its own sampler at 1024x1024 pixels: e^mu, which grows from 1.65 to 2.46 with the number of tokens.
    process: ClassVar[Process] = RectifiedFlow(shift=2.0)
    network_type: ClassVar[str] = "QwenImageTransformer2DModel"
    pipeline_type: ClassVar[str] = "QwenImagePipeline"
    pipeline_aliases: ClassVar[tuple[str, ...]] = ("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline")
    encoders_type: ClassVar[type[Encoders]] = QwenImageEncoders
    masked_text: ClassVar[bool] = True
    comfyui: ClassVar[bool] = True
    layout: ClassVar[str] = "tokens"
    narrows: ClassVar[bool] = True
    last_norm: ClassVar[str | None] = "norm_out"
    text_mlp: ClassVar[str | None] = "txt_mlp"
    # Of models that edit pictures, draw layers, or are fed a guidance scale.
    unknown_settings: ClassVar[tuple[str, ...]] = (
        "zero_cond_t",
        "use_additional_t_cond",
        "use_layer3d_rope",
        "guidance_embeds",
    )

    @staticmethod
    def limits_of(config: dict[str, Any]) -> NetworkLimits:
        return NetworkLimits(
            divisor=2,
            max_side=4 * (POSITIONS - QwenImageEncoders.most_text_tokens),
            blocks=config["num_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            channels=config["in_channels"] // 4,
            native=(128, 128),
        )

    @staticmethod
    def conditioning_widths(config: dict[str, Any]) -> tuple[int, int | None]:
        return config["joint_attention_dim"], None

    @staticmethod
    def sampling_arguments(max_text_tokens: int, guidance: float | None) -> dict[str, Any]:
        return {"true_cfg_scale": 1.0, "max_sequence_length": max_text_tokens}

    @staticmethod
    def guidance_arguments(scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": scale, "negative_prompt": NOTHING}

    @classmethod
    def guide(cls, text: Tensor, empty: Tensor, scale: float, x_t: Tensor | float = 0.0) -> Tensor:
        """As the stock pipeline: each token of the guided velocity gets the length that it has without guidance.

        Velocities are parallel to `x_t - x0`, so that clean predictions need no noise level.
        """
        given, guided = (pack(x0 - x_t) for x0 in (text, super().guide(text, empty, scale)))
        length = guided.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(guided.dtype).tiny)
        return x_t + unpack(guided * (given.norm(dim=-1, keepdim=True) / length), text.shape[2:])

    @property
    def block_list(self) -> Sequence[nn.Module]:
        return self.module_list("transformer_blocks")

    def image_stream(self, output: Any) -> Tensor:
        tensor: Tensor = output[1]  # (text tokens, image tokens)
        return tensor

    def call(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.dtype
        height, width = x_t.shape[2:]
        tokens: Tensor = self.network(
            hidden_states=pack(x_t.to(dtype)),
            # As in the stock pipeline, rounded to the network's dtype on the scale of 1000, then divided.
            timestep=self.timestep(x_t, sigma).to(dtype) / 1000,
            encoder_hidden_states=conditioning.embeds.to(dtype),
            encoder_hidden_states_mask=conditioning.mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(tokens, (height, width))
