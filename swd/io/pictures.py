"""Pictures as tensors, PIL images and sheets."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB: transparency over white, 16-bit grey scaled to 8 bits, other colours converted.

    Raises:
        ValueError: for floating-point pixels, because their range is unknown.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):  # 16 bits, which `convert` would clip at 255
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray(((grey.clip(0, 65535) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def picture_bytes(image: Image.Image, ending: str, quality: int) -> bytes:
    """A picture as the bytes of a "png", "jpg" or "webp" file; `quality` (1 to 100) applies to jpg and webp."""
    options: dict[str, dict[str, Any]] = {
        "png": {"format": "PNG"},
        "jpg": {"format": "JPEG", "quality": quality, "subsampling": 0},
        "webp": {"format": "WEBP", "quality": quality},
    }
    stream = io.BytesIO()
    image.save(stream, **options[ending])
    return stream.getvalue()


def to_pil(pixels: Tensor) -> Image.Image:
    """A PIL image of `[3, H, W]` in [-1, 1], rounded as diffusers does; of a video `[3, F, H, W]`, its middle frame."""
    if pixels.ndim == 4:
        pixels = pixels[:, pixels.shape[1] // 2]
    array = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(array)


def png(pixels: Tensor) -> Callable[[Path], None]:
    """A function that writes `[3, H, W]` in [-1, 1] as a PNG file, for `write_aside`."""
    image = to_pil(pixels)
    return lambda path: image.save(path, format="PNG")


def grid(rows: Sequence[Sequence[Tensor]], gap: int = 2) -> Image.Image:
    """One sheet of rows of pictures `[3, H, W]` in [-1, 1]; smaller ones keep their size, bottom-aligned."""
    images = [[to_pil(pixels) for pixels in row] for row in rows]
    widths = [max(row[column].width for row in images) for column in range(len(images[0]))]
    heights = [max(image.height for image in row) for row in images]
    sheet = Image.new("RGB", (sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(heights) - 1)), "white")
    y = 0
    for row, height in zip(images, heights, strict=True):
        x = 0
        for image, width in zip(row, widths, strict=True):
            sheet.paste(image, (x, y + height - image.height))
            x += width + gap
        y += height + gap
    return sheet
