"""Reads shards with an index: any sample at any time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from swd.data.datamodule import Order
from swd.data.decoders import BatchBuilder, Decoder, S
from swd.data.shards import CorruptSample, Scratch, ShardSet
from swd.types import Batch, UserError

TRIES = 100
"""Samples tried in place of one that cannot be read: so many bad ones in a row are no accident."""

PARTS = ", once those of data.validation are taken out or alone; use another share"


@dataclass(frozen=True, slots=True)
class IndexedFiles:
    """The files of one sample of shards with an index; see `swd.data.shard_samples.SampleFiles`.

    Attributes:
        shards: the shards.
        index: number of the sample.
        scratch: memory to read into; None: new memory for every read.
    """

    shards: ShardSet
    index: int
    scratch: Scratch | None = None

    @property
    def name(self) -> str:
        return self.shards.name(self.index)

    @property
    def endings(self) -> list[str]:
        return [ending for ending in self.shards.endings if self.shards.has(self.index, ending)]

    def read(self, endings: Sequence[str]) -> dict[str, NDArray[np.uint8]]:
        return self.shards.read(self.index, endings, self.scratch)

    def follow(self, column: str) -> IndexedFiles | None:
        other = int(self.shards.columns[column][self.index])
        return None if other == self.index else IndexedFiles(self.shards, other, self.scratch)


class _PerThread(threading.local):
    """One `Scratch` for each thread; a copy in another process begins empty."""

    def __init__(self) -> None:
        self.scratch = Scratch()

    def __reduce__(self) -> tuple[type[_PerThread], tuple[()]]:
        return _PerThread, ()


class IndexedShards(Dataset[S], Generic[S]):
    """Samples of shards by (index, step of the schedule), with others in place of those that cannot be read.

    Args:
        shards: the shards.
        decoder: makes samples of their files.
        chosen: which samples are part of this data set, `[N]`; None: all. No other one is ever read for itself, not
            even in place of one that cannot be read.

    Attributes:
        bucket_of: the bucket of every sample `[N]`; -1 for one that cannot be used.
        members: indices of the samples of each bucket, ascending.

    Raises:
        UserError: if no sample can be used, or the index lacks what the decoder needs.
    """

    def __init__(self, shards: ShardSet, decoder: Decoder[S], chosen: NDArray[np.bool_] | None = None) -> None:
        self.shards = shards
        self.decoder = decoder
        self.bucket_of = decoder.buckets_of(shards)
        if chosen is not None:
            self.bucket_of = np.where(chosen, self.bucket_of, -1)
        self.members = [np.flatnonzero(self.bucket_of == bucket) for bucket in range(decoder.bucket_count)]
        self._memory = _PerThread()
        if not len(self):
            raise UserError(f"data.path={shards.root} holds no sample that can be used" + PARTS * (chosen is not None))

    def __len__(self) -> int:
        return sum(map(len, self.members))

    def orders(self, seed: int, window: int | None) -> list[Order]:
        """The endless order of each bucket that has samples."""
        shard = torch.from_numpy(np.searchsorted(self.shards.starts, np.arange(len(self.shards)), "right"))
        filled = [(b, ids) for b, ids in enumerate(self.members) if len(ids)]
        return [
            Order(ids, f"{seed}/order/{b}", None if window is None else shard[ids], window or 1) for b, ids in filled
        ]

    def caption(self, index: int) -> str:
        """The caption of a sample.

        Raises:
            CorruptSample: if it has none.
        """
        return self.decoder.caption(IndexedFiles(self.shards, index))

    def read(self, index: int, step: int) -> S:
        """One sample, for a step of the schedule.

        Raises:
            CorruptSample: if it cannot be read.
        """
        return self.decoder.decode(IndexedFiles(self.shards, index), int(self.bucket_of[index]), step)

    def __getitem__(self, request: tuple[int, int] | int) -> S:
        index, step = request if isinstance(request, tuple) else (request, 0)
        return self._first_good(index, lambda current: self.read(current, step))

    def collate(self, samples: Sequence[S]) -> Batch:
        """The batch of samples of one bucket."""
        return self.decoder.collate(samples)

    def batch_of(self, requests: Sequence[tuple[int, int]]) -> Batch:
        """A batch of (index, step of the schedule); its samples are read into the same memory, one after the other.

        May be called by several threads at once.
        """
        for index, step in requests:
            self.shards.expect(index, self.decoder.wanted(int(self.bucket_of[index]), step))
        builder = self.decoder.builder(len(requests))
        skipped: list[str] = []
        for row, (index, step) in enumerate(requests):
            skipped += self._first_good(index, self._into(builder, row, step)).skipped
        return builder.batch(skipped)

    def _into(self, builder: BatchBuilder[S], row: int, step: int) -> Callable[[int], S]:
        """A function that reads a sample into this thread's memory and puts it into a row of a batch."""
        scratch = self._memory.scratch

        def read(index: int) -> S:
            scratch.clear()
            files = IndexedFiles(self.shards, index, scratch)
            return self.decoder.decode_into(builder, row, files, int(self.bucket_of[index]), step)

        return read

    def _first_good(self, index: int, read: Callable[[int], S]) -> S:
        """A sample, or the next one of its bucket that can be read.

        Raises:
            UserError: if there is none among `TRIES`.
        """
        members = self.members[int(self.bucket_of[index])]
        first = int(np.searchsorted(members, index))
        skipped: list[str] = []
        for place in range(first, first + TRIES):
            try:
                sample = read(int(members[place % len(members)]))
            except CorruptSample as error:
                skipped.append(str(error))
            else:
                return replace(sample, skipped=tuple(skipped)) if skipped else sample
        raise UserError(f"{TRIES} samples in a row cannot be read, the last one: {skipped[-1]}")
