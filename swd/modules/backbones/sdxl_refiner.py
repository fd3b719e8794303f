"""SDXL's refiner, which takes over the last part of a picture's steps when a teacher draws its training set."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from torch import Tensor

from swd.modules.backbones.sdxl import SDXLBackbone, SDXLEncoders
from swd.modules.drawing import negative_prompts
from swd.modules.encoders import Encoders
from swd.modules.pretrained import Pretrained
from swd.modules.requests import Request
from swd.types import Size, UserError


class RefinerEncoders(SDXLEncoders):
    """The second of SDXL's text encoders alone."""

    optional: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")


class SDXLRefiner(SDXLBackbone):
    """The refiner's UNet: as SDXL's, in the pipeline that starts from a picture."""

    encoders_type: ClassVar[type[Encoders]] = RefinerEncoders

    pipeline_type: ClassVar[str] = "StableDiffusionXLImg2ImgPipeline"
    pipeline_aliases: ClassVar[tuple[str, ...]] = ()


def load_refiner(path: str, model: Pretrained) -> Pretrained:
    """The refiner in a folder or on the hub, of the base's precision; reads configuration files only.

    Raises:
        UserError: if the model there is no refiner.
    """
    try:
        return Pretrained(__name__, path, precision=model.precision)
    except UserError as error:
        message = str(error).replace("model.path", "refiner").replace(f"model.family={__name__}", "a refiner")
        raise UserError(message) from None


def build_refiner(refiner: Pretrained, pipe: Any) -> Any:
    """The refiner's stock pipeline; it shares VAE and text encoder with the base."""
    shared = {name: getattr(pipe, name) for name in ("vae", "text_encoder_2", "tokenizer_2")}
    loaded: Any = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        refiner.fetch(), torch_dtype=pipe.unet.dtype, use_safetensors=True, local_files_only=True, **shared
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded.to(pipe.device)


@torch.no_grad()
def draw_refined(
    pipe: Any, refiner: Any, model: Pretrained, requests: list[Request], size: Size, start: float
) -> list[Tensor]:
    """Pictures `[3, H, W]` in [-1, 1] of a batch of requests, drawn by the base up to `start`, then by the refiner."""
    height, width = model.pixel_size(size)
    common = {
        "prompt": [request.prompt for request in requests],
        "num_inference_steps": model.teacher_steps,
        "guidance_scale": model.drawing_guidance_scale,
        "generator": [torch.Generator().manual_seed(request.seed) for request in requests],
        "output_type": "latent",
        **negative_prompts(model, len(requests)),
    }
    latents = pipe(height=height, width=width, denoising_end=start, **common).images
    latents = refiner(image=latents, denoising_start=start, **common).images
    return list(model.backbone_class.encoders_type(pipe, model.max_text_tokens).decode(latents).cpu())
