"""`swd generate`: a teacher draws its own training set, with the stock pipeline and its own sampler, into shards.

A picture depends on its prompt and seed alone. Row i is drawn in the same batch whoever draws it, and finished batches
are kept as files until their shard is complete: a kill costs one batch, and a resumed job ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from swd import __version__
from swd.commands import keys, shared
from swd.commands.numbers import check_given, check_numbers
from swd.commands.sample import final_size
from swd.config import build, check, given_keys, to_plain
from swd.data.identity import attention_kernel, quantized_layers, whole_fingerprint
from swd.data.job import PARTIAL, Job, Sample, say
from swd.data.shard_writer import is_done, shard_name
from swd.io import video
from swd.io.files import write_aside
from swd.io.pictures import picture_bytes, to_pil
from swd.io.ranks import is_first, share
from swd.modules.backbones import known_families, load_family
from swd.modules.backbones.sdxl_refiner import build_refiner, draw_refined, load_refiner
from swd.modules.drawing import build_pipeline, draw
from swd.modules.pretrained import Pretrained
from swd.modules.requests import Requests, check_filled, read_prompts
from swd.modules.tokens import TextLimit, warn_beyond
from swd.types import Size, UserError

ROOT = keys.GENERATE
BYTES = {"png": 1.6, "jpg": 0.6, "webp": 0.4, "mp4": 0.03}
"""Bytes that a pixel of a photograph takes, about, by format."""
PACKAGES = ("torch", "diffusers", "transformers", "pillow")
LATER = ("vae_precision", "negative_prompt", "quantization")
"""Arguments of models that manifests of earlier versions do not have; null is left out, so that their jobs go on."""
NOT_DRAWN_WITH = {"_target_", "path", "tuning", "rank", "alpha", "targets", "feature_blocks", "init_adapter"} | {
    "adapters",
    "attention",
    "precision",
    "size",
    "teacher_steps",
    "guidance_scale",
    "dmd_guidance_scale",
    "drawing_guidance_scale",
    "embedded_guidance",
}
"""Keys of a model that do not change what its teacher draws, or that the manifest records elsewhere."""


@dataclass(frozen=True)
class DrawingPlan:
    """A checked configuration; no weights are loaded yet.

    Attributes:
        requests: prompt and seed of each row.
        model: the teacher.
        size: latent size of the pictures.
        job: the shards.
        batch_size: pictures drawn at once.
        ending: ending of the files.
        quality: quality of lossy pictures, 1 to 100.
        fps: frames a second of videos.
        refiner: takes over from the teacher; None: the teacher draws to the end.
        refiner_start: share of the steps, from 0 to 1, after which it does.
    """

    requests: Requests
    model: Pretrained
    size: Size
    job: Job
    batch_size: int
    ending: str
    quality: int
    fps: int
    refiner: Pretrained | None
    refiner_start: float


def run(cfg: DictConfig) -> None:
    """Draw the prompts of the configuration into shards; prints their folder and size."""
    shared.quiet()
    plan = prepare(cfg)
    plan.job.claim()
    if plan.job.is_complete:
        print(f"{plan.job.folder} is complete already: {len(plan.requests)} samples")
        return
    announce(plan)
    if is_first():
        warn_beyond(plan.model, [prompt for prompt, _ in plan.requests.rows])
    shared.use_own_gpu()
    painter = Painter(plan)
    task = f"drawing with {plan.model.name} into {plan.job.folder}"
    manifest = plan.job.run(painter.samples, lambda: beyond_limit(plan), task)
    if manifest is not None:
        print(f"{plan.job.folder}: {manifest['samples']} samples, {manifest['bytes'] / 1e6:.1f} MB")
        return
    rank, world = share()
    done = plan.job.shards - len(plan.job.shards_left)
    print(f"process {rank + 1} of {world} is through; {done} of {plan.job.shards} shards are there")


def beyond_limit(plan: DrawingPlan) -> dict[str, Any]:
    """Entry of the manifest: how many pictures have a prompt that is longer than the model's text encoders take."""
    found = TextLimit(plan.model).beyond(prompt for prompt, _ in plan.requests.rows)
    counts = found.metadata() | {"samples": found.count * plan.requests.copies}
    return {"beyond_token_limit": counts} if found.limit else {}


# Configuration


def prepare(cfg: DictConfig) -> DrawingPlan:
    """Check everything that can be checked before weights are loaded.

    Raises:
        UserError: naming what is wrong and the fix.
    """
    check_given(cfg, "generate")
    check(cfg, ROOT)
    check_numbers(cfg, "generate")
    requests = requests_of(cfg)
    model = model_of(cfg)
    if model.backbone_class.video:
        video.check_available()
    size = final_size(cfg, model)
    ending = "mp4" if model.backbone_class.video else cfg.format
    check_of_use(cfg, model, ending)
    refiner = refiner_of(cfg, model)
    settings = settings_of(cfg, model, requests, size, ending) | refiner_settings(cfg, refiner)
    kind, unit = ("videos", "video") if model.backbone_class.video else ("pictures", "picture")
    job = Job(Path(cfg.out), kind, len(requests), cfg.shard_size, settings, unit)
    fps = cfg.fps or model.frame_rate
    return DrawingPlan(requests, model, size, job, cfg.batch_size, ending, cfg.quality, fps, refiner, cfg.refiner_start)


def requests_of(cfg: DictConfig) -> Requests:
    """The requests of all rows: `images_per_prompt` for each prompt of the list.

    Raises:
        UserError: if the list cannot be read.
    """
    rows = read_prompts(Path(cfg.prompts), "prompts")
    check_filled(rows, cfg.prompts)
    return Requests(rows, cfg.images_per_prompt, cfg.seed)


def model_of(cfg: DictConfig) -> Pretrained:
    """The teacher, with the `steps` and the `guidance_scale` of the configuration.

    Raises:
        UserError: for a guidance scale that a pipeline would ignore.
    """
    model: Pretrained = build(cfg, "model")
    model.draw_with(cfg.steps, cfg.guidance_scale)
    return model


def check_of_use(cfg: DictConfig, model: Pretrained, ending: str) -> None:
    """Raise UserError for a setting on the command line that is of other files than those that are drawn."""
    given = set(given_keys())
    what = "videos" if model.backbone_class.video else "pictures"
    if "format" in given and model.backbone_class.video:
        raise UserError(f"format={cfg.format} is of pictures, and {model.family} draws videos, as mp4; leave it out")
    if "quality" in given and ending not in ("jpg", "webp"):
        raise UserError(f"quality={cfg.quality} is of jpg and webp, and these {what} are {ending}; leave it out")
    if "refiner_start" in given and cfg.refiner is None:
        raise UserError(f"refiner_start={cfg.refiner_start}, but there is no refiner; give refiner=, or leave it out")


def refiner_of(cfg: DictConfig, model: Pretrained) -> Pretrained | None:
    """The refiner that takes over from the teacher, if one is asked for.

    Raises:
        UserError: if the teacher's family has no refiners, or the path holds none.
    """
    if cfg.refiner is None:
        return None
    if not model.backbone_class.has_refiner:
        families = " and ".join(name for name in known_families() if load_family(name).has_refiner)
        raise UserError(
            f"refiner={cfg.refiner}, but only {families} has refiners and this model is {model.family}; leave it out"
        )
    if not 0 < cfg.refiner_start < 1:
        raise UserError(f"refiner_start={cfg.refiner_start}; use a part of the steps between 0 and 1, e.g. 0.8")
    return load_refiner(cfg.refiner, model)


def settings_of(cfg: DictConfig, model: Pretrained, requests: Requests, size: Size, ending: str) -> dict[str, Any]:
    """All settings that the contents of the shards depend on, for the manifest."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lossy = {"png": {}, "mp4": {"fps": cfg.fps or model.frame_rate}}.get(ending, {"quality": cfg.quality})
    config = {key: value for key, value in to_plain(cfg.model).items() if key not in NOT_DRAWN_WITH}
    config = {key: value for key, value in config.items() if key not in LATER or value is not None}
    config |= quantized_layers(model) | attention_kernel(model)
    return {
        "model": {"name": model.name, "fingerprint": whole_fingerprint(model), **config} | adapters_of(model),
        "steps": model.teacher_steps,
        "guidance_scale": model.drawing_guidance_scale,
        "embedded_guidance": model.embedded_guidance,
        "precision": str(model.dtype(device)).removeprefix("torch."),
        "size": list(model.pixel_size(size)),
        "files": {"format": ending, **lossy},
        "prompts": {"sha256": requests.hash()},
        "versions": {"swd": __version__} | {name: version(name) for name in PACKAGES},
    }


def adapters_of(model: Pretrained) -> dict[str, Any]:
    """Entry of the manifest about what was added to the teacher; empty if nothing was."""
    return {"adapters": [asdict(entry.baked) | entry.of_expert for entry in model.adapters]} if model.adapters else {}


def refiner_settings(cfg: DictConfig, refiner: Pretrained | None) -> dict[str, Any]:
    """Entry of the manifest about the refiner; empty without one."""
    if refiner is None:
        return {}
    return {"refiner": {"name": refiner.name, "fingerprint": whole_fingerprint(refiner), "start": cfg.refiner_start}}


def announce(plan: DrawingPlan) -> None:
    """Print the size of the shards, and refuse shards that do not fit on the disk.

    Raises:
        UserError: if there is less free space than it will take.
    """
    job = plan.job
    pixels = plan.model.pixel_size(plan.size)
    area = torch.Size(pixels).numel()
    left = job.rows_left
    needed = left * area * BYTES[plan.ending]
    free = shutil.disk_usage(job.folder).free
    estimate = f"{left} {job.unit}s of {'x'.join(map(str, reversed(pixels)))} take about {needed / 1e9:.3g} GB"
    if needed > free:
        raise UserError(f"{estimate}, but {job.folder} has {free / 1e9:.3g} GB free; choose another out= or format=jpg")
    rank, world = share()
    if rank == 0:
        processes = f", by {world} processes" if world > 1 else ""
        print(f"model {plan.model.name}: {estimate}, in {job.shards} shards at {job.folder}{processes}", flush=True)


# Drawing


class Painter:
    """Draws the rows of a plan; loads the pipeline before the first."""

    def __init__(self, plan: DrawingPlan) -> None:
        self.plan = plan
        self.kept = plan.job.folder / PARTIAL
        self._pipe: Any = None
        self._refiner: Any = None

    def samples(self, rows: range, advance: Callable[[int], object]) -> Iterator[Sample]:
        """The samples of a shard; pictures that an earlier, killed process finished are not drawn again."""
        self._clear()
        folder = self.kept / shard_name(rows.start // self.plan.job.shard_size)
        for start in range(rows.start, rows.stop, self.plan.batch_size):
            batch = range(start, min(start + self.plan.batch_size, rows.stop))
            missing = [row for row in batch if not self._file(folder, row).is_file()]
            if missing:  # the whole batch again: a picture's bits may depend on the others of its batch
                for row, drawn in zip(batch, self.draw(batch), strict=True):
                    if row in missing:
                        write_aside(self._file(folder, row), partial(self.write, drawn))
            advance(len(batch))
        for row in rows:
            yield self._sample(row, self._file(folder, row).read_bytes())

    def draw(self, rows: range) -> list[Tensor]:
        """Pictures or videos of rows, drawn as one batch.

        Raises:
            UserError: if the device has too little memory.
        """
        plan = self.plan
        if self._pipe is None:
            self._load()
        requests = [plan.requests[row] for row in rows]
        try:
            if plan.refiner is not None:
                return draw_refined(self._pipe, self._refiner, plan.model, requests, plan.size, plan.refiner_start)
            return draw(self._pipe, plan.model, requests, plan.size, show_sizes=False)[0]
        except torch.OutOfMemoryError:
            raise UserError(
                f"batch_size={plan.batch_size} does not fit the device's memory; use a smaller one, the job continues"
            ) from None

    def _load(self) -> None:
        say(f"loading {self.plan.model.name}")
        self._pipe = build_pipeline(self.plan.model)
        vae = self._pipe.vae
        vae.to(self.plan.model.vae_dtype(vae.dtype, kept=True))
        if self.plan.refiner is not None:
            self._refiner = build_refiner(self.plan.refiner, self._pipe)

    def write(self, drawn: Tensor, path: Path) -> None:
        """Write one picture or video as a file."""
        if self.plan.ending == "mp4":
            video.write(path, drawn, self.plan.fps)
        else:
            path.write_bytes(picture_bytes(to_pil(drawn), self.plan.ending, self.plan.quality))

    def _sample(self, row: int, data: bytes) -> Sample:
        plan = self.plan
        request = self.plan.requests[row]
        *frames, height, width = plan.model.pixel_size(plan.size)
        columns = {"width": width, "height": height} | ({"frames": frames[0]} if frames else {})
        metadata = {"index": row, "prompt": request.prompt, "seed": request.seed, **columns}
        files: Mapping[str, bytes] = {
            plan.ending: data,
            "txt": request.prompt.encode(),
            "json": json.dumps(metadata, ensure_ascii=False).encode(),
        }
        return f"{row:08d}", files, columns

    def _file(self, folder: Path, row: int) -> Path:
        return folder / f"{row:08d}.{self.plan.ending}"

    def _clear(self) -> None:
        """Remove the kept pictures of complete shards."""
        for folder in self.kept.glob("[0-9]*"):
            if is_done(self.plan.job.folder, int(folder.name)):
                shutil.rmtree(folder, ignore_errors=True)
