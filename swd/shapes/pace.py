"""How long a demo will take on this machine, known after its first iterations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from swd.io.job_log import print_line
from swd.modules.distiller import Distiller

TRAINED = 4.5
"""Full-size network evaluations that a sample of a training batch takes the time of, all its losses included. Ours,
measured on two cores without AVX-512, in CPU time: 3.5 to 6, by the losses and the size of the batch."""
JUDGED = 3.0
"""Full-size network evaluations that decoding, writing and judging a picture takes the time of; measured likewise."""


class Pace(Callback):
    """Says, once, if the whole demo will take longer than it is to.

    The iterations of one cycle of the schedule, the second, are timed: iterations of different steps differ in length,
    and the first of each is slower than the others.

    Args:
        minutes: what the demo is to take, installation included.
        drawn: for each model, how many pictures are drawn after training, and network evaluations of each, as
            full-size ones.
        elapsed: returns the seconds since the demo began, installation included.
        shortest: whether this is the shortest demo there is, so that no other one is named.
    """

    def __init__(
        self,
        minutes: int,
        drawn: Sequence[tuple[int, float]],
        elapsed: Callable[[], float],
        shortest: bool = False,
    ) -> None:
        self.minutes = minutes
        self.evaluations = sum(count * (each + JUDGED) for count, each in drawn)
        self.elapsed = elapsed
        self.shortest = shortest
        self._done = 0
        self._first_cycle = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        task = cast(Distiller, pl_module)  # the demo trains no other
        self._done += 1
        cycle = len(task.schedule)
        if self._done == cycle:
            self._first_cycle = self.elapsed()
        if self._done == 2 * cycle:
            iteration = (self.elapsed() - self._first_cycle) / cycle
            samples = cast(Any, trainer).datamodule.batch_size * task.batches_per_iteration
            self.tell(iteration, trainer.max_steps - trainer.global_step, samples, trainer.is_global_zero)

    def expected(self, iteration: float, left: int, samples: int) -> float:
        """Seconds of the whole demo.

        Args:
            iteration: seconds of an iteration.
            left: iterations that are not done yet.
            samples: of an iteration, over all its updates.
        """
        return self.elapsed() + iteration * (left + self.evaluations / (TRAINED * samples))

    def tell(self, iteration: float, left: int, samples: int, shown: bool = True) -> None:
        """Print the line if the demo is too slow; arguments as of `expected`."""
        needed = math.ceil(self.expected(iteration, left, samples) / 60)
        if shown and needed > self.minutes:
            shorter = "" if self.shortest else "; a shorter one: swd demo experiment=demo_ci"
            print_line(
                f"this machine takes {iteration:.2g} s an iteration, so that the demo will take about {needed} minutes "
                f"rather than {self.minutes}{shorter}"
            )
