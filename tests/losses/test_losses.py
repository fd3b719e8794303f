"""Loss terms: closed forms, and every set of terms on real (tiny) networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import SIZES, WIDTH, build_conditioning, build_latents, build_networks, build_schedule
from torch import Tensor, nn
from torch.testing import assert_close

from swd.losses import DMD, GAN, MMD, CriticStep, GeneratorStep, LossTerm
from swd.losses import functional as L
from swd.losses.gan_head import GANHead
from swd.losses.update import critic_loss, generator_gradient, settle, student_x0, trainers, wanted
from swd.modules.networks import SharedBase
from swd.types import SeededDraws, UserError

SUBSETS = ["+".join(names) for n in (1, 2, 3) for names in combinations(("dmd", "mmd", "gan"), n)]
BATCH = 3


@dataclass
class Spy:
    """Networks and draws that note what is asked of them."""

    networks: SharedBase
    draws: SeededDraws
    calls: list[tuple[str, str, Tensor, Tensor]] = field(default_factory=list)  # role, what, x_t, sigma
    indices: dict[str, tuple[int, int]] = field(default_factory=dict)
    noises: list[str] = field(default_factory=list)
    graphs: list[bool] = field(default_factory=list)  # whether features, call by call, can be differentiated

    @property
    def process(self):
        return self.networks.process

    def x0(self, role, x_t, sigma, conditioning, blocks=(), grad_to_features_only=False):
        self.calls.append((role, "x0", x_t.detach(), sigma))
        return self.networks.x0(role, x_t, sigma, conditioning, blocks, grad_to_features_only)

    def features(self, role, x_t, sigma, conditioning, blocks):
        self.calls.append((role, "features", x_t.detach(), sigma))
        features = self.networks.features(role, x_t, sigma, conditioning, blocks)
        self.graphs.append(features[0].requires_grad)
        return features

    def guided_x0(self, x_t, sigma, conditioning, empty, guidance):
        self.calls.append(("teacher", "guided", x_t.detach(), sigma))
        return self.networks.guided_x0(x_t, sigma, conditioning, empty, guidance)

    def noise(self, purpose, like):
        self.noises.append(purpose)
        return self.draws.noise(purpose, like)

    def index(self, purpose, low, high, batch):
        self.indices[purpose] = (low, high)
        return self.draws.index(purpose, low, high, batch)

    def of(self, role: str) -> list[tuple[str, Tensor, Tensor]]:
        return [call[1:] for call in self.calls if call[0] == role]


def make_terms(names: str, **mmd: Any) -> dict[str, LossTerm]:
    """The named terms ("dmd+gan"), built and settled; keywords go to MMD."""
    makers = {
        "dmd": lambda: DMD(guidance_scale=3.0),
        "mmd": lambda: MMD(**({"blocks": (1,)} | mmd)),
        "gan": lambda: GAN(blocks=(1,), weight=0.3, discriminator_weight=0.2),
    }
    terms = {name: makers[name]() for name in names.split("+")}
    settle(terms)
    torch.manual_seed(0)
    for term in terms.values():
        term.build(WIDTH)
    return terms


def make_spy(terms: Mapping[str, LossTerm], update: int = 0) -> Spy:
    roles = ("student", "fake") if trainers(terms) else ("student",)
    return Spy(build_networks(roles=roles), SeededDraws(0, 0, update))


def make_step(spy: Spy, terms: Mapping[str, LossTerm], kind: type) -> tuple[Tensor, Any]:
    """The student's prediction, and the step that terms see."""
    interval = build_schedule().interval(1)
    conditioning, empty = build_conditioning(BATCH), build_conditioning(1, seed=9)
    source, target = build_latents(BATCH, SIZES[0]), build_latents(BATCH, SIZES[1], seed=1)
    critic = kind is CriticStep
    with torch.set_grad_enabled(not critic):
        x0_hat = student_x0(spy, interval, source, conditioning, spy.draws)
    spy.calls.clear()
    asked = wanted(trainers(terms), "critic_pass") if critic else wanted(terms, "generator_pass")
    leaf = x0_hat if critic else x0_hat.detach().requires_grad_()
    return x0_hat, kind(spy, conditioning, empty, leaf, target, spy, asked)


def generator_update(spy: Spy, terms: Mapping[str, LossTerm]) -> tuple[Any, Tensor, Tensor, dict[str, Tensor]]:
    x0_hat, step = make_step(spy, terms, GeneratorStep)
    loss, gradient, metrics = generator_gradient(terms, step)
    (x0_hat * gradient).sum().backward()
    return step, loss, gradient, metrics


def critic_update(spy: Spy, terms: Mapping[str, LossTerm]) -> tuple[Any, Tensor, dict[str, Tensor]]:
    _, step = make_step(spy, terms, CriticStep)
    loss, metrics = critic_loss(terms, step)
    loss.backward()
    return step, loss, metrics


def with_gradient(networks: SharedBase, terms: Mapping[str, LossTerm]) -> set[str]:
    """Owners of the parameters that received a gradient that is not zero."""
    owners = set()
    for key, parameter in networks.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, key
            owners.add(next((r for r in ("student", "fake") if f".{r}." in key), "base"))
    if any(p.grad is not None for term in terms.values() for p in term.parameters()):
        owners.add("head")
    return owners


# Every set of terms


@pytest.mark.parametrize("names", SUBSETS)
def test_a_generator_update_reaches_the_student_alone(names: str) -> None:
    terms = make_terms(names)
    spy = make_spy(terms)
    _, loss, gradient, metrics = generator_update(spy, terms)
    assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().max() > 0
    assert with_gradient(spy.networks, terms) == {"student"}
    weights = {"dmd": 1.0, "mmd": 1.0, "gan": 0.3}
    assert_close(loss, sum(weights[name] * metrics[name] for name in terms))


@pytest.mark.parametrize("names", [n for n in SUBSETS if n != "mmd"])
def test_a_critic_update_reaches_the_fake_and_the_head_alone(names: str) -> None:
    terms = make_terms(names)
    spy = make_spy(terms)
    _, loss, _ = critic_update(spy, terms)
    assert loss.isfinite() and not torch.is_inference(loss)
    assert with_gradient(spy.networks, terms) == ({"fake", "head"} if "gan" in names else {"fake"})


def test_mmd_alone_has_no_critic_and_no_fake_network() -> None:
    terms = make_terms("mmd")
    assert trainers(terms) == {}
    spy = make_spy(terms)
    assert spy.networks.role_parameters("fake") == []
    generator_update(spy, terms)
    assert {role for role, *_ in spy.calls} == {"teacher"}


@pytest.mark.parametrize("names", SUBSETS)
def test_terms_one_by_one_give_the_gradient_of_their_sum(names: str) -> None:
    terms = make_terms(names)
    spy = make_spy(terms)
    _, loss, gradient, _ = generator_update(spy, terms)
    student = [None if p.grad is None else p.grad.clone() for p in spy.networks.role_parameters("student")]

    other = make_spy(terms)
    x0_hat, step = make_step(other, terms, GeneratorStep)
    step.x0_hat = x0_hat  # no leaf: everything in one graph
    total = torch.stack([term.generator(step)[0] for term in terms.values()]).sum()
    assert_close(total, loss)
    assert_close(torch.autograd.grad(total, x0_hat, retain_graph=True)[0], gradient, rtol=1e-4, atol=1e-7)
    total.backward()
    for a, b in zip(student, other.networks.role_parameters("student"), strict=True):
        if a is None:
            assert b.grad is None
        else:
            assert_close(a, b.grad, rtol=1e-4, atol=1e-6)


def descend(networks: SharedBase, step: float = 1e-3) -> None:
    """One small step of all trainable weights down their gradient."""
    with torch.no_grad():
        for parameter in networks.parameters():
            if parameter.grad is not None:
                parameter -= step * parameter.grad / parameter.grad.norm()
                parameter.grad = None


@pytest.mark.parametrize("names", ["mmd", "gan", "mmd+gan"])
def test_a_small_generator_step_lowers_the_loss_of_the_same_draws(names: str) -> None:
    terms = make_terms(names)
    spy = make_spy(terms)
    _, before, *_ = generator_update(spy, terms)
    descend(spy.networks)
    _, after, *_ = generator_update(spy, terms)
    assert after < before


@pytest.mark.parametrize("names", ["dmd", "gan", "dmd+gan"])
def test_a_small_critic_step_lowers_the_loss_of_the_same_draws(names: str) -> None:
    terms = make_terms(names)
    spy = make_spy(terms)
    _, before, _ = critic_update(spy, terms)
    descend(spy.networks)
    _, after, _ = critic_update(spy, terms)
    assert after < before


def test_a_small_dmd_step_moves_the_student_from_fake_towards_real() -> None:
    terms = make_terms("dmd")
    spy = make_spy(terms)
    step, _, gradient, _ = generator_update(spy, terms)
    descend(spy.networks)
    moved, _ = make_step(spy, terms, GeneratorStep)
    assert ((moved - step.x0_hat) * gradient).sum() < 0


# Shared values, and draws


@pytest.mark.parametrize(
    ("names", "fake", "teacher"),
    [
        ("dmd", ["x0"], ["guided"]),
        ("gan", ["features"], []),
        ("dmd+gan", ["x0"], ["guided"]),
        ("dmd+mmd", ["x0", "features", "features"], ["guided"]),
        ("mmd+gan", ["features"] * 3, []),
        ("dmd+mmd+gan", ["x0", "features", "features"], ["guided"]),
        ("mmd", [], ["features", "features"]),
    ],
)
def test_a_generator_update_runs_each_network_once(names: str, fake: list[str], teacher: list[str]) -> None:
    terms = make_terms(names)
    spy = make_spy(terms)
    generator_update(spy, terms)
    assert sorted(kind for kind, *_ in spy.of("fake")) == sorted(fake)
    assert sorted(kind for kind, *_ in spy.of("teacher")) == sorted(teacher)
    assert len(set(spy.noises)) == len(spy.noises), "every noise is drawn once"


def test_terms_that_read_features_share_one_forward_and_its_graph() -> None:
    def make() -> dict[str, LossTerm]:
        terms = make_terms("dmd+gan") | {"other": GAN(blocks=(0,), weight=0.7), "third": GAN(blocks=(2,), weight=0.2)}
        torch.manual_seed(1)
        for name in ("other", "third"):
            terms[name].build(WIDTH)
        return terms

    together = make()
    spy = make_spy(together)
    _, loss, gradient, _ = generator_update(spy, together)
    assert [kind for kind, *_ in spy.of("fake")] == ["x0"]
    parts = [generator_update(make_spy(together), {name: term}) for name, term in make().items()]
    assert_close(loss, sum(part[1] for part in parts))
    assert_close(gradient, sum(part[2] for part in parts))


def test_dmd_and_gan_share_one_noised_sample() -> None:
    terms = make_terms("dmd+gan")
    spy = make_spy(terms)
    step, *_ = generator_update(spy, terms)
    (_, x_fake, sigma_fake), (_, x_teacher, sigma_teacher) = *spy.of("fake"), *spy.of("teacher")
    assert torch.equal(x_fake, x_teacher) and torch.equal(sigma_fake, sigma_teacher)
    eps = spy.draws.noise("renoise/noise", step.x0_hat)
    assert_close(x_fake, spy.process.add_noise(step.x0_hat.detach(), eps, sigma_fake))


@pytest.mark.parametrize("names", ["dmd", "gan", "dmd+gan"])
def test_a_critic_update_noises_real_and_fake_alike(names: str) -> None:
    terms = make_terms(names)
    spy = make_spy(terms)
    step, *_ = critic_update(spy, terms)
    assert spy.of("teacher") == [] and spy.indices == {"renoise/index": (0, 27)}
    assert [kind for kind, *_ in spy.of("fake")] == {
        "dmd": ["x0"], "gan": ["features", "features"], "dmd+gan": ["x0", "features"]
    }[names]  # fmt: skip
    eps = spy.draws.noise("renoise/noise", step.x0_hat)
    for (_, x_t, sigma), clean in zip(spy.of("fake"), (step.x0_hat, step.x0_real), strict=False):
        assert torch.equal(sigma, spy.of("fake")[0][2])
        assert_close(x_t, spy.process.add_noise(clean, eps, sigma))


def test_each_term_draws_from_its_own_range() -> None:
    for names, ranges in {
        "dmd+gan": {"renoise/index": (12, 27)},
        "gan": {"renoise/index": (12, 27)},
        "dmd+mmd": {"renoise/index": (12, 27), "mmd/index": (18, 27)},
    }.items():
        terms = make_terms(names)
        spy = make_spy(terms)
        generator_update(spy, terms)
        assert spy.indices == ranges


def test_ranges_can_be_chosen() -> None:
    terms: dict[str, LossTerm] = {
        "dmd": DMD(indices=(3, 4), critic_indices=(5, 6)),
        "gan": GAN(blocks=(1,), indices=(3, 4), critic_indices=(5, 6)),
        "mmd": MMD(blocks=(1,), indices=(1, 2), features="fake"),
    }
    terms["gan"].build(WIDTH)
    spy = make_spy(terms)
    generator_update(spy, terms)
    assert spy.indices == {"renoise/index": (3, 4), "mmd/index": (1, 2)}
    critic_update(spy, terms)
    assert spy.indices["renoise/index"] == (5, 6)


# DMD


def test_dmd_direction_closed_form() -> None:
    hat, real, fake = (build_latents(BATCH, 5, seed) for seed in range(3))
    expected = torch.stack([
        (f.double() - r.double()) / (h.double() - r.double()).abs().mean()
        for h, r, f in zip(hat, real, fake, strict=True)
    ])  # fmt: skip
    assert_close(L.dmd_direction(hat, real, fake).double(), expected, rtol=1e-5, atol=1e-6)
    leaf = hat.clone().requires_grad_()
    loss = L.dmd_loss(leaf, L.dmd_direction(hat, real, fake))
    loss.backward()
    assert_close(loss.double(), 0.5 * expected.square().mean(), rtol=1e-5, atol=0)
    assert_close(leaf.grad.double() * hat.numel(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("same_fake", [False, True])
def test_dmd_is_finite_where_the_student_equals_the_teacher(same_fake: bool) -> None:
    hat, real, fake = (build_latents(BATCH, 5, seed) for seed in range(3))
    expected = L.dmd_direction(hat, real, fake)
    hat[1] = real[1]
    if same_fake:
        fake[1] = real[1]
    leaf = hat.requires_grad_()
    direction = L.dmd_direction(leaf, real, fake)
    loss = L.dmd_loss(leaf, direction)
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all()
    assert torch.equal(direction[1], torch.zeros_like(direction[1]))
    assert torch.equal(direction[[0, 2]].detach(), expected[[0, 2]])


def test_dmd_follows_fake_minus_guided_teacher() -> None:
    terms = make_terms("dmd")
    spy = make_spy(terms)
    step, _, gradient, metrics = generator_update(spy, terms)
    _, x_t, sigma = spy.of("fake")[0]
    with torch.no_grad():
        fake = spy.networks.x0("fake", x_t, sigma, step.conditioning)[0]
        text = spy.networks.x0("teacher", x_t, sigma, step.conditioning)[0]
        without = spy.networks.x0("teacher", x_t, sigma, step.empty.expand(BATCH))[0]
        direction = L.dmd_direction(step.x0_hat, without + 3.0 * (text - without), fake)
    assert_close(gradient * gradient.numel(), direction, rtol=1e-3, atol=1e-3)
    assert_close(metrics["dmd"], 0.5 * direction.square().mean(), rtol=1e-4, atol=0)


def test_the_fake_network_is_fitted_to_the_students_output() -> None:
    terms = make_terms("dmd")
    spy = make_spy(terms)
    step, loss, _ = critic_update(spy, terms)
    _, x_t, sigma = spy.of("fake")[0]
    with torch.no_grad():
        fake = spy.networks.x0("fake", x_t, sigma, step.conditioning)[0]
    assert_close(loss.detach().double(), (fake.double() - step.x0_hat.double()).square().mean(), rtol=1e-5, atol=0)


# MMD


def token_sets(seed: int, batch: int = 2, tokens: int = 5, width: int = 8) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rbf_closed_form(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Unbiased squared MMD of one pair of sets, pair by pair."""
    n = len(x)

    def k(a: Tensor, b: Tensor) -> float:
        return torch.exp(-(a - b).square().sum() / (2 * bandwidth**2)).item()

    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    xy = sum(k(x[i], y[j]) for i in range(n) for j in range(n)) / n**2
    return xx + yy - 2 * xy


@pytest.mark.parametrize("reduce", ["image", "batch"])
def test_mmd_closed_forms(reduce: L.Reduce) -> None:
    real, fake = token_sets(0), 0.7 * token_sets(1) + 0.3
    sets = [(real[i], fake[i]) for i in range(2)] if reduce == "image" else [(real.flatten(0, 1), fake.flatten(0, 1))]
    means = torch.stack([r.mean(0) - f.mean(0) for r, f in sets])
    expected = {
        "pseudo_huber": ((means.square() + 0.01**2).sqrt() - 0.01).mean(),
        "squared": means.square().sum(),
    }
    for distance, value in expected.items():
        assert_close(
            L.mmd_loss(real, fake, distance=distance, c=0.01, reduce=reduce).double(), value, rtol=1e-5, atol=0
        )
    for bandwidth in (1.0, 5.0):
        value = sum(rbf_closed_form(r, f, bandwidth) for r, f in sets) / len(sets)
        actual = L.mmd_loss(real, fake, kernel="rbf", bandwidth=bandwidth, reduce=reduce)
        assert actual.item() == pytest.approx(value, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("c", [0.0, 0.001, 0.1])
def test_pseudo_huber_is_zero_and_flat_at_zero(c: float) -> None:
    d = torch.tensor([0.0, 1e-12, -3.0], requires_grad=True)
    value = L.pseudo_huber(d, c)
    value.sum().backward()
    assert value[0].item() == pytest.approx(max(c, 1e-5) - c, abs=1e-8)
    assert value[2].item() == pytest.approx((9 + c * c) ** 0.5 - c, rel=1e-6)
    assert d.grad.isfinite().all() and d.grad[0] == 0
    assert d.grad[2].item() == pytest.approx(-3 / (9 + c * c) ** 0.5, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": "rbf", "bandwidth": 5.0},
        {"distance": "squared"},
        {"reduce": "batch"},
        {"noise": "none"},
        {"blocks": (0, 1, 2)},
        {"features": "teacher"},
        {"kernel": "rbf", "bandwidth": 5.0, "reduce": "batch", "noise": "none", "blocks": (0, 2)},
    ],
)
@pytest.mark.parametrize("names", ["mmd", "dmd+mmd+gan"])
def test_every_option_of_mmd_compares_features_of_like_noised_latents(options: dict[str, Any], names: str) -> None:
    terms = make_terms(names, **options)
    spy = make_spy(terms)
    step, _, gradient, metrics = generator_update(spy, terms)
    assert gradient.isfinite().all() and with_gradient(spy.networks, terms) == {"student"}
    role = options.get("features") or ("fake" if names != "mmd" else "teacher")
    (_, x_fake, sigma), (_, x_real, sigma_real) = [c for c in spy.of(role) if c[0] == "features"]
    assert torch.equal(sigma, sigma_real)
    if options.get("noise") == "none":
        assert torch.equal(x_fake, step.x0_hat) and torch.equal(x_real, step.x0_real) and not sigma.any()
        assert not any("mmd" in purpose for purpose in spy.noises)
    else:
        eps = spy.draws.noise("mmd/noise", step.x0_hat)
        assert_close(x_fake, spy.process.add_noise(step.x0_hat.detach(), eps, sigma))
        assert_close(x_real, spy.process.add_noise(step.x0_real, eps, sigma))
    blocks = options.get("blocks", (1,))
    with torch.no_grad():
        fake, real = (spy.networks.features(role, x, sigma, step.conditioning, blocks) for x in (x_fake, x_real))
        named = {k: v for k, v in options.items() if k in ("kernel", "bandwidth", "distance", "reduce")}
        expected = torch.stack([L.mmd_loss(r, f, **named) for r, f in zip(real, fake, strict=True)]).mean()
    assert_close(metrics["mmd"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("names", ["mmd", "dmd+mmd"])
def test_features_of_the_data_keep_no_graph(names: str) -> None:
    terms = make_terms(names)
    spy = make_spy(terms)
    generator_update(spy, terms)
    assert spy.graphs == [True, False]


@pytest.mark.parametrize(("names", "role"), [("mmd", "teacher"), ("dmd+mmd", "fake"), ("mmd+gan", "fake")])
def test_features_come_from_the_fake_where_one_is_trained(names: str, role: str) -> None:
    assert make_terms(names)["mmd"].features == role


def test_features_of_a_fake_that_nobody_trains_are_refused() -> None:
    with pytest.raises(UserError, match=r"loss\.mmd\.features=fake.*features=teacher"):
        make_terms("mmd", features="fake")


def test_no_terms_are_refused() -> None:
    with pytest.raises(UserError, match="loss is empty"):
        settle({})


# GAN


def test_gan_alone_trains_the_critic_by_the_discriminator_loss_only() -> None:
    terms = make_terms("gan")
    spy = make_spy(terms)
    step, loss, metrics = critic_update(spy, terms)
    assert set(metrics) == {"discriminator", "discriminator_accuracy"}
    logits = []
    for _, x_t, sigma in spy.of("fake"):
        with torch.no_grad():
            tokens = spy.networks.features("fake", x_t, sigma, step.conditioning, (1,))[0]
            logits.append(terms["gan"].head(tokens.mean(1)).squeeze(1))
    expected = 0.2 * (F.softplus(logits[0]).mean() + F.softplus(-logits[1]).mean())
    assert_close(loss, expected)
    accuracy = ((logits[0] < 0).float().mean() + (logits[1] > 0).float().mean()) / 2
    assert_close(metrics["discriminator_accuracy"], accuracy)


def test_gan_generator_closed_form_over_several_blocks() -> None:
    term = GAN(blocks=(2, 0), weight=0.3)
    torch.manual_seed(0)
    term.build(WIDTH)
    terms: dict[str, LossTerm] = {"gan": term}
    spy = make_spy(terms)
    step, loss, _, _ = generator_update(spy, terms)
    _, x_t, sigma = spy.of("fake")[0]
    with torch.no_grad():
        blocks = spy.networks.features("fake", x_t, sigma, step.conditioning, (2, 0))
        logits = (term.head(blocks[0].mean(1)) + term.head(blocks[1].mean(1))).squeeze(1) / 2
    assert_close(loss, 0.3 * F.softplus(-logits).mean())


def test_the_head_reads_token_means_in_float32() -> None:
    head = nn.Linear(8, 1)
    tokens = 100 + torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(L.discriminator_logits(head, [tokens.bfloat16()]), head(tokens.bfloat16().float().mean(1))[:, 0])


def test_logits_of_two_batches_are_those_of_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    fake, real = ([torch.randn(3, 5, 8, generator=generator) for _ in range(2)] for _ in range(2))
    torch.manual_seed(0)
    head = GANHead(8, 2)
    together = L.discriminator_logits(head, fake, real)
    apart = [L.discriminator_logits(head, features) for features in (fake, real)]
    assert_close(together, torch.cat(apart))
    assert len({round(value, 6) for value in together.tolist()}) == 6, "all samples differ"


def test_gan_losses_are_finite_for_extreme_logits() -> None:
    logits = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    for loss in (L.gan_generator_loss(logits), L.gan_discriminator_loss(logits, -logits)):
        assert loss.isfinite()
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()


# Memory


def test_gradients_do_not_depend_on_checkpointing() -> None:
    results = []
    for checkpointing in (False, True):
        terms = make_terms("dmd+mmd+gan")
        spy = make_spy(terms)
        if checkpointing:
            spy.networks.enable_checkpointing()
        _, loss, gradient, _ = generator_update(spy, terms)
        critic_update(spy, terms)
        grads = [p.grad for p in [*spy.networks.parameters(), *terms["gan"].parameters()] if p.grad is not None]
        results.append((loss, gradient, grads))
    (loss, gradient, grads), (other_loss, other_gradient, other_grads) = results
    assert torch.equal(loss, other_loss) and torch.equal(gradient, other_gradient)
    assert len(grads) == len(other_grads) and all(map(torch.equal, grads, other_grads))


@contextmanager
def saved_tensors() -> Iterator[list[int]]:
    """Bytes of the tensors that autograd keeps for backwards inside."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        yield sizes


def test_the_pass_behind_the_last_feature_keeps_nothing_for_the_backward() -> None:
    networks, x = build_networks(), build_latents().requires_grad_()
    arguments = ("fake", x, torch.tensor([0.5, 0.5]), build_conditioning(), (0,))
    with saved_tensors() as features_only:
        networks.features(*arguments)
    with saved_tensors() as partial:
        networks.x0(*arguments, grad_to_features_only=True)
    with saved_tensors() as full:
        networks.x0(*arguments)
    assert sum(partial) <= sum(features_only) + 10_000 < sum(full)
