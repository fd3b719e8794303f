"""Lists captioned pictures in lists, folders, and shards of other programs, for `swd import` and `data=images`.

Listing reads lists, names and the headers of shards, never a picture. A source from somebody else could name any file
of this machine; by default, files outside of the source's folder are left out.
"""

from __future__ import annotations

import glob
import json
import os
import posixpath
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any

from webdataset.shardlists import expand_urls

from swd.data.job import is_first
from swd.data.shards import split_name
from swd.io.files import joint_hash
from swd.io.job_log import JobLog
from swd.io.tables import LONGEST, NoText, Table, is_blank, parse_object, read_table, text_of
from swd.types import UserError

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
"""Endings of pictures, in lower case, and the ending that each gets in shards."""
FILES = ("file", "file_name", "filename", "path", "file_path", "filepath", "image", "image_path")
CAPTIONS = ("caption", "text", "prompt")
"""Names of columns and JSON keys that hold captions, in order of preference."""
INDICES = ("index", "id")
LISTS = (".csv", ".tsv", ".jsonl", ".ndjson")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z", ".rar", ".parquet")
"""Endings of archives from which single files cannot be read."""
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
"""First bytes of compressed files."""
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
TEXT_BYTES, META_BYTES = 4 * LONGEST, 16 * 2**20
"""Largest caption file (UTF-8 has up to 4 bytes per character) and largest JSON of a sample, in bytes."""
PATTERNS = 1_000_000
"""Largest number of shards that a pattern may name."""


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


def list_source(source: str, outside: bool = False, skip: Path | None = None) -> PictureList:
    """The rows of a source.

    Args:
        source: a folder, a list, or shards.
        outside: also take files that lie outside of the source's folder.
        skip: a folder to leave out, such as the output folder.

    Raises:
        UserError: if the source is missing, of unknown kind or damaged, or has no captioned picture.
    """
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        found = _folder(path, outside, skip)
    elif os.path.isfile(path):
        found = _file(path, source, outside)
    elif any(mark in source for mark in "{*?["):
        found = _shards([(str(file), file.name) for file in _expand(str(path))], PictureList(), outside)
    else:
        fault = "is a pipe or a device" if os.path.exists(path) else "does not exist"
        raise UserError(f"source={source} {fault}; {GIVE}")
    if not any(isinstance(row, PictureRow) for row in found.rows):
        first = f"; first of {len(found.rows)} problems: {_in_words(found.rows[0])}" if found.rows else ""
        passed = ", ".join(f"{count:,} {kind}" for kind, count in found.ignored.most_common(5))
        more = f"; passed over: {passed}" if passed else ""
        raise UserError(f"source={source} lists no captioned picture{first}{more}{_hint_at_list(path)}")
    return found


GIVE = "give a folder, a .csv or .jsonl list, or .tar shards"


def _file(path: Path, source: str, outside: bool) -> PictureList:
    name = path.name.lower()
    packed = next((ending for ending in PACKED if name.endswith(ending)), None)
    if path.suffix.lower() in LISTS:
        return _list(path, outside)
    if path.suffix.lower() == ".tar":
        return _shards([(str(path), path.name)], PictureList(), outside)
    if packed:
        raise UserError(f"source={source} is of no known kind: compressed, so samples cannot be found; unpack it first")
    raise UserError(f"source={source} is of no known kind; {GIVE}")


def _in_words(row: PictureRow | Problem) -> str:
    return f"{row.file}: {row.kind} ({row.reason})" if isinstance(row, Problem) else row.file


def list_in(folder: Path) -> Path | None:
    """A list in a folder that is read only if the user names it, such as the `metadata.jsonl` of Hugging Face."""
    try:
        found = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in LISTS)
    except OSError:  # also if it is no folder
        return None
    return next((folder / name for name in found if name != LIST and not passed_over(name)), None)


def _hint_at_list(folder: Path) -> str:
    file = list_in(folder)
    return f"; if {file.name} there is their list, give source={file}" if file else ""


def printable(name: str) -> str:
    """A name with characters that UTF-8 cannot hold replaced."""
    return name.encode("utf-8", "replace").decode("utf-8")


def passed_over(name: str) -> bool:
    """Whether a name inside of a source is hidden or a system's own, or lies below such a folder."""
    parts = name.split("/")
    return any((part.startswith(".") and part not in (".", "..")) or part.lower() in SYSTEM for part in parts)


# Folders


def _folder(folder: Path, outside: bool, skip: Path | None) -> PictureList:
    if os.path.isfile(folder / LIST):
        return _list(folder / LIST, outside)
    found = PictureList(None if outside else os.path.realpath(folder))
    names = _walk(folder, found, skip)
    problems = list(found.rows)
    tars = [name for name in names if name.lower().endswith(".tar")]
    _pair(folder, names, ENDINGS, found)
    _count_others(names, found)
    if tars and not any(isinstance(row, PictureRow) for row in found.rows):
        shards = PictureList(found.root, rows=problems, ignored=found.ignored)
        for name in names:
            ending = posixpath.splitext(name)[1].lower()
            if ending[1:] in ENDINGS:
                shards.ignored[f"{ending} (without a caption, beside shards)"] += 1
        return _shards([(os.path.join(folder, name), printable(name)) for name in tars], shards, outside)
    if tars:
        found.ignored[".tar (beside pictures; import them by source=FOLDER/*.tar)"] += len(tars)
    if not found.rows:
        packs = ", ".join(f"{count} {kind}" for kind, count in found.ignored.most_common(5))
        raise UserError(
            f"source={folder} holds no {LIST}, no pictures ({', '.join('.' + e for e in ENDINGS)}) and no .tar"
            f"{f'; it holds {packs}' if packs else ''}{_hint_at_list(folder)}"
        )
    return found


def _count_others(names: Collection[str], found: PictureList) -> None:
    """Count the files of a folder that are neither pictures nor shards, nor the text file of a picture."""
    stems = {stem for stem, ending in map(posixpath.splitext, names) if ending.lower()[1:] in ENDINGS}
    for name in names:
        stem, ending = posixpath.splitext(name)
        packed = next((packed for packed in PACKED if name.lower().endswith(packed)), None)
        ending = printable(ending.lower())
        if packed:
            found.ignored[f"{packed} (unpack them first)"] += 1
        elif ending == ".txt" and stem not in stems:
            found.ignored[".txt (without a picture)"] += 1
        elif ending[1:] not in ENDINGS and ending not in (".txt", ".tar"):
            found.ignored[ending or "without an ending"] += 1


def list_folder(folder: Path, endings: Collection[str], outside: bool = False) -> PictureList:
    """Captioned files of a folder: those in its `metainfo.csv`, else files at any depth with a `.txt` of the same name.

    Args:
        folder: the folder.
        endings: endings of the files to list, in lower case without the dot.
        outside: also take files that lie outside of the folder.

    Raises:
        UserError: if the list cannot be read.
    """
    key = "data.dataset.outside"
    if os.path.isfile(folder / LIST):
        return _list(folder / LIST, outside, key)
    found = PictureList(None if outside else os.path.realpath(folder), key)
    _pair(folder, _walk(folder, found), endings, found)
    return found


def _walk(folder: Path, found: PictureList, skip: Path | None = None) -> dict[str, str]:
    """All entries below a folder that are no folders: names relative to it, sorted, each with the result of `_kind`.

    Hidden and system files are passed over. Folders that cannot be read, and links to folders outside, are added to
    `found` as problems.
    """
    names: dict[str, str] = {}
    entered = {os.path.realpath(folder)} | ({os.path.realpath(skip)} if skip else set())
    left = [""]
    with JobLog(f"list the files below {folder}", 1, "folder", shown=is_first()) as progress:
        while left:
            below = left.pop()
            for name, path, kind, is_link in _entries(folder, below, found):
                if kind is not None:
                    names[below + name] = kind
                elif is_link and found.outside(path):
                    reason = f"a link to a folder outside of {found.root}; {found.key}=true takes it"
                    found.rows.append(Problem("outside", f"{below}{name}/", reason))
                elif not is_link or found.root is None:  # links inside lead to folders that are listed anyway
                    real = os.path.realpath(path)
                    if real not in entered:
                        entered.add(real)
                        left.append(f"{below}{name}/")
                        progress.total += 1
            progress.advance()
    found.rows.sort(key=lambda row: row.file)
    return dict(sorted(names.items()))


def _entries(folder: Path, below: str, found: PictureList) -> list[tuple[str, str, str | None, bool]]:
    """Entries of a folder, links last: name, path, the result of `_kind`, and whether it is a link."""
    try:
        with os.scandir(os.path.join(folder, below)) as entries:
            wanted = [entry for entry in entries if not passed_over(entry.name)]
    except OSError as error:
        found.rows.append(Problem("unreadable", below or str(folder), error.strerror or str(error)))
        return []
    listed = [(entry.name, entry.path, _kind(entry), entry.is_symlink()) for entry in wanted]
    return sorted(listed, key=lambda entry: (entry[3], entry[0]))


def _kind(entry: os.DirEntry[str]) -> str | None:
    """Reason why an entry of a folder is no readable file; empty if it is one, None for a folder."""
    try:
        if entry.is_dir():
            return None
        if entry.is_file():
            return ""
        return "a link to nothing" if entry.is_symlink() else "a pipe, a socket or a device, no file"
    except OSError as error:
        return error.strerror or str(error)


def _pair(folder: Path, names: Mapping[str, str], endings: Collection[str], found: PictureList) -> None:
    """Add files with their captions, the text files of the same name; a second file of one name is a duplicate."""
    texts: dict[str, str] = {}
    split = [(name, *posixpath.splitext(name)) for name in names]
    # If there are a.TXT and a.txt, a.TXT counts: it is set last.
    for name, stem, ending in sorted(split, key=lambda s: s[2], reverse=True):
        if ending.lower() == ".txt":
            texts[stem] = os.path.join(folder, name)
    for name, stem, ending in split:
        if ending.lower()[1:] not in endings:
            continue
        shown = printable(name)
        if names[name]:
            found.rows.append(Problem("unreadable", shown, names[name]))
        else:
            caption = Part(texts[stem]) if stem in texts else None
            found.add(PictureRow(shown, None, Part(os.path.join(folder, name)), caption), stem, f"{shown} and its .txt")


# Lists


def _list(file: Path, outside: bool, key: str = "outside") -> PictureList:
    """Rows of a list: columns by the names in its header, or by position in the published layout."""
    found = PictureList(None if outside else os.path.realpath(file.parent), key)
    if file.name == LIST and found.outside(str(file)):
        raise UserError(f"{file} is a link to a file outside of its folder; {key}=true takes it")
    table = read_table(file)
    index: int | None
    if file.name == LIST:
        _check_published(file, table)
        index, name, captions = 0, 1, [2]
    else:
        if not table.header and table.rows:  # no line of JSON Lines is an object
            found.rows += [Problem("bad line", f"{file.name}, line {row.line}", row.fault) for row in table.rows]
            return found
        index, name, _ = table.column(INDICES), table.needed(FILES), table.needed(CAPTIONS)
        captions = [table.columns.index(key) for key in CAPTIONS if key in table.columns]
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
    header = table.header
    if len(header) > 1 and header[1] and os.path.isfile(file.parent / header[1]):
        raise UserError(f"{file} has no header row; put index,file,caption in front")
    if len(header) < 3:
        raise UserError(f"{file} has {len(header)} columns; it needs a header row, then index, file name, caption")


def _is_name(name: str) -> bool:
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        return False


def _add_line(found: PictureList, folder: Path, where: str, index: Any, name: Any, caption: Any) -> None:
    if not isinstance(name, str) or not name.strip():
        fault = "no file name" if name is None or name == "" or isinstance(name, str) else "the file name is no text"
        found.rows.append(Problem("bad line", where, fault))
        return
    if not _is_name(name):
        found.rows.append(Problem("bad line", where, "the file name is none that a file can have"))
        return
    path = os.path.normpath(folder / name)
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
    if isinstance(index, str):
        index = int(index) if index.isascii() and index.isdigit() and len(index) < 19 else printable(index)
    plain = isinstance(index, int | str) and not isinstance(index, bool) and index != ""
    found.add(PictureRow(printable(name), index if plain else None, Part(path), caption), path, where)


# Shards


def shard_urls(pattern: str, key: str) -> list[str]:
    """The shards that a pattern with braces names, in order.

    Args:
        pattern: a pattern of WebDataset, or several joined by `::`.
        key: its name in messages, e.g. "source".

    Raises:
        UserError: if its braces are invalid or name more than `PATTERNS` shards.
    """
    try:
        for one in pattern.split("::"):
            if _count(one) > PATTERNS:
                raise UserError(f"{key}={one[:200]} names more than {PATTERNS:,} shards; give fewer")
        return list(expand_urls(pattern))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{key}={pattern[:200]}: its braces cannot be read; give {{000..099}}, or {{a,b}}") from None


def _count(pattern: str) -> int:
    """Upper limit of the number of names that a pattern with braces stands for."""
    counts, changed = [1], 1
    while changed:
        groups = re.findall(r"\{([^{}]*)\}", pattern)
        counts += [_choices(group) for group in groups]
        pattern, changed = re.subn(r"\{[^{}]*\}", "", pattern)
    return prod(counts)


def _choices(group: str) -> int:
    numbers = re.fullmatch(r"(-?\d{1,18})\.\.(-?\d{1,18})(\.\.-?\d+)?", group)
    if numbers:
        return abs(int(numbers[2]) - int(numbers[1])) + 1
    return PATTERNS + 1 if re.fullmatch(r"-?\d+\.\.-?\d+(\.\.-?\d+)?", group) else group.count(",") + 1


def _expand(pattern: str) -> list[Path]:
    """Files of a pattern with braces or asterisks, in order."""
    names = [name for one in shard_urls(pattern, "source") for name in (sorted(glob.glob(one)) or [one])]
    for name in names:
        if not os.path.isfile(name):
            raise UserError(f"source={pattern}: {name} does not exist")
        if not name.lower().endswith(".tar"):
            raise UserError(
                f"source={pattern}: {name} is no .tar; patterns are for shards (compressed ones: unpack them)"
            )
    return [Path(name) for name in names]


def _shards(files: Sequence[tuple[str, str]], found: PictureList, outside: bool) -> PictureList:
    """Add the samples of shards, which are given as pairs of path and name in messages."""
    task = f"list the samples of {files[0][0] if files else ''}"
    with JobLog(task, len(files), "shard", shown=is_first()) as progress:
        for path, name in files:
            if found.outside(path):
                reason = f"it lies outside of {found.root}; {found.key}=true takes it"
                found.rows.append(Problem("outside", name, reason))
            elif not os.path.isfile(path):
                found.rows.append(Problem("unreadable", name, "is a pipe, a device or a link to nothing, no file"))
            else:
                _add_shard(found, path, name, outside)
            progress.advance()
    return found


@dataclass
class _Sample:
    """Files of a shard that have one key.

    Attributes:
        parts: places of files by ending.
        dotted: pictures whose name holds a dot: their names by the part after the first dot.
        doubled: whether an ending came twice.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    dotted: dict[str, str] = field(default_factory=dict)
    doubled: bool = False


def _add_shard(found: PictureList, path: str, shard: str, outside: bool) -> None:
    """Append the samples of a shard; keys end at the first dot of a name, as in WebDataset."""
    # Sort files by key.
    samples: dict[str, _Sample] = {}
    last: list[Problem] = []
    for name, part in _members(path):
        shown = f"{shard}/{printable(name)}"
        key, ending = split_name(name.removeprefix("./"))
        if isinstance(part, str) and not name:
            last.append(Problem("damaged shard", shard, part))
        elif passed_over(name):
            found.ignored["hidden or system files"] += 1
        elif isinstance(part, str):
            if ending in (*ENDINGS, "txt", "caption", "json"):
                last.append(Problem("no file", shown, part))
        elif not outside and (posixpath.isabs(name) or ".." in name.split("/")):
            last.append(Problem("outside", shown, f"its name leaves the shard; {found.key}=true takes it"))
        else:
            sample = samples.setdefault(key, _Sample())
            if ending in sample.parts:
                sample.doubled = True
            elif ending in ENDINGS or ending in ("txt", "caption", "json"):
                sample.parts[ending] = part
            elif ending.rpartition(".")[2] in ENDINGS:
                sample.dotted[ending] = shown
            else:
                found.ignored[f".{printable(ending)}"] += 1

    # Add the samples, then the problems of the shard.
    for key, sample in samples.items():
        _add_sample(found, shard, printable(key), sample)
    for key, sample in samples.items():
        if sample.doubled:
            last.append(Problem("duplicate name", f"{shard}/{key}", f"more than once in {shard}"))
    last.sort(key=lambda problem: problem.kind == "damaged shard")
    found.rows += last


def _add_sample(found: PictureList, shard: str, key: str, sample: _Sample) -> None:
    parts = sample.parts
    pictures = [ending for ending in parts if ending in ENDINGS]
    for ending, name in sample.dotted.items():
        if pictures:  # e.g. a mask beside the picture
            found.ignored[f".{printable(ending)}"] += 1
        else:
            stem = key.rpartition("/")[2]
            reason = f"its name holds a dot, so its key is {stem!r} by WebDataset's rule; use another sign than the dot"
            found.rows.append(Problem("dotted name", name, reason))
    if not pictures:
        if parts and not sample.dotted:
            found.rows.append(Problem("no picture", f"{shard}/{key}", f"only .{', .'.join(parts)}"))
        return
    for ending in pictures[1:]:
        found.ignored[f".{ending}"] += 1
    caption = parts.get("txt", parts.get("caption"))
    found.add(
        PictureRow(f"{shard}/{key}.{pictures[0]}", None, parts[pictures[0]], caption, parts.get("json")), key, shard
    )


class _Headers(tarfile.TarFile):
    """A tar file with an attribute of its base class that type checkers do not know: the members read so far."""

    members: list[tarfile.TarInfo]


def _members(path: str) -> Iterator[tuple[str, Part | str]]:
    """Name of every member of a shard, with the place of the file or the reason why it is no file.

    If the shard is damaged, the last pair is "" and the reason.
    """
    end = 0
    try:
        # Compressed shards are recognised by their first bytes.
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            start = stream.read(8)
        packed = next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)
        if packed:
            yield "", f"compressed with {packed}, and samples are read from places in the file; unpack it first"
            return

        # Read the headers one by one.
        with _Headers.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # otherwise memory grows with each member
                if member.offset_data + member.size > size:
                    yield "", f"cut off in {printable(member.name)}"
                    return
                if member.size < 0 or member.offset_data < end:  # such a header can make reading endless
                    yield "", f"damaged at byte {end} of {size}"
                    return
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isreg() and not member.issparse():
                    yield member.name, Part(path, member.offset_data, member.size)
                elif not member.isdir():
                    kind = "a link; put the file itself there" if member.islnk() or member.issym() else "no plain file"
                    yield member.name, f"it is {kind}"

        # tarfile reads a damaged header, or a cut between two samples, as the end, so check for the real end.
        mark = Part(path, end, tarfile.BLOCKSIZE).read(tarfile.BLOCKSIZE)
    except Exception as error:  # tarfile raises errors of many types for damaged headers
        yield "", printable((str(error).splitlines() or [type(error).__name__])[0][:160])
        return
    if mark != bytes(tarfile.BLOCKSIZE):
        yield "", f"damaged or cut off at byte {end} of {size}"
