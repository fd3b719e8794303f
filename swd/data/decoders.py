"""Decoders make samples and batches of the files in shards: captioned pictures, or what `swd encode` stored.

They do not know how the files were read; `swd.data.indexed` and `swd.data.streamed` do that.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from swd.data.buckets import nearest_bucket
from swd.data.cache import TEXT, Assembler, latents_name
from swd.data.datamodule import check_pixels
from swd.data.identity import difference
from swd.data.manifest import MANIFEST, check_inside, is_count
from swd.data.picture_files import MAX_PIXELS, PICTURES, VIDEOS, load_picture, load_video
from swd.data.picture_list import ENDINGS, caption_of
from swd.data.shard_samples import CachedSample, PictureSample, Sample, SampleFiles
from swd.data.shards import CorruptSample, ShardSet
from swd.io.storage import fetch, first_line
from swd.io.tables import NoText
from swd.modules.pretrained import Pretrained
from swd.schedule import ScaleSchedule
from swd.types import Batch, Cached, CachedBatch, Conditioning, PictureBatch, Size, UserError, stacked

S = TypeVar("S", bound=Sample)


class BatchBuilder(ABC, Generic[S]):
    """Takes the samples of one batch, row by row.

    Args:
        rows: number of samples in the batch.
    """

    def __init__(self, rows: int) -> None:
        self.prompts = [""] * rows
        self.bucket = 0

    def put(self, row: int, sample: S) -> None:
        """Put a sample into a row, which may have held another one.

        Raises:
            CorruptSample: if its values are damaged or do not fit the other rows.
        """
        self.prompts[row] = sample.prompt
        self.bucket = sample.bucket

    @abstractmethod
    def batch(self, skipped: Iterable[str]) -> Batch:
        """The batch, once every row has a sample.

        Args:
            skipped: reasons why samples could not be read, whose places others took.
        """


class Decoder(ABC, Generic[S]):
    """Makes samples of one kind."""

    is_cache: ClassVar[bool] = False
    """Whether the samples are encoded already."""

    @property
    @abstractmethod
    def bucket_count(self) -> int:
        """Number of buckets, at least 1."""

    @abstractmethod
    def buckets_of(self, shards: ShardSet) -> NDArray[np.int64]:
        """The bucket of every sample `[N]` of shards with an index; -1 for a sample that cannot be used.

        Raises:
            UserError: if the index does not say it.
        """

    @abstractmethod
    def check(self, model: Pretrained, schedule: ScaleSchedule) -> None:
        """Raise UserError unless these samples are for this model and schedule."""

    def wanted(self, bucket: int, step: int) -> list[str]:
        """Endings of the files that `decode` will ask for, as far as they are known before a sample is looked at."""
        return []

    @abstractmethod
    def caption(self, files: SampleFiles) -> str:
        """The caption of a sample.

        Raises:
            CorruptSample: if it has none.
        """

    @abstractmethod
    def decode(self, files: SampleFiles, bucket: int, step: int) -> S:
        """The sample of these files.

        Args:
            files: where the files are.
            bucket: number of its bucket.
            step: the step of the schedule that it is for.

        Raises:
            CorruptSample: if it cannot be used.
        """

    @abstractmethod
    def builder(self, rows: int) -> BatchBuilder[S]:
        """An empty batch of `rows` samples."""

    def decode_into(self, builder: BatchBuilder[S], row: int, files: SampleFiles, bucket: int, step: int) -> S:
        """Decode a sample and put it into a row of a batch.

        Raises:
            CorruptSample: if it cannot be used, or does not fit the other rows; names the sample.
        """
        sample = self.decode(files, bucket, step)
        try:
            builder.put(row, sample)
        except CorruptSample as error:
            raise CorruptSample(f"{files.name}: {error}") from None
        return sample

    def collate(self, samples: Sequence[S]) -> Batch:
        """The batch of samples of one bucket."""
        builder = self.builder(len(samples))
        for row, sample in enumerate(samples):
            builder.put(row, sample)
        return builder.batch(name for sample in samples for name in sample.skipped)


# Pictures


class PictureDecoder(Decoder[PictureSample]):
    """Captioned pictures or videos; captions from `.txt`, `.caption`, or a key of `.json`.

    Args:
        pixels: size in pixels that all are cropped to; None: the size at which the schedule ends.
        buckets: sizes in pixels instead of `pixels`; each picture goes to the one nearest to its own proportions.
        max_pixels: pictures of more pixels are damaged samples.
    """

    def __init__(
        self, pixels: Size | None, buckets: Sequence[tuple[int, int]] | None = None, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.pixels: Size = pixels or ()
        self.buckets = buckets
        self.max_pixels = max_pixels

    @property
    def bucket_count(self) -> int:
        return 1 if self.buckets is None else len(self.buckets)

    def buckets_of(self, shards: ShardSet) -> NDArray[np.int64]:
        if self.buckets is None:
            return np.zeros(len(shards), np.int64)
        if not {"width", "height"} <= set(shards.columns):
            raise UserError(f"data.buckets: the index of {shards.root} does not say how large pictures are")
        for side in ("width", "height"):
            shards.check_column(side, 1, 2**31)
        pairs = zip(shards.columns["height"].tolist(), shards.columns["width"].tolist(), strict=True)
        return np.array([nearest_bucket(height, width, self.buckets) for height, width in pairs], np.int64)

    def check(self, model: Pretrained, schedule: ScaleSchedule) -> None:
        self.pixels = self.pixels or model.pixel_size(schedule.sizes[-1])
        sizes: Sequence[Size] = [self.pixels] if self.buckets is None else self.buckets
        for size in sizes:
            check_pixels(size, model, schedule, exact=self.buckets is not None)

    def caption(self, files: SampleFiles) -> str:
        return _caption(files, files.read(_texts(files)))

    def decode(self, files: SampleFiles, bucket: int, step: int) -> PictureSample:
        endings = files.endings
        ending = next((ending for ending in endings if f".{ending}" in (*PICTURES, *VIDEOS)), None)
        if ending is None:
            dotted = next((ending for ending in endings if ending.rpartition(".")[2] in ENDINGS), None)
            more = f"; of a name with dots, .{dotted}, the key ends at the first one" if dotted else ""
            raise CorruptSample(f"{files.name} has no picture{more}")
        data = files.read([ending, *_texts(files)])
        prompt = _caption(files, data)
        size = self.pixels if self.buckets is None else self.buckets[bucket]
        pixels = decode_pixels(data[ending].tobytes(), ending, size, files.name, self.max_pixels)
        return PictureSample(pixels=pixels, prompt=prompt, bucket=bucket)

    def builder(self, rows: int) -> PictureBuilder:
        return PictureBuilder(rows, self.buckets)


class PictureBuilder(BatchBuilder[PictureSample]):
    """Stacks the pixels when all rows are there.

    Args:
        rows: number of samples in the batch.
        buckets: sizes in pixels of the buckets; None: there are none.
    """

    def __init__(self, rows: int, buckets: Sequence[tuple[int, int]] | None) -> None:
        super().__init__(rows)
        self.buckets = buckets
        self.pixels: dict[int, Tensor] = {}

    def put(self, row: int, sample: PictureSample) -> None:
        super().put(row, sample)
        self.pixels[row] = sample.pixels

    def batch(self, skipped: Iterable[str]) -> PictureBatch:
        pixels = stacked([self.pixels[row] for row in range(len(self.prompts))])
        bucket = None if self.buckets is None else self.buckets[self.bucket]
        return PictureBatch(pixels, prompts=self.prompts, bucket=bucket, skipped=tuple(skipped))


def _texts(files: SampleFiles) -> list[str]:
    """Endings of a sample's text files, the first one preferred."""
    return [ending for ending in ("txt", "caption") if ending in files.endings]


def _caption(files: SampleFiles, data: Mapping[str, NDArray[np.uint8]]) -> str:
    """The caption, given the contents of the text files; the `.json` is read only where those hold none.

    Raises:
        CorruptSample: if there is none.
    """
    contents = {ending: data[ending].tobytes() for ending in _texts(files)}
    try:
        return caption_of(contents)
    except NoText as error:
        reason = error
    if "json" in files.endings:
        contents["json"] = files.read(["json"])["json"].tobytes()
        try:
            return caption_of(contents)
        except NoText as error:
            reason = error
    raise CorruptSample(f"{files.name} has no caption: it {reason}") from None


def decode_pixels(data: bytes, ending: str, size: Size, name: str, limit: int = MAX_PIXELS) -> Tensor:
    """A picture or a video in a shard as pixels of `size`, `[3, H, W]` or `[3, F, H, W]`: bytes, or in [-1, 1].

    Raises:
        CorruptSample: if it cannot be read, is smaller than `size`, or a picture of more pixels than `limit`.
    """
    is_video = f".{ending}" in VIDEOS
    try:
        if not is_video:
            return load_picture(io.BytesIO(data), size, name, limit)
        with tempfile.TemporaryDirectory() as folder:  # ffmpeg reads files only
            path = Path(folder) / f"video.{ending}"
            path.write_bytes(data)
            return load_video(path, size)
    except UserError as error:
        raise CorruptSample(f"{name}: {error}" if is_video else str(error)) from None
    except Exception as error:  # decoders raise errors of many types for damaged files
        raise CorruptSample(f"{name}: {first_line(error)}") from None


# Caches


class CacheDecoder(Decoder[CachedSample]):
    """Samples that `swd encode` stored: conditioning, and latents at every size of its schedule.

    Args:
        manifest: the cache's manifest.
        root: folder or URL of the cache.

    Raises:
        UserError: if the manifest is damaged.
    """

    is_cache: ClassVar[bool] = True

    def __init__(self, manifest: Mapping[str, Any], root: str) -> None:
        self.manifest = manifest
        self.root = root.rstrip("/")
        _check_cache(manifest, self.root)
        self.pixel_sizes: list[Size] = [tuple(bucket["pixels"]) for bucket in manifest["buckets"]]
        self.sizes: list[list[Size]] = [[tuple(size) for size in bucket["sizes"]] for bucket in manifest["buckets"]]

    @property
    def bucket_count(self) -> int:
        return len(self.pixel_sizes)

    def buckets_of(self, shards: ShardSet) -> NDArray[np.int64]:
        # Every sample's bucket, and the sample that holds its text, must exist.
        for name, stop in (("usable", 2), ("bucket", self.bucket_count), ("text", len(shards))):
            shards.check_column(name, 0, stop)
        usable = shards.columns["usable"] == 1
        bucket = shards.columns["bucket"]
        good = np.flatnonzero(usable)
        holders = shards.columns["text"][good]
        bad = good[~shards.have(TEXT)[holders] | (bucket[holders] != bucket[good])]
        if len(bad):
            raise UserError(
                f"the index of {shards.name(int(bad[0]))} is damaged: its text lies with a sample that holds none of "
                "its kind; run swd encode again"
            )
        return np.where(usable, bucket, -1)

    def check_stream(self) -> None:
        """Raise UserError unless every sample carries its own text and there is one bucket, as streams need it."""
        if self.manifest["deduplicate"]:
            raise UserError(
                f"{self.root} stores repeated prompts once, which a stream cannot follow; encode with deduplicate=false"
            )
        if self.bucket_count > 1:
            raise UserError(
                f"{self.root} has {self.bucket_count} aspect ratios; only shards with an index can be trained so"
            )

    def check(self, model: Pretrained, schedule: ScaleSchedule) -> None:
        try:
            found = difference(self.manifest["identity"], model, schedule)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"{self.root}/{MANIFEST} is damaged: its identity lacks {error}; run swd encode again"
            ) from None
        if found:
            raise UserError(f"{self.root} was not encoded for this training: {found}; run swd encode again")
        for number, pixels in enumerate(self.pixel_sizes):
            if os.path.exists(f"{self.root}/{empty_name(number)}"):  # fail here, before a model is loaded
                self.empty(pixels)
        finals = [model.latent_size(pixels) for pixels in self.pixel_sizes]
        self.sizes = [list(schedule.stretched(final, model.limits.divisor).sizes) for final in finals]

    def due(self, bucket: int, step: int) -> dict[Size, str]:
        """Endings of the latents that a step of the schedule needs, by size."""
        sizes = self.sizes[bucket]
        return {size: latents_name(size) for size in (sizes[max(step - 1, 0)], sizes[step])}

    def wanted(self, bucket: int, step: int) -> list[str]:
        return ["txt", TEXT, *self.due(bucket, step).values()]

    def caption(self, files: SampleFiles) -> str:
        return _prompt(files.read(["txt"]))

    def decode(self, files: SampleFiles, bucket: int, step: int) -> CachedSample:
        due = self.due(bucket, step)
        holder = files.follow("text")
        if holder is None:
            data = files.read(["txt", TEXT, *due.values()])
            text = data[TEXT]
        else:
            # A prompt that occurs again is stored with the first sample that has it.
            data = files.read(["txt", *due.values()])
            held = holder.read(["txt", TEXT])  # they lie side by side, so this is one read
            if not np.array_equal(held["txt"], data["txt"]):
                raise CorruptSample(f"{files.name} has the text of {holder.name}, another prompt's")
            text = held[TEXT]
        latents = {size: data[ending] for size, ending in due.items()}
        return CachedSample(prompt=_prompt(data), text=text, latents=latents, bucket=bucket)

    def builder(self, rows: int) -> CachedBuilder:
        return CachedBuilder(rows, self.pixel_sizes)

    def empty(self, bucket: Size | None) -> Conditioning:
        """The encoded empty prompt, one row.

        Args:
            bucket: size in pixels of finished pictures; None: the first one.

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


class CachedBuilder(BatchBuilder[CachedSample]):
    """Unpacks each sample straight into the tensors of the batch, so that its bytes may be overwritten after `put`.

    Args:
        rows: number of samples in the batch.
        pixel_sizes: sizes in pixels of finished pictures, by bucket.
    """

    def __init__(self, rows: int, pixel_sizes: Sequence[Size]) -> None:
        super().__init__(rows)
        self.pixel_sizes = pixel_sizes
        self.assembler = Assembler(rows)

    def put(self, row: int, sample: CachedSample) -> None:
        super().put(row, sample)
        self.assembler.text(row, sample.text)
        for size, data in sample.latents.items():
            self.assembler.latents(row, size, data)

    def batch(self, skipped: Iterable[str]) -> CachedBatch:
        cached = Cached(self.assembler.conditioning(), self.assembler.posteriors())
        bucket = self.pixel_sizes[self.bucket]
        return CachedBatch(cached, prompts=self.prompts, bucket=bucket, skipped=tuple(skipped))


def _prompt(data: Mapping[str, NDArray[np.uint8]]) -> str:
    """The caption as `swd encode` stored it."""
    return data["txt"].tobytes().decode("utf-8", "replace")


def _check_cache(manifest: Mapping[str, Any], root: str) -> None:
    """Raise UserError unless a manifest has the entries of a cache that readers need."""

    def is_size(value: Any) -> bool:
        return isinstance(value, list) and len(value) in (2, 3) and all(is_count(side) and side > 0 for side in value)

    buckets = manifest.get("buckets")
    empty = manifest.get("empty_sha256", {})
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
        if not (is_size(bucket.get("pixels")) and isinstance(sizes, list) and sizes and all(map(is_size, sizes))):
            raise UserError(f"{root}/{MANIFEST} is damaged: it has the bucket {bucket!r:.80}; run swd encode again")


def empty_name(bucket: int) -> str:
    """File name of the encoded empty prompt of a bucket."""
    return f"empty-{bucket}.safetensors"
