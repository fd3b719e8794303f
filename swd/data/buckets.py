"""Aspect-ratio buckets: a few sizes to which pictures of any shape are cropped."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from swd.types import UserError

MOST = 1e6
"""Both numbers of a proportion are below this."""
MOST_RATIO = 64
"""Largest ratio of two sides: beyond it, the short side has less than one latent in most sizes."""


def aspect_size(aspect: str, area: int, divisor: int) -> tuple[int, int]:
    """(height, width) of about `area` in the proportion `aspect`, "WIDTH:HEIGHT", both multiples of `divisor`.

    Raises:
        UserError: if `aspect` is not a proportion, or one side is too long.

    >>> aspect_size("16:9", 1024 * 1024, 64)
    (768, 1344)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", aspect)
    if not match or not all(0 < float(part) < MOST for part in match.groups()):
        raise UserError(f"aspect={aspect:.40}; give WIDTH:HEIGHT, e.g. aspect=16:9")
    ratio = float(match[1]) / float(match[2])
    if not 1 / MOST_RATIO <= ratio <= MOST_RATIO:
        raise UserError(f"aspect={aspect:.40}; one side is more than {MOST_RATIO} times the other: use less")
    sides = (math.sqrt(area / ratio), math.sqrt(area * ratio))
    height, width = (max(1, round(side / divisor)) * divisor for side in sides)
    return height, width


def bucket_sizes(aspects: Sequence[str], size: int, multiple: int = 64) -> list[tuple[int, int]]:
    """(height, width) of every bucket in pixels.

    Args:
        aspects: proportions, "WIDTH:HEIGHT".
        size: each bucket has about `size * size` pixels.
        multiple: all sides are multiples of it.

    Raises:
        UserError: if an entry is not a proportion, or two entries give the same size.
    """
    if size < 1 or multiple < 1:
        raise UserError(f"size={size}, multiple={multiple}; use at least 1 for both")
    if not aspects:
        raise UserError("buckets is empty; give proportions, e.g. buckets=[1:1,4:3,3:4], or null")
    sizes: list[tuple[int, int]] = []
    for aspect in aspects:
        found = aspect_size(aspect, size * size, multiple)
        if found in sizes:
            raise UserError(
                f"buckets {aspects[sizes.index(found)]} and {aspect} are both {found[1]}x{found[0]} at size={size}, "
                f"multiple={multiple}; leave one out, or use a smaller multiple"
            )
        sizes.append(found)
    return sizes


def nearest_bucket(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> int:
    """Index of the size, (height, width), whose proportion is nearest to a picture's, in the logarithm of the ratio.

    Of two that are equally near, it is the first.
    """
    proportion = math.log(height / width)
    return min(range(len(sizes)), key=lambda i: abs(proportion - math.log(sizes[i][0] / sizes[i][1])))
