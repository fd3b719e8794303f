"""Shards without an index, read from front to back: `pipe:` commands and plain URLs of tar files.

The order depends on (seed, epoch) and on the number of readers, and a resumed run continues it as long as that number
stays the same. Samples are mixed within a buffer, since a pipe cannot go back.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from tarfile import BLOCKSIZE
from typing import Any, Generic

import fsspec
import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_iterator

from swd.data.decoders import Decoder, S
from swd.data.job import in_shared_memory
from swd.data.picture_list import passed_over
from swd.data.shards import CorruptSample
from swd.data.source_shards import shard_urls
from swd.io.storage import first_line
from swd.types import Batch, UserError, stable_hash

BUFFER = 1000
"""Samples that are mixed at a time."""

RawSample = Mapping[str, Any]
"""A sample as WebDataset reads it: contents of its files by ending, its name in `__key__`, its shard in `__url__`."""

STREAMED = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""Endings of shards that can be read from front to back, as tarfile unpacks them."""


def is_stream(path: str) -> bool:
    """Whether a path names shards themselves rather than a folder of them."""
    return path.startswith("pipe:") or path.split("?")[0].lower().endswith(STREAMED)


@dataclass(frozen=True, slots=True)
class BrokenShard:
    """Stands where a shard could not be read any further; `reason` names the shard."""

    reason: str


@dataclass(frozen=True, slots=True)
class StreamedFiles:
    """The files of one streamed sample; see `swd.data.shard_samples.SampleFiles`.

    Attributes:
        raw: the sample as WebDataset reads it.
    """

    raw: RawSample

    @property
    def name(self) -> str:
        return f"{self.raw['__url__']}, {self.raw['__key__']}"

    @property
    def endings(self) -> list[str]:
        return [ending for ending in self.raw if not ending.startswith("__")]

    def read(self, endings: Sequence[str]) -> dict[str, NDArray[np.uint8]]:
        for ending in endings:
            if ending not in self.raw:
                raise CorruptSample(f"{self.name} has no {ending}")
        return {ending: np.frombuffer(bytearray(self.raw[ending]), np.uint8) for ending in endings}

    def follow(self, column: str) -> None:
        return None


class StreamDataset(IterableDataset[Batch | UserError], Generic[S]):
    """Whole batches from streamed shards, one part of the shards for each reader.

    Args:
        path: URLs of shards as WebDataset takes them, with `{00000..00099}` for many, `::` between several.
        batch_size: over all processes.
        seed: of the order.
        decoder: makes samples of their files.
        buffer: samples that are mixed at a time.

    Raises:
        UserError: if the pattern cannot be read, or names too many shards.
    """

    def __init__(
        self,
        path: str,
        batch_size: int,
        seed: int,
        decoder: Decoder[S],
        buffer: int = BUFFER,
    ) -> None:
        self.urls: list[str] = sorted(shard_urls(path, "data.path"))
        self.batch_size = batch_size
        self.seed = seed
        self.decoder = decoder
        self.buffer = buffer
        self.start = self.total = self.rank = 0
        self.world = self.readers = self.per_iteration = 1
        self.steps: Sequence[int] = (0,)

    def plan(
        self,
        start: int,
        total: int,
        rank: int,
        world: int,
        readers: int,
        per_iteration: int = 1,
        steps: Sequence[int] = (0,),
    ) -> StreamDataset:
        """Say which batches are wanted of which process; `readers` is the number of loader processes of each.

        `steps` are those of the schedule that iterations train, one after the other.

        Raises:
            UserError: if there are fewer shards than readers.
        """
        if len(self.urls) < world * readers:
            raise UserError(
                f"{len(self.urls)} streamed shards for {world} processes with {readers} loader processes each; "
                "every one needs a shard of its own: use fewer data.workers, or more shards"
            )
        self.start = start
        self.total = total
        self.rank = rank
        self.world = world
        self.readers = readers
        self.per_iteration = per_iteration
        self.steps = steps
        return self

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Batch | UserError]:
        try:
            for batch in self._batches():
                yield in_shared_memory(batch)
        except UserError as error:
            yield error  # as a value, since a loader process would put its traceback into the message

    def _batches(self) -> Iterator[Batch]:
        info = get_worker_info()
        # Loader processes take turns; the first one gives the first batch that is wanted, wherever a run is resumed.
        reader = ((info.id if info else 0) + self.start) % self.readers
        turns = range(reader, self.total, self.readers)
        local = self.batch_size // self.world
        samples = self._samples(self.rank * self.readers + reader)
        for batch in turns:
            skipped: list[str] = []
            raws: list[RawSample] = []
            while len(raws) < local:
                raw = next(samples)
                if isinstance(raw, BrokenShard):
                    skipped.append(raw.reason)
                else:
                    raws.append(raw)
            if batch >= self.start:
                yield self._batch(raws, self.steps[batch // self.per_iteration % len(self.steps)], skipped)

    def _batch(self, raws: list[RawSample], step: int, skipped: list[str]) -> Batch:
        """Decode a batch; a sample that fails is replaced by one of its own batch, so that no other one moves."""
        builder = self.decoder.builder(len(raws))
        good: list[S] = []
        for raw in raws:
            try:
                good.append(self.decoder.decode_into(builder, len(good), StreamedFiles(raw), 0, step))
            except CorruptSample as error:
                skipped.append(str(error))
        if not good:
            raise UserError(f"none of the {len(raws)} samples of a batch can be read, the last one: {skipped[-1]}")
        for row in range(len(good), len(raws)):
            builder.put(row, good[row % len(good)])
        return builder.batch(skipped)

    def _samples(self, slot: int) -> Iterator[RawSample | BrokenShard]:
        """The endless samples of one reader.

        Raises:
            UserError: if none of its shards holds one.
        """
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(stable_hash(f"{self.seed}/stream/{epoch}".encode()))
            order = torch.randperm(len(self.urls), generator=generator).tolist()
            mine = [self.urls[i] for i in order[slot :: self.world * self.readers]]
            rng = random.Random(f"{self.seed}/{epoch}/{slot}")
            found = False
            for raw in _shuffled((sample for url in mine for sample in read_shard(url)), self.buffer, rng):
                found = found or not isinstance(raw, BrokenShard)
                yield raw
            if not found:
                raise UserError(f"data.path: {mine[0]} and {len(mine) - 1} more shards hold no sample that can be read")
            epoch += 1


def _shuffled(
    samples: Iterator[RawSample | BrokenShard], size: int, rng: random.Random
) -> Iterator[RawSample | BrokenShard]:
    """Samples in another order, from a buffer of at most `size`."""
    buffer: list[RawSample | BrokenShard] = []
    for sample in samples:
        buffer.append(sample)
        if len(buffer) > size:
            yield _take(buffer, rng)
    while buffer:
        yield _take(buffer, rng)


def _take(buffer: list[RawSample | BrokenShard], rng: random.Random) -> RawSample | BrokenShard:
    """Remove a random entry; the last one moves to its place, which is faster than moving all that follow it."""
    place = rng.randrange(len(buffer))
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()


def read_shard(url: str) -> Iterator[RawSample | BrokenShard]:
    """Raw samples of a shard; where it breaks off, a `BrokenShard` comes last.

    Raises:
        UserError: if the package for this kind of URL is not installed.
    """
    count = 0
    try:
        with wds.gopen(url) if url.startswith("pipe:") else fsspec.open(url, "rb") as opened:
            stream = _Tail(opened)
            files = ({**file, "__url__": url} for file in tar_file_iterator(stream) if not passed_over(file["fname"]))
            for sample in group_by_keys(files):
                yield sample
                count += 1
            if stream.is_cut:
                raise EOFError("unexpected end of data")
    except ImportError as error:
        raise UserError(f"data.path: {url} cannot be read ({first_line(error)})") from None
    except Exception as error:  # of many types: tarfile's, the pipe's, the store's own
        unit = "sample" if count == 1 else "samples"
        more = f"; it breaks off after {count} {unit}, what follows is left out" if count else ""
        reason = first_line(error).partition(" @ <")[0]  # WebDataset adds the stream's address
        yield BrokenShard(f"{url}: {reason}{more}")


class _Tail:
    """A stream that is read once and remembers how it ended.

    It is needed because tarfile takes a file that is cut between two samples, or in a header, for a whole one.

    Args:
        stream: has `read`.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._head = b""
        self._tail = b""
        self._ended = False

    def read(self, size: int = -1) -> bytes:
        """The next bytes; fewer than asked for at the end."""
        data: bytes = self._stream.read(size)
        self._head = self._head or data[:6]
        self._tail = data[-BLOCKSIZE:] or self._tail
        self._ended = size < 0 or len(data) < size
        return data

    @property
    def is_cut(self) -> bool:
        """Whether all was read of a tar file, and no block of zeros, which marks its end, came last."""
        compressed = self._head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
        return self._ended and not compressed and any(self._tail)
