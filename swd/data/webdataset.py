"""Training data from shards, of pictures or of what `swd encode` made of them: local, remote, or through a pipe."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from swd.data.buckets import bucket_sizes, nearest_bucket
from swd.data.cache import TEXT, Assembler, latents_name
from swd.data.datamodule import (
    LOOKED_AT,
    BatchPlan,
    GlobalBatches,
    Guarded,
    GuardedLoader,
    Order,
    ThreadedLoader,
    TrainingData,
    as_it_is,
    check_loading,
    check_pixels,
    warn_long_captions,
)
from swd.data.identity import difference
from swd.data.iterations import IterationBatches
from swd.data.picture_files import MAX_PIXELS, PICTURES, VIDEOS, check_max_pixels, read_picture, read_video
from swd.data.shards import (
    MANIFEST,
    CorruptSample,
    Scratch,
    ShardSet,
    check_inside,
    fetch,
    first_line,
    is_count,
    is_url,
    read_manifest,
)
from swd.data.sources import ENDINGS, caption_of
from swd.data.streamed import StreamDataset, is_stream
from swd.io import limits
from swd.io.tables import NoText
from swd.modules.pretrained import Pretrained
from swd.schedule import ScaleSchedule
from swd.types import Batch, Cached, CachedBatch, Conditioning, PictureBatch, Size, UserError

TRIES = 100
"""Samples tried in place of one that cannot be read."""
MOST_AHEAD = 100
"""Batches that one loader may have ready: more than any training waits for."""
LOOKED_AT_REMOTE = 50
"""Captions whose length is looked at where each one is a request of its own."""
COUNTED = 1000
"""Samples that must have been read before a share of them says much."""


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
    ) -> None:
        super().__init__()
        if path is None:
            raise UserError("data.path is missing; give a folder of shards, made by swd generate, import or encode")
        check_loading(batch_size, workers, seed)
        limits.whole("data.prefetch", prefetch, 1, MOST_AHEAD, "so many batches of each loader lie in memory")
        limits.whole("data.window", window, 1)
        limits.whole("data.multiple", multiple, 1)
        limits.number("data.max_bad", max_bad, 0, 1, "a share of the samples")
        check_max_pixels(max_pixels, "data.max_pixels")
        self.path, self.batch_size, self.workers, self.prefetch = path, batch_size, workers, prefetch
        self.seed, self.window, self.max_bad = seed, window, max_bad
        pixels = pixel_size_of(size)
        self.source: Source
        self.stream: StreamDataset | None = None
        if is_stream(path):
            if buckets is not None:
                raise UserError("data.buckets needs shards with an index; a stream has none: use swd import first")
            told = None if manifest is None else read_manifest(manifest)
            if told is not None and told.get("kind") == "cache":
                self.source = StreamedCache(told, str(manifest))
            else:
                self.source = StreamedPictures(pixels, max_pixels=max_pixels)
            self.stream = StreamDataset(path, batch_size, seed, self.source.decode, self.source.collate)
        else:
            if manifest is not None:
                raise UserError(f"data.manifest={manifest} is for streamed shards, but data.path={path}; leave it out")
            self.source = open_shards(path, size, buckets, multiple, max_pixels)
        self.schedule: ScaleSchedule | None = None
        self.seen, self.bad, self.names = 0, 0, set[str]()

    @property
    def is_cache(self) -> bool:
        """Whether samples are encoded already."""
        return self.source.is_cache

    def empty(self, bucket: Size | None) -> Conditioning:
        """A cache's encoding of the empty prompt, one row, for finished pictures of `bucket` pixels."""
        assert isinstance(self.source, CachedSource)
        return self.source.empty(bucket)

    def check(self, model: Pretrained, schedule: ScaleSchedule) -> None:
        """Raise UserError unless these data are for this model and schedule."""
        self.schedule = schedule
        self.source.check(model, schedule)
        if isinstance(self.source, PictureShards):
            remote = is_url(self.source.shards.root)
            warn_long_captions(self.source, model, LOOKED_AT_REMOTE if remote else LOOKED_AT)

    def last(self, count: int, step: int) -> Batch:
        """The last samples of the largest bucket, the last one first, for a step of the schedule.

        Raises:
            UserError: if the shards are streamed.
        """
        if not isinstance(self.source, ShardDataset):
            raise UserError(f"data.path={self.path} is streamed, and has no last samples; use shards with an index")
        members = max(self.source.members, key=len)
        chosen = [int(members[-1 - i % len(members)]) for i in range(count)]
        return self.source.collate([self.source[index, step] for index in chosen])

    def batch_loader(self, plan: BatchPlan) -> Any:
        start, total, rank, world = plan.start, plan.total, plan.rank, plan.world
        steps = len(self.schedule) if self.schedule else 1
        more: dict[str, Any] = {"num_workers": self.workers}
        if self.workers:
            more["prefetch_factor"] = self.prefetch
        if self.stream is not None:
            self.stream.plan(start, total, rank, world, max(self.workers, 1), plan.per_iteration, steps)
            return GuardedLoader(self.stream, batch_size=None, **more)
        source: Any = self.source
        orders = source.orders(self.seed, self.window)
        sampler = DueBatches(None, self.batch_size, start, total, self.seed, rank, world, orders)
        sampler.per_iteration, sampler.steps = plan.per_iteration, steps
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


def pixel_size_of(size: int | Sequence[int] | None) -> Size | None:
    """A size in pixels as configuration writes it."""
    return (size, size) if isinstance(size, int) else None if size is None else tuple(size)


def _side(size: int | Sequence[int] | None) -> int:
    if not isinstance(size, int):
        told = None if size is None else list(size)
        raise UserError(f"data.size={told} beside data.buckets; give one side, buckets have its square's area")
    return size


class DueBatches(GlobalBatches):
    """Batches of (index, step of the schedule): caches are read only at the sizes that the step needs."""

    per_iteration = steps = 1

    def request(self, index: int, batch: int) -> Any:
        return index, batch // self.per_iteration % self.steps


# What shards hold


class Source:
    """How samples of one kind are made of the files in a shard, whichever way those are read."""

    is_cache: ClassVar[bool] = False

    def check(self, model: Pretrained, schedule: ScaleSchedule) -> None:
        """Raise UserError unless these samples are for this model and schedule."""

    def decode(self, files: Mapping[str, Any], step: int) -> dict[str, Any]:
        """A streamed sample (contents by ending, `__key__`, `__url__`), for a step of the schedule.

        Raises:
            CorruptSample: if it cannot be used.
        """
        raise NotImplementedError

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Samples of one bucket as a batch."""
        raise NotImplementedError


class PictureSource(Source):
    """Captioned pictures or videos, of `pixels` unless there are `buckets`; without either, of the schedule's size.

    Those of more than `max_pixels` are damaged samples.
    """

    def __init__(
        self, pixels: Size | None, buckets: Sequence[Size] | None = None, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.pixels: Size = pixels or ()
        self.buckets, self.max_pixels = buckets, max_pixels

    def check(self, model: Pretrained, schedule: ScaleSchedule) -> None:
        self.pixels = self.pixels or model.pixel_size(schedule.sizes[-1])
        for size in self.buckets or [self.pixels]:
            check_pixels(size, model, schedule, exact=self.buckets is not None)

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        return PictureBatch(
            torch.stack([s["pixels"] for s in samples]),
            prompts=[s["prompt"] for s in samples],
            bucket=None if self.buckets is None else self.buckets[samples[0]["bucket"]],
            skipped=_skipped(samples),
        )


class CachedSource(Source):
    """What `swd encode` stored: conditioning, and latents at every size of its schedule.

    Args:
        manifest: of the cache.
        root: where it lies, a folder or a URL.
    """

    is_cache: ClassVar[bool] = True

    def __init__(self, manifest: Mapping[str, Any], root: str) -> None:
        self.manifest, self.root = manifest, root.rstrip("/")
        _check_cache(manifest, self.root)
        self.pixel_sizes: list[Size] = [tuple(bucket["pixels"]) for bucket in manifest["buckets"]]
        self.sizes: list[list[Size]] = [[tuple(size) for size in bucket["sizes"]] for bucket in manifest["buckets"]]

    def check(self, model: Pretrained, schedule: ScaleSchedule) -> None:
        try:
            told = difference(self.manifest["identity"], model, schedule)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"{self.root}/{MANIFEST} is damaged: its identity lacks {error}; run swd encode again"
            ) from None
        if told:
            raise UserError(f"{self.root} was not encoded for this training: {told}; run swd encode again")
        for number, pixels in enumerate(self.pixel_sizes):
            if os.path.exists(f"{self.root}/{empty_name(number)}"):  # here, before a model is loaded
                self.empty(pixels)
        finals = [model.latent_size(pixels) for pixels in self.pixel_sizes]
        self.sizes = [list(schedule.stretched(final, model.limits.divisor).sizes) for final in finals]

    def due(self, bucket: int, step: int) -> dict[Size, str]:
        """Endings of the latents that a step of the schedule needs, by size."""
        sizes = self.sizes[bucket]
        return {size: latents_name(size) for size in (sizes[max(step - 1, 0)], sizes[step])}

    def sample(self, files: Mapping[str, NDArray[np.uint8]], text: NDArray[np.uint8], due: dict[Size, str]) -> Any:
        """A sample of the files read."""
        prompt = files["txt"].tobytes().decode("utf-8", "replace")
        return {"prompt": prompt, "text": text, "latents": {size: files[name] for size, name in due.items()}}

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        assembler = Assembler(len(samples))
        for row, sample in enumerate(samples):
            put(assembler, row, sample)
        return self.batch(assembler, [s["prompt"] for s in samples], samples[0]["bucket"], _skipped(samples))

    def batch(self, assembler: Assembler, prompts: list[str], bucket: int, skipped: tuple[str, ...]) -> Batch:
        """A batch of what has been assembled."""
        cached = Cached(assembler.conditioning(), assembler.posteriors())
        return CachedBatch(cached, prompts=prompts, bucket=self.pixel_sizes[bucket], skipped=skipped)

    def empty(self, bucket: Size | None) -> Conditioning:
        """The encoded empty prompt, one row.

        Raises:
            UserError: if it cannot be read.
        """
        name = empty_name(0 if bucket is None else self.pixel_sizes.index(bucket))
        where = f"{self.root}/{name}"
        check_inside(self.root, [name])
        try:
            data = fetch(where)
            stored = self.manifest.get("empty_sha256", {}).get(name)
            if stored not in (None, hashlib.sha256(data).hexdigest()):
                raise CorruptSample("its hash is not the manifest's")
            assembler = Assembler(1)
            assembler.text(0, np.frombuffer(bytearray(data), np.uint8))
            return assembler.conditioning()
        except (OSError, CorruptSample) as error:
            raise UserError(f"{where} cannot be read ({str(error)[:80]}); run swd encode again") from None


def _check_cache(manifest: Mapping[str, Any], root: str) -> None:
    """Raise UserError unless a manifest says of a cache what readers need."""

    def sides(value: Any) -> bool:
        return isinstance(value, list) and len(value) in (2, 3) and all(is_count(side) and side > 0 for side in value)

    buckets, empty = manifest.get("buckets"), manifest.get("empty_sha256", {})
    for holds, key in (
        (isinstance(buckets, list) and len(buckets) > 0 and all(isinstance(b, dict) for b in buckets), "buckets"),
        (isinstance(manifest.get("identity"), dict), "identity"),
        (isinstance(manifest.get("deduplicate"), bool), "deduplicate"),
        (isinstance(empty, dict), "empty_sha256"),
    ):
        if not holds:
            raise UserError(f"{root}/{MANIFEST} is damaged: {key} is {manifest.get(key)!r:.80}; run swd encode again")
    for bucket in manifest["buckets"]:
        sizes = bucket.get("sizes")
        if not (sides(bucket.get("pixels")) and isinstance(sizes, list) and sizes and all(map(sides, sizes))):
            raise UserError(f"{root}/{MANIFEST} is damaged: it has the bucket {bucket!r:.80}; run swd encode again")


def empty_name(bucket: int) -> str:
    """File name of the encoded empty prompt of a bucket."""
    return f"empty-{bucket}.safetensors"


def put(assembler: Assembler, row: int, sample: Mapping[str, Any]) -> None:
    """Put a cached sample into a row of a batch."""
    assembler.text(row, sample["text"])
    for size, data in sample["latents"].items():
        assembler.latents(row, size, data)


def _skipped(samples: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(name for sample in samples for name in sample["skipped"])


# With an index: any sample, any time


def open_shards(
    path: str,
    size: int | Sequence[int] | None,
    buckets: Sequence[str] | None = None,
    multiple: int = 64,
    max_pixels: int = MAX_PIXELS,
) -> PictureShards | CachedShards:
    """The samples of a folder of shards, as `ShardData` takes them."""
    shards = ShardSet(path)
    if shards.manifest.get("kind") == "cache":
        if buckets is not None:
            raise UserError("data.buckets was decided when the cache was made; leave it out")
        return CachedShards(shards)
    sizes = None if buckets is None else bucket_sizes(buckets, _side(size), multiple)
    return PictureShards(shards, pixel_size_of(size), sizes, max_pixels)


class ShardDataset(Dataset[dict[str, Any]]):
    """Samples of shards by (index, step of the schedule), with others in place of those that cannot be read.

    Args:
        shards: where they are.
        bucket_of: the bucket of every sample `[N]`; -1 for one that cannot be used.
        buckets: how many there are.
    """

    def __init__(self, shards: ShardSet, bucket_of: NDArray[np.int64], buckets: int = 1) -> None:
        self.shards, self.bucket_of = shards, bucket_of
        self.members = [np.flatnonzero(bucket_of == b) for b in range(buckets)]
        if not len(self):
            raise UserError(f"data.path={shards.root} holds no sample that can be used")

    def __len__(self) -> int:
        return sum(map(len, self.members))

    def orders(self, seed: int, window: int | None) -> list[Order]:
        """The endless order of each bucket that has samples."""
        shard = torch.from_numpy(np.searchsorted(self.shards.starts, np.arange(len(self.shards)), "right"))
        filled = [(b, ids) for b, ids in enumerate(self.members) if len(ids)]
        return [
            Order(ids, f"{seed}/order/{b}", None if window is None else shard[ids], window or 1) for b, ids in filled
        ]

    def __getitem__(self, request: tuple[int, int] | int) -> dict[str, Any]:
        index, step = request if isinstance(request, tuple) else (request, 0)
        return self.first_good(index, lambda current: self.read(current, step))

    def first_good(self, index: int, read: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """A sample, or the next one of its bucket that can be read.

        Raises:
            UserError: if there is none for long.
        """
        bucket = int(self.bucket_of[index])
        members = self.members[bucket]
        place = int(np.searchsorted(members, index))
        skipped: list[str] = []
        for _ in range(TRIES):
            current = int(members[place % len(members)])
            try:
                return read(current) | {"index": current, "bucket": bucket, "skipped": skipped}
            except CorruptSample as error:
                skipped.append(str(error))
            place += 1
        raise UserError(f"{TRIES} samples in a row cannot be read, the last one: {skipped[-1]}")

    def read(self, index: int, step: int) -> dict[str, Any]:
        """One sample, for a step of the schedule.

        Raises:
            CorruptSample: if it cannot be read.
        """
        raise NotImplementedError


class PictureShards(PictureSource, ShardDataset):
    """Captioned pictures or videos of indexed shards.

    Args:
        shards: of kind "pictures" or "videos".
        pixels: size that all are cropped to, unless there are buckets.
        buckets: sizes in pixels; each picture goes to the one nearest to its own proportions.
        max_pixels: pictures of more pixels are damaged samples.
    """

    def __init__(
        self,
        shards: ShardSet,
        pixels: Size | None,
        buckets: Sequence[tuple[int, int]] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        PictureSource.__init__(self, pixels, buckets, max_pixels)
        bucket_of = np.zeros(len(shards), np.int64)
        if buckets is not None:
            if not {"width", "height"} <= set(shards.columns):
                raise UserError(f"data.buckets: the index of {shards.root} does not say how large pictures are")
            for side in ("width", "height"):
                shards.check_column(side, 1, 2**31)
            pairs = zip(shards.columns["height"].tolist(), shards.columns["width"].tolist(), strict=True)
            bucket_of = np.array([nearest_bucket(h, w, buckets) for h, w in pairs], np.int64)
        ShardDataset.__init__(self, shards, bucket_of, len(buckets or [()]))
        self.known = [ending for ending in shards.endings if f".{ending}" in (*PICTURES, *VIDEOS)]

    def caption(self, index: int) -> str:
        """The caption of a sample.

        Raises:
            CorruptSample: if it has none.
        """
        return self._prompt(index, self.shards.read(index, self._texts(index)))

    def read(self, index: int, step: int) -> dict[str, Any]:
        ending = next((e for e in self.known if self.shards.has(index, e)), None)
        if ending is None:
            raise CorruptSample(f"{self.shards.name(index)} has no picture")
        data = self.shards.read(index, [ending, *self._texts(index)])
        size = self.pixels if self.buckets is None else self.buckets[int(self.bucket_of[index])]
        prompt = self._prompt(index, data)
        pixels = decode_pixels(data[ending].tobytes(), ending, size, self.shards.name(index), self.max_pixels)
        return {"pixels": pixels, "prompt": prompt}

    def _texts(self, index: int) -> list[str]:
        """The text files of a sample."""
        return [ending for ending in ("txt", "caption") if self.shards.has(index, ending)]

    def _prompt(self, index: int, data: Mapping[str, NDArray[np.uint8]]) -> str:
        """The caption, given the text files; the `.json` is read only where they hold none."""
        files = {ending: data[ending].tobytes() for ending in self._texts(index)}
        try:
            return caption_of(files)
        except NoText:
            if self.shards.has(index, "json"):
                files["json"] = self.shards.read(index, ["json"])["json"].tobytes()
        return _caption(files, self.shards.name(index))


class CachedShards(CachedSource, ShardDataset):
    """A cache with an index.

    Args:
        shards: of kind "cache".
    """

    def __init__(self, shards: ShardSet) -> None:
        CachedSource.__init__(self, shards.manifest, shards.root)
        self._check_columns(shards)
        bucket_of = np.where(shards.columns["usable"] == 1, shards.columns["bucket"], -1)
        ShardDataset.__init__(self, shards, bucket_of, len(self.pixel_sizes))
        self.text_of = shards.columns["text"]
        self._threads = threading.local()

    def _check_columns(self, shards: ShardSet) -> None:
        """Raise UserError unless every sample's bucket and the sample that holds its text are there."""
        for name, stop in (("usable", 2), ("bucket", len(self.pixel_sizes)), ("text", len(shards))):
            shards.check_column(name, 0, stop)
        good = np.flatnonzero(shards.columns["usable"] == 1)
        holders, bucket = shards.columns["text"][good], shards.columns["bucket"]
        bad = good[~shards.have(TEXT)[holders] | (bucket[holders] != bucket[good])]
        if len(bad):
            raise UserError(
                f"the index of {shards.name(int(bad[0]))} is damaged: its text lies with a sample that holds none of "
                "its kind; run swd encode again"
            )

    def _scratch(self) -> Scratch:
        """This thread's own."""
        if not hasattr(self._threads, "scratch"):
            self._threads.scratch = Scratch()
        scratch: Scratch = self._threads.scratch
        return scratch

    def batch_of(self, requests: Sequence[tuple[int, int]]) -> Batch:
        """A batch of (index, step of the schedule); its samples are read into the same memory, one after the other."""
        assembler, samples, scratch = Assembler(len(requests)), [], self._scratch()
        for index, step in requests:
            due = self.due(int(self.bucket_of[index]), step)
            self.shards.expect(index, ["txt", TEXT, *due.values()])
        for row, (index, step) in enumerate(requests):

            def place(current: int, row: int = row, step: int = step) -> dict[str, Any]:
                scratch.clear()
                sample = self.read(current, step, scratch)
                put(assembler, row, sample)
                return {"prompt": sample["prompt"]}

            samples.append(self.first_good(index, place))
        return self.batch(assembler, [s["prompt"] for s in samples], samples[0]["bucket"], _skipped(samples))

    def read(self, index: int, step: int, scratch: Scratch | None = None) -> dict[str, Any]:
        due = self.due(int(self.bucket_of[index]), step)
        # A prompt that occurs again is stored with the first sample that has it.
        holder = int(self.text_of[index])
        own = [TEXT] if holder == index else []
        files = self.shards.read(index, ["txt", *own, *due.values()], scratch)
        if own:
            return self.sample(files, files[TEXT], due)
        held = self.shards.read(holder, ["txt", TEXT], scratch)  # side by side: still one read
        if not np.array_equal(held["txt"], files["txt"]):
            raise CorruptSample(
                f"{self.shards.name(index)} has the text of {self.shards.name(holder)}, another prompt's"
            )
        text = held[TEXT]
        return self.sample(files, text, due)


# Streams: what comes next


class StreamedPictures(PictureSource):
    """Captioned pictures or videos of streamed shards; captions from `.txt`, `.caption`, or a key of `.json`."""

    def decode(self, files: Mapping[str, Any], step: int) -> dict[str, Any]:
        name = f"{files['__url__']}, {files['__key__']}"
        ending = next((e for e in files if f".{e}" in (*PICTURES, *VIDEOS)), None)
        if ending is None:
            dotted = next((e for e in files if e.rpartition(".")[2] in ENDINGS), None)
            told = f"; of a name with dots, .{dotted}, the key ends at the first one" if dotted else ""
            raise CorruptSample(f"{name} has no picture{told}")
        prompt = _caption(files, name)
        return {"pixels": decode_pixels(files[ending], ending, self.pixels, name, self.max_pixels), "prompt": prompt}


def _caption(files: Mapping[str, Any], name: str) -> str:
    """The caption of a sample, given its files by ending.

    Raises:
        CorruptSample: if it has none.
    """
    try:
        return caption_of(files)
    except NoText as error:
        raise CorruptSample(f"{name} has no caption: it {error}") from None


class StreamedCache(CachedSource):
    """A cache that is streamed; every sample must carry its own text.

    Raises:
        UserError: if it stores repeated prompts once, or has several buckets.
    """

    def __init__(self, manifest: Mapping[str, Any], root: str) -> None:
        super().__init__(manifest, root)
        if manifest["deduplicate"]:
            raise UserError(
                f"{root} stores repeated prompts once, which a stream cannot follow; encode with deduplicate=false"
            )
        if len(self.pixel_sizes) > 1:
            raise UserError(
                f"{root} has {len(self.pixel_sizes)} aspect ratios; only shards with an index can be trained so"
            )

    def decode(self, files: Mapping[str, Any], step: int) -> dict[str, Any]:
        due = self.due(0, step)
        missing = [name for name in ("txt", TEXT, *due.values()) if name not in files]
        if missing:
            raise CorruptSample(f"{files['__url__']}, {files['__key__']} has no {missing[0]}")
        arrays = {name: np.frombuffer(bytearray(files[name]), np.uint8) for name in ("txt", TEXT, *due.values())}
        return dict(self.sample(arrays, arrays[TEXT], due))


# Pixels


def decode_pixels(data: bytes, ending: str, size: Size, name: str, limit: int = MAX_PIXELS) -> Tensor:
    """A picture or a video in a shard as pixels of `size`.

    Raises:
        CorruptSample: if it cannot be read, is smaller than `size`, or a picture of more pixels than `limit`.
    """
    try:
        if f".{ending}" not in VIDEOS:
            return read_picture(io.BytesIO(data), size, name, limit)
        with tempfile.TemporaryDirectory() as folder:  # ffmpeg wants a file
            path = Path(folder) / f"video.{ending}"
            path.write_bytes(data)
            return read_video(path, size)
    except UserError as error:
        raise CorruptSample(str(error) if f".{ending}" not in VIDEOS else f"{name}: {error}") from None
    except Exception as error:  # decoders meet damaged files with errors of many types
        raise CorruptSample(f"{name}: {first_line(error)}") from None
