"""Chroma1: FLUX.1 without pooled text and fed guidance; its text has a mask.

Two faults of the stock classes are mended here. The stock pipeline makes the mask of numbers, which are added to the
attention's scores and hide nothing (huggingface/diffusers#12116); the weights were trained with a real mask. And the
stock network checkpoints its single-stream blocks without the mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swd.diffusion import Process, RectifiedFlow
from swd.modules.backbones.base import Backbone, NetworkLimits
from swd.modules.backbones.flux import FluxBackbone
from swd.modules.encoders import Encoders
from swd.scheduler import pack, position_ids, unpack
from swd.types import Conditioning


class ChromaEncoders(Encoders):
    """T5, which sees its own padding masked; the network also sees the first padding token. 8x VAE of FLUX.1."""

    most_text_tokens: ClassVar[int] = 512

    def text(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _, mask, *_ = self.pipeline.encode_prompt(
            list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_text_tokens,
        )
        return Conditioning(embeds, mask=mask)


class ChromaBackbone(Backbone):
    """`ChromaTransformer2DModel`: velocity prediction; blocks are double-stream ones, then single-stream ones."""

    process: ClassVar[Process] = RectifiedFlow()
    network_type: ClassVar[str] = "ChromaTransformer2DModel"
    pipeline_type: ClassVar[str] = "ChromaPipeline"
    pipeline_aliases: ClassVar[tuple[str, ...]] = ("ChromaImg2ImgPipeline", "ChromaInpaintPipeline")
    encoders_type: ClassVar[type[Encoders]] = ChromaEncoders
    masked_text: ClassVar[bool] = True
    comfyui: ClassVar[bool] = True
    layout: ClassVar[str] = "tokens"
    narrows: ClassVar[bool] = True
    last_norm: ClassVar[str | None] = "norm_out"
    text_mlp: ClassVar[str | None] = "ff_context"

    _image_tokens = 0  # in the forward pass that runs

    @staticmethod
    def limits_of(config: dict[str, Any]) -> NetworkLimits:
        return replace(FluxBackbone.limits_of(config), blocks=config["num_layers"] + config["num_single_layers"])

    @staticmethod
    def conditioning_widths(config: dict[str, Any]) -> tuple[int, int | None]:
        return config["joint_attention_dim"], None

    @staticmethod
    def mend(pipe: Any) -> None:
        """Let the network take the stock pipeline's mask as one, also without a scale-wise scheduler."""

        def hides(network: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            mask = kwargs.get("attention_mask")
            return args, kwargs if mask is None else kwargs | {"attention_mask": mask.bool()}

        pipe.transformer.register_forward_pre_hook(hides, with_kwargs=True)

    @property
    def block_list(self) -> Sequence[nn.Module]:
        return [*self.module_list("transformer_blocks"), *self.module_list("single_transformer_blocks")]

    def image_stream(self, output: Any) -> Tensor:
        if isinstance(output, tuple):  # (text tokens, image tokens) of a double-stream block
            tensor: Tensor = output[1]
            return tensor
        return output[:, -self._image_tokens :]  # both in one tensor, text first

    def call(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        size, dtype = x_t.shape[2:], self.dtype
        image, text = pack(x_t.to(dtype)), conditioning.embeds.to(dtype)
        self._image_tokens = image.shape[1]
        mask = None
        if conditioning.mask is not None:
            mask = torch.cat([conditioning.mask.bool(), image.new_ones(image.shape[:2], dtype=torch.bool)], 1)
        with masked_checkpoints(self.network, mask):
            tokens: Tensor = self.network(
                hidden_states=image,
                # As in the stock pipeline, the timestep is rounded on the scale of 1000, then divided.
                timestep=self.timestep(x_t, sigma).to(dtype) / 1000,
                encoder_hidden_states=text,
                txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device, dtype=dtype),
                img_ids=position_ids(size, x_t.device, dtype),
                attention_mask=mask,
                return_dict=False,
            )[0]
        return unpack(tokens, size)


@contextmanager
def masked_checkpoints(network: Any, mask: Tensor | None) -> Iterator[None]:
    """Context in which single-stream blocks that are checkpointed get the mask `[B, L]` of this forward pass.

    Recomputed in the backward pass, they see the same mask whatever runs in between.
    """
    stock = getattr(network, "_gradient_checkpointing_func", None)
    if stock is None or mask is None:
        yield
        return

    def with_mask(block: nn.Module, *inputs: Any) -> Any:
        forgotten = len(inputs) == 3 and any(block is each for each in network.single_transformer_blocks)
        return stock(block, *inputs, mask) if forgotten else stock(block, *inputs)

    network._gradient_checkpointing_func = with_mask
    try:
        yield
    finally:
        network._gradient_checkpointing_func = stock
