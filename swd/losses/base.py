"""The contract of a loss term, and the step object that terms share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from swd.diffusion import IndexRange, Process
from swd.types import Conditioning, Draws, Noised

FeatureSource = Literal["teacher", "fake"]
Metrics = dict[str, Tensor]


class Networks(Protocol):
    """What terms ask of the networks; `swd.modules.networks.SharedBase` is one."""

    process: Process

    def x0(
        self,
        role: Literal["student", "fake", "teacher"],
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        blocks: Sequence[int] = (),
        grad_to_features_only: bool = False,
    ) -> tuple[Tensor, list[Tensor]]: ...

    def features(
        self,
        role: Literal["student", "fake", "teacher"],
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        blocks: Sequence[int],
    ) -> list[Tensor]: ...

    def guided_x0(
        self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, empty: Conditioning, guidance: float
    ) -> Tensor: ...


@dataclass(frozen=True)
class FakePass:
    """What a term wants of the fake network's forward on the noised `x0_hat`."""

    prediction: bool = False
    blocks: tuple[int, ...] = ()

    def __or__(self, other: FakePass) -> FakePass:
        return FakePass(self.prediction or other.prediction, tuple(sorted({*self.blocks, *other.blocks})))


@dataclass
class Step:
    """One update's inputs, and what terms share on it: noised fakes and the fake network's forward on them.

    Attributes:
        networks: the roles.
        conditioning: B rows; `empty`: the encoded empty prompt, one row.
        x0_hat: student's clean prediction `[B, C, *size]`; a leaf that requires a gradient in generator updates.
        x0_real: target latents of the same shape.
        draws: where random numbers come from.
        wanted: union of what the terms want of the fake network.
        shares: over how many processes the global batch is split; their gradients are averaged, so that a loss that
            is a sum over the batch must be multiplied by this.
    """

    networks: Networks
    conditioning: Conditioning
    empty: Conditioning
    x0_hat: Tensor
    x0_real: Tensor
    draws: Draws
    wanted: FakePass = FakePass()
    shares: int = 1
    _noised: dict[tuple[str, IndexRange], tuple[Noised, Tensor]] = field(default_factory=dict)
    _fake: dict[int, tuple[Tensor | None, dict[int, Tensor]]] = field(default_factory=dict)

    def noise_fake(self, purpose: str, indices: IndexRange) -> Noised:
        """The noised `x0_hat`; the same purpose and range give the same sample, drawn once."""
        return self._draw(purpose, indices)[0]

    def noise_real(self, purpose: str, indices: IndexRange) -> Noised:
        """The noised `x0_real`, with the level and the noise of `noise_fake`."""
        noised, eps = self._draw(purpose, indices)
        return Noised(self.networks.process.add_noise(self.x0_real, eps, noised.sigma), noised.sigma)

    def _draw(self, purpose: str, indices: IndexRange) -> tuple[Noised, Tensor]:
        key = (purpose, (indices[0], indices[1]))
        if key not in self._noised:
            process = self.networks.process
            index = self.draws.index(f"{purpose}/index", *indices, len(self.x0_hat))
            sigma = process.level(index).to(self.x0_hat.device)
            eps = self.draws.noise(f"{purpose}/noise", self.x0_hat)
            self._noised[key] = Noised(process.add_noise(self.x0_hat, eps, sigma), sigma), eps
        return self._noised[key]

    def fake_pass(self, noised: Noised) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Clean prediction (None if no term wants it) and features by block, from one forward of the fake network."""
        if id(noised) not in self._fake:
            self._fake[id(noised)] = self._run_fake(noised)
        return self._fake[id(noised)]

    def _run_fake(self, noised: Noised) -> tuple[Tensor | None, dict[int, Tensor]]:
        raise NotImplementedError


class GeneratorStep(Step):
    """A generator update: gradients flow to `x0_hat` through features, never through the fake's prediction."""

    def _run_fake(self, noised: Noised) -> tuple[Tensor | None, dict[int, Tensor]]:
        args = ("fake", noised.x_t, noised.sigma, self.conditioning)
        if not self.wanted.blocks:
            with torch.no_grad():
                return self.networks.x0(*args)[0], {}  # type: ignore[arg-type]
        if not self.wanted.prediction:
            features = self.networks.features(*args, self.wanted.blocks)  # type: ignore[arg-type]
            return None, dict(zip(self.wanted.blocks, features, strict=True))
        x0, features = self.networks.x0(*args, self.wanted.blocks, grad_to_features_only=True)  # type: ignore[arg-type]
        return x0.detach(), dict(zip(self.wanted.blocks, features, strict=True))


class CriticStep(Step):
    """A critic update: `x0_hat` carries no gradient, everything flows to the fake network and the head."""

    def _run_fake(self, noised: Noised) -> tuple[Tensor | None, dict[int, Tensor]]:
        args = ("fake", noised.x_t, noised.sigma, self.conditioning)
        if not self.wanted.prediction:
            features = self.networks.features(*args, self.wanted.blocks)  # type: ignore[arg-type]
            return None, dict(zip(self.wanted.blocks, features, strict=True))
        x0, features = self.networks.x0(*args, self.wanted.blocks)  # type: ignore[arg-type]
        return x0, dict(zip(self.wanted.blocks, features, strict=True))


class LossTerm(nn.Module):
    """A pluggable part of the loss. A term that is off is absent.

    A term returns `(loss, metrics)`: the loss already carries its weight, metrics do not. Modules it owns (a
    discriminator head) are its submodules and train with the critic.

    Attributes:
        trains_fake: whether the term has a `critic` that trains the fake network.
        critic_name: of the critic's loss, in metrics and messages.
        separable: whether the gradient of a batch is the mean of the gradients of its parts, so that several processes
            can share a batch.
        generator_pass, critic_pass: what the term wants of the fake network's forward on the noised `x0_hat`.
    """

    name: str
    trains_fake: bool = False
    critic_name: str = ""
    separable: bool = True
    generator_pass: FakePass = FakePass()
    critic_pass: FakePass = FakePass()

    def generator(self, step: GeneratorStep) -> tuple[Tensor, Metrics]:
        """The generator's loss."""
        raise NotImplementedError

    def critic(self, step: CriticStep) -> tuple[Tensor, Metrics]:
        """The critic's loss; only called where `trains_fake`."""
        raise NotImplementedError

    def build(self, width: int) -> None:
        """Create the modules that the term owns; `width` is the backbone's feature width D."""

    def blocks_used(self) -> tuple[int, ...]:
        """Feature blocks that the term reads, checked against the backbone before training."""
        return ()
