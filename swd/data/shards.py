"""Shards: tar files as WebDataset writes them, each with an index beside it, and one manifest for all.

    FOLDER/manifest.json     what this is, from which settings, how many samples, a hash of every shard
    FOLDER/00000.tar         samples one after the other: KEY.png, KEY.txt, KEY.json, ...
    FOLDER/00000.idx         where each file of each sample lies (safetensors), so that any sample is one read away

A shard appears under its name only when it is complete. Nothing in a shard is ever unpickled.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from swd.files import file_hash, write_json
from swd.types import UserError

MANIFEST, FORMAT = "manifest.json", 1
_WORD = 8
OPEN_FILES = 256
"""Shards that a process keeps open."""
PAUSES = (0.5, 2.0)
"""Seconds before a remote read that failed is tried again: a passing fault must not change what is trained."""

Columns = dict[str, NDArray[np.int64]]


class CorruptSample(Exception):
    """A sample cannot be used; the message names its file and says why."""


def checksum(data: bytes | memoryview | NDArray[np.uint8]) -> int:
    """Sum of the little-endian 64-bit words of `data`, padded with zeros, modulo 2^63: as fast as memory, unlike CRCs.

    Any single damaged byte changes it.
    """
    array = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data
    whole = len(array) - len(array) % _WORD
    total = int(array[:whole].view("<u8").sum(dtype=np.uint64)) if whole else 0
    return (total + int.from_bytes(array[whole:].tobytes(), "little")) % 2**63


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
    """One shard and its index, as two files that the caller renames into place; a context manager.

    Equal samples give equal bytes: times and owners are left out.

    Args:
        path: of the `.tar`; its index goes to the same name with `.idx`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._rows: list[dict[str, tuple[int, int, int]]] = []
        self._columns: list[Mapping[str, int]] = []

    def add(self, key: str, files: Mapping[str, bytes], columns: Mapping[str, int] | None = None) -> None:
        """Append a sample.

        Args:
            key: its name in the shard.
            files: contents by ending, without the dot.
            columns: whole numbers that readers want of every sample without reading it, e.g. its width.
        """
        row = {}
        for ending, data in files.items():
            info = tarfile.TarInfo(f"{key}.{ending}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
            blocks = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            row[ending] = (self._tar.offset - blocks, len(data), checksum(data))
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
        write_index(self.path.with_suffix(".idx"), self._rows, columns, file_hash(self.path))


def write_index(path: Path, rows: Sequence[Mapping[str, tuple[int, int, int]]], columns: Columns, sha: str) -> None:
    """Write where the files of each sample lie: (offset, size, checksum) by ending."""
    endings = list(dict.fromkeys(ending for row in rows for ending in row))
    table = np.full((3, len(rows), len(endings)), -1, np.int64)
    for i, row in enumerate(rows):
        for ending, place in row.items():
            table[:, i, endings.index(ending)] = place
    tensors = {"offset": table[0], "size": table[1], "checksum": table[2]}
    tensors |= {f"column/{name}": values for name, values in columns.items()}
    data = safetensors.numpy.save(
        {key: np.ascontiguousarray(value) for key, value in tensors.items()},
        {"index": json.dumps({"endings": endings, "sha256": sha})},  # one entry: the order of several is random
    )
    path.write_bytes(data)  # save_file would let nobody but its owner read it


def shard_name(number: int) -> str:
    """File name of a shard without its ending."""
    return f"{number:05d}"


def write_shard(
    folder: Path, number: int, samples: Iterator[tuple[str, Mapping[str, bytes], Mapping[str, int]]]
) -> None:
    """Write a whole shard aside, then rename it and its index; the shard last, since it marks both as complete."""
    folder.mkdir(parents=True, exist_ok=True)
    name = shard_name(number)
    # Another process may clear the folder as soon as the last shard has its name.
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


def is_done(folder: Path, number: int) -> bool:
    """Whether a shard is complete."""
    return (folder / f"{shard_name(number)}.tar").is_file() and (folder / f"{shard_name(number)}.idx").is_file()


def write_manifest(folder: Path, kind: str, shards: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of complete shards: counts, hashes and settings."""
    listed = []
    for number in range(shards):
        with safetensors.safe_open(folder / f"{shard_name(number)}.idx", "np") as opened:
            size = (folder / f"{shard_name(number)}.tar").stat().st_size
            listed.append(
                {
                    "file": f"{shard_name(number)}.tar",
                    "samples": opened.get_slice("offset").get_shape()[0],
                    "bytes": size,
                    "sha256": json.loads(opened.metadata()["index"])["sha256"],
                }
            )
    counts = {key: sum(entry[key] for entry in listed) for key in ("samples", "bytes")}
    own: dict[str, Any] = {"format": FORMAT, "kind": kind, **counts, "shards": listed}
    clash = own.keys() & settings.keys()
    assert not clash, f"settings must not be called {clash}"
    manifest = {key: own[key] for key in ("format", "kind", *counts)} | {**settings, "shards": listed}
    write_json(folder / MANIFEST, manifest)
    return manifest


# Reading


def is_url(path: str) -> bool:
    """Whether a path is for fsspec rather than for the file system."""
    return "://" in path


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__


def fetch(where: str) -> bytes:
    """The bytes of a file, or of any URL that fsspec knows.

    Raises:
        OSError: if it cannot be read, whatever the store itself raises then, or has no package here.
        ValueError: if the URL is of no known kind.
    """
    try:
        with fsspec.open(where, "rb") as stream:
            return bytes(stream.read())
    except (OSError, ValueError):
        raise
    except Exception as error:  # of many types, such as aiohttp's
        raise OSError(first_line(error)) from None


def read_manifest(root: str) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Args:
        root: a folder, or any URL that fsspec knows.

    Raises:
        UserError: if there is none, or it is damaged or of another version.
    """
    where = f"{root.rstrip('/')}/{MANIFEST}"
    try:
        manifest = json.loads(fetch(where))
    except FileNotFoundError:
        raise UserError(
            f"{root} holds no {MANIFEST}; make shards with swd generate, swd import or swd encode, or check the path"
        ) from None
    except ValueError as error:
        if "Protocol not known" in str(error):
            raise UserError(f"{root}: {error}; give a folder or a URL that fsspec knows") from None
        raise UserError(f"{where} is damaged ({str(error)[:80]}); make it again") from None
    except OSError as error:
        raise UserError(f"{where} cannot be read ({first_line(error)})") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), list):
        raise UserError(f"{where} is no manifest of shards; make it again")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{where} has format {manifest.get('format')}, this version reads {FORMAT}; make it again")
    if not manifest["shards"] or not manifest.get("samples", 1):
        raise UserError(f"{root} holds no samples")
    return manifest


@dataclass(frozen=True)
class Place:
    """Where one file of a sample lies: shard number, offset and size in bytes, checksum."""

    shard: int
    offset: int
    size: int
    checksum: int


class Scratch:
    """Memory that is used again for every sample: fresh memory costs more than the read itself."""

    def __init__(self) -> None:
        self._whole, self._used = np.empty(0, np.uint8), 0

    def clear(self) -> None:
        """What was taken may be overwritten."""
        self._used = 0

    def take(self, count: int) -> NDArray[np.uint8]:
        """Some bytes; they stay as they are until `clear`."""
        start = -(-self._used // 64) * 64
        if start + count > len(self._whole):
            self._whole, start = np.empty(2 * (start + count), np.uint8), 0  # earlier parts keep the old memory alive
        self._used = start + count
        return self._whole[start : start + count]


class _File:
    """A file that is closed when nobody holds it any more: one thread may put it away while another one reads it."""

    def __init__(self, path: str) -> None:
        self._close = os.close  # still there when the interpreter ends
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            self._close(self.descriptor)


class ShardSet:
    """All samples of a folder of shards, each one read away.

    Args:
        root: a folder, or any URL that fsspec knows.

    Attributes:
        manifest: of the folder.
        columns: what the index says of every sample, `[N]` by name; -1 where a sample has no such value.
        endings: of the files that samples have.

    Raises:
        UserError: if the manifest or an index is missing or damaged.
    """

    def __init__(self, root: str) -> None:
        self.root, self.manifest = root.rstrip("/"), read_manifest(root)
        self.files = [str(entry["file"]) for entry in self.manifest["shards"]]
        indices = [
            self._read_index(file, entry) for file, entry in zip(self.files, self.manifest["shards"], strict=True)
        ]
        self.endings = list(dict.fromkeys(ending for endings, _ in indices for ending in endings))
        counts = [len(tensors["offset"]) for _, tensors in indices]
        self.starts = np.cumsum([0, *counts])
        self._table = np.full((3, self.starts[-1], len(self.endings)), -1, np.int64)
        names = dict.fromkeys(k.removeprefix("column/") for _, t in indices for k in t if k.startswith("column/"))
        self.columns: Columns = {name: np.full(self.starts[-1], -1, np.int64) for name in names}
        for start, (endings, tensors) in zip(self.starts, indices, strict=False):
            rows = slice(start, start + len(tensors["offset"]))
            for j, ending in enumerate(endings):
                for k, name in enumerate(("offset", "size", "checksum")):
                    self._table[k, rows, self.endings.index(ending)] = tensors[name][:, j]
            for name in self.columns:
                if f"column/{name}" in tensors:
                    self.columns[name][rows] = tensors[f"column/{name}"]
        self._open: dict[tuple[int, int], Any] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def _read_index(self, file: str, entry: Mapping[str, Any]) -> tuple[list[str], dict[str, NDArray[np.int64]]]:
        where = f"{self.root}/{file.removesuffix('.tar')}.idx"
        try:
            data = fetch(where)
            length = int.from_bytes(data[:8], "little")
            endings = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["index"])["endings"]
            tensors = safetensors.numpy.load(data)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(
                f"{where} cannot be read ({str(error).splitlines()[0][:80]}); make the shards again"
            ) from None
        if len(tensors["offset"]) != entry["samples"]:
            raise UserError(f"{where} lists {len(tensors['offset'])} samples, the manifest says {entry['samples']}")
        return endings, tensors

    def shard_of(self, index: int) -> int:
        """Number of the shard that holds a sample."""
        return int(np.searchsorted(self.starts, index, "right")) - 1

    def has(self, index: int, ending: str) -> bool:
        """Whether a sample has a file of this ending."""
        return ending in self.endings and bool(self._table[0, index, self.endings.index(ending)] >= 0)

    def place(self, index: int, ending: str) -> Place:
        """Where a sample's file lies.

        Raises:
            CorruptSample: if it has none.
        """
        if not self.has(index, ending):
            raise CorruptSample(f"{self.name(index)} has no .{ending}")
        offset, size, check = self._table[:, index, self.endings.index(ending)]
        return Place(self.shard_of(index), int(offset), int(size), int(check))

    def name(self, index: int) -> str:
        """What messages call a sample."""
        shard = self.shard_of(index)
        return f"{self.root}/{self.files[shard]}, sample {index - self.starts[shard]}"

    def read(self, index: int, endings: Sequence[str], scratch: Scratch | None = None) -> dict[str, NDArray[np.uint8]]:
        """Contents of a sample's files by ending, in one read where they lie side by side.

        Args:
            index: of the sample.
            endings: of the files.
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
                if checksum(part) != place.checksum:
                    raise CorruptSample(f"{self.name(index)}: .{ending} is damaged")
                found[ending] = part
        return found

    def expect(self, index: int, endings: Sequence[str]) -> None:
        """Let the system fetch a sample's files that are about to be read; what is missing is told when it is read."""
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
        """Bytes of a shard; fewer than asked for where the file ends."""
        try:
            if is_url(self.root):
                return self._remote_range(shard, start, stop)
            buffer = np.empty(stop - start, np.uint8) if scratch is None else scratch.take(stop - start)
            file = self._local(shard)
            count = os.preadv(file.descriptor, [buffer], start)  # type: ignore[list-item]
            return buffer[:count]
        except OSError as error:
            raise CorruptSample(f"{self.root}/{self.files[shard]} cannot be read ({error})") from None

    def _remote_range(self, shard: int, start: int, stop: int) -> NDArray[np.uint8]:
        filesystem, path = self._remote(shard)
        for pause in (*PAUSES, None):
            try:
                return np.frombuffer(bytearray(filesystem.cat_file(path, start=start, end=stop)), np.uint8)
            except Exception as error:  # of many types, such as aiohttp's
                if pause is None or isinstance(error, FileNotFoundError):
                    raise OSError(first_line(error)) from None
                time.sleep(pause)
        raise AssertionError

    def _local(self, shard: int) -> _File:
        """A shard, opened by this process; of many that are open, the oldest is put away."""
        key = (os.getpid(), shard)
        opened = self._open.get(key)
        if opened is None:
            opened = self._open.setdefault(key, _File(f"{self.root}/{self.files[shard]}"))
            while len(self._open) > OPEN_FILES:
                self._open.pop(list(self._open)[0], None)  # noqa: RUF015  # an iterator fails where threads meet
        assert isinstance(opened, _File)
        return opened

    def _remote(self, shard: int) -> Any:
        key = (os.getpid(), shard)
        if key not in self._open:
            self._open[key] = fsspec.core.url_to_fs(f"{self.root}/{self.files[shard]}")
        return self._open[key]


def _runs(places: Mapping[str, Place], gap: int = 2 * tarfile.BLOCKSIZE) -> list[list[str]]:
    """Endings in groups that lie side by side in the shard, apart from a header between them."""
    runs: list[list[str]] = []
    for ending in sorted(places, key=lambda e: places[e].offset):
        last = places[runs[-1][-1]] if runs else None
        if last is not None and 0 <= places[ending].offset - last.offset - last.size <= gap:
            runs[-1].append(ending)
        else:
            runs.append([ending])
    return runs
