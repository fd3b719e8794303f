"""Folders of pictures with their prompts, and pictures small enough to stand inside a page."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from swd.io.pictures import picture_bytes, to_rgb
from swd.io.tables import NoText, parse_object
from swd.types import UserError

INDEX = "index.jsonl"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
STEP = "_step"
"""Part of the names of the smaller pictures that `swd sample` writes beside each finished one."""

Key = int | str
"""By what pictures of two folders are matched: a number where the name is one, else the name without its ending."""


@dataclass(frozen=True)
class Picture:
    """A file, and its prompt where that is known."""

    file: Path
    prompt: str = ""


@dataclass(frozen=True)
class PictureFolder:
    """Pictures of one model by key, in order."""

    folder: Path
    pictures: Mapping[Key, Picture]


def read_picture_folder(folder: Path) -> PictureFolder:
    """The pictures of a folder: those of its `index.jsonl`, or else all that lie in it.

    Raises:
        UserError: if there is none, or the index is damaged.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} {'is no folder' if folder.exists() else 'does not exist'}; give a folder of pictures"
        )
    indexed = (folder / INDEX).is_file()
    pictures = _indexed(folder) if indexed else _named(folder)
    if not pictures:
        below = next((file.parent for file in _below(folder) if file.suffix.lower() in ENDINGS), None)
        hint = f"; those of {below.name} are in {below}" if below else "; give a folder of pictures"
        raise UserError(f"{folder} holds no pictures ({', '.join(ENDINGS)}){hint}")
    return PictureFolder(folder, pictures)


def _below(folder: Path, depth: int = 4) -> Iterator[Path]:
    """Files in the folders below, those of an evaluation before others, and not endlessly deep."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    for each in sorted(inside, key=lambda path: path.name not in ("evaluation", "pictures")) if depth else ():
        yield from (file for file in sorted(each.iterdir()) if file.is_file())
        yield from _below(each, depth - 1)


def _indexed(folder: Path) -> dict[Key, Picture]:
    """By the numbers of the index: lines of {"index": 0, "prompt": "...", "file": "00000000.png"}."""
    pictures: dict[Key, Picture] = {}
    with (folder / INDEX).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = parse_object(line)
                key, file = row.get("index", number - 1), folder / row["file"]
                if not isinstance(key, int) or key in pictures:
                    raise ValueError
            except (NoText, LookupError, TypeError, ValueError):
                raise UserError(
                    f"{folder / INDEX}, line {number}: no index and file of a picture; draw again"
                ) from None
            pictures[key] = Picture(file, str(row.get("prompt", "")))
    return pictures


def _named(folder: Path) -> dict[Key, Picture]:
    """By their names; the smaller sizes of `swd sample` are left out."""
    pictures: dict[Key, Picture] = {}
    for file in sorted(folder.iterdir()):
        stem = file.stem
        if file.suffix.lower() not in ENDINGS or (
            STEP in stem and (folder / f"{stem.rpartition(STEP)[0]}.png").is_file()
        ):
            continue
        key: Key = int(stem) if stem.isascii() and stem.isdigit() else stem
        if key in pictures:
            raise UserError(f"{folder} has both {pictures[key].file.name} and {file.name}; leave one of them")
        pictures[key] = Picture(file, _prompt(file))
    return pictures


def _prompt(file: Path) -> str:
    """The prompt that `swd sample` wrote into a PNG; empty where there is none."""
    try:
        with Image.open(file) as image:
            found = image.info.get("prompt", "")
    except (OSError, ValueError, SyntaxError):
        return ""
    return found if isinstance(found, str) else ""


# Pictures inside a page


def embedded(file: Path, side: int, quality: int) -> str:
    """A picture as a `data:` address of a WebP file, at most `side` pixels wide and high, without its metadata.

    Raises:
        UserError: if it is no picture.
    """
    try:
        with Image.open(file) as image:
            small = to_rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else "is no picture that can be read"
        raise UserError(f"{file} {reason}; draw it again, or take it out") from None
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return "data:image/webp;base64," + base64.b64encode(picture_bytes(small, "webp", quality)).decode()


def evenly_spread(count: int, wanted: int) -> list[int]:
    """`wanted` of the positions 0 to count - 1, evenly spread, with the first and the last; all if they are few."""
    if wanted >= count:
        return list(range(count))
    if wanted <= 1:
        return [count - 1] if wanted == 1 and count else []
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def names_of(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder, unlike the others: its path without what all have in common.

    Raises:
        UserError: if a folder is given twice.
    """
    whole = [folder.resolve() for folder in folders]
    for place, folder in zip(whole, folders, strict=True):
        if whole.count(place) > 1:
            raise UserError(f"{folder} is given twice; give it once")
    if len(whole) == 1:
        dated = whole[0].name[:1].isdigit()  # a run's folder is called after its time, the one above it after the run
        return ["/".join(whole[0].parts[-2:] if dated else whole[0].parts[-1:])]
    common = 0
    while all(len(place.parts) > common + 1 for place in whole) and len({p.parts[common] for p in whole}) == 1:
        common += 1
    return ["/".join(place.parts[common:]) for place in whole]
