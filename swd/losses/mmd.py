"""Maximum mean discrepancy between the features of generated and real latents: the paper's new loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from swd.io import limits
from swd.losses.base import FeatureSource, GeneratorStep, LossTerm, Metrics, ModelFacts
from swd.losses.functional import Distance, Kernel, Reduce, mmd_loss
from swd.schedule import ScaleSchedule
from swd.types import Noised, UserError


class MMD(LossTerm):
    """MMD (SwD paper, section 4.2, eq. 2) on features of the teacher or the fake network.

    Args:
        weight: factor of the loss in the total.
        blocks: blocks whose features are compared; the loss is the mean over them.
        features: network that the features come from; None: the fake where one is trained, else the teacher.
        kernel: "linear" compares token means, "rbf" all pairs of tokens.
        distance: "pseudo_huber" or "squared" (eq. 2, summed over the global batch), for the linear kernel.
        c: pseudo-Huber constant.
        bandwidth: sigma of the rbf kernel.
        reduce: "image" compares each image with its own target, "batch" all tokens of the batch as one set. The latter
            takes a single process, since the MMD of a batch does not follow from that of its parts.
        noise: "range" compares noised latents, both at the same level with the same noise; "none" compares clean ones
            (ablation).
        indices: noise-level indices, both ends included; None: the process' own (18..27).
    """

    def __init__(
        self,
        weight: float = 1.0,
        blocks: Sequence[int] = (11,),
        features: FeatureSource | None = None,
        kernel: Kernel = "linear",
        distance: Distance = "pseudo_huber",
        c: float = 0.001,
        bandwidth: float = 100.0,
        reduce: Reduce = "image",
        noise: Literal["range", "none"] = "range",
        indices: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if not blocks:
            raise UserError("loss.mmd.blocks is empty; name at least one feature block")
        limits.number("loss.mmd.weight", weight, least=0)
        limits.number("loss.mmd.c", c, least=0)
        limits.number("loss.mmd.bandwidth", bandwidth, above=0)
        self.weight = float(weight)
        self.c = float(c)
        self.bandwidth = float(bandwidth)
        self.blocks = tuple(blocks)
        self.features = features
        self.kernel = kernel
        self.distance = distance
        self.reduce = reduce
        self.noise = noise
        self.indices = indices

    def settle(self, key: str, has_fake: bool) -> None:
        if self.features == "fake" and not has_fake:
            raise UserError(
                f"{key}.features=fake, but no term trains a fake network; add dmd or gan, or use features=teacher"
            )
        self.features = self.features or ("fake" if has_fake else "teacher")

    def check(self, key: str, model: ModelFacts, schedule: ScaleSchedule) -> None:
        model.check_blocks(f"{key}.blocks", self.blocks)
        model.check_indices(f"{key}.indices", self.indices)
        if self.noise == "none" and not model.process.covers(0.0):
            raise UserError(
                f"{key}.noise=none compares clean latents, and {model.family} is an expert for high noise levels; use "
                f"{key}.noise=range"
            )

    def check_processes(self, key: str, processes: int) -> None:
        if processes > 1 and self.reduce == "batch":
            raise UserError(
                f"{key}.reduce=batch compares the whole batch as one set, which {processes} processes cannot share; "
                f"use {key}.reduce=image, or one process (trainer.devices=1)"
            )

    def check_accumulate(self, key: str, parts: int) -> None:
        if parts > 1 and self.reduce == "batch":
            raise UserError(
                f"{key}.reduce=batch compares the whole batch as one set, which cannot be done in {parts} parts; "
                f"use {key}.reduce=image, or task.accumulate=1"
            )

    def generator(self, step: GeneratorStep) -> tuple[Tensor, Metrics]:
        fake, real = self._noised(step)
        role = self.features or "teacher"
        f_fake = step.networks.features(role, fake.x_t, fake.sigma, step.conditioning, self.blocks)
        with torch.no_grad():
            f_real = step.networks.features(role, real.x_t, real.sigma, step.conditioning, self.blocks)
        losses = [
            mmd_loss(r, f, self.kernel, self.distance, self.c, self.bandwidth, self.reduce)
            for r, f in zip(f_real, f_fake, strict=True)
        ]
        loss = torch.stack(losses).mean()
        if self.kernel == "linear" and self.distance == "squared":
            loss = loss * step.shares  # this distance is summed over the images, all others are averaged
        return self.weight * loss, {"mmd": loss.detach()}

    def _noised(self, step: GeneratorStep) -> tuple[Noised, Noised]:
        """Fake and real latents at the same level with the same noise; the draw is independent of DMD's."""
        if self.noise == "none":
            sigma = torch.zeros(len(step.x0_hat), device=step.x0_hat.device)
            return Noised(step.x0_hat, sigma), Noised(step.x0_real, sigma)
        indices = self.indices or step.networks.process.ranges.features
        return step.noise_fake("mmd", indices), step.noise_real("mmd", indices)
