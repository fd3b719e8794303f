"""`start=` of `swd sample`: real pictures are noised to a level, and a model draws on from there.

SwD paper, section 4.1, Tables 1 and 11: why clean predictions are enlarged, and not noised latents.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from swd.config import given_keys
from swd.data.job import say
from swd.data.picture_files import MAX_PIXELS, byte_limit, read_picture
from swd.data.picture_list import PictureRow, Problem
from swd.data.sources import list_source
from swd.diffusion import rectified_flow_levels
from swd.evaluation.candidate_pictures import FixedLevels
from swd.io import limits
from swd.io.files import write_text
from swd.io.tables import NoText
from swd.modules.pretrained import Pretrained
from swd.modules.requests import Request
from swd.modules.starting import NoisedStart, encode_start
from swd.scheduler import ScaleWiseScheduler
from swd.shapes.dataset import RESOLUTION, ShapesDataset
from swd.shapes.rendered import PROMPT_SEED, SPLIT
from swd.types import Size, UserError

SHAPES = "shapes"
INDEX = "index.jsonl"
"""List of the files beside them: as `swd evaluate` reads it, of prompts and of pictures."""
NEAR = 0.005
"""How far `level` may be from a student's own level: two digits of it are enough."""


@dataclass(frozen=True)
class StartingPictures:
    """Captioned pictures to start from; none is read yet.

    Attributes:
        names: of the pictures, for messages and for the list of files.
        captions: their prompts.
        read: gives picture i `[3, H, W]` in [-1, 1] of a size (H, W) in pixels.
    """

    names: tuple[str, ...]
    captions: tuple[str, ...]
    read: Callable[[int, Size], Tensor]


@dataclass(frozen=True)
class StartPlan:
    """Checked settings of `start`; nothing large is loaded yet.

    Attributes:
        pictures: the pictures.
        copies: drawn of each.
        noised: how they are noised.
        levels: noise levels of the teacher's steps; None: a student draws, by its schedule.
        pixels: size (H, W) of finished pictures.
    """

    pictures: StartingPictures
    copies: int
    noised: NoisedStart
    levels: tuple[float, ...] | None
    pixels: Size

    def prepare_pipeline(self, pipe: Any) -> None:
        """Give a teacher's pipeline the steps from the level on; a student's has its schedule."""
        if self.levels is not None:
            pipe.scheduler = FixedLevels(self.levels)

    def latents(self, pipe: Any, model: Pretrained, first: int, requests: Sequence[Request]) -> Tensor:
        """Noised latents `[B, C, H, W]` of a batch of requests, of which `first` is the number of the first one."""
        rows = [(first + row) // self.copies for row in range(len(requests))]
        pixels = torch.stack([self.pictures.read(row, self.pixels) for row in rows])
        encoders = model.backbone_class.encoders_type(pipe, model.max_text_tokens)
        process = model.backbone_class.process
        seeds = [request.seed for request in requests]
        return encode_start(encoders, process, pixels.to(pipe._execution_device), seeds, self.noised)

    def write_index(self, folder: Path, requests: Sequence[Request], ending: str) -> Path:
        """Write the list of the files in `folder`: index, prompt, seed, file and the picture that it started from."""
        rows = [
            {
                "index": row,
                "prompt": request.prompt,
                "seed": request.seed,
                "file": f"{request.stem}.{ending}",
                "start": self.pictures.names[row // self.copies],
            }
            for row, request in enumerate(requests)
        ]
        return write_text(folder / INDEX, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def settings(self) -> dict[str, Any]:
        """What a picture depends on, for its metadata."""
        return {
            "start_level": self.noised.level,
            "start_from": list(self.noised.source),
            "start_upsample": self.noised.upsampled,
        }


# Pictures


def starting_pictures(cfg: DictConfig) -> StartingPictures | None:
    """The pictures of `start`; None without one.

    Raises:
        UserError: if they cannot be listed, are too few, or keys of `start` are given without it or beside prompts.
    """
    if cfg.start is None:
        given = [key for key in ("level", "from", "n") if cfg[key] is not None]
        if cfg.upsample != "clean":
            given.append("upsample")
        if given:
            raise UserError(f"{given[0]}={cfg[given[0]]} is of pictures to start from; give start=FOLDER, or remove it")
        return None
    if cfg.prompts_file is not None or "prompts" in given_keys():
        key = "prompts" if cfg.prompts_file is None else "prompts_file"
        raise UserError(f"{key} beside start={cfg.start}: prompts are the captions of its pictures; remove {key}")
    limits.whole("n", cfg.n, 1)
    if cfg.start == SHAPES and not Path(SHAPES).exists():
        return _rendered(cfg.n)
    return _listed(cfg.start, cfg.n)


def _rendered(n: int | None) -> StartingPictures:
    """The first `n` held-out pictures of shapes, whose captions are those of `swd evaluate prompts=shapes`."""
    if n is None:
        raise UserError("start=shapes draws as many pictures as are asked for; give n=NUMBER, e.g. n=256")
    dataset = ShapesDataset(SPLIT, PROMPT_SEED, length=n)

    def read(i: int, size: Size) -> Tensor:
        return dataset[i]["pixels"]

    return StartingPictures(tuple(f"{SPLIT}/{i}" for i in range(n)), tuple(dataset.caption(i) for i in range(n)), read)


def _listed(start: str, n: int | None) -> StartingPictures:
    """The first `n` captioned pictures of a folder, a list or shards, by the rules of `swd import`."""
    # List them, and say what is left out.
    try:
        found = list_source(start)
    except UserError as error:
        raise UserError(str(error).replace("source=", "start=")) from None
    rows: list[PictureRow] = []
    captions: list[str] = []
    left_out: Counter[str] = Counter()
    for row in found.rows:
        if len(rows) == n:
            break
        fault = _add_row(row, rows, captions)
        if fault:
            left_out[fault] += 1
    if left_out:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())
        say(f"start={start}: {left_out.total():,} of {len(found.rows):,} rows are left out: {counts}")
    if not rows:
        raise UserError(f"start={start} has no picture that is there and has a caption; give another folder or list")
    if n is not None and len(rows) < n:
        raise UserError(f"n={n}, but start={start} has {len(rows)} captioned pictures; use at most that many")

    def read(i: int, size: Size) -> Tensor:
        try:
            data = rows[i].picture.read(byte_limit(MAX_PIXELS))
        except OSError as error:
            raise UserError(f"start={start}: {rows[i].file} cannot be read ({error.strerror or error})") from None
        return read_picture(BytesIO(data), size, f"start={start}: {rows[i].file}")

    return StartingPictures(tuple(row.file for row in rows), tuple(captions), read)


def _add_row(row: PictureRow | Problem, rows: list[PictureRow], captions: list[str]) -> str | None:
    """Append a picture and its caption; the reason in a word or two if the row is left out."""
    if isinstance(row, Problem):
        return row.kind
    if not os.path.isfile(row.picture.path):
        return "missing"
    try:
        captions.append(row.read_texts()[0])
    except (NoText, OSError):
        return "no caption"
    rows.append(row)
    return None


# Levels and sizes


def start_plan(
    cfg: DictConfig, pictures: StartingPictures, model: Pretrained, schedule: ScaleWiseScheduler | None, final: Size
) -> tuple[StartPlan, ScaleWiseScheduler | None]:
    """The plan of a start, and what is left of the student's schedule.

    Args:
        cfg: the configuration.
        pictures: of `starting_pictures`.
        model: the base.
        schedule: the student's sampler; None: the teacher draws.
        final: latent size of finished pictures.

    Raises:
        UserError: for a level or a size from which the model cannot draw on.
    """
    # What no setting could change.
    if model.backbone_class.video:
        raise UserError(f"start={cfg.start} is of pictures, and {model.family} draws videos; leave it out")
    if cfg.tiny_vae is not None:
        raise UserError("tiny_vae decodes alone, and start= needs the encoder of the model's VAE too; leave one out")
    pixels = model.pixel_size(final)
    if cfg.start == SHAPES and pixels != (RESOLUTION, RESOLUTION):
        raise UserError(f"start=shapes has pictures of {RESOLUTION}x{RESOLUTION}, and this draws others; use a folder")
    for key, example in (("level", "level=0.6"), ("from", f"from={final[0] // 2}")):
        if cfg[key] is None:
            raise UserError(f"start={cfg.start} needs {key}; give {example}")
    level = float(cfg.level)
    if not 0 < level < 1:
        raise UserError(f"level={cfg.level}; use a number between 0 (clean) and 1 (pure noise), e.g. 0.6")

    # Steps from the level on, and the size of the first of them.
    levels = left = None
    target = final
    if schedule is None:
        levels = _teacher_levels(model, level)
    else:
        left = _left_of(schedule, level, final)
        level = float(left.config.sigmas[0])
        target = left.base_sizes[0]
    noised = NoisedStart(level, _source_size(cfg["from"], target), target, cfg.upsample)
    return StartPlan(pictures, cfg.images_per_prompt, noised, levels, pixels), left


def _teacher_levels(model: Pretrained, level: float) -> tuple[float, ...]:
    """Levels of a teacher's steps: `level`, then those below it of all its steps from pure noise.

    The steps are those of the Euler sampler with shift 3 that the levels of students are from, whatever the model's own
    sampler. Stable Diffusion 3.5 has this one.
    """
    if model.backbone_class.process.prediction_type != "flow":
        raise UserError(f"start= with adapter=null is for rectified flow, and {model.family} is none; give a student")
    table = rectified_flow_levels(model.teacher_steps)[:-1].tolist()
    return (level, *(sigma for sigma in table if sigma < level))


def _left_of(schedule: ScaleWiseScheduler, level: float, final: Size) -> ScaleWiseScheduler:
    """The student's steps from the one at `level` on, ending at `final`."""
    sigmas = list(schedule.config.sigmas)
    first = min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - level))
    if abs(sigmas[first] - level) > NEAR:
        own = ", ".join(f"{sigma:.4g}" for sigma in sigmas if sigma < 1)
        raise UserError(f"level={level:g} is none of the student's: {own}; use one of them, or adapter=null")
    config = dict(schedule.config) | {"sigmas": sigmas[first:], "sizes": schedule.sizes_ending_at(final)[first:]}
    return ScaleWiseScheduler.from_config(config)


def _source_size(given: int | Sequence[int], target: Size) -> Size:
    """Latent size at which pictures are encoded.

    Raises:
        UserError: if it is below 1, larger than `target`, or of another aspect ratio.
    """
    size = (given, given) if isinstance(given, int) else tuple(given)
    shown = list(target) if target[0] != target[1] else target[0]
    if len(size) != 2 or any(not 1 <= side <= most for side, most in zip(size, target, strict=False)):
        raise UserError(
            f"from={given}: pictures are enlarged from it to {shown} (latent sides); use at least 1 and at most that"
        )
    # Rounding moves a side by less than one latent pixel.
    if abs(size[0] / target[0] - size[1] / target[1]) * max(size) >= 1:
        near = [max(1, round(side * size[0] / target[0])) for side in target]
        raise UserError(f"from={given} would squash pictures of {shown} (latent sides); use from='{near}'")
    return size
