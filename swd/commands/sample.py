"""`sample.py`: pictures and videos of prompts with the stock diffusers pipeline, an adapter and its schedule."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderTiny
from omegaconf import DictConfig
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from swd import __version__
from swd.commands import shared
from swd.config import check, given_keys, node_of, stored
from swd.data.buckets import aspect_size
from swd.data.job import say
from swd.export.student_folder import build_model, recorded_model, schedule_of
from swd.io import limits, video
from swd.io.files import claim_folder, write_aside
from swd.io.job_log import JobLog
from swd.io.masking import mask, mask_text
from swd.io.pictures import to_pil
from swd.io.tables import NoText, read_table, text_of
from swd.modules import hub
from swd.modules.adapters import locate
from swd.modules.model_folders import check_model_folder, read_json
from swd.modules.pretrained import Pretrained
from swd.modules.quantize import quantize
from swd.modules.requests import Request
from swd.modules.student import Student, load_student
from swd.modules.tokens import warn_beyond
from swd.scheduler import ScaleWiseScheduler
from swd.types import Size, UserError

ROOT = shared.ROOT | {
    "seed": int,
    "name": str,
    "output": str,
    "folder": str,
    "prompts": list[str] | str,
    "prompts_file": str | None,
    "images_per_prompt": int,
    "batch_size": int,
    "adapter": str | None,
    "ema": bool | None,
    "height": int | None,
    "width": int | None,
    "aspect": str | None,
    "frames": int | None,
    "tiny_vae": str | None,
    "compile": bool,
    "offload": Literal["none", "model", "sequential"],
    "show_sizes": bool,
    "fps": int,
}


MOST_PICTURES = 100_000
"""Files of one `swd sample`: more than a folder is looked through."""


def run(cfg: DictConfig) -> None:
    """Draw what the configuration asks for; prints the path of every file."""
    shared.quiet()
    job = prepare(cfg)
    requests, model, student, schedule, size = job.requests, job.model, job.student, job.schedule, job.size
    ending = "mp4" if model.backbone_class.video else "png"
    folder = claim_files(Path(cfg.folder), requests, ending)
    drawer = mask_text(f"model {model.name}, " + (f"adapter {job.source}" if student else "no adapter: the teacher"))
    print(drawer, flush=True)
    warn_beyond(model, [request.prompt for request in requests])
    say(f"loading {drawer}")
    pipe = build_pipeline(model, student, schedule, cfg)
    info = {
        **origin(cfg, job),
        "adapter_hash": student.hash if student else None,
        "schedule": dict(schedule.config) if schedule else None,
    }
    unit = "video" if model.backbone_class.video else "picture"
    with JobLog(f"drawing into {folder}", len(requests), unit) as progress:
        for start in range(0, len(requests), cfg.batch_size):
            batch = requests[start : start + cfg.batch_size]
            final, sizes = draw(pipe, model, batch, size, show_sizes=cfg.show_sizes)
            for i, request in enumerate(batch):
                metadata = {"prompt": request.prompt, "seed": request.seed, **info}
                tqdm.write(str(save(final[i], folder / f"{request.stem}.{ending}", metadata, cfg.fps)))
                for number, drawn in enumerate(sizes, 1):
                    side = "x".join(map(str, reversed(drawn[i].shape[-2:])))
                    file = folder / f"{request.stem}_step{number}_{side}.{ending}"
                    tqdm.write(str(save(drawn[i], file, metadata, cfg.fps)))
            progress.advance(len(batch))


def origin(cfg: DictConfig, job: SamplingPlan) -> dict[str, Any]:
    """What pictures say of the model and the adapter: no value of the environment, no credential."""
    shown, plain = stored(cfg), node_of(cfg, "model")
    typed = shown.get("model", {})
    # What the command line gave is kept as it was typed, the rest as the run recorded it.
    model = {key: typed[key] if key in plain and plain[key] == value else value for key, value in job.node.items()}
    adapter = None if job.source is None else str(job.source)
    if adapter is not None and "${" in str(shown["adapter"]):
        adapter = shown["adapter"]
    masked: dict[str, Any] = mask({"model": model, "adapter": adapter})
    return masked


# What is asked for


@dataclass(frozen=True)
class SamplingPlan:
    """What a configuration asks for, checked; nothing large is loaded yet.

    Attributes:
        requests: the pictures.
        model: the base, `node` its configuration.
        source: where the student lies; None: the teacher draws.
        student, schedule: an adapter or a whole network, and its sampler.
        size: latent size of finished pictures.
    """

    requests: list[Request]
    model: Pretrained
    node: Any
    source: Path | None
    student: Student | None
    schedule: ScaleWiseScheduler | None
    size: Size


def prepare(cfg: DictConfig) -> SamplingPlan:
    """Check everything that can be checked before weights are loaded.

    A run's adapter brings its own model and schedule, unless the command line names a model.

    Raises:
        UserError: naming what is wrong and the fix.
    """
    check(cfg, ROOT)
    if cfg.adapter is None and (given := [key for key in given_keys() if key.partition(".")[0] == "schedule"]):
        raise UserError(f"{given[0]} is of a student, and with adapter=null the teacher draws with its own; remove it")
    if cfg.adapter is None and cfg.ema is not None:
        raise UserError(f"ema={cfg.ema} is of a student, and with adapter=null the teacher draws; remove it")
    requests = plan(cfg)
    source = None if cfg.adapter is None else locate(cfg.adapter, Path(cfg.output), ema=cfg.ema)
    node = node_of(cfg, "model") if source is None else recorded_model(source, cfg)
    model = build_model(node, cfg)
    student = schedule = None
    if source is not None:
        student = load_student(source, cfg.ema)
        student.check_fits(model)
        schedule = schedule_of(source, cfg, model)
    if model.backbone_class.video:
        video.check_available()
    size = final_size(cfg, model, model.size if schedule is None else schedule.base_sizes[-1])
    check_machine(cfg)
    if cfg.tiny_vae is not None:
        check_tiny_vae(cfg.tiny_vae, model)
    return SamplingPlan(requests, model, node, source, student, schedule, size)


def check_machine(cfg: DictConfig) -> None:
    """Raise UserError for `offload` or `compile` where this machine lacks what they need."""
    gpu = torch.cuda.is_available()
    if cfg.offload != "none" and not gpu:
        raise UserError(
            f"offload={cfg.offload} moves weights to a GPU and back, and this machine has none; leave it out"
        )
    if cfg.compile and cfg.offload == "sequential":
        raise UserError("compile=true with offload=sequential: compiled blocks need their weights at hand; drop one")
    if cfg.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "gcc", "clang"))):
        raise UserError("compile=true needs a C compiler, and this machine has none; install g++, or leave it out")


def check_tiny_vae(path: str, model: Pretrained) -> None:
    """Raise UserError unless a distilled decoder fits the model's latents; reads its configuration only."""
    where = f"tiny_vae={path}"
    if model.backbone_class.video:
        raise UserError(f"{where} decodes pictures, and {model.family} draws videos; leave it out")
    folder = hub.configuration(path, key="tiny_vae") if hub.is_hub_id(path) else Path(path)
    if not (folder / "config.json").is_file():
        reason = "has no config.json" if folder.is_dir() else "does not exist"
        raise UserError(f"{where} {reason}; give a folder or hub id of an AutoencoderTiny, e.g. madebyollin/taesd3")
    config = read_json(folder / "config.json")
    if config.get("_class_name") != "AutoencoderTiny":
        raise UserError(f"{where} is a {config.get('_class_name')}; give an AutoencoderTiny, e.g. madebyollin/taesd3")
    if not hub.is_hub_id(path):
        check_model_folder(folder, f"{where} is incomplete: it")
    channels, blocks = config.get("latent_channels", 4), config.get("decoder_block_out_channels", (64,) * 4)
    if channels != model.channels:
        raise UserError(f"{where} decodes {channels} channels, this model's latents have {model.channels}")
    if 2 ** (len(blocks) - 1) != model.factor:
        raise UserError(f"{where} enlarges {2 ** (len(blocks) - 1)} times, this model's decoder {model.factor} times")


def plan(cfg: DictConfig) -> list[Request]:
    """The pictures asked for, each with its own seed.

    Raises:
        UserError: for an empty list of prompts, an empty prompt, or counts below 1.
    """
    limits.whole("images_per_prompt", cfg.images_per_prompt, 1)
    limits.whole("batch_size", cfg.batch_size, 1, limits.AT_ONCE, "no device draws more at once")
    limits.whole("fps", cfg.fps, 1, limits.FPS)
    limits.seed("seed", cfg.seed)
    if cfg.prompts_file is not None:
        rows = read_prompts(Path(cfg.prompts_file))
    else:
        rows = [(prompt, None) for prompt in ([cfg.prompts] if isinstance(cfg.prompts, str) else cfg.prompts)]
    if not rows or not all(prompt.strip() for prompt, _ in rows):
        raise UserError(
            f"prompts={[prompt for prompt, _ in rows][:3]} holds nothing to draw; "
            "give prompts='[a red star above a blue ring]'"
        )
    try:
        rows = [(text_of(prompt), seed) for prompt, seed in rows]
    except NoText as error:
        raise UserError(f"a prompt of prompts {error}; give texts in UTF-8") from None
    count = len(rows) * cfg.images_per_prompt
    if count > MOST_PICTURES:
        raise UserError(
            f"images_per_prompt={cfg.images_per_prompt} of {len(rows)} prompts are {count} files in one folder; use at "
            f"most {MOST_PICTURES}, or swd generate, which writes shards"
        )
    requests, running = [], cfg.seed
    for prompt, seed in rows:
        for copy in range(cfg.images_per_prompt):
            requests.append(Request(prompt, running if seed is None else seed + copy))
            running += 1
    limits.seed("seed", max(request.seed for request in requests))
    return requests


def read_prompts(file: Path, key: str = "prompts_file") -> list[tuple[str, int | None]]:
    """Prompts, and their seeds where given, of a list.

    Args:
        file: a text file (a prompt a line), or a `.csv`, `.tsv` or `.jsonl` table with a column "prompt" and, if
            seeds are given, one "seed".
        key: what messages call it.

    Raises:
        UserError: if the file is missing, empty, has no such column, or a line of it is faulty.
    """
    table = read_table(file, f"{key}=")
    if not table.rows:
        raise UserError(f"{key}={file} holds no prompt")
    faulty = next((row for row in table.rows if row.fault), None)
    if faulty is not None:
        raise UserError(f"{key}={file}, line {faulty.line}: {faulty.fault}")
    prompts, seeds = table.needed(("prompt",), f"{key}="), table.column(("seed",))
    rows: list[tuple[str, int | None]] = []
    for row in table.rows:
        where = f"{key}={file}, line {row.line}"
        try:
            prompt = text_of(row.cells[prompts]).strip()
        except NoText as error:
            raise UserError(f"{where}: the prompt {error}; mend the line, or take it out") from None
        rows.append((prompt, None if seeds is None else _seed(row.cells[seeds], where)))
    return rows


def _seed(cell: Any, where: str) -> int | None:
    """A seed in a table; None for an empty cell."""
    text = "" if cell is None else str(cell).strip()
    if not text:
        return None
    if isinstance(cell, str | int) and re.fullmatch("[0-9]{1,19}", text) and int(text) < 2**63:
        return int(text)
    raise UserError(f"{where}: seed {text[:40]!r} is not a whole number of 0 or more, below 2^63")


def final_size(cfg: DictConfig, model: Pretrained, native: Size | None = None) -> Size:
    """Latent size of finished pictures: from `height` and `width`, from `aspect`, or the native one.

    Args:
        cfg: the configuration.
        model: what draws.
        native: the size without any wish: where the student's schedule ends; None: the model's own.

    Raises:
        UserError: if it is not a size that the model can take.
    """
    factor, (*frames, height, width) = model.factor, native or model.size
    if cfg.aspect is not None:
        if cfg.height is not None or cfg.width is not None:
            raise UserError(f"aspect={cfg.aspect} beside height and width; give one or the other")
        height, width = aspect_size(cfg.aspect, height * width, model.limits.divisor)
    for key, old in (("height", height), ("width", width)):
        pixels = cfg[key]
        limits.whole(key, pixels, 1, limits.SIDE, "eight times what models are trained on")
        if pixels is not None and pixels % (factor * model.limits.divisor):
            step = factor * model.limits.divisor
            near = max(step, round(pixels / step) * step)
            raise UserError(f"{key}={pixels} is not a multiple of {step} pixels; use {near}")
        if key == "height":
            height = old if pixels is None else pixels // factor
        else:
            width = old if pixels is None else pixels // factor
    if cfg.frames is not None:
        if not frames:
            raise UserError(f"frames={cfg.frames}, but {model.family} draws pictures; leave it out")
        if cfg.frames < 1 or (cfg.frames - 1) % model.frame_factor:
            raise UserError(f"frames={cfg.frames}; use 1 more than a multiple of {model.frame_factor}, e.g. 81")
        limits.whole("frames", cfg.frames, 1, limits.FRAMES, "ten times what models are trained on")
        frames = [(cfg.frames - 1) // model.frame_factor + 1]
    size = (*frames, height, width)
    model.limits.check_size(size)
    if max(height, width) * factor > limits.SIDE:
        raise UserError(
            f"aspect={cfg.aspect} is {width * factor}x{height * factor} pixels; a side has at most {limits.SIDE}"
        )
    return size


def claim_files(folder: Path, requests: list[Request], ending: str) -> Path:
    """Create the output folder; refuse to replace a picture that is already there."""
    claim_folder(folder)
    stems = Counter(request.stem for request in requests)
    for stem, count in stems.items():
        if count > 1:
            raise UserError(f"two requests would be called {stem}.{ending}; give them different seeds")
        if (folder / f"{stem}.{ending}").exists():
            raise UserError(f"{folder / stem}.{ending} exists already; choose another folder or seed")
    return folder


# Drawing


def build_pipeline(
    model: Pretrained,
    student: Student | None = None,
    schedule: ScaleWiseScheduler | None = None,
    cfg: DictConfig | None = None,
) -> Any:
    """The stock pipeline of the model; with a student, its weights and its scale-wise scheduler.

    Args:
        model: the base.
        student: the student: an adapter, or a network that was trained whole; None: the teacher.
        schedule: the student's sampler.
        cfg: `tiny_vae`, `compile` and `offload`, as `prepare` checked them; None: none of them.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, part = model.dtype(device), model.backbone_class.subfolder
    network: Any = student.network(model, device) if student else model.network(device).network
    pipe = model.pipeline(dtype, **{part: network})
    pipe.set_progress_bar_config(disable=True)
    if student is not None:
        assert schedule is not None
        student.load_into(pipe, model)
        schedule.attach(pipe)
    if model.quantization:
        # After the adapter: loaders would give it the base's 8 bits. Its layers hold the base under this name.
        inner = [f"{target}.base_layer" for target in model.targets]
        quantize(network, [*model.targets, *inner], model.quantization)
    if cfg is None:
        return pipe.to(device)
    if cfg.tiny_vae is not None:
        pipe.vae = load_tiny_vae(cfg.tiny_vae, dtype)
    if cfg.compile:
        # Some diffusers classes do not say which of their blocks repeat.
        blocks = model.backbone_class(network).block_list
        network._repeated_blocks = network._repeated_blocks or [type(blocks[0]).__name__]
        network.compile_repeated_blocks(dynamic=True)
    if cfg.offload == "none":
        return pipe.to(device)
    pipe.enable_model_cpu_offload() if cfg.offload == "model" else pipe.enable_sequential_cpu_offload()
    return pipe


def load_tiny_vae(path: str, dtype: torch.dtype) -> Any:
    """A distilled decoder in place of the VAE: a small fraction of its time, at some loss.

    Raises:
        UserError: if it cannot be loaded.
    """
    try:
        return AutoencoderTiny.from_pretrained(path, torch_dtype=dtype, use_safetensors=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"tiny_vae={path} cannot be loaded ({reason[:160]})") from None


@torch.no_grad()
def draw(
    pipe: Any, model: Pretrained, requests: list[Request], size: Size | None = None, show_sizes: bool = True
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Pictures `[3, H, W]` or videos `[3, F, H, W]` in [-1, 1] of a batch of requests.

    Args:
        pipe: from `build_pipeline`.
        model: its model.
        requests: prompts and seeds.
        size: latent size of the finished ones; None: the model's own.
        show_sizes: also decode the prediction of every step, if the scheduler is scale-wise.

    Returns:
        The finished ones, and for every step its predictions.
    """
    backbone, scheduler, size = model.backbone_class, pipe.scheduler, size or model.size
    pixels = model.pixel_size(size)
    arguments: dict[str, Any] = {"height": pixels[-2], "width": pixels[-1], "output_type": "latent"}
    if backbone.video:
        arguments["num_frames"] = pixels[0]
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    arguments |= backbone.sampling_arguments(model.max_text_tokens, model.embedded_guidance)
    if isinstance(scheduler, ScaleWiseScheduler):
        scheduler.keep_x0 = show_sizes
        latents = scheduler.initial_latents(
            len(requests), model.channels, size[-2], size[-1], size[0] if backbone.video else None, generators
        )
        arguments |= {
            "latents": backbone.to_pipeline(latents).to(pipe._execution_device, model.latent_dtype(pipe)),
            "num_inference_steps": scheduler.num_inference_steps,
        }
    else:
        arguments |= {"num_inference_steps": model.teacher_steps, "generator": generators}
        if model.drawing_guidance_scale != 1.0:
            arguments |= backbone.guidance_arguments(model.drawing_guidance_scale)
    latents = pipe([request.prompt for request in requests], **arguments)[0]
    latents = backbone.from_pipeline(latents, size)
    encoders = backbone.encoders_type(pipe, model.max_text_tokens)
    final = list(encoders.decode(latents).cpu())
    if not (show_sizes and isinstance(scheduler, ScaleWiseScheduler)):
        return final, []
    return final, [list(encoders.decode(x0.to(latents.device)).cpu()) for x0 in scheduler.x0_predictions]


def save(drawn: Tensor, path: Path, info: dict[str, Any], fps: int = 16) -> Path:
    """Write a PNG or an MP4 with its origin in the metadata, never over an existing file."""
    if path.exists():
        raise UserError(f"{path} exists already; choose another folder or seed")
    if not drawn.isfinite().all():
        raise UserError(f"{path} would hold values that are not finite; try model.precision=fp32, or another adapter")
    metadata = {
        key: str(value) for key, value in {**info, "software": f"swd {__version__}"}.items() if value is not None
    }
    if drawn.ndim == 4:
        return write_aside(path, lambda new: video.write(new, drawn, fps, json.dumps(metadata)))
    meta = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        meta.add_text(key, value)
    image: Image.Image = to_pil(drawn)
    return write_aside(path, lambda new: image.save(new, format="PNG", pnginfo=meta))
