"""Samples that are never trained on, for losses and metrics while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swd.types import Batch, Size, UserError


@dataclass(frozen=True)
class HeldOut:
    """Samples that are never trained on, by their place among them, from 0.

    Attributes:
        ids: number of each in its data set, ascending.
        read: makes a batch of numbers of samples, for a step of the schedule.
        caption: of the sample with a number.
        is_cache: whether they are encoded already, and there are no pixels.
        bucket: size in pixels of all of them where data come in several aspect ratios; None: the schedule's own.
    """

    ids: Sequence[int] | NDArray[np.int64]
    read: Callable[[Sequence[int], int], Batch]
    caption: Callable[[int], str]
    is_cache: bool = False
    bucket: Size | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, places: Sequence[int], step: int) -> Batch:
        """A batch of the samples at `places`, for a step of the schedule."""
        return self.read([int(self.ids[place]) for place in places], step)

    def captions(self, count: int) -> list[str]:
        """The captions of the first samples."""
        return self.captions_at(range(min(count, len(self))))

    def captions_at(self, places: Sequence[int]) -> list[str]:
        """The captions of the samples at `places`."""
        return [str(self.caption(int(self.ids[place]))) for place in places]

    def check(self, count: int, key: str) -> None:
        """Raise UserError if there are fewer than `count`; `key` is what asks for so many."""
        if len(self) < count:
            raise UserError(
                f"{key}={count}, but data.validation holds out {len(self)} samples; use a larger share, or fewer"
            )


def held_out_of(data: Any) -> HeldOut | None:
    """The samples that data hold out; None for data that cannot, or hold none out."""
    return data.held_out() if hasattr(data, "held_out") else None


def is_held_out(count: int, share: float) -> NDArray[np.bool_]:
    """Which of the samples 0 to `count` - 1 are held out, `[count]`: about `share` of them.

    A hash of the number decides (the mixer of SplitMix64, Steele et al. 2014), so every run with the same share holds
    out the same samples whatever its seed, and samples that are added at the end move no other.
    """
    with np.errstate(over="ignore"):
        z = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    chosen: NDArray[np.bool_] = z / 2.0**64 < share
    return chosen


def is_share(validation: Any) -> bool:
    """Whether a value of `data.validation` is a share of the data, rather than data of their own.

    Raises:
        UserError: for a number that is no share.
    """
    if not isinstance(validation, int | float):
        return False
    if not 0 < validation < 1:
        raise UserError(f"data.validation={validation}; use a share of the data between 0 and 1, e.g. 0.01, or null")
    return True
