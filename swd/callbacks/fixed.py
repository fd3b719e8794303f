"""What training did, measured on the same pictures with the same draws."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from swd.data.datamodule import collate
from swd.losses.functional import mmd_loss
from swd.losses.update import student_x0
from swd.modules.distiller import Distiller
from swd.schedule import downscale
from swd.types import Batch, SeededDraws


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
        self.pictures, self.seed = pictures, seed
        self.losses: dict[str, list[float]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Distiller)
        self.losses = {"mmd": [self.measure(pl_module, self.batch(trainer))["mmd"]]}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Distiller)
        values = self.measure(pl_module, self.batch(trainer))
        self.losses["mmd"].append(values["mmd"])
        if "fake" in values:
            self.losses["fake_score"] = [values["teacher"], values["fake"]]

    def batch(self, trainer: Trainer) -> Batch:
        """The pictures."""
        dataset: Any = trainer.datamodule.dataset  # type: ignore[attr-defined]
        return collate([dataset[len(dataset) - 1 - i] for i in range(self.pictures)])

    @torch.no_grad()
    def measure(self, task: Distiller, batch: Batch) -> dict[str, float]:
        """`mmd`, and the scores' errors by role."""
        networks, encoders, process = task.networks, task.encoders, task.networks.process
        conditioning = encoders.encode_prompts(batch.prompts).to(task.device)
        pixels = batch.pixels.to(task.device)
        totals: dict[str, list[Tensor]] = {}
        for k in range(len(task.schedule)):
            interval, draws = task.schedule.interval(k), SeededDraws(self.seed, k)

            def encode(size: tuple[int, ...], draws: SeededDraws = draws) -> Tensor:
                return encoders.encode(downscale(pixels, encoders.pixel_size(size)), draws)

            x0_hat = student_x0(networks, interval, encode(interval.source), conditioning, draws)
            x0_real = encode(interval.target)

            def noised(x0: Tensor, purpose: str, draws: SeededDraws = draws) -> tuple[Tensor, Tensor]:
                index = draws.index(f"{purpose}/index", *process.ranges[purpose], len(x0))
                sigma = process.level(index).to(x0.device)
                return process.add_noise(x0, draws.noise(f"{purpose}/noise", x0), sigma), sigma

            features = [
                networks.features("teacher", *noised(x0, "mmd"), conditioning, task.model.feature_blocks)
                for x0 in (x0_real, x0_hat)
            ]
            losses = [mmd_loss(real, fake) for real, fake in zip(*features, strict=True)]
            totals.setdefault("mmd", []).append(torch.stack(losses).mean())
            for role in ("teacher", "fake") if "fake" in networks.roles else ():
                x0 = networks.x0(role, *noised(x0_hat, "critic"), conditioning)[0]  # type: ignore[arg-type]
                totals.setdefault(role, []).append((x0 - x0_hat).square().mean())
        return {name: torch.stack(values).mean().item() for name, values in totals.items()}
