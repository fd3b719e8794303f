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
    """Tells progress from noise: training losses differ far more between batches than training changes them.

    At the start and at the end of training, averaged over the steps of the schedule:

    * `mmd`: of the student's predictions, in the teacher's features, at the start and at the end;
    * `fake_score`: error of a score on the final student's noised predictions, of the teacher and of the trained fake.

    Args:
        pictures: how many, from the end of the data set; batches are drawn from its beginning.
        seed: of the draws.

    Attributes:
        losses: name to its two values, as above.
    """

    def __init__(self, pictures: int = 32, seed: int = 0) -> None:
        self.pictures = pictures
        self.seed = seed
        self.losses: dict[str, list[float]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Distiller)
        self.losses = {"mmd": [self.measure(pl_module, self.batches(trainer, pl_module))["mmd"]]}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Distiller)
        values = self.measure(pl_module, self.batches(trainer, pl_module))
        self.losses["mmd"].append(values["mmd"])
        if "fake" in values:
            self.losses["fake_score"] = [values["teacher"], values["fake"]]

    def batches(self, trainer: Trainer, task: Distiller) -> list[PictureBatch | CachedBatch]:
        """The pictures, for each step of the schedule."""
        data = cast(Any, trainer).datamodule
        return [data.last(self.pictures, step) for step in range(len(task.schedule))]

    @torch.no_grad()
    def measure(self, task: Distiller, batches: list[PictureBatch | CachedBatch]) -> dict[str, float]:
        """`mmd`, and the scores' errors by role."""
        networks = task.networks
        mmd = MMD(blocks=task.model.feature_blocks, features="teacher")
        totals: dict[str, list[Tensor]] = {}
        for k, batch in enumerate(batches):
            inputs = task.inputs.build(batch.to(task.device), k, SeededDraws(self.seed, k))
            conditioning = inputs.conditioning
            x0_hat = student_x0(networks, inputs.interval, inputs.source, conditioning, inputs.draws)
            step = GeneratorStep(networks, conditioning, inputs.empty, x0_hat, inputs.target, inputs.draws)
            totals.setdefault("mmd", []).append(mmd.generator(step)[1]["mmd"])
            noised = step.noise_fake("critic", networks.process.ranges["critic"])
            scores: tuple[Role, ...] = ("teacher", "fake") if "fake" in networks.roles else ()
            for role in scores:
                x0 = networks.x0(role, noised.x_t, noised.sigma, conditioning)[0]
                totals.setdefault(role, []).append((x0 - x0_hat).square().mean())
        return {name: torch.stack(values).mean().item() for name, values in totals.items()}
