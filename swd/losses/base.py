"""The contract of a loss term, and the step object that terms share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from swd.diffusion import IndexRange, Process
from swd.schedule import ScaleSchedule
from swd.types import Conditioning, Draws, Noised, Role, UserError

FeatureSource = Literal["teacher", "fake"]
Metrics = dict[str, Tensor]


class Predictors(Protocol):
    """The networks as terms use them; `swd.modules.networks` has two implementations, and others may be passed."""

    process: Process

    def x0(
        self,
        role: Role,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        blocks: Sequence[int] = (),
        grad_to_features_only: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Clean prediction `[B, C, *size]` float32, and features `[B, L, D]` of `blocks`.

        `grad_to_features_only`: run what lies behind the last of the blocks without a graph.
        """
        ...

    def features(
        self, role: Role, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, blocks: Sequence[int]
    ) -> list[Tensor]:
        """Features `[B, L, D]` of `blocks`; the network stops after the last of them."""
        ...

    def guided_x0(
        self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, empty: Conditioning, guidance: float
    ) -> Tensor:
        """The teacher's clean prediction with classifier-free guidance."""
        ...


class BlockLimits(Protocol):
    """Which feature blocks a network has; `swd.modules.backbones.base.Limits` is one."""

    def check_block(self, block: int) -> None:
        """Raise UserError for a feature block that does not exist."""
        ...


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a pretrained model, for terms to check themselves against.

    Attributes:
        family: name of the model's family.
        process: the diffusion process.
        limits: which blocks features can be read from.
        poor_at_low_resolution: whether the teacher draws poorly at sizes below its native one.
    """

    family: str
    process: Process
    limits: BlockLimits
    poor_at_low_resolution: bool = False

    def check_blocks(self, key: str, blocks: Sequence[int]) -> None:
        """Raise UserError for a feature block that does not exist; `key` is the configuration's, for the message."""
        for block in blocks:
            try:
                self.limits.check_block(block)
            except UserError as error:
                raise UserError(f"{key}: {error}") from None

    def check_indices(self, key: str, indices: IndexRange | None) -> None:
        """Raise UserError for a range outside the process' table of noise levels; None, the default, always fits."""
        last = self.process.ranges["critic"][1]
        low, high = indices or (0, last)
        if not 0 <= low <= high <= last:
            raise UserError(f"{key}=[{low}, {high}]; use [low, high] with 0 <= low <= high <= {last}")


@dataclass(frozen=True)
class FakePass:
    """What a term wants of the fake network's forward on the noised `x0_hat`."""

    prediction: bool = False
    blocks: tuple[int, ...] = ()

    def __or__(self, other: FakePass) -> FakePass:
        return FakePass(self.prediction or other.prediction, tuple(sorted({*self.blocks, *other.blocks})))


@dataclass(frozen=True)
class FakeOutput:
    """Results of one forward of the fake network.

    Attributes:
        prediction: clean prediction; None if no term wants it.
        features: `[B, L, D]` by block.
    """

    prediction: Tensor | None
    features: dict[int, Tensor]


@dataclass
class Step:
    """One update's inputs, and what terms share on it: noised fakes and the fake network's forward on them.

    A noised sample goes by its name, a purpose and a range of indices: terms that give the same one share it.

    Attributes:
        networks: the three roles.
        conditioning: B rows; `empty`: the encoded empty prompt, one row.
        x0_hat: student's clean prediction `[B, C, *size]`; a leaf that requires a gradient in generator updates.
        x0_real: target latents of the same shape.
        draws: where random numbers come from.
        wanted: union of what the terms want of the fake network.
        shares: over how many processes the global batch is split; their gradients are averaged, so that a loss that
            is a sum over the batch must be multiplied by this.
    """

    networks: Predictors
    conditioning: Conditioning
    empty: Conditioning
    x0_hat: Tensor
    x0_real: Tensor
    draws: Draws
    wanted: FakePass = FakePass()
    shares: int = 1
    _noised: dict[tuple[str, IndexRange], tuple[Noised, Tensor]] = field(default_factory=dict)
    _fake: dict[tuple[str, IndexRange], FakeOutput] = field(default_factory=dict)

    def noise_fake(self, purpose: str, indices: IndexRange) -> Noised:
        """The noised `x0_hat`; the same purpose and range give the same sample, drawn once."""
        return self._draw(purpose, indices)[0]

    def noise_real(self, purpose: str, indices: IndexRange) -> Noised:
        """The noised `x0_real`, with the level and the noise of `noise_fake`."""
        noised, eps = self._draw(purpose, indices)
        return Noised(self.networks.process.add_noise(self.x0_real, eps, noised.sigma), noised.sigma)

    def fake_x0(self, purpose: str, indices: IndexRange) -> Tensor:
        """The fake network's clean prediction on `noise_fake` of that name; the term's pass has `prediction`."""
        prediction = self._fake_output(purpose, indices).prediction
        assert prediction is not None, "a term that reads fake_x0 says so: generator_pass = FakePass(prediction=True)"
        return prediction

    def fake_features(self, purpose: str, indices: IndexRange, blocks: Sequence[int]) -> list[Tensor]:
        """The fake network's features on `noise_fake` of that name; the term's pass names the blocks."""
        features = self._fake_output(purpose, indices).features
        return [features[block] for block in blocks]

    def _draw(self, purpose: str, indices: IndexRange) -> tuple[Noised, Tensor]:
        key = _name(purpose, indices)
        if key not in self._noised:
            process = self.networks.process
            index = self.draws.index(f"{purpose}/index", *indices, len(self.x0_hat))
            sigma = process.level(index).to(self.x0_hat.device)
            eps = self.draws.noise(f"{purpose}/noise", self.x0_hat)
            self._noised[key] = Noised(process.add_noise(self.x0_hat, eps, sigma), sigma), eps
        return self._noised[key]

    def _fake_output(self, purpose: str, indices: IndexRange) -> FakeOutput:
        """The fake network's one forward on a sample, whichever term asks first."""
        key = _name(purpose, indices)
        if key not in self._fake:
            self._fake[key] = self._run_fake(self.noise_fake(purpose, indices))
        return self._fake[key]

    def _run_fake(self, noised: Noised) -> FakeOutput:
        raise NotImplementedError

    def _run_fake_features(self, noised: Noised) -> FakeOutput:
        """The forward where features alone are wanted: it ends after the last block."""
        blocks = self.wanted.blocks
        features = self.networks.features("fake", noised.x_t, noised.sigma, self.conditioning, blocks)
        return FakeOutput(None, dict(zip(blocks, features, strict=True)))


def _name(purpose: str, indices: IndexRange) -> tuple[str, IndexRange]:
    """The key of a noised sample; a range out of a configuration may be a list."""
    return purpose, (indices[0], indices[1])


class GeneratorStep(Step):
    """A generator update: gradients flow to `x0_hat` through features, never through the fake's prediction."""

    def _run_fake(self, noised: Noised) -> FakeOutput:
        blocks = self.wanted.blocks
        if not blocks:
            with torch.no_grad():
                return FakeOutput(self.networks.x0("fake", noised.x_t, noised.sigma, self.conditioning)[0], {})
        if not self.wanted.prediction:
            return self._run_fake_features(noised)
        x0, features = self.networks.x0(
            "fake", noised.x_t, noised.sigma, self.conditioning, blocks, grad_to_features_only=True
        )
        return FakeOutput(x0.detach(), dict(zip(blocks, features, strict=True)))


class CriticStep(Step):
    """A critic update: `x0_hat` carries no gradient, everything flows to the fake network and the head."""

    def _run_fake(self, noised: Noised) -> FakeOutput:
        if not self.wanted.prediction:
            return self._run_fake_features(noised)
        blocks = self.wanted.blocks
        x0, features = self.networks.x0("fake", noised.x_t, noised.sigma, self.conditioning, blocks)
        return FakeOutput(x0, dict(zip(blocks, features, strict=True)))


class LossTerm(nn.Module):
    """A pluggable part of the loss. A term that is off is absent.

    A term returns `(loss, metrics)`: the loss already carries its weight, metrics do not. Modules it owns (a
    discriminator head) are its submodules and train with the critic. Of the methods, only `generator` must be written.
    They are called in the order settle, check, check_processes, build, and then critic and generator in turns.

    Attributes:
        trains_fake: whether the term has a `critic` that trains the fake network.
        critic_name: of the critic's loss, in messages.
        generator_pass, critic_pass: what the term wants of the fake network's forward on the noised `x0_hat`.
    """

    trains_fake: bool = False
    critic_name: str = ""
    generator_pass: FakePass = FakePass()
    critic_pass: FakePass = FakePass()

    def settle(self, key: str, has_fake: bool) -> None:
        """Choose options that depend on the other terms.

        Args:
            key: the term's in the configuration, for messages: "loss.mmd".
            has_fake: whether any term of the loss trains the fake network, so that there is one.

        Raises:
            UserError: if an option asks for a fake network and there is none.
        """

    def check(self, key: str, model: ModelFacts, schedule: ScaleSchedule) -> None:
        """Raise UserError if the term's options do not fit the model or the schedule; nothing is loaded yet."""

    def check_processes(self, key: str, processes: int) -> None:
        """Raise UserError if so many processes cannot share a batch.

        They can if the gradient of a batch is the mean of the gradients of its parts, or `Step.shares` makes it so.
        """

    def build(self, width: int) -> None:
        """Create the modules that the term owns; `width` is the backbone's feature width D."""

    def generator(self, step: GeneratorStep) -> tuple[Tensor, Metrics]:
        """The generator's loss."""
        raise NotImplementedError

    def critic(self, step: CriticStep) -> tuple[Tensor, Metrics]:
        """The critic's loss; only called where `trains_fake`."""
        raise NotImplementedError
