"""Common parts of all pages: templates that escape every value, pictures and data inside the page, short numbers."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from swd.io import limits
from swd.io.files import write_text
from swd.io.pictures import to_pil
from swd.types import UserError

GENERATOR = '<meta name="generator" content="swd">'
"""By this line a page says that this program made it, and that it may be replaced by a newer one."""


def check_page_size(megabytes: float, side: int, quality: int) -> None:
    """Raise UserError unless the settings of a page's pictures are in range.

    Args:
        megabytes: the most that the page may have.
        side: pixels of the longest side of a picture.
        quality: of JPEG.
    """
    limits.number("megabytes", megabytes, 0.1, 1000, "a browser opens no larger page")
    limits.whole("side", side, 64, limits.SIDE)
    limits.whole("quality", quality, 1, 100)


def templates(*folders: Path) -> Environment:
    """Templates of `folders` and of this one. All values are escaped, and an undefined name is an error."""
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"significant": significant, "png": png_base64, "data": data}
    environment.globals["generator"] = Markup(GENERATOR)
    return environment


def significant(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits and without an exponent."""
    if not math.isfinite(value) or value == 0:
        return str(value) if value else "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def png_base64(pixels: Tensor) -> str:
    """The picture `[3, H, W]` in [-1, 1] as the base64 text of a PNG file."""
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def data(value: Any) -> Markup:
    """A value as JSON that may stand inside a `<script>`: no text in it can end the element.

    Raises:
        ValueError: if it holds a number that is not finite, which JSON has not.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def write_page(path: Path, html: str) -> Path:
    """Write a page aside, then rename it.

    Raises:
        UserError: if another file is there, which this program did not make.
    """
    check_replaceable(path)
    return write_text(path, html)


def check_replaceable(path: Path) -> None:
    """Raise UserError if something is at `path` that is no page of this program."""
    if path.is_dir():
        raise UserError(f"out={path} is a folder; give the name of a file, e.g. out={path / 'report.html'}")
    if path.exists():
        with path.open("rb") as stream:
            if GENERATOR.encode() not in stream.read(4096):
                raise UserError(f"out={path} is there already and no page of swd; choose another name")
