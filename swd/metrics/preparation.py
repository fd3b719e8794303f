"""How pictures are brought to the size of a feature network, by Pillow: its filters widen when they shrink a picture.

Resizing changes FID by more than most differences between models (arXiv 2104.11222), so each step has a name, and the
names of all steps are part of the metric's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Transform(Protocol):
    """One step of a preparation; `name` has letters, digits and "-" only."""

    @property
    def name(self) -> str: ...

    def __call__(self, image: Image.Image) -> Image.Image: ...


@dataclass(frozen=True)
class ShortSide:
    """Resize so that the shorter side has `size` pixels; the longer one is rounded down."""

    size: int
    filter: str

    @property
    def name(self) -> str:
        return f"{self.size}{self.filter}"

    def __call__(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        width, height = (self.size * side // short for side in image.size)
        return image if image.size == (width, height) else image.resize((width, height), FILTERS[self.filter])


@dataclass(frozen=True)
class Squash:
    """Resize to `size` x `size`, whatever the aspect ratio."""

    size: int
    filter: str

    @property
    def name(self) -> str:
        return f"{self.size}x{self.size}{self.filter}"

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.resize((self.size, self.size), FILTERS[self.filter])


@dataclass(frozen=True)
class CentreCrop:
    """Cut `size` x `size` pixels out of the middle; None: the largest square."""

    size: int | None = None

    @property
    def name(self) -> str:
        return f"crop{self.size or ''}"

    def __call__(self, image: Image.Image) -> Image.Image:
        size = self.size or min(image.size)
        left, top = ((side - size) // 2 for side in image.size)
        return image.crop((left, top, left + size, top + size))


def names(steps: Sequence[Transform]) -> str:
    """The names of all steps, joined by "-"; "plain" for none."""
    return "-".join(step.name for step in steps) or "plain"


def apply_transforms(picture: Tensor, steps: Sequence[Transform]) -> Tensor:
    """A picture, uint8 `[3, H, W]`, after all steps: uint8 `[3, H', W']`, on its device."""
    if not steps:
        return picture
    image = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
    for step in steps:
        image = step(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(picture.device)


def normalise(picture: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`(picture / 255 - mean) / std` by channel, float32, of uint8 `[3, H, W]`."""
    shape = (3, 1, 1)
    offset = torch.tensor(mean, device=picture.device).view(shape)
    scale = torch.tensor(std, device=picture.device).view(shape)
    return (picture.float() / 255 - offset) / scale
