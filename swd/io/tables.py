"""Tables of texts: CSV, TSV, JSON Lines and plain lines. All commands read them by the same rules.

A faulty row (more cells than the header, a quote that is not closed) is returned with its line number and a description
of the fault; the caller decides whether it skips the row or stops.
"""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from swd.types import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
RECORDS = (".jsonl", ".ndjson")
"""Endings of files with a JSON object a line."""
OTHERS = (".json", ".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".gz", ".zip", ".yaml", ".yml")
"""Endings of files that may hold tables but cannot be read as lines of text."""
LONGEST = 131_072
"""Characters of a text at most: the limit of Python's reader of CSV files, some 40 times what any model reads."""
LARGEST = 4 * 2**30
"""Bytes of a table at most, since it is read into memory as a whole."""
BREAKS = dict.fromkeys(map(ord, "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), " ")
"""Characters other than the newline at which some programs, such as Python's `str.splitlines`, split lines."""
UNSEEN = {"Zs", "Zl", "Zp", "Cc", "Cf", "Cs"}
"""Unicode categories of invisible characters: blanks, control and format characters."""


class NoText(ValueError):
    """A value cannot be used as a prompt; the message is the end of a sentence that begins with "the caption"."""


def text_of(value: Any) -> str:
    """A value as the text of a prompt: line ends are newlines, other separators of lines are blanks.

    Args:
        value: a text, or the bytes of one in UTF-8.

    Raises:
        NoText: if it is of another type, holds only invisible characters, is longer than `LONGEST` or not valid text.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            value = bytes(value).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise NoText(f"is not UTF-8 text (byte {error.start})") from None
    if not isinstance(value, str):
        raise NoText(f"is {_type_in_words(value)}, not text")
    if len(value) > LONGEST:
        raise NoText(f"has {len(value):,} characters, more than {LONGEST:,}")
    if "\0" in value:
        raise NoText("holds a NUL character, as no text does")
    if not _is_unicode(value):
        raise NoText("is no valid Unicode")
    if is_blank(value):
        raise NoText("is empty")
    return value.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n").translate(BREAKS)


def _type_in_words(value: Any) -> str:
    for kind, name in ((dict, "an object"), (list | tuple, "a list"), (type(None), "null"), (bool, "true or false")):
        if isinstance(value, kind):
            return name
    return f"the number {str(value)[:40]}" if isinstance(value, int | float) else f"of type {type(value).__name__}"


def is_blank(text: str) -> bool:
    """Whether a text is empty or holds only invisible characters."""
    return not text.strip() or all(unicodedata.category(character) in UNSEEN for character in text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class TableRow:
    """A row of a table.

    Attributes:
        line: number of its first line, from 1.
        cells: one for each column: a text, or any JSON value; None where a key is missing. Empty if there is a fault.
        fault: description of the fault and of its fix; empty if there is none.
    """

    line: int
    cells: tuple[Any, ...]
    fault: str = ""


@dataclass(frozen=True)
class Table:
    """A table as it lies in a file.

    Attributes:
        file: the file.
        header: names of the columns as written in the file.
        rows: in order, without blank lines.
    """

    file: Path
    header: tuple[str, ...]
    rows: list[TableRow]

    @property
    def columns(self) -> list[str]:
        """Names of the columns, without blanks around them, in lower case."""
        return [name.strip().lower() for name in self.header]

    def column(self, names: Sequence[str]) -> int | None:
        """Position of the column with one of `names`; the first name that exists counts. None if none does."""
        columns = self.columns
        return next((columns.index(name) for name in names if name in columns), None)

    def needed(self, names: Sequence[str], key: str = "") -> int:
        """Like `column`, but required; `key` is put before the file name in the message.

        Raises:
            UserError: if there is none.
        """
        found = self.column(names)
        if found is None:
            columns = ", ".join(self.columns) or "of no name"
            raise UserError(f"{key}{self.file} has columns {columns[:300]}; one must be called {' or '.join(names)}")
        return found


def read_table(file: Path, key: str = "", lines_as: str = "prompt") -> Table:
    """Read a table.

    `.csv` and `.tsv` have a header, and cells may be quoted. `.jsonl` and `.ndjson` have an object in each line; the
    keys of the first one are the columns. Any other file is one column with a text in each line.

    Args:
        file: in UTF-8, with or without a byte order mark.
        key: text before the file name in messages, e.g. "prompts=".
        lines_as: name of the column for a file of plain lines.

    Raises:
        UserError: if it cannot be read as a whole, its header is faulty, or two columns have one name.
    """
    # The ending decides how lines are read.
    ending = file.suffix.lower()
    if ending in OTHERS:
        raise UserError(f"{key}{file} is a {ending} file; give the list as .csv, .jsonl or .txt, in UTF-8")
    lines = _Lines(_bytes(file, key))
    if ending in RECORDS:
        header, rows = _records(lines)
    elif ending in DELIMITERS:
        header, rows = _delimited(lines, DELIMITERS[ending], f"{key}{file}")
    else:
        found = ((i + 1, lines.text(i).strip(" \t\r\n\v\f"), lines.fault(i, i + 1)) for i in range(len(lines.raw)))
        header = (lines_as,)
        rows = [TableRow(i, () if fault else (text,), fault) for i, text, fault in found if fault or not is_blank(text)]

    # Names of columns must be distinct.
    table = Table(file, header, rows)
    doubled = [name for name, count in Counter(table.columns).items() if name and count > 1]
    if doubled:
        raise UserError(f"{key}{file} has more than one column {', '.join(doubled)}; leave one of each")
    return table


def _bytes(file: Path, key: str) -> bytes:
    try:
        if not file.is_file():
            raise UserError(
                f"{key}{file} {'is no file' if file.exists() else 'does not exist'}; give a .csv, .jsonl or .txt"
            )
        if file.stat().st_size > LARGEST:
            raise UserError(f"{key}{file} is larger than {LARGEST / 2**30:.0f} GiB; split it")
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{key}{file} cannot be read ({error.strerror})") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{key}{file} is not UTF-8 text but UTF-16; save it as UTF-8")
    return data


class _Lines:
    """The lines of a file, ends included; bytes that are not UTF-8 become lone surrogates in `text`."""

    def __init__(self, data: bytes) -> None:
        self.raw = data.removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True)  # of bytes: at \n, \r and \r\n only
        self._first = 3 if data.startswith(b"\xef\xbb\xbf") else 0
        self._starts: list[int] | None = None

    def text(self, index: int) -> str:
        return self.raw[index].decode("utf-8", "surrogateescape")

    def fault(self, start: int, stop: int) -> str:
        """Description of the first fault in the bytes of lines `start` to `stop` - 1; empty if there is none."""
        for index in range(start, stop):
            try:
                self.raw[index].decode("utf-8")
            except UnicodeDecodeError as error:
                if self._starts is None:
                    self._starts = list(accumulate(map(len, self.raw), initial=self._first))
                return f"it is not UTF-8 text (byte {self._starts[index] + error.start}); save the file as UTF-8"
            if b"\0" in self.raw[index]:
                return "it holds a NUL byte, as no text does; save the file as UTF-8 text"
        return ""


def _delimited(lines: _Lines, delimiter: str, where: str) -> tuple[tuple[str, ...], list[TableRow]]:
    """Header and rows of a file of separated values."""
    header: tuple[str, ...] | None = None
    rows: list[TableRow] = []
    for start, stop, cells, fault in _parse(lines, delimiter):
        fault = lines.fault(start, stop) or fault
        if not fault and not any(map(str.strip, cells)) and not any('"' in lines.text(i) for i in range(start, stop)):
            continue  # a blank line, or nothing but separators
        if any(re.match(r"\s+\"", cell) for cell in cells):
            fault = fault or "a blank before a quote, which then belongs to the text; take the blank out"
        if header is None:
            if fault:
                raise UserError(f"{where}, line {start + 1}: {fault}")
            header = tuple(cells)
            continue
        if not fault and len(cells) != len(header):
            fault = f"{len(cells)} columns, the header has {len(header)}"
            if len(cells) > len(header):
                fault += f"; put cells that hold a {'comma' if delimiter == ',' else 'tab'} in quotes"
        rows.append(TableRow(start + 1, () if fault else tuple(cells), fault))
    return header or (), rows


def _parse(lines: _Lines, delimiter: str) -> Iterator[tuple[int, int, list[str], str]]:
    """First line, line after the last, cells and fault of every row; after a fault, the next line begins a row."""
    place = start = 0

    def feed() -> Iterator[str]:
        nonlocal place
        while place < len(lines.raw):
            place += 1
            yield lines.text(place - 1)

    while start < len(lines.raw):
        place = start
        try:
            for cells in csv.reader(feed(), delimiter=delimiter, strict=True):
                yield start, place, cells, ""
                start = place
        except csv.Error as error:
            fault = "a quote is not closed, or text follows one"
            if "limit" in str(error):
                fault = f"a cell of more than {LONGEST:,} characters"
            yield start, start + 1, [], f"{fault}; check its quotes"
            start += 1


def _records(lines: _Lines) -> tuple[tuple[str, ...], list[TableRow]]:
    """Keys of the first object, and its rows, of a file with a JSON object a line."""
    header: tuple[str, ...] | None = None
    rows: list[TableRow] = []
    for index in range(len(lines.raw)):
        fault = lines.fault(index, index + 1)
        record = {}
        if not fault:
            text = lines.text(index)
            if not text.strip():
                continue
            try:
                record = parse_object(text)
            except NoText as error:
                fault = str(error)
        if not fault and header is None:
            header = tuple(record)
        rows.append(TableRow(index + 1, () if fault else tuple(record.get(name) for name in header or ()), fault))
    return header or (), rows


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object with its keys in lower case and without blanks around them.

    Raises:
        NoText: if it is not a JSON object, or has a key twice.
    """
    try:
        record = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError, MemoryError):
        record = None
    if not isinstance(record, _Pairs):
        raise NoText("no JSON object")
    names = [str(key).strip().lower() for key, _ in record.pairs]
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise NoText(f"the key {', '.join(doubled)[:100]} more than once; leave one")
    return dict(zip(names, (value for _, value in record.pairs), strict=True))


class _Pairs(dict[str, Any]):
    """A JSON object that keeps all its pairs, also those whose key occurs twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs
