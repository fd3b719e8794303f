"""FLUX.2 klein base: two kinds of blocks, 2x2 patches as tokens with rotary positions, text of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swd.diffusion import Process, RectifiedFlow
from swd.modules.backbones.base import Backbone, NetworkLimits
from swd.modules.encoders import Encoders, chat_lengths
from swd.scheduler import pack, position_ids, unpack
from swd.types import Conditioning, Size


class Flux2KleinEncoders(Encoders):
    """Three layers of Qwen 3 side by side, its padding seen; 8x VAE of 32 channels."""

    most_text_tokens: ClassVar[int] = 512
    # Its published configuration asks for it (force_upcast); the class knows no such setting and loses it when saved.
    vae_dtype: ClassVar[torch.dtype | None] = torch.float32

    def text(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), device=self.device, max_sequence_length=self.max_text_tokens
        )
        return Conditioning(embeds)

    @classmethod
    def count_tokens(cls, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        """Each prompt stands in a template for chats, without a part for thinking."""
        return chat_lengths(tokenizer, prompts, thinking=False)


class Flux2KleinBackbone(Backbone):
    """`Flux2Transformer2DModel`: velocity prediction; double-stream blocks, then single-stream ones."""

    # Its pipeline's own shift for 1024x1024 pixels at 50 steps: exp(mu) of `compute_empirical_mu(4096, 50)`.
    process: ClassVar[Process] = RectifiedFlow(shift=7.56)
    network_type: ClassVar[str] = "Flux2Transformer2DModel"
    pipeline_type: ClassVar[str] = "Flux2KleinPipeline"
    pipeline_aliases: ClassVar[tuple[str, ...]] = ("Flux2KleinInpaintPipeline",)
    encoders_type: ClassVar[type[Encoders]] = Flux2KleinEncoders
    comfyui: ClassVar[bool] = True
    layout: ClassVar[str] = "patches"
    narrows: ClassVar[bool] = True
    last_norm: ClassVar[str | None] = "norm_out"
    text_mlp: ClassVar[str | None] = "ff_context"
    targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("linear_in", "linear_out", "to_qkv_mlp_proj", "to_out"),  # the last two are a whole single-stream block's
    )

    _text_tokens: int = 0  # of the forward pass that runs

    @staticmethod
    def limits_of(config: dict[str, Any]) -> NetworkLimits:
        return NetworkLimits(
            divisor=2,
            max_side=None,
            blocks=config["num_layers"] + config["num_single_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            channels=config["in_channels"] // 4,
            native=(128, 128),
        )

    @staticmethod
    def conditioning_widths(config: dict[str, Any]) -> tuple[int, int | None]:
        return config["joint_attention_dim"], None

    @classmethod
    def from_output(cls, latents: Tensor, size: Size, encoders: Encoders) -> Tensor:
        """The pipeline returns a map of the VAE's own latents."""
        shift, scale = encoders.shift_and_scale(latents)
        normalised: Tensor = (latents.float() - shift) * scale
        return normalised

    @property
    def block_list(self) -> Sequence[nn.Module]:
        return [*self.module_list("transformer_blocks"), *self.module_list("single_transformer_blocks")]

    def image_stream(self, output: Any) -> Tensor:
        """The second tensor of a double-stream block; of a single-stream one's tokens those behind the text."""
        tensor: Tensor = output[1] if isinstance(output, tuple) else output[:, self._text_tokens :]
        return tensor

    def call(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        size = x_t.shape[2:]
        dtype = self.dtype
        self._text_tokens = conditioning.embeds.shape[1]
        # As in the stock pipeline, the timestep is rounded to the network's dtype on the scale of 1000, then divided.
        timestep = self.timestep(x_t, sigma).to(dtype) / 1000
        guidance = None
        if self.diffusers_model.config["guidance_embeds"]:
            assert self.guidance is not None  # checked with the configuration
            guidance = torch.full((len(x_t),), self.guidance, device=x_t.device, dtype=torch.float32)
        # Ids on four axes: row and column for the picture, the number of a token for the text.
        text_ids = F.pad(torch.arange(self._text_tokens, device=x_t.device)[:, None], (3, 0))
        tokens: Tensor = self.network(
            hidden_states=pack(x_t.to(dtype)),
            timestep=timestep,
            guidance=guidance,
            encoder_hidden_states=conditioning.embeds.to(dtype),
            txt_ids=text_ids,
            img_ids=F.pad(position_ids(size, x_t.device, torch.int64), (0, 1)),
            return_dict=False,
        )[0]
        return unpack(tokens, size)
