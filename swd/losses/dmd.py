"""Distribution matching distillation: the reverse KL by a real and a fake score."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from swd.diffusion import IndexRange
from swd.io import limits
from swd.losses.base import CriticStep, FakePass, GeneratorStep, LossTerm, Metrics, ModelFacts
from swd.losses.functional import dmd_direction, dmd_loss, snr_weighted_mse
from swd.schedule import ScaleSchedule
from swd.types import UserError


class DMD(LossTerm):
    """DMD (SwD paper, section 4.1, after DMD2): the student follows fake minus real score on its own noised output.

    Args:
        weight: factor of the generator's loss in the total.
        guidance_scale: classifier-free guidance of the teacher, at least 1, which turns it off. The default is that of
            the released script for Stable Diffusion 3.5 Medium.
        indices: noise-level indices of the generator's draw, both ends included; None: the process' own (12..27).
        critic_indices: noise-level indices of the critic's draw; None: the whole table.
        critic_max_snr: the critic's squared error of x0 is weighed by the signal-to-noise ratio, up to this; for SDXL
            alone. None: all levels weigh the same, as in the released code. docs/losses.md has the reasons.
    """

    trains_fake = True
    critic_name = "fake_score"
    generator_pass = FakePass(prediction=True)
    critic_pass = FakePass(prediction=True)

    def __init__(
        self,
        weight: float = 1.0,
        guidance_scale: float = 7.0,
        indices: tuple[int, int] | None = None,
        critic_indices: tuple[int, int] | None = None,
        critic_max_snr: float | None = None,
    ) -> None:
        super().__init__()
        limits.number("loss.dmd.critic_max_snr", critic_max_snr, above=0)
        limits.number("loss.dmd.weight", weight, least=0)
        limits.number("loss.dmd.guidance_scale", guidance_scale, least=0)
        self.weight = float(weight)
        self.guidance_scale = float(guidance_scale)
        self.indices = indices
        self.critic_indices = critic_indices
        self.critic_max_snr = critic_max_snr

    def check(self, key: str, model: ModelFacts, schedule: ScaleSchedule) -> None:
        if self.guidance_scale < 1:
            raise UserError(
                f"{key}.guidance_scale={self.guidance_scale:g} leads the teacher away from the prompt, to what it "
                "draws without one; use 1 for no guidance, or more"
            )
        model.check_indices(f"{key}.indices", self.indices)
        model.check_indices(f"{key}.critic_indices", self.critic_indices)
        if self.critic_max_snr is not None and model.process.prediction_type != "epsilon":
            raise UserError(
                f"{key}.critic_max_snr={self.critic_max_snr} is for networks that predict the noise, as SDXL does; "
                f"{model.family} predicts the velocity, and no level outweighs the others: leave it null"
            )
        if model.poor_at_low_resolution:
            warnings.warn(
                f"DMD is known to fail on {model.family}: its teacher draws poorly at low resolution, where DMD then "
                "leads the student (SwD paper, appendix B); loss=mmd is what works",
                UserWarning,
                stacklevel=2,
            )

    def generator(self, step: GeneratorStep) -> tuple[Tensor, Metrics]:
        indices: IndexRange = self.indices or step.networks.process.ranges.renoise
        noised = step.noise_fake("renoise", indices)
        x0_fake = step.fake_x0("renoise", indices)
        with torch.no_grad():
            x_t = noised.x_t.detach()
            x0_real = step.networks.guided_x0(x_t, noised.sigma, step.conditioning, step.empty, self.guidance_scale)
            direction = dmd_direction(step.x0_hat, x0_real, x0_fake)
        loss = dmd_loss(step.x0_hat, direction)
        return self.weight * loss, {"dmd": loss.detach(), "dmd_gap": (x0_fake - x0_real).abs().mean()}

    def critic(self, step: CriticStep) -> tuple[Tensor, Metrics]:
        indices: IndexRange = self.critic_indices or step.networks.process.ranges.whole
        x0_fake = step.fake_x0("renoise", indices)
        if self.critic_max_snr is None:
            loss = F.mse_loss(x0_fake, step.x0_hat.float())
        else:
            snr = step.networks.process.snr(step.noise_fake("renoise", indices).sigma)
            loss = snr_weighted_mse(x0_fake, step.x0_hat, snr, self.critic_max_snr)
        return loss, {"fake_score": loss.detach()}
