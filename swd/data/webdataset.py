"""Training data from shards, of pictures or of what `swd encode` made of them: local, remote, or through a pipe."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from swd.data.buckets import bucket_sizes
from swd.data.datamodule import (
    LOOKED_AT,
    BatchPlan,
    GlobalBatches,
    Guarded,
    GuardedLoader,
    ThreadedLoader,
    TrainingData,
    as_it_is,
    check_loading,
    warn_long_captions,
)
from swd.data.decoders import CacheDecoder, Decoder, PictureDecoder
from swd.data.held_out import HeldOut, is_held_out, is_share
from swd.data.indexed import IndexedShards
from swd.data.iterations import IterationBatches
from swd.data.manifest import read_manifest
from swd.data.picture_files import MAX_PIXELS, check_max_pixels
from swd.data.shards import ShardSet
from swd.data.streamed import StreamDataset, is_stream
from swd.io import limits
from swd.io.storage import is_url
from swd.modules.pretrained import Pretrained
from swd.schedule import ScaleSchedule
from swd.types import Batch, Conditioning, Size, UserError

MOST_AHEAD = 100
"""Batches that one loader may have ready at most: they lie in memory, and a few are enough to bridge a slow read."""
LOOKED_AT_REMOTE = 50
"""Captions whose length is looked at where each one is a request of its own."""
COUNTED = 1000
"""The share of unreadable samples is taken of at least this many, so that one early fault does not stop a run."""


class ShardData(TrainingData):
    """Samples from shards, in an order that depends on (seed, epoch) alone, exact on resume.

    Args:
        path: folder or fsspec URL with a manifest (of `swd generate`, `swd import` or `swd encode`); or the URLs of
            shards that are streamed from front to back: `pipe:COMMAND`, or anything that ends in `.tar`, with
            `{00000..00099}` for many.
        size: final side, (H, W) or (F, H, W) in pixels, where shards hold pictures; None: where the schedule ends. With
            `buckets`, the side of the square with their area.
        buckets: proportions "WIDTH:HEIGHT"; each picture goes to the nearest. None: all are cropped to `size`.
        multiple: sides of buckets are multiples of this many pixels.
        batch_size: over all processes.
        workers: loader processes (threads for a cache); 0 loads in the training process.
        prefetch: batches that each of them has ready.
        seed: of the order.
        window: shards that are mixed at a time, which keeps remote reads near each other; None: all.
        manifest: folder or URL with the manifest of streamed shards; a cache needs it.
        max_bad: share of the samples read that may be unreadable before the run stops.
        max_pixels: pictures of more pixels are unreadable samples, found before they are decoded.
        validation: a share of the samples that is never trained on, or a folder (URL) of shards of the same kind with
            samples of its own; None: neither. Shards that are streamed can have the latter only.

    Raises:
        UserError: if there are no such shards, or settings contradict each other.
    """

    def __init__(
        self,
        path: str | None,
        size: int | Sequence[int] | None = None,
        buckets: Sequence[str] | None = None,
        multiple: int = 64,
        batch_size: int = 16,
        workers: int = 0,
        prefetch: int = 2,
        seed: int = 0,
        window: int | None = None,
        max_bad: float = 0.01,
        manifest: str | None = None,
        max_pixels: int = MAX_PIXELS,
        validation: float | str | None = None,
    ) -> None:
        super().__init__()
        if path is None:
            raise UserError("data.path is missing; give a folder of shards, made by swd generate, import or encode")
        check_loading(batch_size, workers, seed)
        check_shard_settings(prefetch, window, multiple, max_bad, max_pixels)
        self.path = path
        self.batch_size = batch_size
        self.workers = workers
        self.prefetch = prefetch
        self.seed = seed
        self.window = window
        self.max_bad = max_bad

        # Choose how the shards are read, and how their samples are decoded.
        self.source: IndexedShards[Any] | StreamDataset[Any]
        self.validation: IndexedShards[Any] | None = None
        decoder_of = partial(indexed_decoder, size=size, buckets=buckets, multiple=multiple, max_pixels=max_pixels)
        if is_stream(path):
            check_stream(buckets, validation)
            self.source = StreamDataset(path, batch_size, seed, stream_decoder(size, manifest, max_pixels))
        else:
            if manifest is not None:
                raise UserError(f"data.manifest={manifest} is for streamed shards, but data.path={path}; leave it out")
            self.source, self.validation = indexed_parts(ShardSet(path), decoder_of, validation)
        if isinstance(validation, str):
            self.validation = indexed_parts(ShardSet(validation), decoder_of)[0]
            if self.validation.decoder.is_cache != self.is_cache:
                raise UserError(f"data.validation={validation}: one of it and data.path={path} is a cache; use two")

        # Known or counted later.
        self.steps: Sequence[int] = (0,)  # of the schedule, those that are trained
        self.seen = 0
        self.bad = 0
        self.names = set[str]()

    @property
    def stream(self) -> StreamDataset[Any] | None:
        """The reader of streamed shards; None where shards have an index."""
        return self.source if isinstance(self.source, StreamDataset) else None

    @property
    def is_cache(self) -> bool:
        """Whether samples are encoded already."""
        return self.source.decoder.is_cache

    def empty(self, bucket: Size | None) -> Conditioning:
        """A cache's encoding of the empty prompt, one row, for finished pictures of `bucket` pixels."""
        decoder = self.source.decoder
        assert isinstance(decoder, CacheDecoder), "pictures have no encoded empty prompt"
        return decoder.empty(bucket)

    def check(self, model: Pretrained, schedule: ScaleSchedule) -> None:
        """Raise UserError unless these data are for this model and schedule."""
        self.steps = schedule.steps_of(model.backbone_class.process)
        self.source.decoder.check(model, schedule)
        if self.validation is not None:
            self.validation.decoder.check(model, schedule)
        if isinstance(self.source, IndexedShards) and not self.is_cache:
            remote = is_url(self.source.shards.root)
            warn_long_captions(self.source, model, LOOKED_AT_REMOTE if remote else LOOKED_AT)

    def held_out(self) -> HeldOut | None:
        """The samples of the largest bucket that are never trained on; None if there are none."""
        held = self.validation
        if held is None:
            return None
        bucket = max(range(len(held.members)), key=lambda number: len(held.members[number]))

        def read(numbers: Sequence[int], step: int) -> Batch:
            return held.collate([held[index, step] for index in numbers])

        members = held.members[bucket]
        size = read([int(members[0])], 0).bucket
        return HeldOut(members, read, held.caption, self.is_cache, size)

    def last(self, count: int, step: int) -> Batch:
        """The last samples of the largest bucket, the last one first, for a step of the schedule.

        Raises:
            UserError: if the shards are streamed.
        """
        if not isinstance(self.source, IndexedShards):
            raise UserError(f"data.path={self.path} is streamed, and has no last samples; use shards with an index")
        members = max(self.source.members, key=len)
        chosen = [int(members[-1 - i % len(members)]) for i in range(count)]
        return self.source.collate([self.source[index, step] for index in chosen])

    def batch_loader(self, plan: BatchPlan) -> Any:
        start, total, rank, world = plan.start, plan.total, plan.rank, plan.world
        more: dict[str, Any] = {"num_workers": self.workers}
        if self.workers:
            more["prefetch_factor"] = self.prefetch
        if self.stream is not None:
            self.stream.plan(start, total, rank, world, max(self.workers, 1), plan.per_iteration, self.steps)
            return GuardedLoader(self.stream, batch_size=None, **more)
        source: Any = self.source
        orders = source.orders(self.seed, self.window)
        sampler = DueBatches(None, self.batch_size, start, total, self.seed, rank, world, orders)
        sampler.per_iteration, sampler.steps = plan.per_iteration, self.steps
        if self.is_cache:
            return ThreadedLoader(source.batch_of, sampler, self.workers, self.prefetch)
        return GuardedLoader(Guarded(source, source.collate), batch_sampler=sampler, collate_fn=as_it_is, **more)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count what could not be read; stop when it is too much of what this process has read.

        Raises:
            UserError: beyond `max_bad`, naming the last file.
        """
        if isinstance(batch, IterationBatches):
            return batch.map(lambda each: self.on_before_batch_transfer(each, dataloader_idx))
        self.seen += len(batch)
        self.bad += len(batch.skipped)
        for name in batch.skipped:
            if name not in self.names:
                self.names.add(name)
                warnings.warn(f"skipped a sample ({len(self.names)} so far): {name}", stacklevel=2)
        if self.bad > self.max_bad * max(self.seen, COUNTED):
            raise UserError(
                f"{self.bad} of {self.seen} samples cannot be read, more than data.max_bad={self.max_bad} allows (of "
                f"at least {COUNTED}); the last one: {batch.skipped[-1] if batch.skipped else 'see above'}"
            )
        return batch


def check_shard_settings(prefetch: int, window: int | None, multiple: int, max_bad: float, max_pixels: int) -> None:
    """Raise UserError for a setting of `ShardData` that is out of its range."""
    limits.whole("data.prefetch", prefetch, 1, MOST_AHEAD, "so many batches of each loader lie in memory")
    limits.whole("data.window", window, 1)
    limits.whole("data.multiple", multiple, 1)
    limits.number("data.max_bad", max_bad, 0, 1, "a share of the samples")
    check_max_pixels(max_pixels, "data.max_pixels")


def check_stream(buckets: Sequence[str] | None, validation: float | str | None) -> None:
    """Raise UserError for a setting of `ShardData` that streamed shards cannot have."""
    if buckets is not None:
        raise UserError("data.buckets needs shards with an index; a stream has none: use swd import first")
    if is_share(validation):
        raise UserError(
            f"data.validation={validation} of streamed shards, whose samples are not known beforehand; give a folder "
            "of shards with an index, or null"
        )


def indexed_parts(
    shards: ShardSet, decoder_of: Callable[[ShardSet], Decoder[Any]], validation: float | str | None = None
) -> tuple[IndexedShards[Any], IndexedShards[Any] | None]:
    """The samples of shards that are trained on, and those that are held out if `validation` is a share of them.

    Raises:
        UserError: if either is empty.
    """
    decoder = decoder_of(shards)
    if not is_share(validation):
        return IndexedShards(shards, decoder), None
    apart = is_held_out(len(shards), float(cast(Any, validation)))
    return IndexedShards(shards, decoder, ~apart), IndexedShards(shards, decoder, apart)


def indexed_decoder(
    shards: ShardSet,
    size: int | Sequence[int] | None,
    buckets: Sequence[str] | None = None,
    multiple: int = 64,
    max_pixels: int = MAX_PIXELS,
) -> Decoder[Any]:
    """The decoder for shards with an index; the other arguments are those of `ShardData`.

    Raises:
        UserError: if settings do not suit the kind of shards.
    """
    if shards.manifest.get("kind") == "cache":
        if buckets is not None:
            raise UserError("data.buckets was decided when the cache was made; leave it out")
        return CacheDecoder(shards.manifest, shards.root)
    if buckets is None:
        return PictureDecoder(pixel_size_of(size), None, max_pixels)
    if not isinstance(size, int):
        given = None if size is None else list(size)
        raise UserError(f"data.size={given} beside data.buckets; give one side, buckets have its square's area")
    return PictureDecoder(pixel_size_of(size), bucket_sizes(buckets, size, multiple), max_pixels)


def stream_decoder(
    size: int | Sequence[int] | None, manifest: str | None = None, max_pixels: int = MAX_PIXELS
) -> Decoder[Any]:
    """The decoder for streamed shards: pictures, unless a manifest is that of a cache.

    Raises:
        UserError: if the manifest cannot be read, or is of a cache that cannot be streamed.
    """
    content = None if manifest is None else read_manifest(manifest)
    if content is None or content.get("kind") != "cache":
        return PictureDecoder(pixel_size_of(size), None, max_pixels)
    decoder = CacheDecoder(content, str(manifest))
    decoder.check_stream()
    return decoder


def pixel_size_of(size: int | Sequence[int] | None) -> Size | None:
    """A size in pixels as configuration writes it: a side, all sides, or None."""
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else tuple(size)


class DueBatches(GlobalBatches):
    """Batches of (index, step of the schedule): caches are read only at the sizes that the step needs."""

    per_iteration = 1
    steps: Sequence[int] = (0,)

    def request(self, index: int, batch: int) -> Any:
        return index, self.steps[batch // self.per_iteration % len(self.steps)]
