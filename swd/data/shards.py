"""Shards: tar files as WebDataset writes them, each with an index beside it, and one manifest for all.

    FOLDER/manifest.json     kind, settings, number of samples, hashes of every shard and its index
    FOLDER/00000.tar         samples one after the other: KEY.png, KEY.txt, KEY.json, ...
    FOLDER/00000.idx         the place of each file of each sample (safetensors), so that one read gets any sample

A shard gets its name only when it is complete. Shards may come from somebody else: nothing in a shard is ever
unpickled, and nothing outside of its folder is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import safetensors.numpy
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError

from swd.io.files import file_hash, write_json
from swd.types import UserError

MANIFEST, FORMAT = "manifest.json", 2
FORMATS = (1, 2)
"""Versions that can be read; the first has no hashes of the indices."""
KINDS = ("pictures", "videos", "cache")
"""Possible contents of shards."""
_WORD = 8
OPEN_FILES = 256
"""Shards that a process keeps open at most."""
PAUSES = (0.5, 2.0)
"""Seconds before a failed remote read is tried again: a short disturbance must not change the training data."""

Columns = dict[str, NDArray[np.int64]]


class CorruptSample(Exception):
    """A sample cannot be used; the message names its file and says why."""


def xxh3(data: Any) -> int:
    """The lower 63 bits of the XXH3 hash of bytes: as fast as reading memory, and sensitive to every kind of change."""
    return int(xxhash.xxh3_64_intdigest(data)) % 2**63


def sum_of_words(data: bytes | NDArray[np.uint8]) -> int:
    """Sum of the little-endian 64-bit words of `data`, padded with zeros, modulo 2^63: checksum of the first format.

    It does not notice words that changed places.
    """
    array = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data
    whole = len(array) - len(array) % _WORD
    total = int(array[:whole].view("<u8").sum(dtype=np.uint64)) if whole else 0
    return (total + int.from_bytes(array[whole:].tobytes(), "little")) % 2**63


CHECKSUMS: dict[str, Callable[[Any], int]] = {"xxh3": xxh3, "words": sum_of_words}
"""Checksum functions by the name in an index; an index without a name has sums of words."""


def split_name(name: str) -> tuple[str, str]:
    """Key and ending of a file in a shard, as WebDataset splits them: at the first dot of the file's name.

    >>> split_name("train/00012.64x64.safetensors")
    ('train/00012', '64x64.safetensors')
    """
    folder, _, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


# Writing


class ShardWriter:
    """Writes one shard and its index, which the caller then renames; a context manager.

    Times and owners are left out, so that equal samples give equal bytes.

    Args:
        path: path of the `.tar`; the index gets the same name with `.idx`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._rows: list[dict[str, tuple[int, int, int]]] = []
        self._columns: list[Mapping[str, int]] = []

    def add(self, key: str, files: Mapping[str, bytes], columns: Mapping[str, int] | None = None) -> None:
        """Append a sample.

        Args:
            key: name of the sample in the shard.
            files: contents by ending, without the dot.
            columns: whole numbers that readers need without reading the sample, e.g. its width.
        """
        row = {}
        for ending, data in files.items():
            info = tarfile.TarInfo(f"{key}.{ending}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
            blocks = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            row[ending] = (self._tar.offset - blocks, len(data), xxh3(data))
        self._rows.append(row)
        self._columns.append(columns or {})

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._tar.close()
        if kind is None:
            self._write_index()

    def _write_index(self) -> None:
        names = sorted({name for columns in self._columns for name in columns})
        columns = {n: np.array([c.get(n, -1) for c in self._columns], np.int64) for n in names}
        shard = {"sha256": file_hash(self.path), "bytes": self.path.stat().st_size}
        write_index(self.path.with_suffix(".idx"), self._rows, columns, shard)


def write_index(
    path: Path, rows: Sequence[Mapping[str, tuple[int, int, int]]], columns: Columns, shard: Mapping[str, Any]
) -> None:
    """Write an index: the place of each file of each sample, and columns of numbers.

    Args:
        path: path of the index.
        rows: for each sample (offset, size, checksum) of its files, by ending.
        columns: whole numbers `[N]` by name.
        shard: hash and size of the shard, "sha256" and "bytes".
    """
    endings = list(dict.fromkeys(ending for row in rows for ending in row))
    table = np.full((3, len(rows), len(endings)), -1, np.int64)
    for i, row in enumerate(rows):
        for ending, place in row.items():
            table[:, i, endings.index(ending)] = place
    tensors = {"offset": table[0], "size": table[1], "checksum": table[2]}
    tensors |= {f"column/{name}": values for name, values in columns.items()}
    metadata = {"endings": endings, **shard, "checksum": "xxh3", "own": _NO_HASH}
    data = safetensors.numpy.save(
        {key: np.ascontiguousarray(value) for key, value in tensors.items()},
        {"index": json.dumps(metadata)},  # a single entry, because safetensors writes several in random order
    )
    own = hashlib.sha256(data).hexdigest()
    # Not by save_file, whose files only their owner can read.
    path.write_bytes(data.replace(_NO_HASH.encode(), own.encode(), 1))


_NO_HASH = "0" * 64
"""Takes the place of an index's own hash while the hash is computed."""


@dataclass(frozen=True)
class Index:
    """The index of a shard: the place of each file of its N samples.

    Attributes:
        endings: the E different endings of files.
        table: offset, size and checksum `[3, N, E]`; -1 where a sample has no such file.
        columns: whole numbers `[N]` by name.
        sha256: hash of the shard.
        checksum: name of the checksum in the table, a key of `CHECKSUMS`.
        size: size of the shard in bytes; None in indices of the first format.
    """

    endings: list[str]
    table: NDArray[np.int64]
    columns: Columns
    sha256: str
    checksum: str
    size: int | None

    def __len__(self) -> int:
        return self.table.shape[1]

    def check_places(self, size: int, where: str) -> None:
        """Raise UserError unless all files lie within a shard of `size` bytes; `where` is its name in messages."""
        offset, length = self.table[0], self.table[1]
        bad = (offset < -1) | (offset > size) | ((offset >= 0) & ((length < 0) | (length > size - offset)))
        if bad.any():
            row, column = np.argwhere(bad)[0].tolist()
            raise UserError(
                f"{where} is damaged: .{self.endings[column]} of sample {row} lies at {offset[row, column]} with "
                f"{length[row, column]} bytes, but the shard has {size}; make the shards again"
            )


def parse_index(data: bytes, where: str) -> Index:
    """The contents of an index file.

    Args:
        data: bytes of the file.
        where: name of the file in messages.

    Raises:
        UserError: if it is damaged.
    """
    # Read the parts.
    try:
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["index"])
        tensors = safetensors.numpy.load(data)
        table = np.stack([tensors[name] for name in ("offset", "size", "checksum")])
        columns = {key.removeprefix("column/"): tensors[key] for key in tensors if key.startswith("column/")}
        checksum, size = metadata.get("checksum", "words"), metadata.get("bytes")
        index = Index(metadata["endings"], table, columns, metadata["sha256"], checksum, size)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise UserError(f"{where} cannot be read ({first_line(error)[:80]}); make the shards again") from None

    # They must be what was written, and fit together.
    own = metadata.get("own")
    if own is not None and hashlib.sha256(data.replace(str(own).encode(), _NO_HASH.encode(), 1)).hexdigest() != own:
        raise UserError(f"{where} is damaged: its hash is not the one stored in it; make the shards again")
    names = isinstance(index.endings, list) and all(isinstance(ending, str) for ending in index.endings)
    arrays = [table, *columns.values()]
    if not (
        names
        and len(set(index.endings)) == len(index.endings)
        and all(array.dtype == np.int64 for array in arrays)
        and table.ndim == 3
        and table.shape[2] == len(index.endings)
        and all(column.shape == (len(index),) for column in columns.values())
        and isinstance(index.sha256, str)
        and index.checksum in CHECKSUMS
        and (index.size is None or is_count(index.size))
    ):
        raise UserError(f"{where} is damaged: its parts do not fit together; make the shards again")
    return index


def is_count(value: object) -> bool:
    """Whether a value is a whole number that an index can hold, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def shard_name(number: int) -> str:
    """File name of a shard without its ending."""
    return f"{number:05d}"


def write_shard(
    folder: Path, number: int, samples: Iterator[tuple[str, Mapping[str, bytes], Mapping[str, int]]]
) -> None:
    """Write a shard under a temporary name, then rename its index and the shard.

    The shard is renamed last, since it marks both as complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = shard_name(number)
    # As soon as the last shard has its name, another process may remove the temporary folder.
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder, ignore_cleanup_errors=True) as work:
        try:
            with ShardWriter(Path(work) / f"{name}.tar") as writer:
                for key, files, columns in samples:
                    writer.add(key, files, columns)
            for ending in (".idx", ".tar"):
                os.replace(Path(work) / (name + ending), folder / (name + ending))
        except FileNotFoundError:
            if Path(work).is_dir():
                raise
            raise UserError(
                f"out={folder}: the same job was started again and is at work on shard {name}; let one of them run"
            ) from None
        except OSError as error:
            if error.errno is not None and error.filename is None:  # tarfile does not name the file
                raise OSError(error.errno, error.strerror, str(folder / f"{name}.tar")) from None
            raise


def is_done(folder: Path, number: int) -> bool:
    """Whether a shard is complete."""
    return (folder / f"{shard_name(number)}.tar").is_file() and (folder / f"{shard_name(number)}.idx").is_file()


def fault(folder: Path, number: int) -> str | None:
    """Reason why a complete shard does not match its index, None if it does; reads all of the shard."""
    name = shard_name(number)
    shard = folder / f"{name}.tar"
    try:
        index = parse_index((folder / f"{name}.idx").read_bytes(), f"{name}.idx")
        size = shard.stat().st_size
        if index.size not in (None, size):
            return f"{name}.tar has {size} bytes, its index says {index.size}"
        index.check_places(size, f"{name}.idx")
        return None if file_hash(shard) == index.sha256 else f"the hash of {name}.tar is not the one in its index"
    except UserError as error:
        return str(error).rpartition(";")[0]


def write_manifest(folder: Path, kind: str, shards: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of complete shards: counts, hashes and settings; reads the indices, not the shards."""
    listed: list[dict[str, Any]] = []
    for number in range(shards):
        name = shard_name(number)
        data = (folder / f"{name}.idx").read_bytes()
        index = parse_index(data, f"{folder / name}.idx")
        listed.append(
            {
                "file": f"{name}.tar",
                "samples": len(index),
                "bytes": (folder / f"{name}.tar").stat().st_size,
                "sha256": index.sha256,
                "index_sha256": hashlib.sha256(data).hexdigest(),
            }
        )
    counts = {key: sum(entry[key] for entry in listed) for key in ("samples", "bytes")}
    own: dict[str, Any] = {"format": FORMAT, "kind": kind, **counts, "shards": listed}
    clash = own.keys() & settings.keys()
    assert not clash, f"settings must not be called {clash}"
    manifest = {key: own[key] for key in ("format", "kind", *counts)} | {**settings, "shards": listed}
    manifest["sha256"] = manifest_hash(manifest)
    write_json(folder / MANIFEST, manifest)
    return manifest


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own hash; it does not depend on the layout of the JSON text."""
    rest = json.loads(json.dumps({key: value for key, value in manifest.items() if key != "sha256"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# Reading


def is_url(path: str) -> bool:
    """Whether a path is a URL for fsspec, not a path of the file system."""
    return "://" in path


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__


def fetch(where: str) -> bytes:
    """The bytes of a file, or of any URL that fsspec knows.

    Raises:
        OSError: for all errors of the storage, and if the package for it is not installed.
        ValueError: if the URL is of no known kind.
    """
    try:
        with fsspec.open(where, "rb") as stream:
            return bytes(stream.read())
    except (OSError, ValueError):
        raise
    except Exception as error:  # storages raise errors of many types, such as aiohttp's
        raise OSError(first_line(error)) from None


def read_manifest(root: str) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Args:
        root: a folder, or any URL that fsspec knows.

    Raises:
        UserError: if it is missing, damaged or of another version.
    """
    # Read the file.
    where = f"{root.rstrip('/')}/{MANIFEST}"
    check_inside(root, [MANIFEST])
    try:
        manifest = json.loads(fetch(where))
    except FileNotFoundError:
        raise UserError(
            f"{root} holds no {MANIFEST}; make shards with swd generate, swd import or swd encode, or check the path"
        ) from None
    except (ValueError, RecursionError) as error:
        if "Protocol not known" in str(error):
            raise UserError(f"{root}: {error}; give a folder or a URL that fsspec knows") from None
        raise UserError(f"{where} is damaged ({str(error)[:80]}); make it again") from None
    except OSError as error:
        raise UserError(f"{where} cannot be read ({first_line(error)})") from None

    # Check its content.
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), list):
        raise UserError(f"{where} is no manifest of shards; make it again")
    if manifest.get("format") not in FORMATS or manifest["format"] is True:
        raise UserError(f"{where} has format {manifest.get('format')}, this version reads 1 and 2; make it again")
    if not manifest["shards"] or not manifest.get("samples", 1):
        raise UserError(f"{root} holds no samples")
    _check_manifest(manifest, where)
    return manifest


def _check_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a manifest whose entries are missing, of other types, or contradict each other."""

    def expect(holds: object, what: str) -> None:
        if not holds:
            raise UserError(f"{where} is damaged: {what}; make the shards again")

    # Each entry of the list of shards.
    kind = manifest.get("kind")
    expect(kind in KINDS, f"kind is {kind!r}, known are {', '.join(KINDS)}")
    files = set()
    for number, entry in enumerate(manifest["shards"]):
        expect(isinstance(entry, dict), f"shard {number} of its list is no entry")
        file = entry.get("file")
        expect(isinstance(file, str), f"shard {number} of its list names no file")
        if not re.fullmatch(r"[\w-][\w.-]*\.tar", file):
            raise UserError(
                f"{where} lists the shard {file!r}, but shards lie in the folder of their manifest under names that "
                "end in .tar; do not use these data if somebody else made them"
            )
        expect(file not in files, f"it lists {file} twice")
        files.add(file)
        for key in ("samples", "bytes"):
            expect(is_count(entry.get(key)), f"{key} of {file} is {entry.get(key)!r}")
        for key in ("sha256", "index_sha256") if manifest["format"] > 1 else ("sha256",):
            text = isinstance(entry.get(key), str) and re.fullmatch("[0-9a-f]{64}", entry[key])
            expect(text, f"{key} of {file} is {entry.get(key)!r}")
    # Totals and the hash of the whole.
    for key in ("samples", "bytes"):
        total = sum(entry[key] for entry in manifest["shards"])
        expect(manifest.get(key) == total, f"{key} is {manifest.get(key)!r}, its shards have {total}")
    if "sha256" in manifest:
        same = manifest["sha256"] == manifest_hash(manifest)
        expect(same, "its hash is not the one stored in it (if you changed it on purpose, remove its last entry)")


def check_inside(root: str, names: Sequence[str]) -> None:
    """Raise UserError for files of a local folder that are links out of the folder, or no plain files."""
    folder = re.sub("^(file|local)://", "", root)
    if is_url(folder):
        return
    base = os.path.realpath(folder)
    for name in names:
        real = os.path.realpath(os.path.join(folder, name))
        if os.path.commonpath([base, real]) != base:
            raise UserError(
                f"{root.rstrip('/')}/{name} is a link out of its folder, to {real}; put the file itself there"
            )
        if os.path.exists(real) and not os.path.isfile(real):  # reading a named pipe would never end
            raise UserError(f"{root.rstrip('/')}/{name} is no plain file; make the shards again")


@dataclass(frozen=True)
class Place:
    """Place of one file of a sample: shard number, offset and size in bytes, checksum."""

    shard: int
    offset: int
    size: int
    checksum: int


class Scratch:
    """Memory that is reused for every sample: allocating new memory takes longer than the read itself."""

    def __init__(self) -> None:
        self._whole = np.empty(0, np.uint8)
        self._used = 0

    def clear(self) -> None:
        """Allow all parts that were taken to be overwritten."""
        self._used = 0

    def take(self, count: int) -> NDArray[np.uint8]:
        """A part of `count` bytes, valid until `clear`."""
        start = -(-self._used // 64) * 64
        if start + count > len(self._whole):
            self._whole = np.empty(2 * (start + count), np.uint8)  # earlier parts keep the old memory alive
            start = 0
        self._used = start + count
        return self._whole[start : start + count]


class _File:
    """A file that is closed when the last reference to it ends, since one thread may drop it while another reads it."""

    def __init__(self, path: str) -> None:
        self._close = os.close  # the module `os` may be gone when the interpreter exits
        self.descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.descriptor).st_size

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            self._close(self.descriptor)


class ShardSet:
    """All samples of a folder of shards; any sample is read without reading others.

    Args:
        root: a folder, or any URL that fsspec knows.

    Attributes:
        manifest: the folder's manifest.
        columns: numbers of every sample from the indices, `[N]` by name; -1 where a sample has no such value.
        endings: endings of the files of samples.

    Raises:
        UserError: if the manifest or an index is missing or damaged.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self.manifest = read_manifest(root)
        entries = self.manifest["shards"]
        self.files = [str(entry["file"]) for entry in entries]
        check_inside(self.root, [name for file in self.files for name in (file, _index_name(file))])
        indices = [self._read_index(file, entry) for file, entry in zip(self.files, entries, strict=True)]
        self.endings = list(dict.fromkeys(ending for index in indices for ending in index.endings))
        self._checksums = [CHECKSUMS[index.checksum] for index in indices]
        self.starts = np.cumsum([0, *map(len, indices)])
        self._table = np.full((3, self.starts[-1], len(self.endings)), -1, np.int64)
        names = dict.fromkeys(name for index in indices for name in index.columns)
        self.columns: Columns = {name: np.full(self.starts[-1], -1, np.int64) for name in names}
        for start, index in zip(self.starts, indices, strict=False):
            rows = slice(start, start + len(index))
            for j, ending in enumerate(index.endings):
                self._table[:, rows, self.endings.index(ending)] = index.table[:, :, j]
            for name, values in index.columns.items():
                self.columns[name][rows] = values
        self._open: dict[tuple[int, int], Any] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def _read_index(self, file: str, entry: Mapping[str, Any]) -> Index:
        where = f"{self.root}/{_index_name(file)}"
        try:
            data = fetch(where)
        except (OSError, ValueError) as error:
            raise UserError(f"{where} cannot be read ({first_line(error)[:80]}); make the shards again") from None
        index = parse_index(data, where)
        if len(index) != entry["samples"]:
            raise UserError(f"{where} lists {len(index)} samples, the manifest says {entry['samples']}")
        stored = entry.get("index_sha256")
        if index.sha256 != entry["sha256"] or stored not in (None, hashlib.sha256(data).hexdigest()):
            raise UserError(
                f"{where} is damaged, or of another shard: its hash is not the manifest's; make the shards again"
            )
        index.check_places(entry["bytes"], where)
        return index

    def shard_of(self, index: int) -> int:
        """Number of the shard that holds a sample."""
        return int(np.searchsorted(self.starts, index, "right")) - 1

    def has(self, index: int, ending: str) -> bool:
        """Whether a sample has a file of this ending."""
        return ending in self.endings and bool(self._table[0, index, self.endings.index(ending)] >= 0)

    def have(self, ending: str) -> NDArray[np.bool_]:
        """Which samples have a file of this ending, `[N]`."""
        if ending not in self.endings:
            return np.zeros(len(self), np.bool_)
        found: NDArray[np.bool_] = self._table[0, :, self.endings.index(ending)] >= 0
        return found

    def check_column(self, name: str, start: int, stop: int) -> None:
        """Raise UserError unless a column exists and its values are at least `start` and below `stop`."""
        values = self.columns.get(name)
        if values is None:
            raise UserError(f"the index of {self.root} has no column {name}; make the shards again")
        bad = np.flatnonzero((values < start) | (values >= stop))
        if len(bad):
            index = int(bad[0])
            raise UserError(
                f"the index of {self.name(index)} is damaged: {name} is {values[index]}, which is not from {start} to "
                f"{stop - 1}; make the shards again"
            )

    def place(self, index: int, ending: str) -> Place:
        """Place of a sample's file.

        Raises:
            CorruptSample: if the sample has no such file.
        """
        if not self.has(index, ending):
            raise CorruptSample(f"{self.name(index)} has no .{ending}")
        offset, size, check = self._table[:, index, self.endings.index(ending)]
        return Place(self.shard_of(index), int(offset), int(size), int(check))

    def name(self, index: int) -> str:
        """Name of a sample in messages."""
        shard = self.shard_of(index)
        return f"{self.root}/{self.files[shard]}, sample {index - self.starts[shard]}"

    def read(self, index: int, endings: Sequence[str], scratch: Scratch | None = None) -> dict[str, NDArray[np.uint8]]:
        """Contents of a sample's files by ending; files that lie side by side take one read.

        Args:
            index: index of the sample.
            endings: endings of the files to read.
            scratch: memory to read into; None: new memory.

        Raises:
            CorruptSample: if a file is missing, cut off or damaged.
        """
        places = {ending: self.place(index, ending) for ending in endings}
        found: dict[str, NDArray[np.uint8]] = {}
        for run in _runs(places):
            start = places[run[0]].offset
            stop = places[run[-1]].offset + places[run[-1]].size
            data = self._read_range(places[run[0]].shard, start, stop, scratch)
            for ending in run:
                place = places[ending]
                part = data[place.offset - start : place.offset - start + place.size]
                if len(part) != place.size:
                    raise CorruptSample(f"{self.name(index)}: .{ending} is cut off")
                if self._checksums[place.shard](part) != place.checksum:
                    raise CorruptSample(f"{self.name(index)}: .{ending} is damaged")
                found[ending] = part
        return found

    def expect(self, index: int, endings: Sequence[str]) -> None:
        """Ask the operating system to load files of a sample that will be read soon; ignores missing files."""
        if is_url(self.root) or not hasattr(os, "posix_fadvise"):
            return
        places = {ending: self.place(index, ending) for ending in endings if self.has(index, ending)}
        for run in _runs(places):
            first, last = places[run[0]], places[run[-1]]
            with suppress(OSError):
                file = self._local(first.shard)
                length = last.offset + last.size - first.offset
                os.posix_fadvise(file.descriptor, first.offset, length, os.POSIX_FADV_WILLNEED)

    def _read_range(self, shard: int, start: int, stop: int, scratch: Scratch | None = None) -> NDArray[np.uint8]:
        """Bytes `start` to `stop` of a shard; fewer if the file ends before."""
        try:
            if is_url(self.root):
                return self._remote_range(shard, start, stop)
            file = self._local(shard)
            size = max(min(stop, file.size) - start, 0)  # a damaged index must not cause a huge allocation
            buffer = np.empty(size, np.uint8) if scratch is None else scratch.take(size)
            count = os.preadv(file.descriptor, [buffer], start)  # type: ignore[list-item]
            return buffer[:count]
        except OSError as error:
            raise CorruptSample(f"{self.root}/{self.files[shard]} cannot be read ({error})") from None

    def _remote_range(self, shard: int, start: int, stop: int) -> NDArray[np.uint8]:
        filesystem, path = self._remote(shard)
        for pause in (*PAUSES, None):
            try:
                return np.frombuffer(bytearray(filesystem.cat_file(path, start=start, end=stop)), np.uint8)
            except Exception as error:  # storages raise errors of many types, such as aiohttp's
                if pause is None or isinstance(error, FileNotFoundError):
                    raise OSError(first_line(error)) from None
                time.sleep(pause)
        raise AssertionError

    def _local(self, shard: int) -> _File:
        """A shard, opened by this process; if too many are open, the one opened first is dropped."""
        key = (os.getpid(), shard)
        opened = self._open.get(key)
        if opened is None:
            opened = self._open.setdefault(key, _File(f"{self.root}/{self.files[shard]}"))
            while len(self._open) > OPEN_FILES:
                # A list, because an iterator fails if another thread changes the dictionary meanwhile.
                self._open.pop(list(self._open)[0], None)  # noqa: RUF015
        assert isinstance(opened, _File)
        return opened

    def _remote(self, shard: int) -> Any:
        key = (os.getpid(), shard)
        if key not in self._open:
            self._open[key] = fsspec.core.url_to_fs(f"{self.root}/{self.files[shard]}")
        return self._open[key]


def _index_name(file: str) -> str:
    """File name of a shard's index."""
    return f"{file.removesuffix('.tar')}.idx"


def _runs(places: Mapping[str, Place], gap: int = 2 * tarfile.BLOCKSIZE) -> list[list[str]]:
    """Endings in groups of files that lie side by side in the shard, with only a header between them."""
    runs: list[list[str]] = []
    for ending in sorted(places, key=lambda e: places[e].offset):
        last = places[runs[-1][-1]] if runs else None
        if last is not None and 0 <= places[ending].offset - last.offset - last.size <= gap:
            runs[-1].append(ending)
        else:
            runs.append([ending])
    return runs
