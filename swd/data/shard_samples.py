"""One training sample: its files as a reader finds them, and its values as a decoder makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from swd.types import Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample of a data set, of a kind that the classes below it say.

    Attributes:
        prompt: the caption.
        bucket: number of the bucket that it belongs to, from 0.
        skipped: reasons why samples before it could not be read, if it takes the place of one.
    """

    prompt: str
    bucket: int = 0
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureSample(Sample):
    """A captioned picture or video.

    Attributes:
        pixels: `[3, H, W]` or `[3, F, H, W]`: bytes, uint8, or float32 in [-1, 1].
    """

    pixels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSample(Sample):
    """A sample that `swd encode` made, still packed. Its bytes may lie in memory that the next sample overwrites.

    Attributes:
        text: the packed conditioning, see `swd.data.cache.pack_text`.
        latents: packed latents by size, see `swd.data.cache.pack_latents`.
    """

    text: NDArray[np.uint8]
    latents: Mapping[Size, NDArray[np.uint8]]


class SampleFiles(Protocol):
    """The files of one sample. Each reader has a class for it; decoders know this protocol alone."""

    @property
    def name(self) -> str:
        """Name of the sample in messages."""
        ...

    @property
    def endings(self) -> Sequence[str]:
        """Endings of the files that the sample has, without the dot."""
        ...

    def read(self, endings: Sequence[str]) -> dict[str, NDArray[np.uint8]]:
        """Contents of files by ending.

        Raises:
            CorruptSample: if one is missing, cut off or damaged.
        """
        ...

    def follow(self, column: str) -> SampleFiles | None:
        """Files of the sample whose number stands in a column of the index; None: this sample, or there is no index."""
        ...
