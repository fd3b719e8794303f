"""The contract of a loss term, and the step object that terms share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from swd.diffusion import IndexRange, Process
from swd.schedule import ScaleSchedule
from swd.types import Conditioning, Draws, Noised, Role, UserError

FeatureSource = Literal["teacher", "fake"]
"""Role whose features MMD compares."""
Metrics = dict[str, Tensor]
"""Detached scalars by name, for the log."""


class Predictors(Protocol):
    """The networks in their three roles, as loss terms use them.

    `swd.modules.networks.Networks` and its two kinds implement this; any other object with these methods may be passed.
    """

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

        With `grad_to_features_only`, blocks after the last of `blocks` run without a graph, and the prediction carries
        no gradient.
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


class NarrowingPredictors(Predictors, Protocol):
    """Networks that can go on with some of a pass's samples; an attribute `narrows` that is true tells them."""

    narrows: bool

    def x0(
        self,
        role: Role,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        blocks: Sequence[int] = (),
        grad_to_features_only: bool = False,
        rows: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """As `Predictors.x0`; behind the last of `blocks` only the first `rows` samples go on, None: all do."""
        ...


class BlockLimits(Protocol):
    """The feature blocks that a network has; `swd.modules.backbones.base.NetworkLimits` implements it."""

    def check_block(self, block: int) -> None:
        """Raise UserError for a feature block that does not exist."""
        ...


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a pretrained model, for terms to check themselves against.

    Attributes:
        family: name of the model's family.
        process: the diffusion process.
        limits: the blocks that features can be read from.
        poor_at_low_resolution: whether the teacher draws poorly at sizes below its native one.
    """

    family: str
    process: Process
    limits: BlockLimits
    poor_at_low_resolution: bool = False

    def check_blocks(self, key: str, blocks: Sequence[int]) -> None:
        """Raise UserError for a feature block that does not exist; `key` names the option in the message."""
        for block in blocks:
            try:
                self.limits.check_block(block)
            except UserError as error:
                raise UserError(f"{key}: {error}") from None

    def check_indices(self, key: str, indices: IndexRange | None) -> None:
        """Raise UserError for a range outside the model's table of noise levels; None, the default, always fits."""
        first, last = self.process.ranges.whole
        low, high = indices or (first, last)
        if not first <= low <= high <= last:
            raise UserError(f"{key}=[{low}, {high}]; use [low, high] with {first} <= low <= high <= {last}")


@dataclass(frozen=True)
class FakePass:
    """Outputs that a term needs from the fake network's forward pass on the noised `x0_hat`.

    Attributes:
        prediction: whether it needs the clean prediction.
        blocks: the blocks whose features it needs.
    """

    prediction: bool = False
    blocks: tuple[int, ...] = ()

    def __or__(self, other: FakePass) -> FakePass:
        return FakePass(self.prediction or other.prediction, tuple(sorted({*self.blocks, *other.blocks})))


@dataclass(frozen=True)
class FakeOutput:
    """Results of one forward of the fake network.

    Attributes:
        prediction: clean prediction; None if no term needs it.
        features: `[B, L, D]` by block.
        real_features: the same of the noised `x0_real`, where they came of the same pass.
    """

    prediction: Tensor | None
    features: dict[int, Tensor]
    real_features: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Step:
    """One update's inputs, and the results that terms share: noised samples and the fake network's outputs on them.

    A noised sample is identified by a purpose and a range of indices: terms that ask for the same pair share it.

    Attributes:
        networks: the three roles.
        conditioning: of the B prompts.
        empty: conditioning of the empty prompt, one row.
        x0_hat: student's clean prediction `[B, C, *size]`; a leaf that requires a gradient in generator updates.
        x0_real: target latents of the same shape.
        draws: where random numbers come from.
        wanted: union of the outputs that the terms need from the fake network.
        shares: number of parts that the global batch is split into: over processes, and on each by `task.accumulate`.
            Gradients are averaged over parts, so a loss that is a sum over the batch must be multiplied by this.
        reads_real: whether a term will ask for `real_features`, so that one pass may make them with the others.
    """

    networks: Predictors
    conditioning: Conditioning
    empty: Conditioning
    x0_hat: Tensor
    x0_real: Tensor
    draws: Draws
    wanted: FakePass = FakePass()
    shares: int = 1
    reads_real: bool = False
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
        """The fake network's clean prediction on `noise_fake(purpose, indices)`; needs `FakePass.prediction`."""
        prediction = self._fake_output(purpose, indices).prediction
        assert prediction is not None, "a term that reads fake_x0 says so: generator_pass = FakePass(prediction=True)"
        return prediction

    def fake_features(self, purpose: str, indices: IndexRange, blocks: Sequence[int]) -> list[Tensor]:
        """The fake network's features on `noise_fake(purpose, indices)`; `FakePass.blocks` must name the blocks."""
        features = self._fake_output(purpose, indices).features
        return [features[block] for block in blocks]

    def real_features(self, purpose: str, indices: IndexRange, blocks: Sequence[int]) -> list[Tensor]:
        """The fake network's features on `noise_real(purpose, indices)`.

        Of the same pass as `fake_features`, where a term has `LossTerm.reads_real` and the networks can.
        """
        found = self._fake_output(purpose, indices).real_features
        if set(blocks) <= set(found):
            return [found[block] for block in blocks]
        real = self.noise_real(purpose, indices)
        return self.networks.features("fake", real.x_t, real.sigma, self.conditioning, blocks)

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
        """Output of the fake network on a noised sample; the network runs once, when the first term asks."""
        key = _name(purpose, indices)
        if key not in self._fake:
            noised = self.noise_fake(purpose, indices)
            real = self.noise_real(purpose, indices) if self._joins() else None
            self._fake[key] = self._run_fake(noised) if real is None else self._run_both(noised, real)
        return self._fake[key]

    def _joins(self) -> bool:
        """Whether noised fake and noised real go through the fake network together."""
        return self.reads_real and bool(self.wanted.blocks) and getattr(self.networks, "narrows", False)

    def _run_both(self, fake: Noised, real: Noised) -> FakeOutput:
        """Run the fake network on both up to the last block, and on the noised fake alone behind it."""
        raise NotImplementedError

    def _run_fake(self, noised: Noised) -> FakeOutput:
        """Run the fake network on a noised sample."""
        raise NotImplementedError

    def _run_fake_features(self, noised: Noised) -> FakeOutput:
        """Run the fake network for features alone; it stops after the last block."""
        blocks = self.wanted.blocks
        features = self.networks.features("fake", noised.x_t, noised.sigma, self.conditioning, blocks)
        return FakeOutput(None, dict(zip(blocks, features, strict=True)))


def _name(purpose: str, indices: IndexRange) -> tuple[str, IndexRange]:
    """Key of a noised sample; a range from a configuration may be a list, so it is made a tuple."""
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
    """A critic update: `x0_hat` carries no gradient, gradients flow to the fake network and the head."""

    def _run_fake(self, noised: Noised) -> FakeOutput:
        if not self.wanted.prediction:
            return self._run_fake_features(noised)
        blocks = self.wanted.blocks
        x0, features = self.networks.x0("fake", noised.x_t, noised.sigma, self.conditioning, blocks)
        return FakeOutput(x0, dict(zip(blocks, features, strict=True)))

    def _run_both(self, fake: Noised, real: Noised) -> FakeOutput:
        x_t = torch.cat([fake.x_t, real.x_t])
        sigma = torch.cat([fake.sigma, real.sigma])
        conditioning = Conditioning.cat([self.conditioning, self.conditioning])
        blocks = self.wanted.blocks
        count = len(fake.x_t)
        if self.wanted.prediction:
            networks = cast(NarrowingPredictors, self.networks)
            x0, features = networks.x0("fake", x_t, sigma, conditioning, blocks, rows=count)
        else:
            x0 = None
            features = self.networks.features("fake", x_t, sigma, conditioning, blocks)
        # One split: the gradients of two slices would each be padded with zeros to the whole, and added.
        halves = zip(*(feature.chunk(2) for feature in features), strict=True)
        own, of_real = (dict(zip(blocks, half, strict=True)) for half in halves)
        return FakeOutput(x0, own, of_real)


class LossTerm(nn.Module):
    """A pluggable part of the loss. A term that is off is absent.

    A term returns `(loss, metrics)`: the loss already carries its weight, metrics do not. Modules it owns (a
    discriminator head) are its submodules and train with the critic. Of the methods, only `generator` must be written.
    They are called in the order settle, check, check_processes, build, and then critic and generator in turns.

    Attributes:
        trains_fake: whether the term has a `critic` that trains the fake network.
        critic_name: name of the critic's loss in messages.
        generator_pass: outputs that `generator` needs from the fake network on the noised `x0_hat`.
        critic_pass: the same for `critic`.
        reads_real: whether `critic` asks for `Step.real_features`, of blocks in `critic_pass`.
    """

    trains_fake: bool = False
    critic_name: str = ""
    generator_pass: FakePass = FakePass()
    critic_pass: FakePass = FakePass()
    reads_real: bool = False

    def settle(self, key: str, has_fake: bool) -> None:
        """Choose options that depend on the other terms.

        Args:
            key: the term's key in the configuration, e.g. "loss.mmd", for messages.
            has_fake: whether there is a fake network, that is, whether any term of the loss trains one.

        Raises:
            UserError: if an option asks for a fake network and there is none.
        """

    def check(self, key: str, model: ModelFacts, schedule: ScaleSchedule) -> None:
        """Raise UserError if the term's options do not fit the model or the schedule; nothing is loaded yet."""

    def check_processes(self, key: str, processes: int) -> None:
        """Raise UserError if a batch cannot be split over this number of processes.

        It can be if its gradient is the mean of the gradients of its parts, by itself or with a factor `Step.shares`.
        """

    def check_accumulate(self, key: str, parts: int) -> None:
        """Raise UserError if each process's share of a batch cannot be worked on in so many parts; as for processes."""
        self.check_processes(key, parts)

    def build(self, width: int) -> None:
        """Create the modules that the term owns; `width` is the backbone's feature width D."""

    def generator(self, step: GeneratorStep) -> tuple[Tensor, Metrics]:
        """The generator's loss."""
        raise NotImplementedError

    def critic(self, step: CriticStep) -> tuple[Tensor, Metrics]:
        """The critic's loss; only called where `trains_fake`."""
        raise NotImplementedError
