"""Refusals and metrics of terms, values that a step shares between them, and losses where a rule has an edge."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from swd.diffusion import RectifiedFlow
from swd.losses import DMD, GAN, MMD, CriticStep, FakePass, GeneratorStep, LossTerm
from swd.losses import functional as L
from swd.losses.base import ModelFacts
from swd.losses.gan_head import GANHead
from swd.losses.update import critic_loss, generator_gradient, settle, student_x0, trainers, wanted
from swd.schedule import Interval, ScaleSchedule
from swd.types import Conditioning, SeededDraws, UserError

WIDTH = 8


@dataclass
class Linear:
    """Networks in closed form: `x0 = factor x_t`, features of block b are `(b + 1) x_t` as one token a pixel."""

    process: RectifiedFlow = field(default_factory=RectifiedFlow)
    factors: dict[str, float] = field(default_factory=lambda: {"student": 0.5, "fake": 0.75, "teacher": 0.25})
    calls: list[tuple[str, str]] = field(default_factory=list)

    def x0(
        self,
        role: str,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        blocks: Sequence[int] = (),
        grad_to_features_only: bool = False,
    ) -> Any:
        assert len(sigma) == len(conditioning.embeds) == len(x_t)
        self.calls.append((role, "x0"))
        x0 = self.factors[role] * x_t
        return x0, [(block + 1) * tokens(x_t) for block in blocks]

    def features(
        self, role: str, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, blocks: Sequence[int]
    ) -> list[Tensor]:
        assert len(sigma) == len(conditioning.embeds) == len(x_t)
        self.calls.append((role, "features"))
        return [(block + 1) * tokens(x_t) for block in blocks]

    def guided_x0(
        self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, empty: Conditioning, guidance: float
    ) -> Tensor:
        assert len(sigma) == len(conditioning.embeds) == len(x_t) and len(empty.embeds) == 1
        self.calls.append(("teacher", f"guided {guidance:g}"))
        return self.factors["teacher"] * x_t


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def latents(seed: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, WIDTH, 2, 2, generator=torch.Generator().manual_seed(seed))


def text(batch: int = 3) -> Conditioning:
    return Conditioning(torch.zeros(batch, 1, 1))


def a_step(kind: type, want: FakePass, shares: int = 1) -> Any:
    hat = latents(0).requires_grad_(kind is GeneratorStep)
    return kind(Linear(), text(), text(1), hat, latents(1), SeededDraws(0, 0, 0), want, shares)


def noised(clean: Tensor, purpose: str, low: int, high: int) -> tuple[Tensor, Tensor]:
    """`clean` as a step noises it, from the table and the draws themselves."""
    draws, process = SeededDraws(0, 0, 0), RectifiedFlow()
    sigma = process.table[draws.index(f"{purpose}/index", low, high, len(clean))]
    return process.add_noise(clean.detach(), draws.noise(f"{purpose}/noise", clean.detach()), sigma), sigma


# Functions at their edges


def test_two_tokens_a_set_are_the_fewest_of_the_unbiased_kernel() -> None:
    one, two = torch.zeros(2, 1, 4), torch.zeros(2, 2, 4)
    with pytest.raises(ValueError, match=r"^the unbiased rbf kernel needs at least 2 tokens per set, got 1$"):
        L.mmd_loss(one, one, kernel="rbf")
    assert L.mmd_loss(two, two, kernel="rbf") == 0
    assert L.mmd_loss(one, one + 1, kernel="rbf", reduce="batch", bandwidth=1.0).isfinite()


def test_a_token_is_not_compared_with_itself() -> None:
    """Tokens that are all far from each other for the bandwidth: every kernel value is 0, and so is the estimate."""
    generator = torch.Generator().manual_seed(0)
    real, fake = (1000 * torch.randn(2, 5, 64, generator=generator) + 300 for _ in range(2))
    assert L.mmd_loss(real, fake, kernel="rbf", bandwidth=1.0).abs() < 1e-6


def test_dmd_divides_by_the_mean_distance_of_each_sample() -> None:
    hat, real, fake = torch.tensor([[3.0, 1.0], [9.0, 1.0]]), torch.tensor([[1.0, 1.0]] * 2), torch.zeros(2, 2)
    expected = torch.tensor([[-1.0, -1.0], [-0.25, -0.25]])
    assert torch.equal(L.dmd_direction(hat, real, fake), expected)
    assert L.dmd_loss(hat, expected).item() == pytest.approx(0.5 * (1 + 1 + 1 / 16 + 1 / 16) / 4)


def test_losses_of_half_precision_are_computed_in_float32() -> None:
    hat, real, fake = (latents(seed).bfloat16() for seed in range(3))
    direction = L.dmd_direction(hat, real, fake)
    assert direction.dtype == torch.float32
    assert torch.equal(direction, L.dmd_direction(hat.float(), real.float(), fake.float()))
    assert torch.equal(L.dmd_loss(hat, direction), L.dmd_loss(hat.float(), direction))
    a, b = tokens(hat), tokens(real)
    for kernel in ("linear", "rbf"):
        assert torch.equal(
            L.mmd_loss(a, b, kernel=kernel, bandwidth=2.0), L.mmd_loss(a.float(), b.float(), kernel=kernel, bandwidth=2)
        )


def test_defaults_of_the_discrepancy_are_those_of_the_paper() -> None:
    a, b = tokens(latents(0)), tokens(latents(1))
    difference = a.mean(1) - b.mean(1)
    expected = ((difference.square() + 0.001**2).sqrt() - 0.001).mean()
    assert_close(L.mmd_loss(a, b), expected, rtol=1e-6, atol=0)
    assert torch.equal(L.mmd_loss(a, b, kernel="rbf"), L.mmd_loss(a, b, kernel="rbf", bandwidth=100.0))
    assert not torch.equal(L.mmd_loss(a, b, kernel="rbf"), L.mmd_loss(a, b, kernel="rbf", bandwidth=101.0))


# Terms


def test_a_term_by_default_is_that_of_the_paper() -> None:
    dmd, gan, mmd = DMD(), GAN(), MMD()
    assert (dmd.weight, dmd.guidance_scale, dmd.indices, dmd.critic_indices) == (1.0, 7.0, None, None)
    assert (gan.weight, gan.discriminator_weight, gan.blocks, gan.layers) == (5e-3, 1e-2, (11,), 4)
    assert (gan.indices, gan.critic_indices) == (None, None)
    assert (mmd.weight, mmd.c, mmd.bandwidth, mmd.blocks, mmd.indices) == (1.0, 0.001, 100.0, (11,), None)
    assert (mmd.kernel, mmd.distance, mmd.reduce, mmd.noise) == ("linear", "pseudo_huber", "image", "range")
    assert gan.generator_pass == gan.critic_pass == FakePass(blocks=(11,))
    for term in (dmd, gan, mmd):
        term.check_processes("loss.x", 2)
    with pytest.raises(UserError, match="2 processes cannot share"):
        MMD(reduce="batch").check_processes("loss.mmd", 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DMD(weight=-1), "loss.dmd.weight=-1"),
        (lambda: DMD(guidance_scale=-1), "loss.dmd.guidance_scale=-1"),
        (lambda: GAN(weight=-1), "loss.gan.weight=-1"),
        (lambda: GAN(discriminator_weight=-1), "loss.gan.discriminator_weight=-1"),
        (lambda: GAN(blocks=()), "loss.gan.blocks is empty; name at least one feature block"),
        (
            lambda: GAN(layers=0),
            "loss.gan.layers=0; use 1 to 64: widths fall from layer to layer, and more of them would hardly differ",
        ),
        (lambda: GAN(layers=65), "loss.gan.layers=65; use 1 to 64"),
        (lambda: MMD(weight=-1), "loss.mmd.weight=-1"),
        (lambda: MMD(c=-1), "loss.mmd.c=-1"),
        (lambda: MMD(bandwidth=0), "loss.mmd.bandwidth=0"),
        (lambda: MMD(blocks=()), "loss.mmd.blocks is empty; name at least one feature block"),
        (lambda: settle({}), "loss is empty; choose at least one term, e.g. loss=mmd or loss=swd"),
    ],
)
def test_what_a_term_cannot_use_is_refused_by_its_name(make: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


class FourBlocks:
    """A network with feature blocks 0 to 3."""

    def check_block(self, block: int) -> None:
        if block > 3:
            raise UserError(f"no block {block}")


def a_model(poor: bool = False) -> ModelFacts:
    return ModelFacts("sd3", RectifiedFlow(), FourBlocks(), poor)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DMD(indices=(0, 28)), "loss.x.indices=[0, 28]; use [low, high] with 0 <= low <= high <= 27"),
        (lambda: DMD(critic_indices=(-1, 27)), "loss.x.critic_indices=[-1, 27]; use [low, high] with 0 <= low"),
        (lambda: GAN(blocks=(0, 4)), "loss.x.blocks: no block 4"),
        (lambda: GAN(blocks=(0,), indices=(3, 2)), "loss.x.indices=[3, 2]; use"),
        (lambda: GAN(blocks=(0,), critic_indices=(0, 28)), "loss.x.critic_indices=[0, 28]; use"),
        (lambda: MMD(blocks=(4, 0)), "loss.x.blocks: no block 4"),
        (lambda: MMD(blocks=(0,), indices=(-1, 0)), "loss.x.indices=[-1, 0]; use"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_by_its_key(make: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make().check("loss.x", a_model(), ScaleSchedule([1.0], [4]))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_terms_at_the_ends_of_the_table_fit_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for term in (
            DMD(indices=(0, 27), critic_indices=(27, 27)),
            GAN(blocks=(0, 3), indices=(0, 0), critic_indices=(0, 27)),
            MMD(blocks=(3,), indices=(27, 27)),
        ):
            term.check("loss.x", a_model(), ScaleSchedule([1.0], [4]))


def test_dmd_warns_of_a_teacher_that_draws_poorly_at_low_resolution() -> None:
    with pytest.warns(UserWarning) as caught:
        DMD().check("loss.x", a_model(poor=True), ScaleSchedule([1.0], [4]))
    assert [str(warning.message) for warning in caught] == [
        "DMD is known to fail on sd3: its teacher draws poorly at low resolution, where DMD then leads the student "
        "(SwD paper, appendix B); loss=mmd is what works"
    ]


def test_sets_of_a_batch_are_compared_on_one_process_alone() -> None:
    term = MMD(reduce="batch")
    term.check_processes("loss.x", 1)
    with pytest.raises(UserError) as caught:
        term.check_processes("loss.x", 2)
    assert str(caught.value) == (
        "loss.x.reduce=batch compares the whole batch as one set, which 2 processes cannot share; "
        "use loss.x.reduce=image, or one process (trainer.devices=1)"
    )


def test_zero_weights_and_the_longest_head_are_taken() -> None:
    assert (
        DMD(weight=0, guidance_scale=0).weight == GAN(weight=0, discriminator_weight=0).weight == MMD(weight=0).weight
    )
    assert (
        MMD(c=0).c == 0
        and MMD(bandwidth=0.5).bandwidth == 0.5
        and GAN(layers=1).layers == 1
        and GAN(layers=64).layers == 64
    )


def test_a_head_narrows_evenly_to_one() -> None:
    head = GANHead(17)
    shapes = [(layer[0].normalized_shape, layer[2].in_features, layer[2].out_features) for layer in head.layers]
    assert shapes == [((17,), 17, 13), ((13,), 13, 9), ((9,), 9, 5), ((5,), 5, 1)]
    assert [type(part) for part in head.layers[0]] == [nn.LayerNorm, nn.GELU, nn.Linear]
    assert [(layer[2].in_features, layer[2].out_features) for layer in GANHead(9, 2).layers] == [(9, 5), (5, 1)]


def test_a_term_builds_its_head_on_the_cpu() -> None:
    term = GAN(blocks=(0,), layers=2)
    with torch.device("meta"):
        term.build(WIDTH)
    assert len(term.head.layers) == 2 and {p.device.type for p in term.parameters()} == {"cpu"}


def test_a_logit_of_zero_is_no_right_answer() -> None:
    term = GAN(blocks=(0,), discriminator_weight=0.5)
    term.build(WIDTH)
    for parameter in term.parameters():
        parameter.data.zero_()
    loss, metrics = term.critic(a_step(CriticStep, term.critic_pass))
    log2 = torch.tensor(2.0).log()
    assert metrics.keys() == {"discriminator", "discriminator_accuracy"}
    assert metrics["discriminator_accuracy"] == 0
    assert_close(metrics["discriminator"], 2 * log2)
    assert_close(loss, log2)
    loss, metrics = term.generator(a_step(GeneratorStep, term.generator_pass))
    assert metrics.keys() == {"gan"}
    assert_close(metrics["gan"], log2)
    assert_close(loss, 5e-3 * log2)


def test_dmd_in_closed_form() -> None:
    """Fake 0.75 x_t, teacher 0.25 x_t: the direction is x_t / (2 mean|x0_hat - x_t / 4|)."""
    term = DMD(weight=0.5, guidance_scale=2.0, indices=(3, 9), critic_indices=(1, 5))
    step = a_step(GeneratorStep, term.generator_pass)
    loss, metrics = term.generator(step)
    x_t, _ = noised(step.x0_hat, "renoise", 3, 9)
    direction = 0.5 * x_t / (step.x0_hat.detach() - 0.25 * x_t).abs().mean((1, 2, 3), keepdim=True)
    assert step.networks.calls == [("fake", "x0"), ("teacher", "guided 2")]
    assert metrics.keys() == {"dmd", "dmd_gap"} and not metrics["dmd"].requires_grad
    assert_close(metrics["dmd"], 0.5 * direction.square().mean())
    assert_close(metrics["dmd_gap"], (0.5 * x_t).abs().mean())
    assert_close(loss, 0.5 * metrics["dmd"])
    assert_close(torch.autograd.grad(loss, step.x0_hat)[0], 0.5 * direction / direction.numel(), rtol=1e-4, atol=1e-7)

    step = a_step(CriticStep, term.critic_pass)
    loss, metrics = term.critic(step)
    x_t, _ = noised(step.x0_hat, "renoise", 1, 5)
    assert metrics.keys() == {"fake_score"} and torch.equal(metrics["fake_score"], loss)
    assert_close(loss, (0.75 * x_t - step.x0_hat).square().mean())


@pytest.mark.parametrize("role", ["teacher", "fake"])
def test_mmd_in_closed_form_over_two_blocks(role: Any) -> None:
    """Features are multiples of the latents: blocks 0 and 2 of the means' distance d count d and 3 d."""
    term = MMD(weight=0.25, blocks=(0, 2), features=role, c=0.1, indices=(2, 4))
    step = a_step(GeneratorStep, term.generator_pass)
    loss, metrics = term.generator(step)
    fake, real = (tokens(noised(x, "mmd", 2, 4)[0]).mean(1) for x in (step.x0_hat, step.x0_real))
    expected = torch.stack([L.pseudo_huber(k * (real - fake), 0.1).mean() for k in (1, 3)]).mean()
    assert step.networks.calls == [(role, "features")] * 2
    assert metrics.keys() == {"mmd"} and not metrics["mmd"].requires_grad
    assert_close(metrics["mmd"], expected)
    assert_close(loss, 0.25 * expected)


@pytest.mark.parametrize(("options", "factor"), [
    ({"distance": "squared"}, 3), ({}, 1), ({"kernel": "rbf", "distance": "squared", "bandwidth": 2.0}, 1)
])  # fmt: skip
def test_only_a_sum_over_the_batch_is_multiplied_by_its_shares(options: dict[str, Any], factor: int) -> None:
    values = []
    for shares in (1, 3):
        term = MMD(blocks=(0,), **options)
        step = a_step(GeneratorStep, term.generator_pass, shares)
        values.append(term.generator(step)[0].item())
    assert values[1] == pytest.approx(factor * values[0], rel=1e-6) and abs(values[0]) > 0.01


def test_mmd_without_noise_compares_clean_latents_at_level_zero() -> None:
    term = MMD(blocks=(0,), noise="none", distance="squared")
    step = a_step(GeneratorStep, term.generator_pass)
    seen = []
    features = step.networks.features
    step.networks.features = lambda role, x_t, sigma, *rest: (
        seen.append((role, x_t, sigma)) or features(role, x_t, sigma, *rest)
    )
    loss, _ = term.generator(step)
    assert [role for role, *_ in seen] == ["teacher", "teacher"], "the teacher, where nothing was settled"
    assert seen[0][1] is step.x0_hat and seen[1][1] is step.x0_real
    assert all(torch.equal(sigma, torch.zeros(3)) for *_, sigma in seen)
    expected = (step.x0_hat - step.x0_real).mean((2, 3)).square().sum()
    assert_close(loss, expected)


# Steps


def test_wishes_of_terms_are_joined() -> None:
    assert FakePass(True, (3,)) | FakePass(False, (5, 1, 3)) == FakePass(True, (1, 3, 5))
    assert FakePass(False, (2,)) | FakePass(True) == FakePass(True, (2,))
    assert FakePass() | FakePass() == FakePass(False, ())
    terms: dict[str, LossTerm] = {"dmd": DMD(), "gan": GAN(blocks=(4, 2)), "mmd": MMD()}
    assert wanted(terms, "generator_pass") == wanted(terms, "critic_pass") == FakePass(True, (2, 4))
    assert wanted({"mmd": MMD()}, "critic_pass") == wanted({}, "generator_pass") == FakePass()
    assert list(trainers(terms)) == ["dmd", "gan"]


def test_noise_is_drawn_once_for_a_purpose_and_range() -> None:
    step = a_step(GeneratorStep, FakePass())
    first = step.noise_fake("renoise", (2, 9))
    assert step.noise_fake("renoise", [2, 9]) is first, "a list as configurations give it"
    assert step.noise_fake("renoise", (2, 8)) is not first and step.noise_fake("mmd", (2, 9)) is not first
    for name, clean, found in (
        ("renoise", step.x0_hat, first),
        ("renoise", step.x0_real, step.noise_real("renoise", (2, 9))),
        ("mmd", step.x0_hat, step.noise_fake("mmd", (2, 9))),
    ):
        x_t, sigma = noised(clean, name, 2, 9)
        assert torch.equal(found.x_t, x_t) and torch.equal(found.sigma, sigma)


@pytest.mark.parametrize(
    ("kind", "want", "call", "gradient"),
    [
        (GeneratorStep, FakePass(True), "x0", False),
        (GeneratorStep, FakePass(True, (0, 2)), "x0", False),
        (GeneratorStep, FakePass(False, (0, 2)), "features", None),
        (CriticStep, FakePass(True), "x0", True),
        (CriticStep, FakePass(True, (0, 2)), "x0", True),
        (CriticStep, FakePass(False, (0, 2)), "features", None),
    ],
)
def test_the_fake_network_runs_once_for_a_noised_sample(
    kind: type, want: FakePass, call: str, gradient: bool | None
) -> None:
    step = a_step(kind, want)
    step.x0_hat = latents(0).requires_grad_()
    sample = step.noise_fake("renoise", (2, 9))
    for _ in range(2):
        features = step.fake_features("renoise", (2, 9), want.blocks)
        for block, found in zip(want.blocks, features, strict=True):
            assert torch.equal(found, (block + 1) * tokens(sample.x_t)) and found.requires_grad
        if gradient is None:
            with pytest.raises(AssertionError, match="prediction=True"):
                step.fake_x0("renoise", (2, 9))
        else:
            x0 = step.fake_x0("renoise", (2, 9))
            assert torch.equal(x0, 0.75 * sample.x_t) and x0.requires_grad == gradient
    assert step.networks.calls == [("fake", call)]
    step.fake_features("other", (2, 9), want.blocks)
    assert step.networks.calls == [("fake", call)] * 2


class Forgetful(Linear):
    """Networks that leave out the last feature every second time they are asked for features."""

    def features(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        found = super().features(*args, **kwargs)
        return found[:-1] if len(self.calls) % 2 else found

    def x0(self, *args: Any, **kwargs: Any) -> Any:
        x0, features = super().x0(*args, **kwargs)
        return x0, features[:-1]


@pytest.mark.parametrize("kind", [GeneratorStep, CriticStep])
@pytest.mark.parametrize("prediction", [True, False])
def test_a_feature_that_is_missing_is_an_error(kind: type, prediction: bool) -> None:
    step = a_step(kind, FakePass(prediction, (0, 2)))
    step.networks = Forgetful()
    with pytest.raises(ValueError, match="zip"):
        step.fake_features("renoise", (2, 9), (0, 2))


def test_features_of_both_sides_are_compared_one_by_one() -> None:
    step = a_step(GeneratorStep, FakePass())
    step.networks = Forgetful()
    with pytest.raises(ValueError, match="zip"):
        MMD(blocks=(0, 2)).generator(step)


class Fixed(LossTerm):
    """A loss of `slope * sum(x0_hat)`."""

    def __init__(self, name: str, slope: float, trains: bool = True, generator_pass: FakePass | None = None) -> None:
        super().__init__()
        self.name = name
        self.slope = slope
        self.trains_fake = trains
        self.critic_name = f"critic of {name}"
        self.generator_pass = generator_pass or FakePass()

    def generator(self, step: GeneratorStep) -> Any:
        order.append(self.name)
        return self.slope * step.x0_hat.sum(), {self.name: torch.tensor(self.slope)}

    def critic(self, step: CriticStep) -> Any:
        assert isinstance(step, CriticStep)
        return torch.tensor(self.slope), {self.critic_name: torch.tensor(self.slope)}


order: list[str] = []


def test_losses_and_gradients_of_terms_add_up() -> None:
    terms: dict[str, LossTerm] = {"a": Fixed("a", 2.0), "b": Fixed("b", -0.5), "c": Fixed("c", 0.25, trains=False)}
    step = a_step(GeneratorStep, FakePass())
    checks: dict[str, Tensor] = {}
    total, gradient, metrics = generator_gradient(terms, step, checks)
    assert_close(total, 1.75 * step.x0_hat.detach().sum())
    assert torch.equal(gradient, torch.full_like(gradient, 1.75))
    assert {name: float(value) for name, value in metrics.items()} == {"a": 2.0, "b": -0.5, "c": 0.25}
    assert {name: bool(value) for name, value in checks.items()} == {"a": True, "b": True, "c": True}
    checks = {}
    loss, metrics = critic_loss(terms, a_step(CriticStep, FakePass()), checks)
    assert loss == 1.5 and {k: float(v) for k, v in metrics.items()} == {"critic of a": 2.0, "critic of b": -0.5}
    assert {name: bool(value) for name, value in checks.items()} == {"critic of a": True, "critic of b": True}


def test_a_term_that_is_not_finite_is_named_by_the_checks() -> None:
    terms: dict[str, LossTerm] = {"a": Fixed("a", 1.0), "b": Fixed("b", float("inf"))}
    checks: dict[str, Tensor] = {}
    generator_gradient(terms, a_step(GeneratorStep, FakePass()), checks)
    assert {name: bool(value) for name, value in checks.items()} == {"a": True, "b": False}
    checks = {}
    critic_loss(terms, a_step(CriticStep, FakePass()), checks)
    assert {name: bool(value) for name, value in checks.items()} == {"critic of a": True, "critic of b": False}
    checks = {}
    generator_gradient({"c": Fixed("c", 1e38)}, step := a_step(GeneratorStep, FakePass()), checks)
    assert (1e38 * step.x0_hat.sum()).isinf() and not checks["c"], "the loss alone, with a finite gradient"


def test_a_critic_goes_by_its_own_name_or_by_its_terms() -> None:
    terms: dict[str, LossTerm] = {"a": Fixed("a", 1.0), "b": Fixed("b", 1.0)}
    terms["a"].critic_name, terms["b"].critic_name = "judge", ""
    checks: dict[str, Tensor] = {}
    critic_loss(terms, a_step(CriticStep, FakePass()), checks)
    assert list(checks) == ["judge", "critic of b"]


class OnOneDevice(Linear):
    """Networks that find all that they are given on the device of the latents."""

    def x0(self, role: str, x_t: Tensor, sigma: Tensor, *rest: Any, **more: Any) -> Any:
        assert sigma.device == x_t.device == torch.device("meta")
        return super().x0(role, x_t, sigma, *rest, **more)

    def features(self, role: str, x_t: Tensor, sigma: Tensor, *rest: Any) -> list[Tensor]:
        assert sigma.device == x_t.device == torch.device("meta")
        return super().features(role, x_t, sigma, *rest)


def test_an_update_is_computed_where_its_latents_lie() -> None:
    networks, draws = OnOneDevice(), SeededDraws(0, 0, 0)
    source = latents(5).to("meta")
    assert student_x0(networks, Interval(0, 0.75, (2, 2), (2, 2)), source, text(), draws).is_meta
    terms: dict[str, LossTerm] = {"mmd": MMD(blocks=(0,)), "clean": MMD(blocks=(0,), noise="none"), "dmd": DMD()}
    step = a_step(GeneratorStep, wanted(terms, "generator_pass"))
    step.networks, step.x0_hat, step.x0_real = networks, source.clone().requires_grad_(), source
    total, gradient, metrics = generator_gradient(terms, step)
    assert total.is_meta and gradient.is_meta and all(value.is_meta for value in metrics.values())
    assert len(networks.calls) == 1 + 4 + 2


def test_terms_that_read_the_shared_pass_run_first() -> None:
    """Those with features and a prediction, with features, with a prediction, and with neither; by name within."""
    passes = {
        "a": FakePass(),
        "b": FakePass(True),
        "e": FakePass(True, (1,)),
        "d": FakePass(True, (2,)),
        "c": FakePass(False, (1,)),
    }
    order.clear()
    terms: dict[str, LossTerm] = {name: Fixed(name, 1.0, True, want) for name, want in passes.items()}
    generator_gradient(terms, a_step(GeneratorStep, FakePass()))
    assert order == ["d", "e", "c", "b", "a"]


def test_the_student_predicts_from_the_upsampled_noised_source() -> None:
    networks, source, draws = Linear(), latents(5), SeededDraws(0, 0, 0)
    x0 = student_x0(networks, Interval(0, 0.75, (2, 2), (2, 2)), source.bfloat16(), text(), draws)
    eps = draws.noise("student/noise", source)
    assert_close(x0, 0.5 * (0.25 * source.bfloat16().float() + 0.75 * eps))
    assert x0.dtype == torch.float32 and networks.calls == [("student", "x0")]


def test_features_are_settled_once_for_each_term() -> None:
    terms: dict[str, LossTerm] = {"dmd": DMD(), "first": MMD(features="teacher"), "second": MMD()}
    settle(terms)
    assert [terms[name].features for name in ("first", "second")] == ["teacher", "fake"]
    alone: dict[str, LossTerm] = {"mmd": MMD()}
    settle(alone)
    assert alone["mmd"].features == "teacher"
    with pytest.raises(UserError) as caught:
        settle({"style": MMD(features="fake")})
    assert str(caught.value) == (
        "loss.style.features=fake, but no term trains a fake network; add dmd or gan, or use features=teacher"
    )
