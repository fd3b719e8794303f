"""Writes shards, their indices and their manifest; a shard gets its name only when it is complete."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from swd.data.manifest import FORMAT, MANIFEST, manifest_hash
from swd.data.shard_index import parse_index, write_index, xxh3
from swd.io.files import file_hash, write_json
from swd.types import UserError


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
