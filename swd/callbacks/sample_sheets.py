"""Pictures of fixed prompts at every size, while training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lightning import LightningModule, Trainer
from torch import Tensor

from swd.callbacks.measurement import Recurring
from swd.callbacks.pictures_log import log_pictures
from swd.callbacks.ranks import Share, attempt, gather
from swd.io.files import write_aside
from swd.io.pictures import grid
from swd.modules.distiller import Distiller
from swd.modules.finite import all_finite
from swd.modules.tokens import warn_beyond
from swd.types import Conditioning, UserError


class Samples(Recurring):
    """Draw a sheet of fixed prompts with fixed seeds: one row for each prompt, one column for each size.

    A failure to draw is only a warning, since these pictures are not worth stopping a training.

    Args:
        prompts: the prompts.
        every: iterations between sheets; there is one of the last iteration in any case.
        seed: seed of the first prompt; prompt i has `seed + i`.

    Nothing is drawn of an expert that does not take all steps of the schedule.
    Every process draws its share, and the first one writes. Prompts are encoded once; between sheets only their
    embeddings are kept, in main memory.
    """

    def __init__(self, prompts: Sequence[str], every: int = 100, seed: int = 0) -> None:
        if every < 1 or not prompts:
            raise UserError(f"callbacks.samples: every={every} with {len(prompts)} prompts; use at least 1 of each")
        self.prompts = list(prompts)
        self.every = every
        self.seed = seed
        self._conditioning: Conditioning | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and isinstance(pl_module, Distiller):
            if not pl_module.draws_alone:
                warnings.warn(
                    f"no sample sheets: model.family={pl_module.model.family} is an expert for "
                    f"{len(pl_module.steps)} of the schedule's {len(pl_module.schedule)} steps",
                    stacklevel=2,
                )
            warn_beyond(pl_module.model, self.prompts, "prompts of sample sheets")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, Distiller) and pl_module.draws_alone:
            attempt(trainer, partial(self._encoded, pl_module), "prompts of samples")

    def work(self, trainer: Trainer, task: LightningModule) -> None:
        self.write(trainer, task)

    def write(self, trainer: Trainer, task: LightningModule) -> None:
        """Draw the sheet of the current iteration on all processes, and write it on the first."""
        if not isinstance(task, Distiller) or not task.draws_alone:
            return
        what = f"samples of iteration {trainer.global_step}"
        drawn = attempt(trainer, partial(self._draw, trainer, task), what)
        if drawn is None:
            return
        sizes = [gather(trainer, pictures, len(self.prompts)) for pictures in drawn]
        attempt(trainer, partial(self._write_sheet, trainer, sizes), what)

    def _encoded(self, task: Distiller) -> Conditioning:
        """The prompts' conditioning on the CPU, encoded together at the first call."""
        if self._conditioning is None:
            self._conditioning = task.encode_prompts(self.prompts).to("cpu")
        return self._conditioning

    def _draw(self, trainer: Trainer, task: Distiller) -> list[Tensor]:
        """This process's share of the pictures, `[n, 3, H, W]` at every size."""
        places = Share.of(trainer, len(self.prompts)).places
        _, sizes = task.sample(self._encoded(task).rows(places), [self.seed + i for i in places], keep_x0=True)
        if not all_finite(sizes):
            raise ValueError("the student's pictures hold values that are not finite")
        return sizes

    def _write_sheet(self, trainer: Trainer, sizes: Sequence[Tensor]) -> bool:
        if not trainer.is_global_zero:
            return True
        sheet = grid([[pictures[i] for pictures in sizes] for i in range(len(self.prompts))])
        path = self._path(Path(trainer.default_root_dir), trainer.global_step)
        write_aside(path, lambda new: sheet.save(new, format="PNG"))
        log_pictures(trainer, "samples", [sheet], ["; ".join(self.prompts)])
        return True

    @staticmethod
    def _path(run: Path, iteration: int) -> Path:
        return run / "samples" / f"iteration-{iteration:06d}.png"

    def missing(self, run: Path, task: LightningModule, iterations: int) -> str | None:
        """Path of the sheet of the last iteration if a run of so many iterations lacks it, else None."""
        path = self._path(run, iterations)
        expected = isinstance(task, Distiller) and task.draws_alone
        return str(path) if expected and not path.is_file() else None
