"""The stock diffusers pipeline with a student in it, and the pictures that it draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoencoderTiny
from omegaconf import DictConfig
from torch import Tensor

from swd.modules.attention import check_gpu
from swd.modules.compiling import compile_in_place
from swd.modules.encoders import channels_last
from swd.modules.pretrained import Pretrained
from swd.modules.quantize import quantize
from swd.modules.requests import Request
from swd.modules.saved_student import Student
from swd.modules.tiny_video import TinyVideoDecoder
from swd.modules.tiny_video_files import load_video_decoder, takes_video_decoder
from swd.scheduler import ScaleWiseScheduler
from swd.types import Size, UserError


@dataclass(frozen=True)
class OtherExpert:
    """The student of the expert that takes the noise levels which a student's own does not.

    Attributes:
        model: the same pipeline, as the other expert's family reads it.
        student: the student.
    """

    model: Pretrained
    student: Student


@dataclass(frozen=True)
class DrawingOptions:
    """What makes drawing faster, or smaller, than the stock pipeline's; `swd sample` has the same keys.

    Attributes:
        tiny_vae: a distilled decoder that takes the VAE's place: folder or hub id of an `AutoencoderTiny`; of Wan's and
            Qwen-Image's latents a file of TAEHV.
        compile: "blocks" (or True): the network's repeated blocks; "whole": the network as one.
        compile_coders: text encoders and the decoder too.
        offload: "model" or "sequential": weights wait in main memory until they are needed.
    """

    tiny_vae: str | None = None
    compile: bool | Literal["blocks", "whole"] = False
    compile_coders: bool = False
    offload: Literal["none", "model", "sequential"] = "none"


def build_pipeline(
    model: Pretrained,
    student: Student | None = None,
    schedule: ScaleWiseScheduler | None = None,
    cfg: DictConfig | DrawingOptions | None = None,
    fold: bool = False,
    other: OtherExpert | None = None,
) -> Any:
    """The stock pipeline of the model; with a student, its weights and its scale-wise scheduler.

    Args:
        model: the base.
        student: the student: an adapter, or a network that was trained whole; None: the teacher.
        schedule: the student's sampler.
        cfg: `DrawingOptions`, or a configuration with these keys, as `swd sample` checked them; None: none of them.
        fold: draw faster, and round in another way than training does: a student's LoRA is added to the weights, unless
            they are in 8 bits, and the VAE's convolutions are laid out for speed.
        other: the student of the pipeline's other expert; None: that is as the folder has it.
    """
    check_gpu(model.attention)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, part = model.dtype(device), model.backbone_class.subfolder
    network: Any = student.network(model, device) if student else model.network(device).network
    networks = {part: network}
    if other is not None:
        networks[other.model.backbone_class.subfolder] = other.student.network(other.model, device)
    pipe = model.pipeline(dtype, **networks)
    pipe.set_progress_bar_config(disable=True)
    model.backbone_class.mend(pipe)
    if student is not None:
        assert schedule is not None
        students = [(student, model, network)]
        if other is not None:
            students.append((other.student, other.model, networks[other.model.backbone_class.subfolder]))
        for each, its_model, its_network in students:
            if fold and not its_model.quantization:
                each.fold_into(its_network)
            else:
                each.load_into(pipe, its_model)
        schedule.attach(pipe)
    # After the adapters: loaders would give them the base's 8 bits. Their layers hold the base under this name.
    for its_network, its_model in denoising_networks(pipe, model, other):
        if its_model.quantization:
            inner = [f"{target}.base_layer" for target in its_model.targets]
            blocks = its_model.backbone_class(its_network).repeated_blocks
            quantize(its_network, [*its_model.targets, *inner], its_model.quantization, blocks)
    if fold:
        channels_last(pipe.vae)
    if cfg is None:
        return pipe.to(device)
    if cfg.tiny_vae is not None:
        pipe.vae = load_tiny_vae(cfg.tiny_vae, dtype, type(pipe.vae).__name__)
    if cfg.compile:
        compile_parts(pipe, model, whole=cfg.compile == "whole", coders=cfg.compile_coders)
    if cfg.offload == "none":
        return pipe.to(device)
    pipe.enable_model_cpu_offload() if cfg.offload == "model" else pipe.enable_sequential_cpu_offload()
    return pipe


def denoising_networks(pipe: Any, model: Pretrained, other: OtherExpert | None = None) -> list[tuple[Any, Pretrained]]:
    """The denoising networks of a pipeline, each with its model: the model's own, then those of its other experts.

    Without a student of its own, another expert is the base's and is treated as the model's own network is.
    """
    models = dict.fromkeys((model.backbone_class.subfolder, *model.backbone_class.other_experts), model)
    if other is not None:
        models[other.model.backbone_class.subfolder] = other.model
    return [(getattr(pipe, part), its_model) for part, its_model in models.items()]


def compile_parts(pipe: Any, model: Pretrained, whole: bool, coders: bool) -> None:
    """Compile parts of a pipeline, in place and for any size; each is compiled when it first runs.

    Args:
        pipe: the pipeline.
        model: its model.
        whole: each network as one, whose hooks run outside of what is compiled; False: each of its repeated blocks, as
            `compile_in_place` does.
        coders: also text encoders and the VAE's decoder.
    """
    for network, _ in denoising_networks(pipe, model):
        if whole:
            network.forward = torch.compile(network.forward, dynamic=True)
        else:
            compile_in_place(model.backbone_class(network).repeated_blocks)
    if coders:
        names = model.backbone_class.encoders_type.text_encoders
        for encoder in (getattr(pipe, name, None) for name in names):
            if encoder is not None:
                encoder.forward = torch.compile(encoder.forward)
        if isinstance(pipe.vae, TinyVideoDecoder):  # what it repeats, for videos of any length
            pipe.vae.step = torch.compile(pipe.vae.step, dynamic=True)
        else:
            pipe.vae.decode = torch.compile(pipe.vae.decode, dynamic=True)


def load_tiny_vae(path: str, dtype: torch.dtype, vae_class: str) -> Any:
    """A distilled decoder in place of the VAE: a small fraction of its time, at some loss.

    Args:
        path: folder or hub id of an `AutoencoderTiny`, or a file of TAEHV.
        dtype: dtype of its weights.
        vae_class: class of the VAE, which says whether TAEHV is what its latents are decoded by.

    Raises:
        UserError: if it cannot be loaded.
    """
    if takes_video_decoder(vae_class):
        return load_video_decoder(path, dtype, f"tiny_vae={path}")
    try:
        return AutoencoderTiny.from_pretrained(path, torch_dtype=dtype, use_safetensors=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"tiny_vae={path} cannot be loaded ({reason[:160]})") from None


def negative_prompts(model: Pretrained, count: int) -> dict[str, list[str]]:
    """Arguments of a stock pipeline for the model's negative prompt, one for each of `count` prompts; empty without."""
    return {} if model.negative_prompt is None else {"negative_prompt": [model.negative_prompt] * count}


@torch.no_grad()
def draw(
    pipe: Any,
    model: Pretrained,
    requests: list[Request],
    size: Size | None = None,
    show_sizes: bool = True,
    start: Tensor | None = None,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Pictures `[3, H, W]` or videos `[3, F, H, W]` in [-1, 1] of a batch of requests.

    Args:
        pipe: from `build_pipeline`.
        model: its model.
        requests: prompts and seeds.
        size: latent size of the finished ones; None: the model's own.
        show_sizes: also decode the prediction of every step, if the scheduler is scale-wise.
        start: noised latents `[B, C, H, W]` that the scheduler's first step takes; None: noise of the requests' seeds.

    Returns:
        The finished ones, and for every step its predictions.
    """
    backbone, scheduler, size = model.backbone_class, pipe.scheduler, size or model.size
    arguments: dict[str, Any] = {"output_type": "latent"}
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    arguments |= backbone.sampling_arguments(model.max_text_tokens, model.embedded_guidance)
    if isinstance(scheduler, ScaleWiseScheduler):
        scheduler.keep_x0 = show_sizes
        arguments["num_inference_steps"] = scheduler.num_inference_steps
        if start is None:
            start = scheduler.initial_latents(
                len(requests), model.channels, size[-2], size[-1], size[0] if backbone.video else None, generators
            )
    else:
        arguments |= {"num_inference_steps": model.teacher_steps, "generator": generators}
        if model.drawing_guidance_scale != 1.0:
            arguments |= backbone.guidance_arguments(model.drawing_guidance_scale)
            arguments |= negative_prompts(model, len(requests))
    if start is not None:
        arguments["latents"] = backbone.to_pipeline(start).to(pipe._execution_device, model.latent_dtype(pipe))
    arguments |= model.size_arguments(size if start is None else tuple(start.shape[2:]), size)
    encoders = backbone.encoders_type(pipe, model.max_text_tokens)
    latents = pipe(prompt=[request.prompt for request in requests], **arguments)[0]
    latents = backbone.from_output(latents, size, encoders)
    final = list(encoders.decode(latents).cpu())
    if not (show_sizes and isinstance(scheduler, ScaleWiseScheduler)):
        return final, []
    return final, [list(encoders.decode(x0.to(latents.device)).cpu()) for x0 in scheduler.x0_predictions]
