"""Reads folders of captioned pictures or videos without conversion, e.g. the published training data."""

from __future__ import annotations

import os
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from swd.data.picture_list import ENDINGS, Part, PictureList, PictureRow, Problem
from swd.data.source_lists import LIST
from swd.data.sources import list_folder, list_in
from swd.io import video
from swd.io.limits import number
from swd.io.pictures import to_rgb
from swd.io.tables import NoText
from swd.types import Size, UserError, in_unit_range

PICTURES = tuple(f".{ending}" for ending in ENDINGS)
Image.init()
STORED_AS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # several JPEG pictures in one file, as phones and stereo cameras write them
    "PNG": "png",
    "WEBP": "webp",
    "TIFF": "tiff",
    "BMP": "bmp",
    "GIF": "gif",
    "AVIF": "avif",
    "JPEG2000": "jp2",
}
"""Ending in shards for each format that Pillow may read, by Pillow's name of the format."""
FORMATS = [name for name in STORED_AS if name in Image.OPEN]
"""Formats that Pillow may read, if it was built with them. Others are excluded because some start programs."""
MISSING = "that are not there"
"""Kind of the problem of a listed file that is missing, in words that follow a count."""
VIDEOS = (".mp4", ".mov", ".webm", ".mkv")
MAX_PIXELS = 2**26
"""Default limit on the pixels of a picture, 8192 x 8192. Decoded they take 0.3 GB, however small the file is. The
largest cameras with a 35 mm sensor give 61 million pixels."""
MAX_MISSING = 0.01
"""Default share of a list's rows whose files may be missing: with more, the list is probably another folder's."""
PILLOW_PIXELS = 178_956_970
"""Largest number of pixels that Pillow itself opens (twice its `MAX_IMAGE_PIXELS`)."""
TEXT_BYTES = 2**20
"""Largest text or colour profile of a PNG that is passed to Pillow, in bytes; all together may have 16 times as many.
Pillow refuses a picture with a larger one (`MAX_TEXT_CHUNK`), although it is not needed here."""


class FolderDataset(Dataset[dict[str, Any]]):
    """Files with captions from `metainfo.csv` or from text files of the same name.

    An item is `{"pixels": [3, H, W] or [3, F, H, W], "prompt": str, "index": int}`; its pixels are bytes or in [-1, 1],
    see `load_picture` and `load_video`. Pictures are scaled so that they cover `size` and cropped around the middle,
    never squashed; videos lose frames at their end.

    Args:
        path: the folder.
        size: side, (H, W) or (F, H, W) in pixels.
        kind: kind of the files.
        outside: also take files that lie outside of the folder, by links or by their names in the list.
        max_pixels: pictures with more pixels are refused before they are decoded.
        max_missing: share of a list's rows whose files may be missing. The published tables have such rows; the
            default is ours.

    Raises:
        UserError: if the folder is missing, has no captions or lists too many missing files, or if the package that
            reads videos is not installed.
    """

    def __init__(
        self,
        path: str | None,
        size: int | Sequence[int],
        kind: Literal["pictures", "videos"] = "pictures",
        outside: bool = False,
        max_pixels: int = MAX_PIXELS,
        max_missing: float = MAX_MISSING,
    ) -> None:
        if path is None:
            raise UserError(f"data.dataset.path is missing; give a folder of {kind} with {LIST} or .txt captions")
        self.folder = Path(path)
        self.kind = kind
        self.size: Size = (size, size) if isinstance(size, int) else tuple(size)
        if len(self.size) != (2 if kind == "pictures" else 3):
            raise UserError(f"data.dataset.size={size} has {len(self.size)} axes, which does not fit {kind}")
        if not self.folder.is_dir():
            raise UserError(f"data.dataset.path={path} does not exist; give a folder of {kind}")
        if kind == "videos":
            video.check_available()
        check_max_pixels(max_pixels, "data.dataset.max_pixels")
        self.max_pixels = max_pixels
        number("data.dataset.max_missing", max_missing, 0, 1, "a share of the list's rows")
        self.pairs = read_pairs(self.folder, kind, outside, max_missing)

    def __len__(self) -> int:
        return len(self.pairs)

    def caption(self, index: int) -> str:
        """The caption of an item, without reading its file."""
        return self.pairs[index][1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, caption = self.pairs[index]
        if self.kind == "pictures":
            pixels = load_picture(file, self.size, limit=self.max_pixels)
        else:
            pixels = load_video(file, self.size)
        return {"pixels": pixels, "prompt": caption, "index": index}


def read_pairs(
    folder: Path, kind: str = "pictures", outside: bool = False, max_missing: float = MAX_MISSING
) -> list[tuple[Path, str]]:
    """Files and captions of a folder, in the list's order or by name; the same files that `swd import` would take.

    Files without a caption, files with a name that occurred before and missing files are left out; one warning counts
    them.

    Args:
        folder: the folder.
        kind: "pictures" or "videos".
        outside: also take files that lie outside of the folder.
        max_missing: share of the list's rows whose files may be missing.

    Raises:
        UserError: if there are none, or the list has a faulty line or names too many missing files.
    """
    # Read names and captions.
    endings = ENDINGS if kind == "pictures" else [ending[1:] for ending in VIDEOS]
    found = list_folder(folder, endings, outside)
    pairs: list[tuple[Path, str]] = []
    problems: list[Problem] = []
    for row in found.rows:
        caption = _caption(folder, found, row)
        if isinstance(caption, Problem):
            problems.append(caption)
        elif isinstance(row, PictureRow):
            pairs.append((Path(row.picture.path), caption))

    # Report what is left out.
    check_missing([problem for problem in problems if problem.kind == MISSING], len(found.rows), max_missing)
    if not pairs:
        first = f" (the first one is {problems[0].file}: {problems[0].reason})" if problems else ""
        other = list_in(folder)
        more = f"; if {other.name} there is their list: swd import source={other} out=shards" if other else ""
        raise UserError(
            f"data.dataset.path={folder} holds no captioned files{first}; add {LIST}, or a .txt beside each file{more}"
        )
    if problems:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in Counter(p.kind for p in problems).items())
        warnings.warn(
            f"data.dataset.path={folder}: {len(problems):,} of {len(found.rows):,} {kind} are left out: {counts}; the "
            f"first one is {problems[0].file}: {problems[0].reason}",
            stacklevel=3,
        )
    return pairs


def check_missing(missing: Sequence[Problem], rows: int, most: float) -> None:
    """Raise UserError if the files of more than a share of the rows are missing."""
    if len(missing) > most * rows:
        more = "" if len(missing) == 1 else f" and {len(missing) - 1:,} more of {rows:,} rows are missing"
        raise UserError(
            f"{missing[0].reason}{more}; take the line{'s' * (len(missing) > 1)} out, or put the file there"
            f"{'' if most >= 1 else f'. Up to data.dataset.max_missing={most} of the rows may be left out'}"
        )


def _caption(folder: Path, found: PictureList, row: PictureRow | Problem) -> str | Problem:
    """The caption of a row, or the problem for which it is left out.

    Raises:
        UserError: for a fault in a list.
    """
    if isinstance(row, Problem):
        if row.kind == "bad line":
            raise UserError(f"{folder / row.file}: {row.reason}")
        descriptions = {
            "no caption": "without a caption",
            "duplicate name": "of a name that another one has",
            "outside": "outside of the folder",
            "unreadable": "that cannot be read",
        }
        return Problem(descriptions.get(row.kind, row.kind), row.file, row.reason)
    where = found.seen.get(row.picture.path)  # only lists record paths
    if where and not os.path.isfile(row.picture.path):
        return Problem(MISSING, row.file, f"{folder / where}: {row.file} is not in the folder")
    try:
        return row.read_texts()[0]
    except NoText as error:
        caption = Path(row.caption.path).name if isinstance(row.caption, Part) else "its caption"
        return Problem("whose caption is empty or no text", row.file, f"{caption} {error}")
    except OSError as error:
        return Problem("whose caption cannot be read", row.file, error.strerror or str(error))


def check_max_pixels(value: int, key: str) -> None:
    """Raise UserError unless a limit on pixels is from 1 to `PILLOW_PIXELS`."""
    if not 1 <= value <= PILLOW_PIXELS:
        raise UserError(f"{key}={value}; use 1 to {PILLOW_PIXELS:,}, more than which Pillow does not open")


def read_picture(file: Path | BinaryIO, size: Size, name: str | None = None, limit: int = MAX_PIXELS) -> Tensor:
    """`load_picture` in [-1, 1], float32."""
    return in_unit_range(load_picture(file, size, name, limit))


def load_picture(file: Path | BinaryIO, size: Size, name: str | None = None, limit: int = MAX_PIXELS) -> Tensor:
    """A picture `[3, H, W]`, uint8, of exactly `size`: scaled to cover it, cropped around the middle.

    It is turned as its EXIF orientation says, transparency becomes white, and of an animation the first frame is taken.

    Args:
        file: path of a file, or an open file.
        size: (H, W) in pixels.
        name: name in messages; None: the file's own.
        limit: largest number of pixels.

    Raises:
        UserError: if it cannot be read, is smaller than `size`, or has more pixels than the limit.
    """
    name = str(file) if name is None else name
    try:
        image = decode(file, limit)
    except Exception as error:  # Pillow raises errors of many types for damaged files
        message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = (message.splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} cannot be read as a picture ({reason[:120]}); remove it") from None
    height, width = size
    if image.width < width or image.height < height:
        raise UserError(f"{name} is {image.width}x{image.height}, smaller than {width}x{height}; remove it")
    array = np.array(cover_and_crop(image, size))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def decode(file: Path | BinaryIO, limit: int = MAX_PIXELS) -> Image.Image:
    """A picture in RGB: upright, transparency over white, 16 bits scaled to 8; of several frames or pages, the first.

    Args:
        file: path of a file, or an open file.
        limit: largest number of pixels.

    Raises:
        Exception: of many types, if the file is damaged, of none of `FORMATS`, or beyond the limit.
    """
    data = Part(str(file)).read(byte_limit(limit)) if isinstance(file, Path) else file.read()
    with open_picture(data, limit) as opened:
        opened.load()
        # Only if it has to be turned, because a needless copy may take longer than decoding.
        image: Image.Image = ImageOps.exif_transpose(opened) if opened.getexif().get(0x0112, 1) != 1 else opened
    plain = image.mode == "RGB" and "transparency" not in image.info
    return image if plain else to_rgb(image)


def byte_limit(pixels: int) -> int:
    """Largest file of a picture in bytes: four uncompressed 16-bit values per pixel, and 16 MiB of metadata."""
    return 8 * pixels + 2**24


def open_picture(data: bytes, limit: int = MAX_PIXELS) -> Image.Image:
    """A picture whose header has been read, but not its pixels.

    Args:
        data: content of the file.
        limit: largest number of pixels.

    Raises:
        Exception: of many types, if the file is damaged, of none of `FORMATS`, or beyond the limit.
    """
    try:
        opened = Image.open(BytesIO(_without_long_texts(data)), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(_beyond(f"more than {PILLOW_PIXELS:,}", limit)) from None
    if opened.width * opened.height > limit:
        raise ValueError(_beyond(f"{opened.width}x{opened.height}", limit))
    return opened


def _beyond(size: str, limit: int) -> str:
    return f"{size} pixels, beyond max_pixels={limit:,}, which keeps memory bounded"


def _without_long_texts(data: bytes) -> bytes:
    """Content of a picture's file; of a PNG, without texts and colour profiles that are too long for Pillow."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    place = 8
    total = 0
    kept = [(0, 8)]
    while place < len(data):
        kind = data[place + 4 : place + 8]
        stop = place + 12 + int.from_bytes(data[place : place + 4])
        is_text = kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
        size = 0
        if is_text and total <= 16 * TEXT_BYTES:
            size = _text_size(kind, data[place + 8 : stop - 4])
            total += min(size, TEXT_BYTES)
        if not is_text or (size <= TEXT_BYTES and total <= 16 * TEXT_BYTES):
            kept.append((place, stop))
        place = stop
    whole = sum(stop - start for start, stop in kept) >= len(data)
    return data if whole else b"".join(data[start:stop] for start, stop in kept)


def _text_size(kind: bytes, chunk: bytes) -> int:
    """Size of a chunk's text after decompression, in bytes; decompression stops just above `TEXT_BYTES`."""
    packed = chunk.partition(b"\0")[2]
    if kind == b"tEXt" or (kind == b"iTXt" and packed[:1] != b"\1"):
        return len(chunk)
    packed = packed[1:] if kind != b"iTXt" else packed[2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        return len(zlib.decompressobj().decompress(packed, TEXT_BYTES + 1))
    except zlib.error:  # Pillow ignores damaged texts
        return 0


def cover_and_crop(image: Image.Image, size: Size) -> Image.Image:
    """A picture scaled down so that it covers `size`, (H, W), cropped around the middle."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    shrunk = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(shrunk, Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST, reducing_gap=2.0)
    left = (shrunk[0] - width) // 2
    top = (shrunk[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def read_video(file: Path, size: Size) -> Tensor:
    """`load_video` in [-1, 1], float32."""
    return in_unit_range(load_video(file, size))


def load_video(file: Path, size: Size) -> Tensor:
    """A video `[3, F, H, W]` of exactly `size`: its first frames, each scaled and cropped as a picture.

    Returns:
        Bytes, uint8, of a video whose frames are only cropped; else float32 in [-1, 1], since scaling comes before
        rounding.

    Raises:
        UserError: if it cannot be read, or is shorter or smaller than `size`.
    """
    count, height, width = size
    frames = video.read_bytes(file, count)
    if any(have < wanted for have, wanted in zip(frames.shape[1:], size, strict=True)):
        raise UserError(f"{file} is {tuple(frames.shape[1:])} (frames, height, width), smaller than {size}; remove it")
    scale = max(height / frames.shape[2], width / frames.shape[3])
    shrunk = (max(height, round(frames.shape[2] * scale)), max(width, round(frames.shape[3] * scale)))
    if shrunk != tuple(frames.shape[2:]):
        frames = F.interpolate(in_unit_range(frames).transpose(0, 1), size=shrunk, mode="area").transpose(0, 1)
    top = (shrunk[0] - height) // 2
    left = (shrunk[1] - width) // 2
    return frames[:, :, top : top + height, left : left + width].contiguous()
