"""Aspect-ratio buckets: the few sizes that pictures of any shape are cropped to."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from swd.types import UserError

EXTREME = 100
"""Longer side over shorter side at most: a strip of 10,000 x 100 pixels."""


def aspect_size(aspect: str, area: int, divisor: int) -> tuple[int, int]:
    """(height, width) of about `area` in the proportion `aspect`, "WIDTH:HEIGHT", both multiples of `divisor`.

    Raises:
        UserError: if that is not a proportion.

    >>> aspect_size("16:9", 1024 * 1024, 64)
    (768, 1344)
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?):(\d{1,9}(?:\.\d{1,9})?)", aspect)
    if not match or not all(float(part) > 0 for part in match.groups()):
        raise UserError(f"aspect={aspect}; give WIDTH:HEIGHT, e.g. aspect=16:9")
    ratio = float(match[1]) / float(match[2])
    if not 1 / EXTREME <= ratio <= EXTREME:
        raise UserError(f"aspect={aspect}; use a proportion between 1:{EXTREME} and {EXTREME}:1, as pictures have")
    sides = (math.sqrt(area / ratio), math.sqrt(area * ratio))
    height, width = (max(1, round(side / divisor)) * divisor for side in sides)
    return height, width


def bucket_sizes(aspects: Sequence[str], size: int, multiple: int = 64) -> list[tuple[int, int]]:
    """(height, width) of every bucket in pixels.

    Args:
        aspects: proportions, "WIDTH:HEIGHT".
        size: side of the square that has as many pixels as each bucket about has.
        multiple: what all sides are multiples of.

    Raises:
        UserError: if an entry is not a proportion, or two come to the same size.
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
    """Which of `sizes`, (height, width), has the proportion nearest to a picture's: by the logarithm of the ratio.

    Of two that are equally near, the first counts.
    """
    proportion = math.log(height / width)
    return min(range(len(sizes)), key=lambda i: abs(proportion - math.log(sizes[i][0] / sizes[i][1])))
