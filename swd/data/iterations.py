"""Batches of training data, grouped into iterations."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any, Protocol

from swd.types import Batch


class BatchLoader(Iterable[Batch], Sized, Protocol):
    """Gives batches, and knows how many they are."""


class IterationBatches(Iterator[Batch]):
    """The batches of one iteration, each fetched when it is asked for, so that host memory holds one at a time.

    Args:
        batches: an iterator that ends with the iteration.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def __next__(self) -> Batch:
        return next(self._batches)

    def map(self, function: Callable[[Batch], Batch]) -> IterationBatches:
        """The same batches, with `function` applied to each when it is fetched."""
        return IterationBatches(map(function, self._batches))

    def to(self, *args: Any) -> IterationBatches:
        """The same batches, each moved when it is fetched; Lightning calls this with the device."""
        return self.map(lambda batch: batch.to(*args))


class Iterations:
    """A loader whose items are iterations.

    Args:
        loader: of batches.
        per_iteration: batches of one iteration.
    """

    def __init__(self, loader: BatchLoader, per_iteration: int) -> None:
        self.loader = loader
        self.per_iteration = per_iteration

    def __len__(self) -> int:
        return len(self.loader) // self.per_iteration

    def __iter__(self) -> Iterator[IterationBatches]:
        batches = iter(self.loader)
        try:
            for _ in range(len(self)):
                due = islice(batches, self.per_iteration)
                yield IterationBatches(due)
                deque(due, maxlen=0)  # pass over what was not asked for: the next iteration starts at its own batch
        finally:
            if close := getattr(batches, "close", None):
                close()  # ends loader processes and threads
