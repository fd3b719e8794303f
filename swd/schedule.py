"""Scale schedules: the noise level and the latent size of every generation step, and resizing between sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from swd.scheduler import ScaleWiseScheduler, blend_frames, check_schedule, upsample
from swd.types import Size, UserError, WrongProcess

__all__ = ["DIRECT", "Frames", "Interval", "Resizing", "ScaleSchedule", "downscale", "upsample"]

Frames = Literal["blend", "nearest"]
"""Which frames of a clip a shorter one has: linear blends of two neighbours, or the nearer of them."""


class Covers(Protocol):
    """A process that says which noise levels its networks take; those of `swd.diffusion` do."""

    def covers(self, sigma: float) -> bool:
        """Whether networks of this process take a noise level."""
        ...


@dataclass(frozen=True)
class Interval:
    """One step of the schedule as training sees it (SwD paper, section 4.1).

    Attributes:
        index: which step, from 0.
        sigma: noise level at which the student starts.
        source: latent size of the previous step's prediction.
        target: latent size that the student predicts at; at least `source`.
    """

    index: int
    sigma: float
    source: Size
    target: Size


class ScaleSchedule:
    """Noise levels `sigma_1 > ... > sigma_N` with sizes `s_1 <= ... <= s_N` (SwD paper, section 4.1).

    Args:
        sigmas: N noise levels in (0, 1], strictly decreasing.
        sizes: N latent side lengths, (H, W) or (F, H, W); sides never shrink.
        process: diffusion process of the levels: "flow", rectified flow, or "epsilon", SDXL's variance-preserving
            process, in which the same level has another share of noise. None: unknown, and not checked.

    Raises:
        UserError: if a rule above is broken.
    """

    def __init__(
        self,
        sigmas: Sequence[float],
        sizes: Sequence[int | Sequence[int]],
        process: Literal["flow", "epsilon"] | None = None,
    ) -> None:
        self.process = process
        self.sigmas: tuple[float, ...]
        self.sizes: tuple[Size, ...]
        try:
            self.sigmas, self.sizes = check_schedule(sigmas, sizes, where="schedule.")
        except ValueError as error:
            raise UserError(str(error)) from None

    def __len__(self) -> int:
        return len(self.sigmas)

    def interval(self, i: int) -> Interval:
        """Step `i` (from 0); the first step's source and target are both the first size."""
        return Interval(i, self.sigmas[i], self.sizes[max(i - 1, 0)], self.sizes[i])

    def steps_of(self, process: Covers) -> tuple[int, ...]:
        """The steps, from 0, whose noise levels a model of this process takes: all but for one of several experts."""
        return tuple(i for i, sigma in enumerate(self.sigmas) if process.covers(sigma))

    def stretched(self, final: Size, divisor: int = 1) -> ScaleSchedule:
        """This schedule in another aspect ratio or resolution, with the sizes of `ScaleWiseScheduler.sizes_ending_at`.

        Args:
            final: latent size of finished pictures.
            divisor: sides are multiples of this.
        """
        if final == self.sizes[-1]:
            return self
        scheduler = self.scheduler(divisor, self.process or "flow")  # sizes do not depend on the process
        return ScaleSchedule(self.sigmas, scheduler.sizes_ending_at(final), self.process)

    def check_process(self, prediction_type: str) -> None:
        """Raise WrongProcess if the noise levels are of another process than a model of `prediction_type`."""
        if self.process not in (None, prediction_type):
            raise WrongProcess(self.process, prediction_type, full_size=len(set(self.sizes)) == 1)

    def scheduler(self, divisor: int = 1, prediction_type: str = "flow") -> ScaleWiseScheduler:
        """The sampler of this schedule.

        Raises:
            UserError: if the noise levels are of another process, or a side is no multiple of `divisor`.
        """
        self.check_process(prediction_type)
        sizes = [s[0] if len(s) == 2 and s[0] == s[1] else list(s) for s in self.sizes]
        try:
            return ScaleWiseScheduler(
                sigmas=list(self.sigmas), sizes=sizes, divisor=divisor, prediction_type=prediction_type
            )
        except ValueError as error:
            raise UserError(f"schedule: {error}") from None


def downscale(pixels: Tensor, size: Sequence[int], frames: Frames = "blend") -> Tensor:
    """Area-downscale pictures or videos to a size in pixels, from full size directly (SwD paper, section 4.1).

    A video is resampled in time first: n frames at `linspace(0, F - 1, n)`.

    Args:
        pixels: `[B, C, H, W]` or `[B, C, F, H, W]`.
        size: (H, W) or (F, H, W).
        frames: how a frame between two others is made.

    Raises:
        UserError: if the pictures are smaller than `size`, or have another number of axes.
    """
    size = tuple(size)
    have = tuple(pixels.shape[2:])
    if len(size) != len(have):
        raise UserError(
            f"data of {have} pixels do not fit sizes of {size}: give pictures for (H, W), videos for (F, H, W)"
        )
    if any(side < wanted for side, wanted in zip(have, size, strict=True)):
        raise UserError(f"pictures of {have} pixels cannot be shrunk to {size}; use larger pictures or smaller sizes")
    if have == size:
        return pixels
    if len(size) == 2:
        return F.interpolate(pixels, size=size, mode="area")
    clip = blend_frames(pixels, size[0]) if frames == "blend" else nearest_frames(pixels, size[0])
    flat = F.interpolate(clip.transpose(1, 2).flatten(0, 1), size=size[1:], mode="area")
    return flat.unflatten(0, (len(pixels), size[0])).transpose(1, 2)


def nearest_frames(video: Tensor, frames: int) -> Tensor:
    """A video `[B, C, F, H, W]` with the frames nearest to `linspace(0, F - 1, frames)`; of two, the later one."""
    places = torch.linspace(0, video.shape[2] - 1, frames, dtype=torch.float64)
    return video.index_select(2, (places + 0.5).floor().long().to(video.device))


@dataclass(frozen=True)
class Resizing:
    """How training data of full size become pixels of a step's two sizes.

    Attributes:
        downscale: "direct" shrinks full size to each of the two sizes. "cascade" makes the source of the target, as the
            released code does, which blurs it more.
        frames: how frames of shorter clips are made.
    """

    downscale: Literal["direct", "cascade"] = "direct"
    frames: Frames = "blend"

    def pair(self, pixels: Tensor, source: Sequence[int], target: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Pixels of the source's and of the target's size, of full-size pictures or videos; see `downscale`."""
        large = downscale(pixels, target, self.frames)
        if tuple(source) == tuple(target):
            return large, large
        return downscale(large if self.downscale == "cascade" else pixels, source, self.frames), large


DIRECT = Resizing()
"""The default: both sizes from full size, blended frames."""
