"""Shards: tar files as WebDataset writes them, each with an index beside it, and one manifest for all.

    FOLDER/manifest.json     kind, settings, number of samples, hashes of every shard and its index
    FOLDER/00000.tar         samples one after the other: KEY.png, KEY.txt, KEY.json, ...
    FOLDER/00000.idx         the place of each file of each sample (safetensors), so that one read gets any sample

`swd.data.shard_writer` writes them, `ShardSet` reads any sample of them.

A shard gets its name only when it is complete. Shards may come from somebody else: nothing in a shard is ever
unpickled, and nothing outside of its folder is read.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from swd.data.manifest import check_inside, read_manifest
from swd.data.shard_index import CHECKSUMS, Columns, Index, parse_index
from swd.io.storage import fetch, first_line, is_url
from swd.types import UserError

OPEN_FILES = 256
"""Shards that a process keeps open at most."""
PAUSES = (0.5, 2.0)
"""Seconds before a failed remote read is tried again: a short disturbance must not change the training data."""


class CorruptSample(Exception):
    """A sample cannot be used; the message names its file and says why."""


def split_name(name: str) -> tuple[str, str]:
    """Key and ending of a file in a shard, as WebDataset splits them: at the first dot of the file's name.

    >>> split_name("train/00012.64x64.safetensors")
    ('train/00012', '64x64.safetensors')
    """
    folder, _, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


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
        # Read the manifest and all indices.
        self.root = root.rstrip("/")
        self.manifest = read_manifest(root)
        entries = self.manifest["shards"]
        self.files = [str(entry["file"]) for entry in entries]
        check_inside(self.root, [name for file in self.files for name in (file, _index_name(file))])
        indices = [self._read_index(file, entry) for file, entry in zip(self.files, entries, strict=True)]

        # Join the indices into one table: offset, size and checksum `[3, N, endings]`.
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
        self._open: dict[tuple[int, int], _File] = {}
        self._stores: dict[tuple[int, int], tuple[Any, str]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}, "_stores": {}}

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
            first = places[run[0]]
            last = places[run[-1]]
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
            count = os.preadv(file.descriptor, [buffer.data], start)
            return buffer[:count]
        except OSError as error:
            raise CorruptSample(f"{self.root}/{self.files[shard]} cannot be read ({error})") from None

    def _remote_range(self, shard: int, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes `start` to `stop` of a remote shard; a failed read is tried again after each of `PAUSES`.

        Raises:
            OSError: if the last try fails.
        """
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
        return opened

    def _remote(self, shard: int) -> tuple[Any, str]:
        """The file system of fsspec that holds a shard, made by this process, and the shard's path in it."""
        key = (os.getpid(), shard)
        if key not in self._stores:
            self._stores[key] = fsspec.core.url_to_fs(f"{self.root}/{self.files[shard]}")
        return self._stores[key]


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
