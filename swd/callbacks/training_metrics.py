"""Metrics of the student's pictures at every size, while it trains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from swd.callbacks.measurement import Measurement
from swd.callbacks.ranks import Share, attempt, gather
from swd.data.held_out import HeldOut, held_out_of
from swd.data.picture_files import read_picture
from swd.io import limits
from swd.metrics.base import Drawn, Extractor, PictureMetric, Reference
from swd.metrics.features import load_features, picture_files, save_features
from swd.metrics.streaming import StreamedMetrics
from swd.modules.distiller import Distiller
from swd.modules.finite import all_finite
from swd.modules.run_values import log_values
from swd.schedule import downscale
from swd.types import Conditioning, PictureBatch, Size, UserError, in_unit_range

FIRST = 8
"""Real pictures whose pixels identify the whole set, beside the captions or file names of all."""

REFERENCE = "callbacks.metrics.reference=FOLDER"


@dataclass(frozen=True)
class RealPictures:
    """Pictures that drawn ones are compared with, from a folder or held out of the data.

    Attributes:
        places: of those that are used, among the files or samples.
        source: their files, or the samples that are held out.
        size: (H, W) in pixels of full pictures.
    """

    places: Sequence[int]
    source: HeldOut | Sequence[Path]
    size: Size

    @property
    def count(self) -> int:
        """How many are used."""
        return len(self.places)

    def read(self, numbers: Sequence[int]) -> Tensor:
        """Full pictures `[B, 3, H, W]` in [-1, 1], by their numbers among those that are used."""
        places = [self.places[number] for number in numbers]
        if not isinstance(self.source, HeldOut):
            return torch.stack([read_picture(self.source[place], self.size) for place in places])
        batch = self.source.batch(places, 0)
        assert isinstance(batch, PictureBatch)
        return downscale(in_unit_range(batch.pixels), self.size)

    def identity(self) -> str:
        """Hash of the captions (or file names) of all pictures and the pixels of the first few."""
        held, places = self.source, self.places
        names = held.captions_at(places) if isinstance(held, HeldOut) else [str(held[place]) for place in places]
        pixels = to_bytes(self.read(range(min(FIRST, self.count)))).numpy().tobytes()
        return hashlib.sha256(json.dumps([names, self.size]).encode() + pixels).hexdigest()


@dataclass(frozen=True)
class Stored:
    """Stored features of real pictures.

    Attributes:
        files: where they lie or will, by step of the schedule and extractor.
        known: those that were read, by step and the extractor's name.
    """

    files: dict[tuple[int, Extractor], Path]
    known: dict[tuple[int, str], Tensor]

    def write(self, features: Mapping[tuple[int, Extractor], Tensor], is_writer: bool) -> bool:
        """Write features to their files, on the process that does."""
        for key, rows in features.items() if is_writer else ():
            self.files[key].parent.mkdir(parents=True, exist_ok=True)
            save_features(self.files[key], key[1], rows)
        return True


class Metrics(Measurement):
    """Scores pictures of fixed prompts with fixed seeds now and then, by any metrics of pictures.

    A picture's prediction at each step of the schedule is compared with real pictures shrunk to that size, as the data
    are in training; where several steps have one size, the last of them counts. Values are logged as
    `metrics/NAME/SIZE`, sizes in pixels, and are in `trainer.callback_metrics`. Real pictures are scored once and the
    features stored. Every process draws its share. Between scorings nothing of this is on the device, and in main
    memory there are the prompts' embeddings and the features of real pictures. What goes wrong in a scoring is a
    warning.

    Args:
        sizes: metrics at every size, by name.
        full: metrics at full size alone, by name.
        every: iterations between scorings; the last iteration is always scored.
        pictures: how many are drawn; distances of different numbers must not be compared.
        batch_size: pictures that one process draws at once.
        seed: of the first picture, the others count up.
        prompts: they take turns; None: the captions of the samples that `data.validation` holds out.
        reference: folder of real pictures; None: samples that `data.validation` holds out, as many as are drawn, and
            others than those whose captions are drawn: beside their own captions' pictures, distances are too small.
        store: folder for the features of real pictures, which other runs may use too; None: in the run's folder.
    """

    def __init__(
        self,
        sizes: Mapping[str, PictureMetric] | None = None,
        full: Mapping[str, PictureMetric] | None = None,
        every: int = 100,
        pictures: int = 512,
        batch_size: int = 16,
        seed: int = 0,
        prompts: Sequence[str] | None = None,
        reference: str | None = None,
        store: str | None = None,
    ) -> None:
        self.sizes = list((sizes or {}).values())
        self.full = list((full or {}).values())
        if not self.sizes + self.full:
            raise UserError("callbacks.metrics has no metric; choose some, e.g. callbacks/metrics=shapes")
        for key, value, least in (("every", every, 1), ("pictures", pictures, 2), ("batch_size", batch_size, 1)):
            limits.number(f"callbacks.metrics.{key}", value, least=least)
        self.every = every
        self.pictures = pictures
        self.batch_size = batch_size
        self.seed = seed
        self.prompts = None if prompts is None else list(prompts)
        self.folder = reference
        self.store = store
        self._conditioning: list[Conditioning] = []
        self._reference: dict[int, Reference] = {}

    # Before training

    def check_fit(self, task: LightningModule, data: Any) -> None:
        """Refuse, before any model is loaded, what could not be scored.

        Raises:
            UserError: for absent weights, packages, prompts or real pictures, and metrics that are scored outside.
        """
        if not isinstance(task, Distiller):
            raise UserError("callbacks.metrics scores a distillation; leave it out of other tasks: ~callbacks.metrics")
        if task.model.backbone_class.video:
            raise UserError("callbacks.metrics scores pictures, and this model draws videos; leave it out")
        held = held_out_of(data)
        prompts = self._prompts(held)
        needs_reference = any(metric.needs_reference for metric in self.sizes + self.full)
        count = self._real(task, held).count if needs_reference else self.pictures
        for metric in self.sizes + self.full:
            if not metric.extractors:
                raise UserError(f"callbacks.metrics: {metric.name} is scored outside; leave it out of training")
            for extractor in metric.extractors:
                extractor.check()
            # The features themselves are not known yet.
            known = {each.name: torch.empty(1, each.width).expand(count, -1) for each in metric.extractors}
            metric.check(Reference(known))
            metric.check_prompts(prompts)

    def _prompts(self, held: HeldOut | None) -> list[str]:
        """The prompt of each picture.

        Raises:
            UserError: if there are none, or not enough samples are held out.
        """
        if self.prompts is not None:
            if not self.prompts:
                raise UserError("callbacks.metrics.prompts is empty; give prompts, or null for captions of the data")
            return [self.prompts[i % len(self.prompts)] for i in range(self.pictures)]
        if held is None:
            raise UserError(
                "callbacks.metrics takes the captions of data.validation, which holds none out; give "
                "callbacks.metrics.prompts=[...], or a share, e.g. data.validation=0.01"
            )
        apart = self.folder is None and any(metric.needs_reference for metric in self.sizes + self.full)
        if apart:
            self._check_twice(held)
        else:
            held.check(self.pictures, "callbacks.metrics.pictures")
        return held.captions_at(halves(self.pictures)[0] if apart else range(self.pictures))

    def _check_twice(self, held: HeldOut) -> None:
        """Raise UserError if there are too few samples for captions of some and pictures of others."""
        most = len(held) // 2
        if most < self.pictures:
            fewer = f"set callbacks.metrics.pictures={most}, " if most > 1 else ""
            raise UserError(
                f"callbacks.metrics.pictures={self.pictures} takes the captions of so many samples of data.validation "
                f"and the pictures of as many others, but it holds out {len(held)} samples; hold out "
                f"{2 * self.pictures}, {fewer}or give a folder of real pictures with {REFERENCE}"
            )

    def _real(self, task: Distiller, held: HeldOut | None) -> RealPictures:
        """The real pictures.

        Raises:
            UserError: if there are none, too few, or none with pixels.
        """
        size = task.model.pixel_size(task.schedule.sizes[-1])
        if self.folder is not None:
            files = picture_files(Path(self.folder))
            return RealPictures(range(len(files)), files, size)
        how = f"give a folder of real pictures with {REFERENCE}"
        if held is None:
            raise UserError(f"callbacks.metrics compares with real pictures, and data.validation holds none out; {how}")
        if held.is_cache or held.bucket is not None:
            why = "a cache holds no pixels" if held.is_cache else "data.buckets have other proportions than samples"
            raise UserError(f"callbacks.metrics compares with real pictures: {why}; {how}")
        if self.prompts is not None:
            held.check(self.pictures, "callbacks.metrics.pictures")
            return RealPictures(range(self.pictures), held, size)
        self._check_twice(held)
        return RealPictures(halves(self.pictures)[1], held, size)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, Distiller):
            attempt(trainer, partial(self._encode, trainer, pl_module), "prompts of metrics")
            for step, reference in (self._references(trainer, pl_module, "metrics") or {}).items():
                self._rehearse(pl_module, step, reference)

    def _rehearse(self, task: Distiller, step: int, reference: Reference) -> None:
        """Score real pictures as if they had been drawn, so that what cannot be computed is known before training.

        Raises:
            UserError: by the metric, for example where it needs more pictures; on all processes alike.
        """
        for metric in self._metrics(task)[step]:
            if metric.needs_reference and not metric.needs_prompts:
                features = {each.name: reference.features[each.name][: self.pictures] for each in metric.extractors}
                metric.score(Drawn(features), reference)

    def _held_out(self, trainer: Trainer) -> HeldOut | None:
        return held_out_of(cast(Any, trainer).datamodule)

    def _encode(self, trainer: Trainer, task: Distiller) -> list[Conditioning]:
        """The conditioning of this process's prompts on the CPU, by batch; they are encoded at the first call."""
        if not self._conditioning:
            prompts = self._prompts(self._held_out(trainer))
            with task.inputs.lent_encoders(trainer.strategy.root_device) as encoders:
                for places in Share.of(trainer, self.pictures).batches(self.batch_size):
                    encoded = encoders.encode_prompts([prompts[i] for i in places], task.schedule.sizes[-1])
                    self._conditioning.append(encoded.to("cpu"))
        return self._conditioning

    # While training

    def measure(self, trainer: Trainer, task: LightningModule) -> dict[str, float]:
        """Score the student on all processes, and log the values; empty if it failed."""
        if not isinstance(task, Distiller):
            return {}
        what = f"metrics of iteration {trainer.global_step}"
        try:
            reference = self._references(trainer, task, what)
            if reference is None:
                return {}
            streams = self._streams(trainer, task, reference)
            if attempt(trainer, partial(self._draw, trainer, task, streams), what) is None:
                return {}
            row = attempt(trainer, partial(scores, streams), what)  # equal on all processes
        finally:
            for extractor in self._extractors():
                extractor.unload()
        if row is None:
            return {}
        log_values(trainer, row)
        return row

    def _extractors(self) -> dict[Extractor, None]:
        return dict.fromkeys(each for metric in self.sizes + self.full for each in metric.extractors)

    def _metrics(self, task: Distiller) -> dict[int, list[PictureMetric]]:
        """The metrics of each step of the schedule that is scored: the last step of each size."""
        steps = {size: step for step, size in enumerate(task.schedule.sizes)}
        last = len(task.schedule) - 1
        found = {step: self.sizes + (self.full if step == last else []) for step in steps.values()}
        return {step: metrics for step, metrics in found.items() if metrics}

    def _streams(
        self, trainer: Trainer, task: Distiller, references: Mapping[int, Reference]
    ) -> dict[tuple[int, str], StreamedMetrics]:
        """Empty metrics by step and name of the size."""
        prompts = self._prompts(self._held_out(trainer))
        streams = {}
        for step, metrics in self._metrics(task).items():
            stream = StreamedMetrics(metrics, prompts, references.get(step))
            streams[step, size_name(task.model.pixel_size(task.schedule.sizes[step]))] = stream.to(task.device)
        return streams

    @torch.no_grad()
    def _draw(self, trainer: Trainer, task: Distiller, streams: Mapping[tuple[int, str], StreamedMetrics]) -> bool:
        """Draw this process's share of the pictures, and keep their features."""
        conditioning = self._encode(trainer, task)
        share = Share.of(trainer, self.pictures)
        with task.inputs.lent_encoders(trainer.strategy.root_device, text=False) as encoders:
            for batch, places in zip(conditioning, share.batches(self.batch_size), strict=True):
                _, predictions = task.draw_latents(batch, [self.seed + place for place in places], keep_x0=True)
                for (step, _), stream in streams.items():
                    pictures = encoders.decode(predictions[step])
                    if not all_finite([pictures]):
                        raise ValueError("the student's pictures hold values that are not finite")
                    stream.update(to_bytes(pictures), torch.tensor(places))
        return True

    # Real pictures

    def _references(self, trainer: Trainer, task: Distiller, what: str) -> dict[int, Reference] | None:
        """Features of real pictures by step of the schedule, extracted once or read from the store; None if it failed.

        The first process alone reads and writes files, since another one may not see them.
        """
        if self._reference or not any(metric.needs_reference for metric in self.sizes + self.full):
            return self._reference
        real = self._real(task, self._held_out(trainer))
        stored = attempt(trainer, partial(self._stored, trainer, task, real), what)
        if stored is None:
            return None
        known: dict[tuple[int, str], Tensor] = trainer.strategy.broadcast(stored.known)
        absent = [key for key in stored.files if (key[0], key[1].name) not in known]
        rows = attempt(trainer, partial(self._extract, trainer, task, real, absent), what) if absent else {}
        if rows is None:
            return None
        fresh = {key: gather(trainer, features, real.count) for key, features in rows.items()}
        attempt(trainer, partial(stored.write, fresh, trainer.is_global_zero), f"stored features for {what}")
        known |= {(step, extractor.name): features for (step, extractor), features in fresh.items()}
        for step in {step for step, _ in known}:
            self._reference[step] = Reference({name: each for (at, name), each in known.items() if at == step})
        return self._reference

    def _stored(self, trainer: Trainer, task: Distiller, real: RealPictures) -> Stored:
        """Where features of real pictures lie, and those that are there already."""
        identity = real.identity() if trainer.is_global_zero else ""
        folder = Path(self.store) if self.store else Path(trainer.default_root_dir) / "metrics"
        files = {}
        for step, metrics in self._metrics(task).items():
            side = size_name(task.model.pixel_size(task.schedule.sizes[step]))
            comparing = [metric for metric in metrics if metric.needs_reference]
            for each in {e.name: e for metric in comparing for e in metric.extractors}.values():
                key = hashlib.sha256(f"{identity}/{each.weights_id()}".encode()).hexdigest()[:16]
                files[step, each] = folder / f"real-{side}-{each.name}-{key}.safetensors"
        there = {key: file for key, file in files.items() if trainer.is_global_zero and file.is_file()}
        return Stored(files, {(step, each.name): load_features(file, each) for (step, each), file in there.items()})

    @torch.no_grad()
    def _extract(
        self, trainer: Trainer, task: Distiller, real: RealPictures, wanted: Sequence[tuple[int, Extractor]]
    ) -> dict[tuple[int, Extractor], Tensor]:
        """Features of this process's share of the real pictures, by step and extractor."""
        rows: dict[tuple[int, Extractor], list[Tensor]] = {key: [] for key in wanted}
        for places in Share.of(trainer, real.count).batches(self.batch_size):
            pixels = real.read(places).to(task.device)
            for step, extractor in wanted:
                shrunk = downscale(pixels, task.model.pixel_size(task.schedule.sizes[step]))
                rows[step, extractor].append(extractor(to_bytes(shrunk)).cpu())
        return {key: torch.cat(parts) for key, parts in rows.items()}


def scores(streams: Mapping[tuple[int, str], StreamedMetrics]) -> dict[str, float]:
    """The values of all metrics by the name that they are logged under; every process must call it."""
    return {
        f"metrics/{name}/{size}": float(value)
        for (_, size), stream in streams.items()
        for name, value in stream.compute().items()
    }


def halves(count: int) -> tuple[list[int], list[int]]:
    """Places 0 to 2 `count` - 1 in two random halves, always the same: samples with a caption to draw, and others.

    Random, since data may lie in some order: the second half of such data is unlike the first, and every other one of
    them more like those between than an independent sample is.
    """
    order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0)).tolist()
    return sorted(order[:count]), sorted(order[count:])


def size_name(size: Size) -> str:
    """A size in pixels as a part of a name: 128 for 128x128, else with all sides, "480x832"."""
    return str(size[0]) if len(size) == 2 and size[0] == size[1] else "x".join(map(str, size))


def to_bytes(pixels: Tensor) -> Tensor:
    """Pictures in [-1, 1] as uint8, rounded as they are when they are written to a file."""
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
