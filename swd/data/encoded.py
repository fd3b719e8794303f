"""Some pictures of a data set, encoded once when training starts and kept in main memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from swd.data.datamodule import BatchPlan, PairData, ThreadedLoader
from swd.data.webdataset import DueBatches
from swd.io.job_log import JobLog
from swd.io.ranks import is_first
from swd.modules.distiller import Distiller
from swd.modules.encoders import Encoders, channels_last
from swd.schedule import ScaleSchedule, downscale
from swd.types import Cached, CachedBatch, Conditioning, Size, UserError, in_unit_range, stacked

AT_ONCE = 32
"""Pictures encoded at once, whatever the size of a batch: the last bits of a result depend on it, and a run that goes
on must get the same as a straight one."""


@dataclass(frozen=True)
class EncodedSamples:
    """Outputs of the encoders for N samples, on the CPU.

    Attributes:
        prompts: N captions.
        conditioning: N rows.
        posteriors: mean and standard deviation `[N, C, *size]` of the network's latents, by latent size.
    """

    prompts: list[str]
    conditioning: Conditioning
    posteriors: dict[Size, tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, rows: Sequence[int], sizes: Sequence[Size]) -> CachedBatch:
        """The batch of some samples, with latents of some sizes."""
        chosen = list(rows)
        posteriors = {size: (mean[chosen], std[chosen]) for size in sizes for mean, std in [self.posteriors[size]]}
        return CachedBatch(
            Cached(self.conditioning.rows(chosen), posteriors), prompts=[self.prompts[row] for row in chosen]
        )

    @staticmethod
    def cat(parts: Sequence[EncodedSamples]) -> EncodedSamples:
        """Samples of several parts, in their order."""
        posteriors = {}
        for size in parts[0].posteriors:
            means, stds = zip(*(part.posteriors[size] for part in parts), strict=True)
            posteriors[size] = torch.cat(means), torch.cat(stds)
        prompts = [prompt for part in parts for prompt in part.prompts]
        return EncodedSamples(prompts, Conditioning.cat([part.conditioning for part in parts]), posteriors)


def encode(encoders: Encoders, samples: Sequence[dict[str, Any]], schedule: ScaleSchedule) -> EncodedSamples:
    """Encode samples with `pixels` and `prompt` at every size of the schedule, each shrunk from full size directly."""
    prompts = [sample["prompt"] for sample in samples]
    pixels = in_unit_range(stacked([sample["pixels"] for sample in samples]).to(encoders.device))
    posteriors = {}
    for size in dict.fromkeys(schedule.sizes):
        mean, std = encoders.distribution(downscale(pixels, encoders.pixel_size(size)))
        posteriors[size] = mean.cpu(), std.cpu()
    return EncodedSamples(prompts, encoders.encode_prompts(prompts, schedule.sizes[-1]).to("cpu"), posteriors)


class EncodedPairs(PairData):
    """The first pictures of a dataset, encoded once when training starts, and used over and over.

    The encoders are freed afterwards. What is kept of a picture are the VAE's distributions at all sizes of the
    schedule, so that each use draws its latents anew. Every process encodes all pictures.

    Args:
        dataset: items are dicts with `pixels` `[3, H, W]` in [-1, 1] and `prompt`.
        encoded: how many of its pictures are used. The default is ours: in 150 iterations of three batches of 16 each
            is used seven times.
        batch_size: over all processes.
        workers: threads that put batches together ahead; 0 does so when one is asked for, which takes a millisecond.
        seed: of the order.

    Raises:
        UserError: if the dataset has fewer pictures.
    """

    is_cache: ClassVar[bool] = True

    def __init__(
        self, dataset: Dataset[Any], encoded: int = 1024, batch_size: int = 16, workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__(dataset, batch_size, workers, seed)
        have = len(cast(Any, dataset))
        if not 1 <= encoded <= have:
            raise UserError(f"data.encoded={encoded}; use a number from 1 to {have}, the pictures of the data set")
        self.encoded = encoded
        self._samples: EncodedSamples | None = None
        self._last: EncodedSamples | None = None
        self._empty: Conditioning | None = None

    def empty(self, bucket: Size | None) -> Conditioning:
        """The encoded empty prompt, one row."""
        assert self._empty is not None, "the loader, which encodes, is made before anything asks"
        return self._empty

    def last(self, count: int, step: int) -> CachedBatch:
        if self._last is None or len(self._last) != count:
            end = len(cast(Any, self.dataset))
            self._last = self._encode(range(end - 1, end - 1 - count, -1))
        return self._last.batch(range(count), self._sizes(step))

    def batch_loader(self, plan: BatchPlan) -> ThreadedLoader:
        """The batches of `plan`, of what is encoded now, if it was not before."""
        if self._samples is None:
            self._samples = self._encode(range(self.encoded))
        samples = self._samples

        def read(requests: Sequence[tuple[int, int]]) -> CachedBatch:
            return samples.batch([index for index, _ in requests], self._sizes(requests[0][1]))

        due = DueBatches(self.encoded, self.batch_size, plan.start, plan.total, self.seed, plan.rank, plan.world)
        due.per_iteration = plan.per_iteration
        due.steps = self._task.steps
        return ThreadedLoader(read, due, self.workers)

    @property
    def _task(self) -> Distiller:
        """The distillation that these data are for; `swd train` refuses them for other tasks."""
        task = cast(Any, self.trainer).lightning_module
        assert isinstance(task, Distiller), f"{type(task).__name__} is no distillation"
        return task

    def _sizes(self, step: int) -> tuple[Size, Size]:
        interval = self._task.schedule.interval(step)
        return interval.source, interval.target

    def _encode(self, indices: Sequence[int]) -> EncodedSamples:
        """Encode samples of the dataset, and the empty prompt, with encoders that are freed afterwards."""
        task = self._task
        device = cast(Any, self.trainer).strategy.root_device
        dataset: Any = self.dataset
        parts = []
        log = JobLog("encoding pictures, once for all iterations", len(indices), "picture", shown=is_first())
        with task.inputs.lent_encoders(device) as encoders, log:
            channels_last(encoders.vae)
            self._empty = encoders.encode_prompts([""], task.schedule.sizes[-1]).to("cpu")
            for start in range(0, len(indices), AT_ONCE):
                samples = [dataset[index] for index in indices[start : start + AT_ONCE]]
                parts.append(encode(encoders, samples, task.schedule))
                log.advance(len(samples))
        return EncodedSamples.cat(parts)
