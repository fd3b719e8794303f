"""Pictures of fixed prompts at every size, while training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from swd.files import write_aside
from swd.images import grid
from swd.modules.distiller import Distiller
from swd.types import UserError


class Samples(Callback):
    """Draw fixed prompts with fixed seeds now and then, one row a prompt, one column a size.

    Args:
        prompts: what to draw.
        every: iterations between drawings; the last iteration is always drawn.
        seed: of the first prompt, the others count up.
    """

    def __init__(self, prompts: Sequence[str], every: int = 100, seed: int = 0) -> None:
        if every < 1 or not prompts:
            raise UserError(f"callbacks.samples: every={every} with {len(prompts)} prompts; use at least 1 of each")
        self.prompts, self.every, self.seed = list(prompts), every, seed
        self._drawn = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step and trainer.global_step % self.every == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if step == self._drawn or not trainer.is_global_zero or not isinstance(pl_module, Distiller):
            return
        self._drawn = step
        seeds = [self.seed + i for i in range(len(self.prompts))]
        _, sizes = pl_module.sample(self.prompts, seeds, keep_x0=True)
        sheet = grid([[pictures[i] for pictures in sizes] for i in range(len(self.prompts))])
        path = Path(trainer.default_root_dir) / "samples" / f"iteration-{step:06d}.png"
        write_aside(path, lambda new: sheet.save(new, format="PNG"))
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("samples", [sheet], caption=["; ".join(self.prompts)])
