"""The index of a shard: a safetensors file with the place and the checksum of each file of each sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError

from swd.data.manifest import is_count
from swd.io.storage import first_line
from swd.types import UserError

_WORD = 8
"""Bytes of a word in `sum_of_words`."""
_NO_HASH = "0" * 64
"""Takes the place of an index's own hash while the hash is computed."""
Columns = dict[str, NDArray[np.int64]]


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
        offset = self.table[0]
        length = self.table[1]
        bad = (offset < -1) | (offset > size) | ((offset >= 0) & ((length < 0) | (length > size - offset)))
        if bad.any():
            row, column = np.argwhere(bad)[0].tolist()
            raise UserError(
                f"{where} is damaged: .{self.endings[column]} of sample {row} lies at {offset[row, column]} with "
                f"{length[row, column]} bytes, but the shard has {size}; make the shards again"
            )


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
        checksum = metadata.get("checksum", "words")
        index = Index(metadata["endings"], table, columns, metadata["sha256"], checksum, metadata.get("bytes"))
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
