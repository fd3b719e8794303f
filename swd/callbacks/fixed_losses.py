"""Losses before and after training, measured on the same pictures with the same draws."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from swd.losses import MMD, GeneratorStep
from swd.losses.update import student_x0
from swd.modules.distiller import Distiller
from swd.types import CachedBatch, PictureBatch, Role, SeededDraws


class FixedLosses(Callback):
    """Measures losses on the same pictures with the same noise, so that they show whether training made progress.

    The losses that training logs differ far more between batches than training changes them. Two are measured, each
    averaged over the steps of the schedule:

    * `mmd`: the MMD of the student's predictions in the teacher's features, before and after training;
    * `fake_score`: the squared error with which a network recovers the final student's pictures after noising, of the
      teacher and of the trained fake network.

    Args:
        pictures: number of pictures, taken from the end of the data set.
        seed: seed of the noise.

    Attributes:
        losses: the two values of each loss, by name.
    """

    def __init__(self, pictures: int = 32, seed: int = 0) -> None:
        self.pictures = pictures
        self.seed = seed
        self.losses: dict[str, list[float]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Distiller)
        values = self.measure(pl_module, self.batches(trainer, pl_module), scores=False)
        self.losses = {"mmd": [values["mmd"]]}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Distiller)
        values = self.measure(pl_module, self.batches(trainer, pl_module))
        self.losses["mmd"].append(values["mmd"])
        if "fake" in values:
            self.losses["fake_score"] = [values["teacher"], values["fake"]]

    def batches(self, trainer: Trainer, task: Distiller) -> list[PictureBatch | CachedBatch]:
        """The pictures, as one batch for each step of the schedule."""
        data = cast(Any, trainer).datamodule
        return [data.last(self.pictures, step) for step in range(len(task.schedule))]

    @torch.no_grad()
    def measure(
        self, task: Distiller, batches: list[PictureBatch | CachedBatch], scores: bool = True
    ) -> dict[str, float]:
        """`mmd`, and with `scores` the squared errors of teacher and fake network by role."""
        networks = task.networks
        mmd = MMD(blocks=task.model.feature_blocks, features="teacher")
        totals: dict[str, list[Tensor]] = {}
        for k, batch in enumerate(batches):
            inputs = task.inputs.build(batch.to(task.device), k, SeededDraws(self.seed, k))
            conditioning = inputs.conditioning
            x0_hat = student_x0(networks, inputs.interval, inputs.source, conditioning, inputs.draws)
            step = GeneratorStep(networks, conditioning, inputs.empty, x0_hat, inputs.target, inputs.draws)
            totals.setdefault("mmd", []).append(mmd.generator(step)[1]["mmd"])
            noised = step.noise_fake("critic", networks.process.ranges.whole)
            scored: tuple[Role, ...] = ("teacher", "fake") if scores and "fake" in networks.roles else ()
            for role in scored:
                x0 = networks.x0(role, noised.x_t, noised.sigma, conditioning)[0]
                totals.setdefault(role, []).append((x0 - x0_hat).square().mean())
        return {name: torch.stack(values).mean().item() for name, values in totals.items()}
