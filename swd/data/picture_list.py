"""Rows of a source of captioned pictures: where each picture and its caption lie, and which rows are left out."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from swd.io.files import joint_hash
from swd.io.tables import LONGEST, NoText, parse_object, text_of

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
"""Endings of pictures, in lower case, and the ending that each gets in shards."""
CAPTIONS = ("caption", "text", "prompt")
"""Names of columns and JSON keys that hold captions, in order of preference."""
SYSTEM = frozenset(
    [
        "__macosx",
        "@eadir",
        "@tmp",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "recycler",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "lost+found",
        "__pycache__",
        "icon\r",
    ]
) | {"system volume information"}
"""Names, in lower case, of files and folders that operating systems, file servers and programs create."""
TEXT_BYTES = 4 * LONGEST
"""Largest caption file in bytes: UTF-8 has up to 4 for a character."""
META_BYTES = 16 * 2**20
"""Largest JSON of a sample in bytes."""


@dataclass(frozen=True)
class Part:
    """Place of some bytes: a whole file, or `size` bytes of it from `offset` on."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self, limit: int) -> bytes:
        """The bytes, at most `limit` of them.

        Raises:
            OSError: if they cannot be read or are more than `limit`, or if the path is a folder, a pipe or a device.
        """
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise OSError("is a folder, a pipe or a device, no file")
        # Non-blocking, in case the file has become a pipe since the check above, to which nobody writes.
        with open(os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size if self.size < 0 else self.size
            if size > limit:
                raise OSError(f"has {size:,} bytes, more than {limit:,}")
            stream.seek(self.offset)
            return stream.read(size)


@dataclass(frozen=True)
class Problem:
    """A row that is left out, and the reason. All texts can be written as UTF-8.

    Attributes:
        kind: short name of the reason, for counting.
        file: name of the file in the source.
        reason: the reason in words.
    """

    kind: str
    file: str
    reason: str

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, printable(getattr(self, one.name)))


@dataclass(frozen=True)
class PictureRow:
    """A picture that a source lists.

    Attributes:
        file: name of the file in the source.
        index: number in the source; None: the number of the row.
        picture: place of the picture.
        caption: the caption, or the place of its text file; None: it is in `meta`.
        meta: place of a JSON object that may hold a caption and `index`.
    """

    file: str
    index: int | str | None
    picture: Part
    caption: str | Part | None
    meta: Part | None = None

    def read_texts(self) -> tuple[str, int | str | None]:
        """Caption and index, read from their files.

        Raises:
            NoText: if there is no caption.
            OSError: if one of the files cannot be read.
        """
        if self.caption is None and self.meta is None:
            raise NoText("is missing")
        contents: dict[str, Any] = {}
        if self.caption is not None:
            contents["txt"] = self.caption.read(TEXT_BYTES) if isinstance(self.caption, Part) else self.caption
        if self.meta is not None:
            contents["json"] = self.meta.read(META_BYTES)
        caption = caption_of(contents)
        index = meta_of(contents).get("index") if self.index is None else self.index
        is_number = isinstance(index, int) and not isinstance(index, bool)
        return caption, index if is_number or isinstance(self.index, str) else None


def meta_of(contents: Mapping[str, Any]) -> dict[str, Any]:
    """The `.json` of a sample with keys in lower case; empty if there is none or it is no JSON object."""
    try:
        return parse_object(contents["json"]) if "json" in contents else {}
    except NoText:
        return {}


def caption_of(contents: Mapping[str, Any]) -> str:
    """The caption of a sample: its `.txt`, else its `.caption`, else the first of `CAPTIONS` in its `.json`.

    Args:
        contents: contents of the sample's files by ending.

    Raises:
        NoText: if none of them is a text; the message is about the first one.
    """
    first: NoText | None = None
    meta = meta_of(contents)
    key = next((key for key in CAPTIONS if meta.get(key) is not None), None)
    texts = [contents[ending] for ending in ("txt", "caption") if ending in contents]
    for value in [*texts, *([] if key is None else [meta[key]])]:
        try:
            text = text_of(value)
            return text if isinstance(value, str) else text.strip()
        except NoText as error:
            first = first or error
    raise first or NoText("is missing")


@dataclass
class PictureList:
    """The rows of a source.

    Attributes:
        root: real path of the folder that must hold all files; None: they may lie anywhere.
        key: the configuration key that allows files outside of `root`.
        rows: pictures and problems in order.
        ignored: number of files that were passed over, by ending.
        seen: for each identity, such as a path, the place in the source where it came first.
        real: real paths of folders, remembered.
    """

    root: str | None = None
    key: str = "outside"
    rows: list[PictureRow | Problem] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    seen: dict[str, str] = field(default_factory=dict)
    real: dict[str, str] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """SHA-256 of names, captions and places, hexadecimal."""
        return joint_hash(json.dumps(_entry(row)).encode() + b"\n" for row in self.rows)

    def add(self, row: PictureRow, identity: str, where: str) -> None:
        """Append a row, or a problem if one is known before the picture is read."""
        problem = None
        if identity in self.seen:
            problem = Problem("duplicate name", row.file, f"again in {where}, first in {self.seen[identity]}")
        elif self.outside(row.picture.path):
            problem = Problem("outside", row.file, f"{where}: it lies outside of {self.root}; {self.key}=true takes it")
        elif isinstance(row.caption, Part) and self.outside(row.caption.path):
            problem = Problem("outside", row.file, f"its caption lies outside of {self.root}; {self.key}=true takes it")
        elif row.caption is None and row.meta is None:
            problem = Problem("no caption", row.file, f"no caption in {where}")
        else:
            self.seen[identity] = where
        self.rows.append(problem or row)

    def outside(self, path: str) -> bool:
        """Whether a file lies outside of the source's folder after links are followed."""
        if self.root is None:
            return False
        folder, name = os.path.split(path)
        if folder not in self.real:  # once for all files of a folder
            self.real[folder] = os.path.realpath(folder)
        real = os.path.join(self.real[folder], name)
        return not _within(os.path.realpath(real) if os.path.islink(real) else real, self.root)


def _entry(row: PictureRow | Problem) -> list[Any]:
    """Values of a row that the hash of its list covers."""
    if isinstance(row, Problem):
        return [row.kind, row.file, row.reason]
    parts = (row.picture, row.caption, row.meta)
    return [row.file, row.index, *([part.offset, part.size] if isinstance(part, Part) else part for part in parts)]


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(os.path.join(root, ""))


def printable(name: str) -> str:
    """A name with characters that UTF-8 cannot hold replaced."""
    return name.encode("utf-8", "replace").decode("utf-8")


def passed_over(name: str) -> bool:
    """Whether a name inside of a source is hidden or a system's own, or lies below such a folder."""
    parts = name.split("/")
    return any((part.startswith(".") and part not in (".", "..")) or part.lower() in SYSTEM for part in parts)
