"""`swd sample` and `sample.py`: draw pictures or videos with the stock diffusers pipeline."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from swd import __version__
from swd.commands import keys, shared, starting_pictures
from swd.commands.numbers import check_numbers, check_sides
from swd.commands.starting_pictures import StartPlan, start_plan
from swd.config import check, given_keys, node_of, read_recorded, stored
from swd.data.buckets import aspect_size
from swd.data.job import say
from swd.export.student_folder import build_model, recorded_model, schedule_of
from swd.io import limits, video
from swd.io.files import claim_folder, write_aside
from swd.io.job_log import JobLog
from swd.io.masking import mask, mask_text
from swd.io.pictures import to_pil
from swd.io.tables import NoText, text_of
from swd.modules import hub
from swd.modules.adapters import locate, run_folder
from swd.modules.compiling import check_compiler
from swd.modules.drawing import DrawingOptions, OtherExpert, build_pipeline, draw
from swd.modules.model_folders import check_model_folder, read_json
from swd.modules.pretrained import Pretrained
from swd.modules.requests import Request, read_prompts
from swd.modules.saved_student import Student, load_student
from swd.modules.tiny_video_files import check_video_decoder, takes_video_decoder
from swd.modules.tokens import warn_beyond
from swd.scheduler import ScaleWiseScheduler
from swd.types import Size, UserError

ROOT = keys.SAMPLE


MOST_PICTURES = 100_000
"""Files of one `swd sample` at most: nobody looks through a folder of more."""
TINY_VAES: Mapping[str, str] = {
    "sd3": "taesd3",
    "flux": "taef1",
    "chroma": "taef1",
    "z_image": "taef1",
    "sdxl": "taesdxl",
}
"""Names under which small decoders of pictures are published (huggingface.co/madebyollin), by family."""


def run(cfg: DictConfig) -> None:
    """Draw the prompts of the configuration; prints the path of every file."""
    shared.quiet()
    job = prepare(cfg)
    requests = job.requests
    model = job.model
    student = job.student
    schedule = job.schedule
    size = job.size
    ending = "mp4" if model.backbone_class.video else "png"
    folder = claim_files(Path(cfg.folder), requests, ending, indexed=job.start is not None)
    drawer = mask_text(f"model {model.name}, " + (f"adapter {job.source}" if student else "no adapter: the teacher"))
    print(drawer, flush=True)
    warn_beyond(model, [request.prompt for request in requests])
    say(f"loading {drawer}")
    pipe = build_pipeline(model, student, schedule, cfg, cfg.fold, job.other)
    if job.start is not None:
        job.start.prepare_pipeline(pipe)
    info = {
        **origin(cfg, job),
        **(job.start.settings() if job.start else {}),
        "adapter_hash": student.hash if student else None,
        "other_adapter_hash": job.other.student.hash if job.other else None,
        "schedule": dict(schedule.config) if schedule else None,
    }
    unit = "video" if model.backbone_class.video else "picture"
    fps = cfg.fps or model.frame_rate
    with JobLog(f"drawing into {folder}", len(requests), unit) as progress:
        for start in range(0, len(requests), cfg.batch_size):
            batch = requests[start : start + cfg.batch_size]
            latents = job.start.latents(pipe, model, start, batch) if job.start else None
            final, sizes = draw(pipe, model, batch, size, cfg.show_sizes, latents)
            for i, request in enumerate(batch):
                metadata = {"prompt": request.prompt, "seed": request.seed, **info}
                tqdm.write(str(save_drawn(final[i], folder / f"{request.stem}.{ending}", metadata, fps)))
                for number, drawn in enumerate(sizes, 1):
                    side = "x".join(map(str, reversed(drawn[i].shape[-2:])))
                    file = folder / f"{request.stem}_step{number}_{side}.{ending}"
                    tqdm.write(str(save_drawn(drawn[i], file, metadata, fps)))
            progress.advance(len(batch))
    if job.start is not None:
        print(job.start.write_index(folder, requests, ending))


def origin(cfg: DictConfig, job: SamplingPlan) -> dict[str, Any]:
    """Model and adapter for a picture's metadata, without values of the environment and without credentials."""
    shown = stored(cfg)
    plain = node_of(cfg, "model")
    typed = shown.get("model", {})
    # Values of the command line are kept as they were typed, the others as the run recorded them.
    model = {key: typed[key] if key in plain and plain[key] == value else value for key, value in job.node.items()}
    adapter = None if job.source is None else str(job.source)
    if adapter is not None and "${" in str(shown["adapter"]):
        adapter = shown["adapter"]
    masked: dict[str, Any] = mask({"model": model, "adapter": adapter})
    return masked


# Configuration


@dataclass(frozen=True)
class SamplingPlan:
    """A checked configuration; no weights of the base are loaded yet.

    Attributes:
        requests: the pictures, each a prompt and a seed.
        model: the base.
        node: the base's configuration.
        source: folder or file of the student; None: the teacher draws.
        student: an adapter or a whole network; None: the teacher draws.
        schedule: the student's sampler; None: the teacher draws with its own.
        size: latent size of finished pictures.
        start: the pictures that drawing starts from; None: from pure noise.
        other: the student of the pipeline's other expert, in families that have one.
    """

    requests: list[Request]
    model: Pretrained
    node: Any
    source: Path | None
    student: Student | None
    schedule: ScaleWiseScheduler | None
    size: Size
    start: StartPlan | None = None
    other: OtherExpert | None = None


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
    pictures = starting_pictures.starting_pictures(cfg)
    requests = plan(cfg, pictures.captions if pictures else None)
    source = None if cfg.adapter is None else locate(cfg.adapter, Path(cfg.output), ema=cfg.ema)
    node = node_of(cfg, "model") if source is None else recorded_model(source, cfg)
    model = build_model(node, cfg)
    student = schedule = None
    if source is not None:
        student = load_student(source, cfg.ema).fitted(model)
        schedule = schedule_of(source, cfg, model)
    if model.backbone_class.video:
        video.check_available()
    size = final_size(cfg, model, model.size if schedule is None else schedule.base_sizes[-1])
    check_machine(cfg)
    if cfg.tiny_vae is not None:
        check_tiny_vae(cfg.tiny_vae, model)
    start = None
    if pictures is not None:
        start, schedule = start_plan(cfg, pictures, model, schedule, size)
    other = other_expert(cfg, model, node, schedule)
    return SamplingPlan(requests, model, node, source, student, schedule, size, start, other)


def other_expert(
    cfg: DictConfig, model: Pretrained, node: dict[str, Any], schedule: ScaleWiseScheduler | None
) -> OtherExpert | None:
    """The student that takes the noise levels of the schedule which the adapter's own network does not.

    Args:
        cfg: the configuration.
        model: the adapter's model.
        node: its configuration.
        schedule: the adapter's; None: the teacher draws.

    Raises:
        UserError: if the family has no other expert, no adapter is given, or the two have different schedules.
    """
    families = list(model.backbone_class.other_experts.values())
    if cfg.other_adapter is None:
        if families and schedule is not None:
            warnings.warn(
                f"model.family={model.family} takes some of the schedule's steps and the teacher the others, which are "
                "too few; give other_adapter=, the student of the other expert",
                stacklevel=2,
            )
        return None
    if not families or schedule is None:
        reason = "adapter is null" if families else f"model.family={model.family} is one network alone"
        raise UserError(f"other_adapter={cfg.other_adapter} is of a second expert, but {reason}; leave it out")
    source = locate(cfg.other_adapter, Path(cfg.output), "other_adapter", ema=cfg.ema)
    other = other_model(cfg, node, source, families[0])
    student = load_student(source, cfg.ema).fitted(other)
    found = schedule_of(source, cfg, other)
    if (found.config.sigmas, found.base_sizes) != (schedule.config.sigmas, schedule.base_sizes):
        raise UserError(
            f"other_adapter={cfg.other_adapter} was trained for another schedule than the adapter: sizes "
            f"{found.base_sizes} against {schedule.base_sizes}; give students of one schedule"
        )
    return OtherExpert(other, student)


def other_model(cfg: DictConfig, node: dict[str, Any], source: Path, family: str) -> Pretrained:
    """The other expert's model: that of its student's run, or the adapter's where it is from none.

    Raises:
        UserError: if the run was one of another family.
    """
    run = run_folder(source)
    if run is not None and (run / "config.yaml").is_file():
        trained = read_recorded(run / "config.yaml").get("model")
        found = trained.get("family") if isinstance(trained, dict) else None
        if found != family:
            raise UserError(
                f"other_adapter={cfg.other_adapter} is a student of model.family={found}, and the other expert is "
                f"{family}; give a student of that"
            )
        node = recorded_model(source, cfg)
    return build_model(node | {"family": family}, cfg)


def check_machine(cfg: DictConfig | DrawingOptions, table: str = "") -> None:
    """Raise UserError for `offload` or `compile` where this machine lacks what they need.

    Args:
        cfg: the configuration.
        table: the table that holds `compile`, for messages: "timing." or none.
    """
    gpu = torch.cuda.is_available()
    if cfg.offload != "none" and not gpu:
        raise UserError(
            f"offload={cfg.offload} moves weights to a GPU and back, and this machine has none; leave it out"
        )
    if cfg.compile_coders and not cfg.compile:
        raise UserError(
            f"{table}compile_coders=true compiles more than the network; give {table}compile=blocks or "
            f"{table}compile=whole too"
        )
    how = f"{table}compile={str(cfg.compile).lower()}"
    if cfg.compile and cfg.offload == "sequential":
        raise UserError(f"{how} with offload=sequential: what is compiled needs its weights at hand; drop one")
    if cfg.compile:
        check_compiler(how)


def check_tiny_vae(path: str, model: Pretrained, key: str = "tiny_vae") -> None:
    """Raise UserError unless a distilled decoder fits the model's latents.

    Args:
        path: folder or hub id of an `AutoencoderTiny`; for latents of Wan's VAEs and Qwen-Image's, a file of TAEHV.
        model: the model.
        key: what the user calls the setting.
    """
    where = f"{key}={path}"
    if takes_video_decoder(model.files.parts.get("vae", ("", ""))[1]):
        check_video_decoder(path, model, where)
        return
    if model.backbone_class.video:
        raise UserError(f"{where}: no small decoder of {model.family}'s videos is known; leave it out")
    published = TINY_VAES.get(model.family)
    fitting = "an AutoencoderTiny" + (f", e.g. madebyollin/{published}" if published else "")
    if Path(path).is_file() or Path(path).suffix == ".safetensors":
        raise UserError(
            f"{where} is a file, as the small decoders of Wan and Qwen-Image are; {model.family} takes a folder or hub "
            f"id of {fitting}"
        )
    name = Path(path).name.lower()
    if name in TINY_VAES.values() and name != published:
        raise UserError(f"{where} decodes other latents than those of {model.family}; give {fitting}")
    folder = hub.configuration(path, key=key) if hub.is_hub_id(path) else Path(path)
    if not (folder / "config.json").is_file():
        reason = "has no config.json" if folder.is_dir() else "does not exist"
        raise UserError(f"{where} {reason}; give a folder or hub id of {fitting}")
    config = read_json(folder / "config.json")
    if config.get("_class_name") != "AutoencoderTiny":
        raise UserError(f"{where} is a {config.get('_class_name')}; give {fitting}")
    if not hub.is_hub_id(path):
        check_model_folder(folder, f"{where} is incomplete: it")
    channels = config.get("latent_channels", 4)
    blocks = config.get("decoder_block_out_channels", (64,) * 4)
    if channels != model.channels:
        raise UserError(f"{where} decodes {channels} channels, this model's latents have {model.channels}")
    if 2 ** (len(blocks) - 1) != model.factor:
        raise UserError(f"{where} enlarges {2 ** (len(blocks) - 1)} times, this model's decoder {model.factor} times")


def plan(cfg: DictConfig, captions: Sequence[str] | None = None) -> list[Request]:
    """The prompts to draw, each picture with a seed of its own.

    Args:
        cfg: the configuration.
        captions: prompts in place of those of the configuration: of the pictures to start from.

    Raises:
        UserError: for an empty list of prompts, an empty prompt, or numbers out of range.
    """
    check_numbers(cfg, "sample")

    # Prompts.
    if captions is not None:
        rows: list[tuple[str, int | None]] = [(caption, None) for caption in captions]
    elif cfg.prompts_file is not None:
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

    # Seeds.
    requests = []
    running = cfg.seed
    for prompt, seed in rows:
        for copy in range(cfg.images_per_prompt):
            requests.append(Request(prompt, running if seed is None else seed + copy))
            running += 1
    limits.seed("seed", max(request.seed for request in requests))
    return requests


def final_size(cfg: DictConfig, model: Pretrained, native: Size | None = None) -> Size:
    """Latent size of finished pictures: from `height` and `width`, from `aspect`, or the native one.

    Args:
        cfg: the configuration.
        model: the model that draws.
        native: latent size where none of these keys is given, such as the last of the student's schedule; None: the
            model's own.

    Raises:
        UserError: if it is not a size that the model can take.
    """
    # Height and width.
    check_sides(cfg)
    factor = model.factor
    *frames, height, width = native or model.size
    if cfg.aspect is not None:
        if cfg.height is not None or cfg.width is not None:
            raise UserError(f"aspect={cfg.aspect} beside height and width; give one or the other")
        height, width = aspect_size(cfg.aspect, height * width, model.limits.divisor)
    for key, old in (("height", height), ("width", width)):
        pixels = cfg[key]
        if pixels is not None and pixels % (factor * model.limits.divisor):
            step = factor * model.limits.divisor
            near = max(step, round(pixels / step) * step)
            raise UserError(f"{key}={pixels} is not a multiple of {step} pixels; use {near}")
        if key == "height":
            height = old if pixels is None else pixels // factor
        else:
            width = old if pixels is None else pixels // factor

    # Frames.
    if cfg.get("frames") is not None:
        if not frames:
            raise UserError(f"frames={cfg.frames}, but {model.family} draws pictures; leave it out")
        if cfg.frames < 1 or (cfg.frames - 1) % model.frame_factor:
            raise UserError(f"frames={cfg.frames}; use 1 more than a multiple of {model.frame_factor}, e.g. 81")
        limits.whole("frames", cfg.frames, 1, limits.FRAMES, "ten times what models are trained on")
        frames = [(cfg.frames - 1) // model.frame_factor + 1]

    if cfg.get("fps") is not None and not frames:
        raise UserError(f"fps={cfg.fps}, but {model.family} draws pictures; leave it out")

    # The whole.
    size = (*frames, height, width)
    model.limits.check_size(size)
    if max(height, width) * factor > limits.SIDE:
        raise UserError(
            f"aspect={cfg.aspect} is {width * factor}x{height * factor} pixels; a side has at most {limits.SIDE}"
        )
    return size


def claim_files(folder: Path, requests: list[Request], ending: str, indexed: bool = False) -> Path:
    """Create the output folder; raise UserError if a file to be written exists or would have the name of another.

    Args:
        folder: the folder.
        requests: the pictures or videos to be written.
        ending: of their names.
        indexed: whether a list of them is written too.
    """
    claim_folder(folder)
    if indexed and (folder / starting_pictures.INDEX).exists():
        raise UserError(f"{folder / starting_pictures.INDEX} exists already; choose another folder")
    stems = Counter(request.stem for request in requests)
    for stem, count in stems.items():
        if count > 1:
            raise UserError(f"two requests would be called {stem}.{ending}; give them different seeds")
        if (folder / f"{stem}.{ending}").exists():
            raise UserError(f"{folder / stem}.{ending} exists already; choose another folder or seed")
    return folder


# Writing


def save_drawn(drawn: Tensor, path: Path, info: dict[str, Any], fps: int = 16) -> Path:
    """Write a PNG or an MP4 with `info` as its metadata; raise UserError rather than replace an existing file."""
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
