"""Small folders of shards for tests."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from swd.data.job import Job, Sample

WORDS = ["a red star", "a large blue ring above a small heart", "a green cross"]


def picture(row: int, width: int, height: int) -> Image.Image:
    """A smooth picture that differs for every row."""
    rng = np.random.default_rng(row)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def make_pictures(
    folder: Path, count: int, sizes: Sequence[tuple[int, int]] = ((64, 64),), shard_size: int = 4, captions: Any = None
) -> Path:
    """Shards of captioned pictures; row i has `sizes[i % len(sizes)]` (width, height)."""
    captions = captions or (lambda row: f"{WORDS[row % len(WORDS)]}, number {row}")

    def make(rows: range, advance: Callable[[int], object]) -> Iterator[Sample]:
        for row in rows:
            width, height = sizes[row % len(sizes)]
            files = {
                "png": png(picture(row, width, height)),
                "txt": captions(row).encode(),
                "json": json.dumps({"index": row}).encode(),
            }
            yield f"{row:08d}", files, {"width": width, "height": height}

    job = Job(folder, "pictures", count, shard_size, {"made": "for tests"})
    job.claim()
    assert job.run(make) is not None
    return folder
