"""Batches in an order that depends on the seed alone: not on processes, workers, or where a run was resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from swd.types import Batch, UserError, stable_hash


class GlobalBatches(Sampler[list[int]]):
    """Dataset indices of this process's part of every global batch.

    Sample number g of the run is entry `g mod length` of epoch `g div length`, each epoch shuffled by (seed, epoch).
    A process takes a contiguous slice of each global batch, so that the batch as a whole is always the same.

    Args:
        length: of the dataset; None: endless, index g itself.
        batch_size: global, a multiple of `world`.
        start: first batch to yield, when a run is resumed.
        total: number of batches of the whole run; `len` counts them all, also the ones skipped by `start`.
        seed: of the shuffle.
        rank, world: this process and the number of processes.
    """

    def __init__(
        self, length: int | None, batch_size: int, start: int, total: int, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise UserError(f"data.batch_size={batch_size} does not divide over {world} processes; use a multiple")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.total, self.rank, self.world = start, total, rank, world
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[int]]:
        local = self.batch_size // self.world
        for batch in range(self.start, self.total):
            first = batch * self.batch_size + self.rank * local
            yield [self._index(g) for g in range(first, first + local)]

    def _index(self, g: int) -> int:
        if self.length is None:
            return g
        epoch, entry = divmod(g, self.length)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(stable_hash(f"{self.seed}/order/{epoch}".encode()))
            self._epoch, self._order = epoch, torch.randperm(self.length, generator=generator)
        return int(self._order[entry])


class Guarded(Dataset[Any]):
    """A dataset whose wrong input comes out of a worker process as a value.

    A loader would pass it on with the worker's traceback as its message.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> list[Any] | UserError:
        try:
            return [self.dataset[index] for index in indices]
        except UserError as error:
            return error

    @staticmethod
    def collate(samples: list[Any] | UserError) -> Batch | UserError:
        return samples if isinstance(samples, UserError) else collate(samples)


class PairLoader(DataLoader[Any]):
    """Raises in this process what was wrong with the input in a worker's."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Samples with `pixels` and `prompt` to a batch."""
    return Batch(torch.stack([s["pixels"] for s in samples]), [s["prompt"] for s in samples])


class PairData(LightningDataModule):
    """Pictures with captions from a map-style dataset.

    Args:
        dataset: items are dicts with `pixels` `[3, H, W]` in [-1, 1] and `prompt`.
        endless: every index is a fresh sample, so there are no epochs and no shuffling.
        batch_size: over all processes.
        workers: loader processes; 0 loads in the training process.
        seed: of the order.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int = 16, workers: int = 0, seed: int = 0, endless: bool = False
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size={batch_size}; use at least 1")
        self.dataset, self.batch_size, self.workers, self.seed, self.endless = (
            dataset,
            batch_size,
            workers,
            seed,
            endless,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        trainer, task = self.trainer, self.trainer.lightning_module  # type: ignore[union-attr]
        total = trainer.max_steps * getattr(task, "updates_per_iteration", 1)  # type: ignore[union-attr]
        length = _length(self.dataset)
        if self.endless and length < total * self.batch_size:
            raise UserError(
                f"the dataset has {length} samples, but this run uses {total * self.batch_size} fresh ones; "
                "set data.endless=false to repeat them"
            )
        sampler = GlobalBatches(
            None if self.endless else length,
            self.batch_size,
            getattr(task, "updates", 0),
            total,
            self.seed,
            trainer.global_rank,  # type: ignore[union-attr]
            trainer.world_size,  # type: ignore[union-attr]
        )
        return PairLoader(
            Guarded(self.dataset),
            batch_sampler=sampler,
            num_workers=self.workers,
            collate_fn=Guarded.collate,
            persistent_workers=self.workers > 0,
        )


def _length(dataset: Any) -> int:
    if not isinstance(dataset, Sized) or len(dataset) == 0:
        raise UserError("the dataset is empty; check data.*")
    return len(dataset)
