"""`swd encode`: run the text encoders and the VAE over a data set once and store the results as shards.

Trainings read those instead of encoding pictures and prompts again.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import Dataset

from swd import __version__
from swd.commands import keys, shared
from swd.commands.keys import Posterior
from swd.commands.numbers import check_given, check_numbers
from swd.commands.training_keys import check_unread
from swd.config import build, check
from swd.data.cache import TEXT, Precision, latents_name, pack_latents, pack_text, relative_error
from swd.data.datamodule import GuardedLoader, check_pixels
from swd.data.decoders import PictureDecoder, empty_name
from swd.data.identity import identity
from swd.data.indexed import IndexedShards
from swd.data.job import Job, Sample, in_shared_memory, say
from swd.data.shard_writer import is_done, shard_name
from swd.data.shards import CorruptSample
from swd.io import limits
from swd.io.files import file_hash, joint_hash, write_aside, write_json
from swd.io.job_log import JobLog
from swd.io.ranks import is_first, share
from swd.modules.encoders import draw_latents
from swd.modules.model_folders import read_json
from swd.modules.pretrained import Pretrained
from swd.modules.tokens import TextLimit, evenly, warn_beyond
from swd.schedule import ScaleSchedule, downscale
from swd.types import SeededDraws, Size, UserError, in_unit_range, stacked

ROOT = keys.ENCODE
NOTES = "notes"
"""Name of the folder with one note for each finished shard: its measurements and its unusable rows."""
LOOKED_AT = 1000
"""Captions whose tokens are counted before encoding begins; the manifest counts those of all captions."""
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
"""Bytes of one number, by `precision`."""


def run(cfg: DictConfig) -> None:
    """Encode the data set of the configuration; prints the cache's folder and size."""
    shared.quiet()
    plan = prepare(cfg)
    plan.job.claim()
    if plan.job.is_complete:
        print(f"{plan.job.folder} is complete already: {plan.job.rows} samples")
        return
    shared.use_own_gpu()
    say(f"loading the encoders of {plan.model.name}")
    encoder = Encoder(plan)
    encoder.announce()
    task = f"encoding {source_name(plan.dataset)} with {plan.model.name} into {plan.job.folder}"
    manifest = plan.job.run(encoder.samples, encoder.measured, task)
    if manifest is not None:
        errors = ", ".join(f"{name} {value:.2g}" for name, value in manifest["relative_error"].items())
        bad = f", {manifest['unusable']} unusable" if manifest["unusable"] else ""
        print(
            f"{plan.job.folder}: {manifest['samples']} samples{bad}, {manifest['bytes'] / 1e6:.1f} MB; "
            f"relative error of storing: {errors}"
        )


# Configuration


@dataclass(frozen=True)
class EncodingPlan:
    """A checked encoding; no weights are loaded yet.

    Attributes:
        dataset: items are dicts with `pixels` and `prompt`; `caption(i)` gives the caption alone.
        model: the model whose encoders are used.
        schedules: one for each bucket, ending at the bucket's size.
        buckets: sizes in pixels of finished pictures.
        bucket_of: gives the bucket's number for a row's.
        job: the shards to write.
        precision: number format of the stored tensors.
        posterior: whether mean and deviation of the VAE's distribution are stored, its mean, or a draw from it.
        deduplicate: whether equal captions of a bucket are stored once.
        batch_size: pictures or prompts encoded at once.
        workers: loader processes.
        max_bad: largest share of rows that may be unusable.
    """

    dataset: Any
    model: Pretrained
    schedules: list[ScaleSchedule]
    buckets: list[Size]
    bucket_of: Callable[[int], int]
    job: Job
    precision: Precision
    posterior: Posterior
    deduplicate: bool
    batch_size: int
    workers: int
    max_bad: float


def check_values(cfg: DictConfig) -> None:
    """Raise UserError for values of the configuration that no model or data set could be encoded with."""
    check_given(cfg, "encode")
    check_unread(cfg)
    check(cfg, ROOT)
    check_numbers(cfg, "encode")


def prepare(cfg: DictConfig) -> EncodingPlan:
    """Check everything that can be checked before weights are loaded.

    Raises:
        UserError: naming what is wrong and the fix.
    """
    check_values(cfg)

    # Model, schedule and data, and whether they fit each other.
    model: Pretrained = build(cfg, "model")
    model.check_trainable()
    schedule: ScaleSchedule = build(cfg, "schedule")
    data = build(cfg, "data")
    dataset = dataset_of(data)
    rows = rows_of(dataset, cfg.limit)
    buckets, bucket_of = buckets_of(dataset, model, schedule)
    schedules = schedules_of(buckets, model, schedule)

    # A stopped job goes on only under the same settings.
    settings = {
        "identity": identity(model, schedule),
        "buckets": [
            {"pixels": list(pixels), "sizes": [list(size) for size in stretched.sizes]}
            for pixels, stretched in zip(buckets, schedules, strict=True)
        ],
        "precision": cfg.precision,
        "posterior": cfg.posterior,
        "deduplicate": cfg.deduplicate,
        "encoders": str(model.dtype("cuda" if torch.cuda.is_available() else "cpu")).removeprefix("torch."),
        **({} if model.vae_precision is None else {"vae_precision": model.vae_precision}),
        "data": source_of(dataset),
        "code": __version__,
    }
    job = Job(Path(cfg.out), "cache", rows, cfg.shard_size, settings)
    return EncodingPlan(
        dataset,
        model,
        schedules,
        buckets,
        bucket_of,
        job,
        cfg.precision,
        cfg.posterior,
        cfg.deduplicate,
        cfg.batch_size,
        int(getattr(data, "workers", 0)),
        cfg.max_bad,
    )


def dataset_of(data: Any) -> Any:
    """The captioned pictures behind the group `data`.

    Raises:
        UserError: if it has none, or is a cache, whose pictures are encoded already.
    """
    dataset = getattr(data, "source", None) or getattr(data, "dataset", None)
    if not hasattr(dataset, "caption") or getattr(data, "is_cache", False):
        raise UserError("data is no set of captioned pictures that can be encoded; use data=images or data=webdataset")
    return dataset


def schedules_of(buckets: Sequence[Size], model: Pretrained, schedule: ScaleSchedule) -> list[ScaleSchedule]:
    """The schedule that ends at each bucket's size.

    Args:
        buckets: sizes in pixels.
        model: the model whose latents the schedules describe.
        schedule: the schedule to stretch.

    Raises:
        UserError: if the model cannot take one of the sizes.
    """
    schedules = [schedule.stretched(model.latent_size(size), model.limits.divisor) for size in buckets]
    for stretched in schedules:
        for size in stretched.sizes:
            model.limits.check_size(size)
    return schedules


def rows_of(dataset: Any, limit: int | None) -> int:
    """Number of samples to encode: all, or the first `limit`.

    Raises:
        UserError: if the data set has more samples than one cache holds and there is no limit, or if the limit
            exceeds either of them.
    """
    count = len(dataset)
    if limit is None and count > limits.MOST_ROWS:
        raise UserError(f"data has {count} samples, drawn as they are asked for; give limit=, e.g. limit=5000")
    if limit is not None and limit > limits.MOST_ROWS:
        raise UserError(f"limit={limit} is more than one cache holds; use at most {limits.MOST_ROWS}")
    if limit is not None and limit > count:
        raise UserError(f"limit={limit}, but data has {count} samples; use at most {count}")
    return count if limit is None else limit


def buckets_of(dataset: Any, model: Pretrained, schedule: ScaleSchedule) -> tuple[list[Size], Callable[[int], int]]:
    """Sizes in pixels of finished pictures, and a function that gives the number of a row's size.

    Raises:
        UserError: if the pictures are too small for the schedule.
    """
    if isinstance(dataset, IndexedShards):
        decoder = picture_decoder(dataset)
        decoder.check(model, schedule)
        if decoder.buckets is not None:
            return [tuple(size) for size in decoder.buckets], lambda row: int(dataset.bucket_of[row])
    elif hasattr(dataset, "size"):
        check_pixels(tuple(dataset.size), model, schedule, key="data.dataset.size")
    return [model.pixel_size(schedule.sizes[-1])], lambda row: 0


def picture_decoder(dataset: IndexedShards[Any]) -> PictureDecoder:
    """The decoder of shards that are to be encoded."""
    assert isinstance(dataset.decoder, PictureDecoder), "prepare refuses caches"
    return dataset.decoder


def source_name(dataset: Any) -> str:
    """Name of the data for messages: its path, or its kind."""
    source = source_of(dataset)
    return str(source.get("path", source.get("kind")))


def source_of(dataset: Any) -> dict[str, Any]:
    """Origin of the data for the manifest; a stopped job goes on only if it is the same."""
    if isinstance(dataset, IndexedShards):
        shards = [str(entry["sha256"]) for entry in dataset.shards.manifest["shards"]]
        size = list(picture_decoder(dataset).pixels)
        limit = picture_decoder(dataset).max_pixels
        found = {"path": dataset.shards.root, "size": size, "samples": len(dataset), "max_pixels": limit}
        return found | {"shards": shards}
    source: dict[str, Any] = {"kind": type(dataset).__name__, "samples": len(dataset)}
    if hasattr(dataset, "folder"):
        pairs = dataset.pairs
        listed = joint_hash(f"{file}\n{caption}\n".encode(errors="surrogateescape") for file, caption in pairs)
        source |= {"path": str(dataset.folder), "size": list(dataset.size), "max_pixels": dataset.max_pixels}
        return source | {"pairs": listed}
    return source | {name: getattr(dataset, name, None) for name in ("seed", "split", "resolution")}


# Encoding


class Encoder:
    """Encodes the rows of a plan, shard by shard.

    Args:
        plan: the checked configuration.

    Attributes:
        device: where the encoders run.
        encoders: the model's text encoders and VAE.
        text_limit: counts captions that are longer than the text encoders take.
        captions: all captions, read in advance where equal ones are stored once; else None.
        holders: row that stores the conditioning of a (caption, bucket).
    """

    def __init__(self, plan: EncodingPlan) -> None:
        self.plan = plan
        self.notes = plan.job.folder / NOTES
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoders = plan.model.encoders(self.device).to(self.device)
        self.text_limit = TextLimit(plan.model)
        self.captions: list[str] | None = None
        self.holders: dict[tuple[str, int], int] = {}
        if plan.deduplicate:
            self.captions = self._all_captions()
            for row, caption in enumerate(self.captions):
                self.holders.setdefault((caption, plan.bucket_of(row)), row)
        if is_first():
            rows = evenly(plan.job.rows, LOOKED_AT)
            captions = self.captions or [self._caption(row) for row in rows]
            warn_beyond(plan.model, captions, "captions", plan.job.rows)

    def _all_captions(self) -> list[str]:
        rows = self.plan.job.rows
        captions = []
        with JobLog("reading captions", rows, "caption", shown=is_first() and rows > LOOKED_AT) as progress:
            for row in range(rows):
                captions.append(self._caption(row))
                progress.advance()
        return captions

    def _caption(self, row: int) -> str:
        """A row's caption; empty where it cannot be read (the row then cannot be used)."""
        try:
            return str(self.plan.dataset.caption(row))
        except (CorruptSample, UserError):
            return ""

    def announce(self) -> None:
        """Print the size of the cache, and refuse one that does not fit on the disk.

        Raises:
            UserError: if there is less free space than it will take.
        """
        plan = self.plan
        job = self.plan.job
        caption = self._caption(0)
        text = len(self._packed_text(self._encode_text([caption], 0)[0], caption, plan.precision))
        different = len(self.holders) / job.rows if plan.deduplicate else 1.0
        values = sum(torch.Size(size).numel() for size in plan.schedules[0].sizes) * plan.model.channels
        latents = values * BYTES[plan.precision] * (2 if plan.posterior == "keep" else 1)
        left = job.rows_left
        needed = left * (latents + different * text)
        free = shutil.disk_usage(job.folder).free
        estimate = (
            f"{left} samples take about {needed / 1e9:.3g} GB (each {latents / 1e6:.3g} MB of latents at "
            f"{len(plan.schedules[0])} sizes and {text / 1e6:.3g} MB of text; {different:.0%} of the prompts differ)"
        )
        if needed > free:
            raise UserError(
                f"{estimate}, but {job.folder} has {free / 1e9:.3g} GB free; use precision=int8 or another out="
            )
        if share()[0] == 0:
            print(f"model {plan.model.name}: {estimate}, in {job.shards} shards at {job.folder}", flush=True)

    def samples(self, rows: range, advance: Callable[[int], object]) -> Iterator[Sample]:
        """The samples of a shard; first writes the shard's note (measurements and unusable rows)."""
        sums: dict[str, list[float]] = {}
        found, reasons = self._latents(rows, sums, advance)
        texts = self._texts(rows, found, sums)
        empty = self._write_empty() if rows.start == 0 else {}
        beyond = self.text_limit.beyond(caption for caption, _ in found.values())
        note = {"sums": sums, "unusable": reasons, "beyond": [beyond.count, beyond.most], "empty_sha256": empty}
        write_json(self._note(rows.start // self.plan.job.shard_size), note)
        for row in rows:
            caption, latents = found.get(row, (self._caption(row), {}))
            bucket = self.plan.bucket_of(row)
            files = {"txt": caption.encode()}
            if row in texts:
                files[TEXT] = texts[row]
            holder = self.holders[caption, bucket] if self.plan.deduplicate else row
            columns = {"usable": int(row in found), "bucket": bucket, "text": holder}
            yield f"{row:08d}", files | latents, columns

    def _texts(
        self, rows: range, found: Mapping[int, tuple[str, Any]], sums: dict[str, list[float]]
    ) -> dict[int, bytes]:
        """Packed conditioning, by row, of the rows that store one: all, or the first of each different prompt."""
        plan = self.plan
        texts = {}
        captions = {row: found[row][0] if row in found else self._caption(row) for row in rows}
        own = [row for row in rows if not plan.deduplicate or self.holders[captions[row], plan.bucket_of(row)] == row]
        for bucket, part in self._batches(own):
            encoded = self._encode_text([captions[row] for row in part], bucket)
            for row, conditioning in zip(part, encoded, strict=True):
                texts[row] = self._packed_text(conditioning, captions[row], plan.precision)
                add_pair(sums, "text", relative_error(conditioning.embeds[0].float(), plan.precision))
        return texts

    @staticmethod
    def _packed_text(conditioning: Any, prompt: str, precision: Precision) -> bytes:
        """A prompt's conditioning as it is stored.

        Raises:
            UserError: if it is not finite: other samples may share it, and other prompts are likely to fail too.
        """
        try:
            return pack_text(conditioning, precision)
        except CorruptSample as error:
            raise UserError(
                f"the text encoders fail on {prompt[:80]!r} ({error}); change it, or use model.precision=fp32"
            ) from None

    def _encode_text(self, prompts: list[str], bucket: int) -> list[Any]:
        """Conditioning of each prompt, one row each, on the CPU."""
        together = self.encoders.encode_prompts(prompts, self.plan.schedules[bucket].sizes[-1]).to("cpu")
        return [together.rows(slice(i, i + 1)).unpadded() for i in range(len(prompts))]

    def _latents(
        self, rows: range, sums: dict[str, list[float]], advance: Callable[[int], object]
    ) -> tuple[dict[int, tuple[str, dict[str, bytes]]], list[str]]:
        """Captions and packed latents by row, and the reason for each row that cannot be used."""
        found: dict[int, tuple[str, dict[str, bytes]]] = {}
        reasons = list[str]()
        earlier = self._unusable()
        batches = list(self._batches(rows))
        loader = GuardedLoader(
            Rows(self.plan.dataset),
            batch_sampler=[part for _, part in batches],
            num_workers=min(self.plan.workers, len(batches)),
            collate_fn=as_shared,
        )
        for (bucket, part), items in zip(batches, loader, strict=True):
            good = [item for item in items if "bad" not in item]
            reasons += [item["bad"] for item in items if "bad" in item]
            self._limit([*earlier, *reasons])
            if good:
                for item, files in zip(good, self._encode_pixels(good, bucket, sums), strict=True):
                    if isinstance(files, str):
                        reasons.append(files)
                    else:
                        found[item["row"]] = item["prompt"], files
                self._limit([*earlier, *reasons])
            advance(len(part))
        return found, reasons

    def _note(self, shard: int) -> Path:
        """File of a shard's note."""
        return self.notes / f"{shard_name(shard)}.json"

    def _unusable(self) -> list[str]:
        """Reasons of the unusable rows of all complete shards, including those that other processes wrote."""
        job = self.plan.job
        done = [shard for shard in range(job.shards) if is_done(job.folder, shard)]
        return [reason for shard in done for reason in self._read_note(shard)["unusable"]]

    def _read_note(self, shard: int) -> dict[str, Any]:
        """The note of a complete shard.

        Raises:
            UserError: if it is missing or damaged.
        """
        file = self._note(shard)
        again = f"remove {self.plan.job.folder / shard_name(shard)}.tar, and the same command makes it again"
        try:
            note = read_json(file)
        except UserError as error:
            raise UserError(f"{str(error).rpartition(';')[0]}; {again}") from None
        if not (isinstance(note.get("sums"), dict) and isinstance(note.get("unusable"), list)):
            raise UserError(f"{file} is damaged: it lacks sums or unusable; {again}")
        return note

    def _limit(self, reasons: Sequence[str]) -> None:
        """Raise UserError when more rows than `max_bad` allows cannot be used, for these reasons."""
        count = len(reasons)
        whole = max(self.plan.job.rows, 100)
        if count > self.plan.max_bad * whole:
            raise UserError(
                f"{count} of {self.plan.job.rows} samples cannot be used, more than max_bad={self.plan.max_bad} allows "
                f"(of at least 100); the last one: {reasons[-1]}"
            )

    @torch.no_grad()
    def _encode_pixels(
        self, items: Sequence[dict[str, Any]], bucket: int, sums: dict[str, list[float]]
    ) -> list[dict[str, bytes] | str]:
        """For each picture of one bucket, files with its latents at every size of the schedule, or why it has none."""
        plan = self.plan
        pixels = in_unit_range(stacked([item["pixels"] for item in items]).to(self.device))
        files: list[dict[str, bytes]] = [{} for _ in items]
        bad: dict[int, str] = {}
        for size in dict.fromkeys(plan.schedules[bucket].sizes):
            mean, std = self.encoders.distribution(downscale(pixels, plan.model.pixel_size(size)))
            if plan.posterior == "draw":
                mean = torch.cat([self._draw(*row) for row in zip(items, mean, std, strict=True)])
            keep = plan.posterior == "keep" and bool(std.any())  # SANA's autoencoder has no deviation
            for i, item in enumerate(items):
                try:
                    files[i][latents_name(size)] = pack_latents(mean[i], std[i] if keep else None, plan.precision)
                    add_pair(sums, f"latents {'x'.join(map(str, size))}", relative_error(mean[i].cpu(), plan.precision))
                except CorruptSample as error:
                    bad[i] = f"sample {item['row']}: {error}"
        return [bad.get(i, found) for i, found in enumerate(files)]

    def _draw(self, item: dict[str, Any], mean: Tensor, std: Tensor) -> Tensor:
        """One draw `[1, C, *size]` that depends on the row alone."""
        return draw_latents(mean[None], std[None], SeededDraws(0, first=item["row"]))

    def _batches(self, rows: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Rows of one bucket, `batch_size` at a time."""
        buckets: dict[int, list[int]] = {}
        for row in rows:
            buckets.setdefault(self.plan.bucket_of(row), []).append(row)
        for bucket, members in sorted(buckets.items()):
            for start in range(0, len(members), self.plan.batch_size):
                yield bucket, members[start : start + self.plan.batch_size]

    def _write_empty(self) -> dict[str, str]:
        """Write the empty prompt of every bucket, for classifier-free guidance; returns their SHA-256 by name."""
        hashes = {}
        for bucket in range(len(self.plan.buckets)):
            precision: Precision = "fp32" if self.plan.precision == "fp32" else "bf16"
            data = self._packed_text(self._encode_text([""], bucket)[0], "", precision)
            write_aside(self.plan.job.folder / empty_name(bucket), partial(Path.write_bytes, data=data))
            hashes[empty_name(bucket)] = hashlib.sha256(data).hexdigest()
        return hashes

    def measured(self) -> dict[str, Any]:
        """Entries of the manifest: the notes of all shards, added up."""
        notes = [self._read_note(shard) for shard in range(self.plan.job.shards)]
        sums: dict[str, list[float]] = {}
        for note in notes:
            for name, pair in note["sums"].items():
                add_pair(sums, name, pair)
        errors = {name: (wrong / max(whole, 1e-30)) ** 0.5 for name, (wrong, whole) in sorted(sums.items())}
        reasons = self._unusable()
        summary: dict[str, Any] = {"relative_error": errors, "unusable": len(reasons), "problems": reasons}
        if self.text_limit.limit is not None:
            counts, most = zip(*(note.get("beyond", (0, 0)) for note in notes), strict=True)
            summary["beyond_token_limit"] = {"limit": self.text_limit.limit, "samples": sum(counts), "most": max(most)}
        return summary | {"empty_sha256": self._empty_hashes()}

    def _empty_hashes(self) -> dict[str, str]:
        """SHA-256 by name of each encoded empty prompt; all are encoded again where a file is missing or changed."""
        stored = self._read_note(0).get("empty_sha256", {})
        names = [empty_name(bucket) for bucket in range(len(self.plan.buckets))]
        files = [self.plan.job.folder / name for name in names]
        if not all(f.is_file() and stored.get(f.name) in (None, file_hash(f)) for f in files):
            warnings.warn(f"{self.plan.job.folder}: an empty prompt has changed; it is encoded again", stacklevel=2)
            self._write_empty()
        return {file.name: file_hash(file) for file in files}


class Rows(Dataset[dict[str, Any]]):
    """Samples of a data set by row; for one that cannot be used, the reason: `{"row": row, "bad": reason}`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            if isinstance(self.dataset, IndexedShards):
                sample = self.dataset.read(row, 0)
                return {"row": row, "pixels": sample.pixels, "prompt": sample.prompt}
            item = self.dataset[row]
        except (CorruptSample, UserError) as error:
            return {"row": row, "bad": str(error)}
        return {"row": row, "pixels": item["pixels"], "prompt": item["prompt"]}


def as_shared(items: list[dict[str, Any]]) -> list[dict[str, Any]] | UserError:
    """The loader's collate function: items as they are, or the error if shared memory cannot take them."""
    try:
        in_shared_memory(items)
    except UserError as error:
        return error
    return items


def add_pair(sums: dict[str, list[float]], name: str, pair: Sequence[float]) -> None:
    """Add a pair of numbers to the pair of sums called `name`."""
    old = sums.get(name, [0.0, 0.0])
    sums[name] = [old[0] + pair[0], old[1] + pair[1]]
