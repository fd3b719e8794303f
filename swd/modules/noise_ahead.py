"""Noise of the next iteration, drawn in a thread while the device computes the present one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from swd.types import SeededDraws


class Wanted(NamedTuple):
    """One draw of an iteration.

    Attributes:
        update: within the iteration.
        first: position of the first sample in the global batch.
        purpose: of the draw.
        shape: of the result `[B, ...]`.
    """

    update: int
    first: int
    purpose: str
    shape: tuple[int, ...]


class NoiseAhead:
    """Draws on the CPU, ahead of time, what an iteration will ask for; the values are those of `SeededDraws`.

    An iteration is taken to ask for what the last one of the same step of the schedule asked for. What was not
    foreseen is drawn when it is asked for, and what is not asked for is dropped.

    Args:
        device: where the noise is used. For a GPU it lies in pinned memory, from which it is copied without waiting.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._asked: dict[int, list[Wanted]] = {}  # by step of the schedule
        self._drawn: dict[int, dict[Wanted, Future[Tensor]]] = {}  # by iteration
        self._now: tuple[int, list[Wanted]] | None = None  # the iteration that runs, and what it asked for so far
        self._thread = ThreadPoolExecutor(1, "noise", self._use_device)

    def _use_device(self) -> None:
        """Keep the thread off the first GPU where another one is used: pinned memory belongs to the current one."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @contextmanager
    def iteration(self, draws: SeededDraws, steps: Sequence[int]) -> Iterator[None]:
        """Context in which an iteration's noise is asked for, and the next one's drawn.

        Args:
            draws: of this iteration.
            steps: of the schedule, that iterations train one after the other.
        """
        number = draws.iteration
        step = steps[number % len(steps)]
        self._drawn = {number: self._drawn.get(number, {})}
        self._begin(replace(draws, iteration=number + 1), steps[(number + 1) % len(steps)])
        self._now = (number, [])
        try:
            yield
            self._asked[step] = self._now[1]
        finally:
            self._now = None

    def _begin(self, draws: SeededDraws, step: int) -> None:
        """Let the thread draw what the iteration of `draws` is taken to ask for."""
        self._drawn[draws.iteration] = {
            wanted: self._thread.submit(
                replace(draws, update=wanted.update, first=wanted.first).drawn,
                wanted.purpose,
                wanted.shape,
                self.device.type == "cuda",
            )
            for wanted in self._asked.get(step, ())
        }

    def take(self, draws: SeededDraws, purpose: str, shape: tuple[int, ...]) -> Tensor | None:
        """Noise on the CPU that was drawn ahead; None if it was not, or outside of the iteration that runs."""
        if self._now is None or self._now[0] != draws.iteration:
            return None
        wanted = Wanted(draws.update, draws.first, purpose, shape)
        self._now[1].append(wanted)
        found = self._drawn[draws.iteration].pop(wanted, None)
        return None if found is None else found.result()

    def close(self) -> None:
        """End the thread; what it has not begun is not drawn."""
        self._thread.shutdown(cancel_futures=True)
