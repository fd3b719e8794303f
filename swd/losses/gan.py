"""Adversarial term: a small head on the fake network's features tells generated from real latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swd.diffusion import IndexRange
from swd.io import limits
from swd.losses.base import CriticStep, FakePass, GeneratorStep, LossTerm, Metrics, ModelFacts
from swd.losses.functional import discriminator_logits, gan_discriminator_loss, gan_generator_loss
from swd.losses.gan_head import GANHead
from swd.schedule import ScaleSchedule
from swd.types import UserError


class GAN(LossTerm):
    """GAN (SwD paper, appendix A, after DMD2): the discriminator reads the fake network's features of noised latents.

    Together with DMD it reads the noised sample that DMD draws, in the same forward pass; alone it draws its own.

    Args:
        weight: factor of the generator's loss in the total.
        discriminator_weight: factor of the discriminator's loss in the critic's total.
        blocks: blocks whose features the head reads; one head serves all of them, and its logits are averaged.
        layers: number of stages of the head.
        indices: noise-level indices of the generator's draw, both ends included; None: the process' own (12..27).
        critic_indices: noise-level indices of the critic's draw; None: the whole table.
    """

    trains_fake = True
    critic_name = "discriminator"
    reads_real = True

    def __init__(
        self,
        weight: float = 5e-3,
        discriminator_weight: float = 1e-2,
        blocks: Sequence[int] = (11,),
        layers: int = 4,
        indices: tuple[int, int] | None = None,
        critic_indices: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if not blocks:
            raise UserError("loss.gan.blocks is empty; name at least one feature block")
        if not 1 <= layers <= limits.HEAD_LAYERS:
            raise UserError(
                f"loss.gan.layers={layers}; use 1 to {limits.HEAD_LAYERS}: widths fall from layer to layer, "
                "and more of them would hardly differ"
            )
        limits.number("loss.gan.weight", weight, least=0)
        limits.number("loss.gan.discriminator_weight", discriminator_weight, least=0)
        self.weight = float(weight)
        self.discriminator_weight = float(discriminator_weight)
        self.blocks = tuple(blocks)
        self.layers = layers
        self.indices = indices
        self.critic_indices = critic_indices
        self.generator_pass = FakePass(blocks=self.blocks)
        self.critic_pass = FakePass(blocks=self.blocks)

    def check(self, key: str, model: ModelFacts, schedule: ScaleSchedule) -> None:
        model.check_blocks(f"{key}.blocks", self.blocks)
        model.check_indices(f"{key}.indices", self.indices)
        model.check_indices(f"{key}.critic_indices", self.critic_indices)

    def build(self, width: int) -> None:
        # Built on the CPU, whatever the default device is, so that its initial weights are the same everywhere.
        with torch.device("cpu"):
            self.head = GANHead(width, self.layers)

    def generator(self, step: GeneratorStep) -> tuple[Tensor, Metrics]:
        indices: IndexRange = self.indices or step.networks.process.ranges.renoise
        features = step.fake_features("renoise", indices, self.blocks)
        loss = gan_generator_loss(discriminator_logits(self.head, features))
        return self.weight * loss, {"gan": loss.detach()}

    def critic(self, step: CriticStep) -> tuple[Tensor, Metrics]:
        indices: IndexRange = self.critic_indices or step.networks.process.ranges.whole
        features = step.fake_features("renoise", indices, self.blocks)
        real_features = step.real_features("renoise", indices, self.blocks)
        fake_logits, real_logits = discriminator_logits(self.head, features, real_features).chunk(2)
        loss = gan_discriminator_loss(fake_logits, real_logits)
        right = ((fake_logits < 0).float().mean() + (real_logits > 0).float().mean()) / 2
        return self.discriminator_weight * loss, {
            "discriminator": loss.detach(),
            "discriminator_accuracy": right.detach(),
        }
