"""Prompts and rendered pictures of shapes, for evaluations: combinations that training never drew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swd.evaluation.candidates import GivenPictures
from swd.io.files import write_aside
from swd.io.pictures import png
from swd.shapes.dataset import RESOLUTION, ShapesDataset

SPLIT = "heldout"
"""Captions with combinations of colour and shape that training never drew."""
PROMPT_SEED, REFERENCE_SEED, FLOOR_SEED = 0, 1, 2
"""Dataset seeds: of the prompts, of the rendered pictures that FID compares with, and of a second set of those."""


def prompts_of(n: int) -> list[str]:
    """The first `n` captions of the held-out split."""
    dataset = ShapesDataset(SPLIT, PROMPT_SEED, length=n)
    return [dataset.draw(i)[1].caption() for i in range(n)]


@dataclass(frozen=True)
class RenderedPictures(GivenPictures):
    """Real pictures of shapes; their files are made when they are needed.

    Attributes:
        seed: of the data set.
    """

    seed: int = REFERENCE_SEED

    @classmethod
    def at(cls, folder: Path, n: int) -> RenderedPictures:
        """`n` pictures in a folder, which need not be there yet."""
        return cls("reference", "shapes", tuple(folder / f"{row:08d}.png" for row in range(n)))

    def settings(self) -> dict[str, Any]:
        """Facts that decide the rendered pictures, which are the same on every machine."""
        return {"rendered": [SPLIT, self.seed, RESOLUTION, len(self.files)]}

    def render(self, rows: Iterable[int]) -> None:
        """Write the files of these rows that are missing."""
        dataset = ShapesDataset(SPLIT, self.seed, length=len(self.files))
        for row in rows:
            if not self.files[row].is_file():
                write_aside(self.files[row], png(torch.as_tensor(dataset[row]["pixels"])))
