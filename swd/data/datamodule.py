"""Batches in an order that depends on the seed alone: not on processes, workers, or where a run was resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from swd.data.held_out import HeldOut, is_held_out, is_share
from swd.data.iterations import Iterations
from swd.data.job import in_shared_memory
from swd.data.read_ahead import read_ahead
from swd.data.shards import CorruptSample
from swd.io import limits, signals
from swd.io.ranks import is_first
from swd.modules.pretrained import Pretrained
from swd.modules.tokens import evenly, warn_beyond
from swd.schedule import ScaleSchedule
from swd.types import Batch, PictureBatch, Size, UserError, stable_hash, stacked

LOOKED_AT = 1000
"""Captions whose length is looked at before training: all of a small set, a sample of a large one."""

LOOKED_AT_DRAWN = 100
"""The same where every sample is drawn when it is asked for, which takes longer and seldom differs in kind."""


class Order:
    """An endless order of samples: one shuffle after the other, each decided by (seed, epoch) alone.

    Args:
        ids: the samples.
        key: what the shuffles are seeded with.
        groups: which group each sample is in, ascending (its shard); samples are mixed within `window` groups at a
            time, and the groups themselves are shuffled. None: all are mixed.
        window: how many groups are mixed.
    """

    def __init__(
        self, ids: Sequence[int] | range | NDArray[Any], key: str, groups: Tensor | None = None, window: int = 1
    ) -> None:
        self.ids = ids
        self.key = key
        self.groups = groups
        self.window = window
        self._epoch = -1
        self._order = torch.empty(0)

    def __getitem__(self, g: int) -> int:
        epoch, entry = divmod(g, len(self.ids))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = self._shuffled(epoch)
        return int(self.ids[int(self._order[entry])])

    def _shuffled(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(stable_hash(f"{self.key}/{epoch}".encode()))
        shuffle = torch.randperm(len(self.ids), generator=generator)
        if self.groups is None:
            return shuffle
        # Stable sorts of a shuffle: by which window a sample's group falls into this time.
        _, number = self.groups.unique(return_inverse=True)
        place = torch.randperm(int(number.max()) + 1, generator=generator) // self.window
        return shuffle[place[number[shuffle]].argsort(stable=True)]


class GlobalBatches(Sampler[list[Any]]):
    """Dataset indices of this process's part of every global batch.

    Sample number g of the run is entry `g mod length` of epoch `g div length`, each epoch shuffled by (seed, epoch).
    A process takes a contiguous slice of each global batch, so that the batch as a whole is always the same. Where
    samples come in buckets, a batch has samples of one bucket: which one is drawn by (seed, number of the batch) in
    proportion to their sizes, and each bucket has epochs of its own.

    Args:
        length: of the dataset; None: endless, index g itself.
        batch_size: global, a multiple of `world`.
        start: first batch to yield, when a run is resumed.
        total: number of batches of the whole run; `len` counts them all, also the ones skipped by `start`.
        seed: of the shuffle.
        rank, world: this process and the number of processes.
        orders: one order a bucket, instead of `length`.
    """

    def __init__(
        self,
        length: int | None,
        batch_size: int,
        start: int,
        total: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        orders: Sequence[Order] | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise UserError(f"data.batch_size={batch_size} does not divide over {world} processes; use a multiple")
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.total = total
        self.rank = rank
        self.world = world
        plain = [] if length is None else [Order(range(length), f"{seed}/order")]
        self.orders = plain if orders is None else list(orders)

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[Any]]:
        local = self.batch_size // self.world
        used = [0] * max(len(self.orders), 1)
        for batch in range(self.total):
            bucket = self._bucket(batch)
            first = used[bucket] * self.batch_size + self.rank * local
            used[bucket] += 1
            if batch >= self.start:
                order = self.orders[bucket] if self.orders else None
                yield [self.request(g if order is None else order[g], batch) for g in range(first, first + local)]

    def _bucket(self, batch: int) -> int:
        if len(self.orders) < 2:
            return 0
        generator = torch.Generator().manual_seed(stable_hash(f"{self.seed}/bucket/{batch}".encode()))
        sizes = torch.tensor([float(len(order.ids)) for order in self.orders])
        return int(torch.multinomial(sizes, 1, generator=generator))

    def request(self, index: int, batch: int) -> Any:
        """The argument of the dataset's `__getitem__` for a sample: its index."""
        return index


class Guarded(Dataset[Any]):
    """Batches of a dataset, whose wrong input and failed reading come out of a worker process as a value.

    A loader would pass them on with the worker's traceback as their message, and a failed read without number and file.

    Args:
        dataset: map-style.
        collate: samples to a batch.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        self.dataset = dataset
        self.collate = collate

    def __getitems__(self, requests: list[Any]) -> Any:
        try:
            return in_shared_memory(self.collate([self.dataset[request] for request in requests]))
        except (UserError, OSError) as error:
            return error


def as_it_is(batch: Any) -> Any:
    """The collate function of loaders whose dataset gives whole batches."""
    return batch


class GuardedLoader(DataLoader[Any]):
    """Raises in this process what was wrong with the input, or could not be read, in a worker's.

    Batches lie in pinned memory where there is a GPU, so that it copies them while this process goes on. Workers
    outlive a signal to their whole group, so that the iteration they fetch for can be finished.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        fixed: dict[str, Any] = {"worker_init_fn": signals.outlive, "pin_memory": torch.cuda.is_available()}
        super().__init__(*args, **fixed | options)

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if isinstance(batch, UserError | OSError):
                raise batch
            yield batch


class ThreadedLoader:
    """Whole batches, read ahead by threads and given in order.

    For data that are read rather than computed: unlike loader processes, threads hand batches over without copying them
    through shared memory, of which containers often have little.

    Args:
        read: the batch of a request.
        requests: what to ask for, in order.
        workers: threads; 0 reads when a batch is asked for.
        prefetch: batches that each thread has ready.
    """

    def __init__(self, read: Callable[[Any], Batch], requests: GlobalBatches, workers: int, prefetch: int = 2) -> None:
        self.read = read
        self.requests = requests
        self.workers = workers
        self.prefetch = prefetch

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Batch]:
        if not self.workers:
            return map(self._read, self.requests)
        return read_ahead(self._read, self.requests, self.workers, self.workers * self.prefetch)

    def _read(self, request: Any) -> Batch:
        """The batch of a request, in pinned memory where there is a GPU."""
        batch = self.read(request)
        return batch.pin_memory() if torch.cuda.is_available() else batch


def collate(samples: list[dict[str, Any]]) -> PictureBatch:
    """Samples with `pixels` and `prompt` to a batch."""
    return PictureBatch(stacked([s["pixels"] for s in samples]), prompts=[s["prompt"] for s in samples])


def check_pixels(
    size: Size, model: Pretrained, schedule: ScaleSchedule, exact: bool = False, key: str = "data.size"
) -> None:
    """Raise UserError unless finished pictures of `size` pixels suit the model and the schedule.

    Args:
        size: in pixels.
        model: what is trained.
        schedule: its sizes.
        exact: the schedule is stretched to end at exactly this size; else it may end at a smaller one.
        key: what the size is called in the configuration.
    """
    if exact:
        model.limits.check_size(model.latent_size(size))
        return
    final = model.pixel_size(schedule.sizes[-1])
    if len(size) != len(final):
        kind = "images" if len(final) == 2 else "videos"
        raise UserError(f"{key}={list(size)}, but the schedule ends at {list(final)} pixels; use data={kind}")
    small = any(have < wanted for have, wanted in zip(size, final, strict=True))
    if small or size[-2] * final[-1] != size[-1] * final[-2]:
        raise UserError(
            f"{key}={list(size)}, but the schedule ends at {list(final)} pixels, and data are neither enlarged nor "
            f"squashed; set '{key}=[{','.join(map(str, final))}]'"
        )


def check_loading(batch_size: int, workers: int, seed: int) -> None:
    """Raise UserError unless these are a batch size, a number of loader processes and a seed."""
    limits.whole("data.batch_size", batch_size, 1, limits.BATCH, "all processes together")
    limits.workers("data.workers", workers)
    limits.seed("data.seed", seed)


def warn_long_captions(dataset: Any, model: Pretrained, most: int = LOOKED_AT) -> None:
    """Warn, in the first process alone, if captions are longer than the model sees.

    Args:
        dataset: has `caption(i)`; others are passed over.
        model: what is trained.
        most: captions to look at, spread evenly over the data set.
    """
    if not is_first() or not hasattr(dataset, "caption") or not len(dataset):
        return
    captions = []
    for row in evenly(len(dataset), most):
        with suppress(CorruptSample, UserError):  # training tells of these
            captions.append(str(dataset.caption(row)))
    warn_beyond(model, captions, "captions", len(dataset))


@dataclass(frozen=True)
class BatchPlan:
    """The batches that one process of a run is due.

    Attributes:
        total: number of batches of the whole run.
        start: the first batch, when a run is resumed.
        rank, world: this process and the number of processes.
        per_iteration: number of batches of one iteration.
    """

    total: int
    start: int = 0
    rank: int = 0
    world: int = 1
    per_iteration: int = 1

    def batches(
        self, length: int | None, batch_size: int, seed: int, orders: Sequence[Order] | None = None
    ) -> GlobalBatches:
        """The indices of these batches, for a dataset of `length` samples (None: endless), or in `orders`."""
        return GlobalBatches(length, batch_size, self.start, self.total, seed, self.rank, self.world, orders)


class TrainingData(LightningDataModule):
    """Base of the data that tasks train on; subclasses load batches.

    A task with `batches_per_iteration` loops over iterations (`IterationBatches`), any other one over batches, each of
    which is an iteration.
    """

    def batch_loader(self, plan: BatchPlan) -> Any:
        """A loader of the batches of `plan`, `plan.start` first, whose length is `plan.total`."""
        raise NotImplementedError

    def held_out(self) -> HeldOut | None:
        """The samples that are never trained on; None if there are none."""
        return None

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        assert trainer is not None
        count: int | None = getattr(trainer.lightning_module, "batches_per_iteration", None)
        each = count or 1
        plan = BatchPlan(
            trainer.max_steps * each, trainer.global_step * each, trainer.global_rank, trainer.world_size, each
        )
        loader = self.batch_loader(plan)
        return loader if count is None else Iterations(loader, count)


class PairData(TrainingData):
    """Pictures with captions from a map-style dataset.

    Args:
        dataset: items are dicts with `pixels` `[3, H, W]`, bytes or in [-1, 1], and `prompt`.
        endless: every index is a fresh sample, so there are no epochs and no shuffling.
        batch_size: over all processes.
        workers: loader processes, at most four a core or 32; 0 loads in the training process.
        seed: of the order.
        validation: a share of the dataset that is never trained on, or a dataset of its own; None: neither.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int = 16,
        workers: int = 0,
        seed: int = 0,
        endless: bool = False,
        validation: float | Dataset[Any] | None = None,
    ) -> None:
        super().__init__()
        check_loading(batch_size, workers, seed)
        self.dataset = dataset
        self.validation = validation
        held_out = is_share(validation)
        if held_out and endless:
            raise UserError(
                f"data.validation={validation} with data.endless=true; give it a dataset of its own, or null"
            )
        self.share = is_held_out(_length(dataset), float(cast(Any, validation))) if held_out else None
        if self.share is not None and not 0 < self.share.sum() < len(self.share):
            raise UserError(
                f"data.validation={validation} holds out {self.share.sum()} of {len(self.share)} samples; use another "
                "share"
            )
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed
        self.endless = endless

    def check(self, model: Pretrained, schedule: ScaleSchedule) -> None:
        """Raise UserError unless pictures are large enough for the model and the schedule."""
        if hasattr(self.dataset, "size"):
            check_pixels(tuple(self.dataset.size), model, schedule, key="data.dataset.size")
        size = getattr(self.validation, "size", None)
        if size is not None:
            check_pixels(tuple(size), model, schedule, key="data.validation.size")
        warn_long_captions(self.dataset, model, LOOKED_AT_DRAWN if self.endless else LOOKED_AT)

    def last(self, count: int, step: int) -> Batch:
        """The last samples of the data set, the last one first, for a step of the schedule."""
        dataset: Any = self.dataset
        return collate([dataset[len(dataset) - 1 - i] for i in range(count)])

    def held_out(self) -> HeldOut | None:
        if self.validation is None:
            return None
        dataset: Any = self.dataset if self.share is not None else self.validation
        ids = range(len(dataset)) if self.share is None else np.flatnonzero(self.share)
        caption = getattr(dataset, "caption", lambda i: dataset[i]["prompt"])
        return HeldOut(ids, lambda numbers, step: collate([dataset[i] for i in numbers]), caption)

    def batch_loader(self, plan: BatchPlan) -> Any:
        length = _length(self.dataset)
        if self.endless and length < plan.total * self.batch_size:
            raise UserError(
                f"the dataset has {length} samples, but this run uses {plan.total * self.batch_size} fresh ones; "
                "set data.endless=false to repeat them"
            )
        orders = None if self.share is None else [Order(np.flatnonzero(~self.share), f"{self.seed}/order")]
        return GuardedLoader(
            Guarded(self.dataset, collate),
            batch_sampler=plan.batches(None if self.endless else length, self.batch_size, self.seed, orders),
            num_workers=self.workers,
            collate_fn=as_it_is,
        )


def _length(dataset: Any) -> int:
    if not isinstance(dataset, Sized) or len(dataset) == 0:
        raise UserError("the dataset is empty; check data.*")
    return len(dataset)
