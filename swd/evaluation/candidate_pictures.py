"""Drawing: every model draws the same rows, as PNG files that are written aside and renamed.

A picture depends on (model, prompt, seed) alone. A batch whose files are all there is not drawn again, so a kill loses
one batch.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from swd.data.job import say
from swd.evaluation.candidates import DrawingModel
from swd.evaluation.plan import Plan, mine
from swd.io.files import clear_leftovers, write_aside
from swd.io.job_log import JobLog
from swd.io.pictures import png
from swd.modules.drawing import DrawingOptions, build_pipeline, draw
from swd.modules.pretrained import Pretrained
from swd.types import UserError

PNG_BYTES = 1.6
"""About how many bytes a pixel of a photograph takes."""


class CandidatePainter:
    """Draws rows of a plan with one model; the pipeline is loaded when it is first needed.

    Args:
        plan: the rows.
        candidate: the model.
    """

    def __init__(self, plan: Plan, candidate: DrawingModel) -> None:
        self.plan = plan
        self.candidate = candidate
        self.files = plan.pictures(candidate).files

    @cached_property
    def pipe(self) -> Any:
        """The pipeline that draws the pictures."""
        return load_pipeline(self.candidate)

    def left(self, rows: range) -> list[range]:
        """Batches of a chunk of which a picture is missing."""
        size = self.plan.batch_size
        parts = (range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size))
        return [part for part in parts if not all(self.files[row].is_file() for row in part)]

    def draw(self, rows: range) -> list[Tensor]:
        """Pictures `[3, H, W]` in [-1, 1] of rows, drawn as one batch.

        Raises:
            UserError: if the device has too little memory, or a picture is not finite.
        """
        candidate = self.candidate
        requests = [self.plan.requests[row] for row in rows]
        try:
            drawn = draw(self.pipe, candidate.model, requests, candidate.size, show_sizes=False)[0]
        except torch.OutOfMemoryError:
            raise UserError(
                f"batch_size={self.plan.batch_size} does not fit the device's memory; use a smaller one, the "
                "evaluation continues"
            ) from None
        for row, picture in zip(rows, drawn, strict=True):
            if not picture.isfinite().all():
                raise UserError(
                    f"{candidate.name} drew values that are not finite in row {row}; try model.precision=fp32, or "
                    "leave it out"
                )
        return drawn

    def paint(self, rows: range) -> None:
        """Draw a batch and write those of its files that are missing."""
        missing = [row for row in rows if not self.files[row].is_file()]
        for row, picture in zip(rows, self.draw(rows), strict=True):
            if row in missing:
                write_aside(self.files[row], png(picture))

    def free(self) -> None:
        """Let the pipeline go."""
        with suppress(AttributeError):
            del self.pipe
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_pipeline(candidate: DrawingModel, options: DrawingOptions | None = None) -> Any:
    """The stock pipeline with the student in it, its LoRA folded into the weights."""
    say(f"loading {candidate.name} ({candidate.model.name})")
    pipe = build_pipeline(candidate.model, candidate.student, candidate.schedule, options, fold=True)
    if candidate.sigmas is not None:
        pipe.scheduler = FixedLevels(candidate.sigmas)
    return pipe


def check_levels(name: str, sigmas: Sequence[float], model: Pretrained) -> None:
    """Raise UserError unless a teacher can take steps at these noise levels.

    Args:
        name: of its row, for messages.
        sigmas: the levels.
        model: the teacher.
    """
    falling = all(a > b for a, b in pairwise([*sigmas, 0.0]))
    if not sigmas or not falling or max(sigmas) > 1:
        raise UserError(f"models: sigmas of {name} are {list(sigmas)}; use falling numbers in (0, 1]")
    if model.backbone_class.process.prediction_type != "flow":
        raise UserError(f"models: {name} has sigmas, which {model.family} has no sampler for; give steps instead")


class FixedLevels(FlowMatchEulerDiscreteScheduler):
    """Euler steps at given noise levels.

    Args:
        levels: noise levels of the steps, falling, in (0, 1].
    """

    def __init__(self, levels: tuple[float, ...] = (1.0,)) -> None:
        super().__init__(shift=1.0)
        self.levels = list(levels)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, **kwargs: Any
    ) -> None:
        super().set_timesteps(sigmas=self.levels, device=device)


def draw_share(painter: CandidatePainter) -> None:
    """Draw what is missing of this process's share of one model's pictures, and say how far it is."""
    plan = painter.plan
    clear_leftovers(painter.files[0].parent)
    shares = [(number, rows, painter.left(rows)) for number, rows in mine(plan.chunks, plan.share)]
    total = sum(len(rows) for _, rows, _ in shares)
    todo = sum(len(batch) for _, _, left in shares for batch in left)
    task = f"drawing with {painter.candidate.name} into {plan.folder / 'pictures' / painter.candidate.name}"
    with JobLog(task, total, "picture", done=total - todo, shown=plan.share[0] == 0 and todo > 0) as progress:
        for _, _, left in shares:
            for batch in left:
                painter.paint(batch)
                progress.advance(len(batch))


def is_drawn(painter: CandidatePainter) -> bool:
    """Whether all pictures of all processes are there."""
    return all(file.is_file() for file in painter.files)


def check_space(plan: Plan) -> None:
    """Raise UserError if the pictures that are still to be drawn do not fit on the disk."""
    needed = 0.0
    for candidate in plan.candidates:
        if isinstance(candidate, DrawingModel):
            painter = CandidatePainter(plan, candidate)
            left = sum(len(batch) for rows in plan.chunks for batch in painter.left(rows))
            needed += left * PNG_BYTES * torch.Size(candidate.model.pixel_size(candidate.size)).numel()
    free = shutil.disk_usage(plan.folder).free
    if needed > free:
        raise UserError(
            f"the pictures take about {needed / 1e9:.3g} GB, but {plan.folder} has {free / 1e9:.3g} GB free; "
            "choose another disk with output="
        )
