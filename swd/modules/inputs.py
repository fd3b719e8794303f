"""Batches of training data to what one update works on, whether they are encoded here or were so before."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from swd.modules.encoders import Encoders, draw_latents
from swd.modules.finite import all_finite
from swd.modules.pretrained import Pretrained
from swd.schedule import DIRECT, Interval, Resizing, ScaleSchedule
from swd.types import CachedBatch, Checks, Conditioning, PictureBatch, SeededDraws, Size


@dataclass(frozen=True)
class Inputs:
    """The data of one update, with its place in the run and in the schedule.

    Attributes:
        interval: the step of the schedule that is trained.
        source, target: clean latents of the data at its two sizes.
        conditioning: B rows.
        empty: the conditioning that guidance takes in place of a prompt's, one row.
        draws: where random numbers come from.
        place: iteration (from 1), step of the schedule (from 1) and update, for messages.
        bucket: size of finished pictures in pixels where data come in several aspect ratios; None: the schedule's own.
        x0_hat: the student's clean predictions `[B, C, *size]`, where they were made ahead of the update.
    """

    interval: Interval
    source: Tensor
    target: Tensor
    conditioning: Conditioning
    empty: Conditioning
    draws: SeededDraws
    place: str = ""
    bucket: Size | None = None
    x0_hat: Tensor | None = None

    def finite(self) -> Checks:
        """Whether what the data and their encoders gave is finite."""
        texts = [t for c in (self.conditioning, self.empty) for t in (c.embeds, c.pooled) if t is not None]
        return {"latents of the data": all_finite([self.source, self.target]), "encoded prompts": all_finite(texts)}

    def parts(self, count: int) -> list[Inputs]:
        """The batch in equal parts, which draw as its rows do; `count` divides it."""
        size = len(self.target) // count
        assert size * count == len(self.target), f"{count} parts of {len(self.target)} samples"
        return [self] if count == 1 else [self._rows(start, start + size) for start in range(0, size * count, size)]

    def _rows(self, start: int, end: int) -> Inputs:
        return replace(
            self,
            source=self.source[start:end],
            target=self.target[start:end],
            conditioning=self.conditioning.rows(slice(start, end)),
            x0_hat=None if self.x0_hat is None else self.x0_hat[start:end],
            draws=replace(self.draws, first=self.draws.first + start),
        )

    def first(self) -> Inputs:
        """The first sample alone."""
        return replace(
            self,
            source=self.source[:1].clone(),  # a view would keep the whole batch in memory
            target=self.target[:1].clone(),
            conditioning=self.conditioning.map(lambda tensor: tensor[:1].clone()),
            x0_hat=None,
        )


class Cache(Protocol):
    """Data that were encoded before, and hold the encoded empty prompt."""

    def empty(self, bucket: Size | None) -> Conditioning:
        """The encoded empty prompt, one row, for finished pictures of `bucket` pixels."""


class InputBuilder:
    """Makes `Inputs` of batches: encodes pictures and prompts, or takes what a cache holds of them.

    A plain object, so that the frozen encoders stay out of checkpoints and away from DDP.

    Args:
        model: whose encoders are used.
        schedule: noise levels and sizes.
        resizing: how pictures of full size are shrunk to a step's sizes; a cache holds them shrunk already.

    Attributes:
        cache: the data, if they are encoded already; None: pictures and prompts are encoded here.
    """

    def __init__(self, model: Pretrained, schedule: ScaleSchedule, resizing: Resizing = DIRECT) -> None:
        self.model = model
        self.schedule = schedule
        self.resizing = resizing
        self.cache: Cache | None = None
        self._encoders: Encoders | None = None
        self._empty: dict[Size | None, Conditioning] = {}

    def build(self, batch: PictureBatch | CachedBatch, step: int, draws: SeededDraws, place: str = "") -> Inputs:
        """The inputs of one update, on the batch's device.

        Args:
            batch: pictures and prompts, or what a cache holds of them.
            step: of the schedule, from 0.
            draws: where random numbers come from.
            place: for messages.
        """
        interval = self.schedule_for(batch.bucket).interval(step)
        source, target = self.latents(batch, interval, draws)
        if isinstance(batch, CachedBatch):
            conditioning = batch.cached.conditioning
        else:
            conditioning = self.encode_prompts(batch.prompts, batch.bucket, target.device)
        empty = self.empty(batch.bucket, target.device)
        return Inputs(interval, source, target, conditioning, empty, draws, place, batch.bucket)

    def latents(
        self, batch: PictureBatch | CachedBatch, interval: Interval, draws: SeededDraws
    ) -> tuple[Tensor, Tensor]:
        """Latents at the source and target size, downscaled in pixels and then encoded."""
        one_size = interval.source == interval.target
        if isinstance(batch, CachedBatch):
            posteriors = batch.cached.posteriors
            target = draw_latents(*posteriors[interval.target], draws)
            return (target if one_size else draw_latents(*posteriors[interval.source], draws)), target
        sizes = (self.model.pixel_size(size) for size in (interval.source, interval.target))
        small, large = self.resizing.pair(batch.pixels, *sizes)
        encoders = self.encoders(large.device)
        target = encoders.encode(large, draws)
        return (target if one_size else encoders.encode(small, draws)), target

    def empty(self, bucket: Size | None, device: torch.device) -> Conditioning:
        """The conditioning that guidance takes in place of a prompt's, one row.

        `bucket` is the size of finished pictures in pixels; None: the schedule's own. Caches hold the encoded empty
        prompt; SDXL's zeros are made of it here.
        """
        if bucket not in self._empty:
            cache = self.cache
            empty = self.encode_prompts([""], bucket, device) if cache is None else cache.empty(bucket)
            self._empty[bucket] = self.model.unconditional(empty)
        return self._empty[bucket].to(device)

    def encode_prompts(self, prompts: list[str], bucket: Size | None, device: torch.device) -> Conditioning:
        """Conditioning of B prompts, for finished pictures of `bucket` pixels; None: of the schedule's own size."""
        with self.lent_encoders(device) as encoders:
            return encoders.encode_prompts(prompts, self.schedule_for(bucket).sizes[-1]).to(device)

    def schedule_for(self, bucket: Size | None) -> ScaleSchedule:
        """The schedule stretched to finished pictures of `bucket` pixels; None: as it is."""
        if bucket is None:
            return self.schedule
        return self.schedule.stretched(self.model.latent_size(bucket), self.model.limits.divisor)

    def encoders(self, device: torch.device) -> Encoders:
        """Text encoders and VAE; loaded to `device` when they are first asked for, which with a cache may be never."""
        if self._encoders is None:
            self._encoders = self.model.encoders(device).to(device)
        return self._encoders

    @contextmanager
    def lent_encoders(self, device: torch.device, text: bool = True) -> Iterator[Encoders]:
        """Encoders to use for a while: those that training holds, or, with a cache, ones that are freed afterwards.

        A model's text encoders and VAE may take more memory than its network. Whoever uses them here must keep no
        reference to them.

        Args:
            device: where they compute.
            text: False: without text encoders, to decode alone.
        """
        if self.cache is None or self._encoders is not None:
            yield self.encoders(device)
            return
        encoders = self.model.encoders(device, text).to(device)
        try:
            yield encoders
        finally:
            del encoders
            gc.collect()  # pipelines hold references in cycles
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def load(self, device: torch.device) -> None:
        """Load now what the first update would load."""
        if self.cache is None:
            self.encoders(device)
