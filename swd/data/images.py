"""A folder of captioned pictures or videos, as it is: for small experiments and for the published training data."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from swd import video
from swd.types import Size, UserError

LIST = "metainfo.csv"
"""Captions of a folder: a header row, then index, file name, caption by position (the published layout)."""
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
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
        UserError: if the folder is missing, has no captions, or names a file that is not there.
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
        self.pairs = read_pairs(self.folder, PICTURES if kind == "pictures" else VIDEOS)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, caption = self.pairs[index]
        read = read_picture if self.kind == "pictures" else read_video
        return {"pixels": read(file, self.size), "prompt": caption, "index": index}


def read_pairs(folder: Path, endings: Sequence[str]) -> list[tuple[Path, str]]:
    """Files and captions of a folder, in the list's order or by name.

    Raises:
        UserError: if there are none, or the list names a file that is not there.
    """
    if (folder / LIST).is_file():
        with open(folder / LIST, newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))[1:]
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
            (file, file.with_suffix(".txt").read_text(encoding="utf-8").strip())
            for file in files
            if file.with_suffix(".txt").is_file()
        ]
    if not pairs:
        raise UserError(f"data.dataset.path={folder} holds no captioned files; add {LIST}, or a .txt beside each file")
    return pairs


def read_picture(file: Path, size: Size) -> Tensor:
    """A picture `[3, H, W]` in [-1, 1] of exactly `size`: scaled to cover it, cropped around the middle.

    Raises:
        UserError: if it cannot be read, or is smaller than `size`.
    """
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{file} cannot be read as a picture ({str(error).splitlines()[0][:80]}); remove it") from None
    height, width = size
    scale = max(height / image.height, width / image.width)
    if scale > 1:
        raise UserError(f"{file} is {image.width}x{image.height}, smaller than {width}x{height}; remove it")
    shrunk = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(shrunk, Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST, reducing_gap=2.0)
    left, top = (shrunk[0] - width) // 2, (shrunk[1] - height) // 2
    array = np.asarray(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 127.5 - 1


def read_video(file: Path, size: Size) -> Tensor:
    """A video `[3, F, H, W]` in [-1, 1] of exactly `size`: its first frames, each scaled and cropped as a picture.

    Raises:
        UserError: if it is shorter or smaller than `size`.
    """
    video.check_available()
    frames = video.read(file)
    count, height, width = size
    if any(have < wanted for have, wanted in zip(frames.shape[1:], size, strict=True)):
        raise UserError(f"{file} is {tuple(frames.shape[1:])} (frames, height, width), smaller than {size}; remove it")
    scale = max(height / frames.shape[2], width / frames.shape[3])
    shrunk = (max(height, round(frames.shape[2] * scale)), max(width, round(frames.shape[3] * scale)))
    frames = F.interpolate(frames[:, :count].transpose(0, 1), size=shrunk, mode="area").transpose(0, 1)
    top, left = (shrunk[0] - height) // 2, (shrunk[1] - width) // 2
    return frames[:, :, top : top + height, left : left + width].contiguous()
