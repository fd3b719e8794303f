"""Lists of captioned pictures: tables and JSON Lines with file names and captions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from swd.data.picture_list import CAPTIONS, Part, PictureList, PictureRow, Problem, printable
from swd.io.job_log import JobLog
from swd.io.ranks import is_first
from swd.io.tables import NoText, Table, is_blank, read_table, text_of
from swd.types import UserError

LIST = "metainfo.csv"
"""Captions of a folder: a header row, then index, file name, caption by position (the published layout)."""
FILES = ("file", "file_name", "filename", "path", "file_path", "filepath", "image", "image_path")
"""Names of columns and JSON keys that hold file names, in order of preference."""
INDICES = ("index", "id")
"""Names of columns and JSON keys that hold the number of a picture."""


def rows_of_list(file: Path, outside: bool, key: str = "outside") -> PictureList:
    """Rows of a list: columns by the names in its header, or by position in the published layout.

    Args:
        file: the list.
        outside: also take files that lie outside of the list's folder.
        key: the configuration key that allows them.

    Raises:
        UserError: if it cannot be read, or lacks the columns of file names or captions.
    """
    # Read the table and find its columns.
    found = PictureList(None if outside else os.path.realpath(file.parent), key)
    if file.name == LIST and found.outside(str(file)):
        raise UserError(f"{file} is a link to a file outside of its folder; {key}=true takes it")
    table = read_table(file)
    index: int | None
    if file.name == LIST:
        _check_published(file, table)
        index = 0
        name = 1
        captions = [2]
    else:
        if not table.header and table.rows:  # no line of JSON Lines is an object
            found.rows += [Problem("bad line", f"{file.name}, line {row.line}", row.fault) for row in table.rows]
            return found
        index = table.column(INDICES)
        name = table.needed(FILES)
        table.needed(CAPTIONS)  # at least one of them must be there
        captions = [table.columns.index(key) for key in CAPTIONS if key in table.columns]

    # Add its rows.
    with JobLog(f"list the pictures of {file}", len(table.rows), "row", shown=is_first()) as progress:
        for row in table.rows:
            where = f"{file.name}, line {row.line}"
            if row.fault:
                found.rows.append(Problem("bad line", where, row.fault))
            else:
                caption = next((row.cells[column] for column in captions if row.cells[column] is not None), None)
                number = None if index is None else row.cells[index]
                _add_line(found, file.parent, where, number, row.cells[name], caption)
            progress.advance()
    return found


def _check_published(file: Path, table: Table) -> None:
    """Raise UserError unless a list in the published layout has a header row and three columns."""
    header = table.header
    if len(header) > 1 and header[1] and os.path.isfile(file.parent / header[1]):
        raise UserError(f"{file} has no header row; put index,file,caption in front")
    if len(header) < 3:
        raise UserError(f"{file} has {len(header)} columns; it needs a header row, then index, file name, caption")


def _is_name(name: str) -> bool:
    """Whether the file system can have a file of this name."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        return False


def _add_line(found: PictureList, folder: Path, where: str, index: Any, name: Any, caption: Any) -> None:
    """Add a row of a list, or the problem for which it is left out.

    Args:
        found: the list that grows.
        folder: folder that file names are relative to.
        where: name of the row in messages.
        index, name, caption: its cells; of any type, since a list may hold anything.
    """
    # A file name must be there.
    if not isinstance(name, str) or not name.strip():
        fault = "no file name" if name is None or name == "" or isinstance(name, str) else "the file name is no text"
        found.rows.append(Problem("bad line", where, fault))
        return
    if not _is_name(name):
        found.rows.append(Problem("bad line", where, "the file name is none that a file can have"))
        return
    path = os.path.normpath(folder / name)

    # So must a caption, unless the file came before: then it is a duplicate, which `add` says.
    try:
        caption = text_of(caption)
    except NoText as error:
        if isinstance(caption, str) and not is_blank(caption):
            found.rows.append(Problem("bad line", where, f"the caption of {name} {error}"))
            return
        if path not in found.seen:
            more = "" if isinstance(caption, str) else f": it {error}"
            found.rows.append(Problem("no caption", name, f"no caption in {where}{more}"))
            return
        caption = None

    # An index counts if it is a whole number or a text.
    if isinstance(index, str):
        index = int(index) if index.isascii() and index.isdigit() and len(index) < 19 else printable(index)
    plain = isinstance(index, int | str) and not isinstance(index, bool) and index != ""
    found.add(PictureRow(printable(name), index if plain else None, Part(path), caption), path, where)
