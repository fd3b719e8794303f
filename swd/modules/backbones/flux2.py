"""FLUX.2-dev: the network of FLUX.2 klein, guidance-distilled, with text of another language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from torch import Tensor

from swd.modules.backbones.flux2_klein import Flux2KleinBackbone, Flux2KleinEncoders
from swd.modules.encoders import Encoders
from swd.types import Size


class Flux2Encoders(Flux2KleinEncoders):
    """Three layers of Mistral Small 3 side by side, its padding seen; the VAE of FLUX.2 klein."""

    @classmethod
    def count_tokens(cls, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        """Each prompt stands behind the pipeline's own system message, which counts."""
        chats = format_input(list(prompts))
        return [len(tokens) for tokens in tokenizer.apply_chat_template(chats, return_dict=False)]


class Flux2Backbone(Flux2KleinBackbone):
    """`Flux2Transformer2DModel`, fed a guidance scale; its pipeline has no guidance between two passes."""

    pipeline_type: ClassVar[str] = "Flux2Pipeline"
    pipeline_aliases: ClassVar[tuple[str, ...]] = ()
    encoders_type: ClassVar[type[Encoders]] = Flux2Encoders

    @staticmethod
    def sampling_arguments(max_text_tokens: int, guidance: float | None) -> dict[str, Any]:
        return {"guidance_scale": guidance, "max_sequence_length": max_text_tokens}

    @staticmethod
    def guidance_arguments(scale: float) -> dict[str, Any]:
        return {}

    @classmethod
    def from_output(cls, latents: Tensor, size: Size, encoders: Encoders) -> Tensor:
        """The pipeline returns the tokens of its loop."""
        return cls.from_pipeline(latents, size)
