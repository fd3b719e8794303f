"""What `swd import` reads: lists and folders of captioned pictures, and shards made elsewhere.

Listing reads lists, names and the headers of shards, never a picture.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from webdataset.shardlists import expand_urls

from swd.data.images import ENDINGS, LIST
from swd.data.shards import split_name
from swd.types import UserError

FILES = ("file", "file_name", "filename", "path", "file_path", "filepath", "image", "image_path")
CAPTIONS = ("caption", "text", "prompt")
INDICES = ("index", "id")


@dataclass(frozen=True)
class Part:
    """Where bytes lie: a whole file, or `size` of its bytes from `offset` on."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The bytes."""
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


@dataclass(frozen=True)
class Problem:
    """Why a row is left out.

    Attributes:
        kind: one of few, for counting.
        file: what the source calls it.
        reason: in words.
    """

    kind: str
    file: str
    reason: str


@dataclass(frozen=True)
class Row:
    """A picture that a source lists.

    Attributes:
        file: what the source calls it.
        index: the source's own number; None: the row's.
        picture: where it lies.
        caption: the text, or the text file it lies in; None: it is in `meta`.
        meta: a JSON object that may hold `caption` and `index`.
    """

    file: str
    index: int | str | None
    picture: Part
    caption: str | Part | None
    meta: Part | None = None


@dataclass
class Source:
    """The rows of a source in order, and how many files were passed over, by ending."""

    rows: list[Row | Problem] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    seen: dict[str, str] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """SHA-256 of names, captions and places, hexadecimal."""
        digest = hashlib.sha256()
        for row in self.rows:
            told: list[Any] = [row.kind, row.file, row.reason] if isinstance(row, Problem) else [row.file, row.index]
            if isinstance(row, Row):
                for part in (row.picture, row.caption, row.meta):
                    told.append([part.offset, part.size] if isinstance(part, Part) else part)
            digest.update(json.dumps(told).encode() + b"\n")
        return digest.hexdigest()

    def add(self, row: Row, identity: str, where: str) -> None:
        """Append a row, or the problem that can be seen without reading it."""
        problem = None
        if not row.file.strip():
            problem = Problem("bad line", where, "no file name")
        elif identity in self.seen:
            problem = Problem("duplicate name", row.file, f"again in {where}, first in {self.seen[identity]}")
        elif row.meta is None and (row.caption is None or (isinstance(row.caption, str) and not row.caption.strip())):
            problem = Problem("no caption", row.file, f"no caption in {where}")
        elif isinstance(row.caption, str) and printable(row.caption) != row.caption:
            problem = Problem("bad line", row.file, f"{where}: the caption is no valid Unicode")
        else:
            self.seen[identity] = where
        self.rows.append(problem or row)


def list_source(source: str) -> Source:
    """The rows of a source.

    Raises:
        UserError: if it is missing, of no known kind, damaged, or has nothing that can be used.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = _folder(path)
    elif any(mark in source for mark in "{*?["):
        found = _shards(_expand(str(path)))
    elif not path.is_file():
        raise UserError(f"source={source} does not exist; give a folder, a .csv or .jsonl list, or .tar shards")
    elif path.name == LIST:
        found = _published(path)
    elif path.suffix.lower() in READERS:
        found = READERS[path.suffix.lower()](path)
    else:
        raise UserError(f"source={source} is of no known kind; give a folder, a .csv or .jsonl list, or .tar shards")
    if not any(isinstance(row, Row) for row in found.rows):
        first = f"; first of {len(found.rows)} problems: {_tell(found.rows[0])}" if found.rows else ""
        raise UserError(f"source={source} lists no captioned picture{first}")
    return found


def _tell(row: Row | Problem) -> str:
    return f"{row.file}: {row.kind} ({row.reason})" if isinstance(row, Problem) else row.file


def printable(name: str) -> str:
    """A name that can be written as UTF-8."""
    return name.encode("utf-8", "replace").decode("utf-8")


# Folders


def _folder(folder: Path) -> Source:
    if (folder / LIST).is_file():
        return _published(folder / LIST)
    pairs, tars = _pairs(folder), sorted(folder.glob("*.tar"))
    if tars and not any(isinstance(row, Row) for row in pairs.rows):
        return _shards(tars)
    if not pairs.rows:
        raise UserError(
            f"source={folder} holds no {LIST}, no pictures ({', '.join('.' + e for e in ENDINGS)}) and no .tar"
        )
    return pairs


def _pairs(folder: Path) -> Source:
    """Pictures and the text files of the same name, at any depth, by name; two pictures of one name are one sample."""
    found, texts = Source(), {}
    files = [file for file in folder.rglob("*") if not file.name.startswith(".") and file.is_file()]
    for file in sorted(files, key=lambda f: f.suffix, reverse=True):  # of a.TXT and a.txt, the first in ASCII
        if file.suffix.lower() == ".txt":
            texts[file.with_suffix("")] = file
    for file in sorted(files, key=lambda f: f.relative_to(folder).as_posix()):
        if file.suffix.lower()[1:] in ENDINGS:
            name, text = printable(file.relative_to(folder).as_posix()), texts.get(file.with_suffix(""))
            caption = None if text is None else Part(str(text))
            found.add(Row(name, None, Part(str(file)), caption), str(file.with_suffix("")), f"{name} and its .txt")
    return found


# Lists


def _published(file: Path) -> Source:
    """The published layout: a header row, then index, file name, caption by position."""
    found, lines = Source(), _csv(file)
    _, header = next(lines, (0, []))
    if len(header) > 1 and header[1] and (file.parent / header[1]).is_file():
        raise UserError(f"{file} has no header row; put index,file,caption in front")
    for number, row in lines:
        _add_line(found, file, number, row, (0, 1, 2))
    return found


def _table(file: Path) -> Source:
    """A CSV file whose header names the columns."""
    found, lines = Source(), _csv(file)
    header = [name.strip().lower() for name in next(lines, (0, []))[1]]
    columns = (_column(header, INDICES, None), _column(header, FILES, file), _column(header, CAPTIONS, file))
    for number, row in lines:
        _add_line(found, file, number, row, columns)
    return found


def _records(file: Path) -> Source:
    """A file with a JSON object a line; the first one says what the keys are called."""
    found, header = Source(), None
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            found.rows.append(Problem("bad line", f"{file.name}, line {number}", "no JSON object"))
            continue
        record = {str(key).strip().lower(): value for key, value in record.items()}
        if header is None:
            names = list(record)
            columns = (_column(names, INDICES, None), _column(names, FILES, file), _column(names, CAPTIONS, file))
            header = ["" if column is None else names[column] for column in columns]
        _add_line(found, file, number, [record.get(key) for key in header], (0, 1, 2))
    return found


def _add_line(found: Source, file: Path, number: int, row: Sequence[Any], columns: Sequence[int | None]) -> None:
    where = f"{file.name}, line {number}"
    if len(row) <= max(column for column in columns if column is not None):
        found.rows.append(Problem("bad line", where, f"{len(row)} columns"))
        return
    index, name, caption = (None if column is None else row[column] for column in columns)
    if not isinstance(name, str):
        found.rows.append(Problem("bad line", where, f"the file name is {name!r}"))
        return
    if isinstance(index, str):
        index = int(index) if index.isascii() and index.isdigit() else printable(index)
    path = os.path.normpath(file.parent / name)
    row_of = Row(
        printable(name),
        index if isinstance(index, int | str) and index != "" else None,
        Part(path),
        caption if isinstance(caption, str) else None,
    )
    found.add(row_of, path, where)


def _csv(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number, where a row ends, and cells; empty rows are left out."""
    reader = csv.reader(io.StringIO(_text(file), newline=""))
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: {error}; check its quotes") from None


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None


def _column(header: Sequence[str], names: Sequence[str], file: Path | None) -> int | None:
    """Position of the first of `names` in `header`; None if there is none and none is needed (`file` is None)."""
    for name in names:
        if name in header:
            return header.index(name)
    if file is None:
        return None
    raise UserError(f"{file} has columns {', '.join(header) or 'of no name'}; one must be called {' or '.join(names)}")


# Shards


def _expand(pattern: str) -> list[Path]:
    """Files of a pattern with braces or asterisks, in order."""
    names = [name for one in expand_urls(pattern) for name in (sorted(glob.glob(one)) or [one])]
    for name in names:
        if not Path(name).is_file():
            raise UserError(f"source={pattern}: {name} does not exist")
        if not name.lower().endswith(".tar"):
            raise UserError(f"source={pattern}: {name} is no .tar; patterns are for shards")
    return [Path(name) for name in names]


def _shards(files: Sequence[Path]) -> Source:
    found = Source()
    for file in files:
        _add_shard(found, file)
    return found


def _add_shard(found: Source, file: Path) -> None:
    """Append the samples of a shard: keys by the first dot of a name, as WebDataset has it."""
    samples: dict[str, dict[str, Part]] = {}
    doubles: dict[str, None] = {}
    cut = None
    for name, part in _members(file):
        if part is None:
            cut = name
            break
        key, ending = split_name(name.removeprefix("./"))
        sample = samples.setdefault(key, {})
        if ending in sample:
            doubles[key] = None
        elif ending in ENDINGS or ending in ("txt", "caption", "json"):
            sample[ending] = part
        else:
            found.ignored[f".{ending}"] += 1
    for key, sample in samples.items():
        _add_sample(found, file.name, printable(key), sample)
    for key in doubles:
        found.rows.append(Problem("duplicate name", f"{file.name}/{printable(key)}", f"more than once in {file.name}"))
    if cut is not None:
        found.rows.append(Problem("damaged shard", file.name, cut))


def _add_sample(found: Source, shard: str, key: str, sample: dict[str, Part]) -> None:
    pictures = [ending for ending in sample if ending in ENDINGS]
    if not pictures:
        if sample:
            found.rows.append(Problem("no picture", f"{shard}/{key}", f"only .{', .'.join(sample)}"))
        return
    for ending in pictures[1:]:
        found.ignored[f".{ending}"] += 1
    row = Row(
        f"{shard}/{key}.{pictures[0]}",
        None,
        sample[pictures[0]],
        sample.get("txt", sample.get("caption")),
        sample.get("json"),
    )
    found.add(row, key, shard)


def _members(file: Path) -> Iterator[tuple[str, Part | None]]:
    """Name and place of every whole file in a shard; at last, if it is damaged, the reason and None."""
    size, end = file.stat().st_size, 0
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps them all
                if member.offset_data + member.size > size:
                    yield f"cut off in {printable(member.name)}", None
                    return
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isreg() and not member.issparse():
                    yield member.name, Part(str(file), member.offset_data, member.size)
    except tarfile.TarError as error:
        yield printable(str(error)), None
        return
    # tarfile takes a damaged header for the end, and a shard may be cut between two samples.
    mark = Part(str(file), end, tarfile.BLOCKSIZE).read()
    if mark != bytes(tarfile.BLOCKSIZE):
        yield f"damaged or cut off at byte {end} of {size}", None


READERS = {".csv": _table, ".jsonl": _records, ".tar": lambda file: _shards([file])}
