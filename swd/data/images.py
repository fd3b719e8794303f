"""A folder of captioned pictures or videos, as it is: for small experiments and for the published training data."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from swd import video
from swd.images import to_rgb
from swd.types import Size, UserError

LIST = "metainfo.csv"
"""Captions of a folder: a header row, then index, file name, caption by position (the published layout)."""
ENDINGS = {
    "jpg": "jpg",
    "jpeg": "jpg",
    "jpe": "jpg",
    "jfif": "jpg",
    "png": "png",
    "webp": "webp",
    "tif": "tiff",
    "tiff": "tiff",
    "bmp": "bmp",
    "gif": "gif",
    "avif": "avif",
    "jp2": "jp2",
}
"""Endings of pictures, in lower case, and what shards call them."""
PICTURES = tuple(f".{ending}" for ending in ENDINGS)
Image.init()
_FORMATS: list[str] = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000"]
FORMATS = [name for name in _FORMATS if name in Image.OPEN]
"""What Pillow may read, as far as it is built to; some of its other formats start programs."""
VIDEOS = (".mp4", ".mov", ".webm", ".mkv")


class FolderDataset(Dataset[dict[str, Any]]):
    """Files with captions from `metainfo.csv` or from text files of the same name.

    An item is `{"pixels": [3, H, W] or [3, F, H, W] in [-1, 1], "prompt": str, "index": int}`. Pictures are scaled so
    that they cover `size` and cropped around the middle, never squashed; videos lose frames at their end.

    Args:
        path: the folder.
        size: side, (H, W) or (F, H, W) in pixels.
        kind: what the files are.

    Raises:
        UserError: if the folder is missing, has no captions, or names a file that is not there, or if videos cannot
            be read here.
    """

    def __init__(
        self, path: str | None, size: int | Sequence[int], kind: Literal["pictures", "videos"] = "pictures"
    ) -> None:
        if path is None:
            raise UserError(f"data.dataset.path is missing; give a folder of {kind} with {LIST} or .txt captions")
        self.folder, self.kind = Path(path), kind
        self.size: Size = (size, size) if isinstance(size, int) else tuple(size)
        if len(self.size) != (2 if kind == "pictures" else 3):
            raise UserError(f"data.dataset.size={size} has {len(self.size)} axes, which does not fit {kind}")
        if not self.folder.is_dir():
            raise UserError(f"data.dataset.path={path} does not exist; give a folder of {kind}")
        if kind == "videos":
            video.check_available()
        self.pairs = read_pairs(self.folder, PICTURES if kind == "pictures" else VIDEOS)

    def __len__(self) -> int:
        return len(self.pairs)

    def caption(self, index: int) -> str:
        """The caption of an item, without reading its file."""
        return self.pairs[index][1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, caption = self.pairs[index]
        read = read_picture if self.kind == "pictures" else read_video
        return {"pixels": read(file, self.size), "prompt": caption, "index": index}


def read_pairs(folder: Path, endings: Sequence[str]) -> list[tuple[Path, str]]:
    """Files and captions of a folder, in the list's order or by name.

    Raises:
        UserError: if there are none, the list names a file that is not there, or a text is not UTF-8.
    """
    if (folder / LIST).is_file():
        try:
            rows = list(csv.reader(StringIO(read_text(folder / LIST), newline="")))[1:]
        except csv.Error as error:
            raise UserError(f"{folder / LIST} is not a table of comma-separated values ({error})") from None
        pairs = []
        for number, row in enumerate(rows, 2):
            if len(row) < 3:
                raise UserError(f"{folder / LIST}, line {number}: {len(row)} columns; use index, file name, caption")
            file = folder / row[1]
            if not file.is_file():
                raise UserError(f"{folder / LIST}, line {number}: {row[1]} is not in the folder")
            pairs.append((file, row[2]))
    else:
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in endings)
        pairs = [
            (file, read_text(file.with_suffix(".txt")).strip()) for file in files if file.with_suffix(".txt").is_file()
        ]
    if not pairs:
        raise UserError(f"data.dataset.path={folder} holds no captioned files; add {LIST}, or a .txt beside each file")
    return pairs


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, line ends as they are.

    Raises:
        UserError: if it is none.
    """
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text; save it as UTF-8") from None


def read_picture(file: Path | BinaryIO, size: Size, name: str | None = None) -> Tensor:
    """A picture `[3, H, W]` in [-1, 1] of exactly `size`: scaled to cover it, cropped around the middle.

    It stands as its EXIF orientation says; transparency shows white; of an animation the first frame is taken.

    Args:
        file: a file, or an open one.
        size: (H, W) in pixels.
        name: what messages call it; None: the file's own.

    Raises:
        UserError: if it cannot be read, or is smaller than `size`.
    """
    name = str(file) if name is None else name
    try:
        image = decode(file)
    except Exception as error:  # Pillow meets damaged files with errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} cannot be read as a picture ({reason[:80]}); remove it") from None
    height, width = size
    if image.width < width or image.height < height:
        raise UserError(f"{name} is {image.width}x{image.height}, smaller than {width}x{height}; remove it")
    array = np.array(cover_and_crop(image, size))
    return torch.from_numpy(array).permute(2, 0, 1).float().contiguous().div_(127.5).sub_(1)


def decode(file: Path | BinaryIO) -> Image.Image:
    """A picture in RGB as it is meant to be seen: upright, transparency over white, 16 bits scaled to 8.

    Of several frames or pages, the first.

    Raises:
        Exception: of many types, if it is damaged or of none of `FORMATS`.
    """
    with Image.open(file, formats=FORMATS) as opened:
        opened.load()
        # A copy that is not needed may cost more than decoding does.
        image: Image.Image = ImageOps.exif_transpose(opened) if opened.getexif().get(0x0112, 1) != 1 else opened
    plain = image.mode == "RGB" and "transparency" not in image.info
    return image if plain else to_rgb(image)


def cover_and_crop(image: Image.Image, size: Size) -> Image.Image:
    """A picture scaled down so that it covers `size`, (H, W), cropped around the middle."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    shrunk = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(shrunk, Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST, reducing_gap=2.0)
    left, top = (shrunk[0] - width) // 2, (shrunk[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def read_video(file: Path, size: Size) -> Tensor:
    """A video `[3, F, H, W]` in [-1, 1] of exactly `size`: its first frames, each scaled and cropped as a picture.

    Raises:
        UserError: if it cannot be read, or is shorter or smaller than `size`.
    """
    count, height, width = size
    frames = video.read(file, count)
    if any(have < wanted for have, wanted in zip(frames.shape[1:], size, strict=True)):
        raise UserError(f"{file} is {tuple(frames.shape[1:])} (frames, height, width), smaller than {size}; remove it")
    scale = max(height / frames.shape[2], width / frames.shape[3])
    shrunk = (max(height, round(frames.shape[2] * scale)), max(width, round(frames.shape[3] * scale)))
    frames = F.interpolate(frames.transpose(0, 1), size=shrunk, mode="area").transpose(0, 1)
    top, left = (shrunk[0] - height) // 2, (shrunk[1] - width) // 2
    return frames[:, :, top : top + height, left : left + width].contiguous()
