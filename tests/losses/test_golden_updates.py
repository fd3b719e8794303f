"""Whole updates against stored numbers of the released code: stub networks, stored draws, our terms."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import Golden
from stored import TOLERANCE, load_head
from torch import Tensor, nn
from torch.testing import assert_close

from swd.diffusion import RectifiedFlow
from swd.losses import DMD, GAN, MMD, CriticStep, GeneratorStep, LossTerm
from swd.losses.update import critic_loss, generator_gradient, settle, student_x0, trainers, wanted
from swd.schedule import ScaleSchedule
from swd.types import Conditioning


class StubNetworks:
    """The reference's stub networks: closed forms with one scalar parameter each (tests/data/README.md)."""

    process = RectifiedFlow()

    def __init__(self) -> None:
        values = {"a": 0.8, "b": 0.05, "c": 0.7, "d": -0.1, "e": 1.3}
        self.parameters = {name: nn.Parameter(torch.tensor(value)) for name, value in values.items()}
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {"student": [], "fake": []}

    def velocity(self, role: str, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self.calls["fake" if role == "fake" else "student"].append((x.detach(), 1000 * sigma))
        m, q = (v.flatten(1).mean(1).view(-1, 1, 1, 1) for v in (conditioning.embeds, conditioning.pooled))
        u, p = sigma.view(-1, 1, 1, 1), self.parameters
        if role == "student":
            return p["a"] * x + p["b"] * u + m
        return p["c"] * x + p["d"] * u + q if role == "fake" else 0.6 * x - 0.2 * u + 2 * m

    def x0(self, role, x_t, sigma, conditioning, blocks=(), grad_to_features_only=False):
        x0 = self.process.to_x0(x_t, self.velocity(role, x_t, sigma, conditioning), sigma)
        return x0, [self.tokens(x_t, sigma) for _ in blocks]

    def features(self, role, x_t, sigma, conditioning, blocks: Sequence[int]) -> list[Tensor]:
        assert role == "fake"
        self.calls["fake"].append((x_t.detach(), 1000 * sigma))
        return [self.tokens(x_t, sigma) for _ in blocks]

    def tokens(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.parameters["e"] * x.tanh().flatten(2).transpose(1, 2) + 0.1 * sigma.view(-1, 1, 1)

    def guided_x0(self, x_t, sigma, conditioning, empty, guidance):
        text = self.x0("teacher", x_t, sigma, conditioning)[0]
        without = self.x0("teacher", x_t, sigma, empty)[0]
        return without + guidance * (text - without)


class StoredDraws:
    """Draws in the reference's order of calls."""

    def __init__(self, golden: Golden, case: str, order: Sequence[str]) -> None:
        self.stored = {f"{purpose}/noise": golden[f"e2e/{case}/noise{i}"] for i, purpose in enumerate(order)} | {
            f"{purpose}/index": golden[f"e2e/{case}/idx_noisy{i}"] for i, purpose in enumerate(order[1:])
        }

    def noise(self, purpose: str, like: Tensor) -> Tensor:
        return self.stored[purpose]

    def index(self, purpose: str, low: int, high: int, batch: int) -> Tensor:
        index = self.stored[purpose]
        assert low <= index.min() and index.max() <= high, "the stored draw lies outside our range"
        return index


class Setup:
    """Conditioning, interval and networks of one stored case."""

    def __init__(self, golden: Golden, case: str, order: Sequence[str]) -> None:
        self.golden, self.case = golden, case
        self.networks, self.draws = StubNetworks(), StoredDraws(golden, case, order)
        self.conditioning = Conditioning(golden["e2e/prompt_embeds"], golden["e2e/pooled"])
        self.empty = Conditioning(golden["e2e/uncond_prompt_embeds"], golden["e2e/uncond_pooled"])
        table = golden["sched/sigmas"]
        schedule = ScaleSchedule(golden["sched/boundary_sigmas_4"][:-1].tolist(), [4, 5, 6, 8])
        start = golden[f"e2e/{case}/idx_start"][0]
        self.interval = next(
            i for i in map(schedule.interval, range(4)) if i.sigma == pytest.approx(table[start].item())
        )
        self.target = golden[f"e2e/{case}/model_input"]
        # The first interval's source is its target (paper, section 4.1); the reference agrees up to its stored input.
        self.source = golden[f"e2e/{case}/model_input_prev"]

    def x0_hat(self) -> Tensor:
        return student_x0(self.networks, self.interval, self.source, self.conditioning, self.draws)

    def check_calls(self) -> None:
        for role, calls in self.networks.calls.items():
            stored = self.golden.names(f"e2e/{self.case}/{role}_call")
            for i in range(len([n for n in stored if n.endswith("_x")])):
                x, t = calls[i]
                assert_close(x, self.golden[f"e2e/{self.case}/{role}_call{i}_x"], **TOLERANCE)
                assert_close(t, self.golden[f"e2e/{self.case}/{role}_call{i}_t"], rtol=1e-5, atol=1e-3)


def gan(golden: Golden) -> GAN:
    term = GAN(blocks=(0,))
    term.build(16)
    term.head = load_head(golden, "e2e/head/", 16)
    return term


@pytest.mark.parametrize("case", ["fake_s0", "fake_s2"])
def test_critic_update(golden: Golden, case: str) -> None:
    setup = Setup(golden, case, ["student", "renoise"])
    terms: dict[str, LossTerm] = {"dmd": DMD(), "gan": gan(golden)}
    with torch.no_grad():
        x0_hat = setup.x0_hat()
    step = CriticStep(
        setup.networks, setup.conditioning, setup.empty, x0_hat, setup.target, setup.draws,
        wanted(trainers(terms), "critic_pass"),
    )  # fmt: skip
    loss, _ = critic_loss(terms, step)
    loss.backward()
    assert_close(loss, golden[f"e2e/{case}/loss"], **TOLERANCE)
    for name in golden.names(f"e2e/{case}/grad/"):
        key = name.split("/grad/")[1]
        if key.startswith("cls_pred_branch."):
            actual = dict(terms["gan"].head.named_parameters())["layers." + key.removeprefix("cls_pred_branch.")].grad
        else:
            actual = setup.networks.parameters[key].grad
        assert_close(actual, golden[name], **TOLERANCE, msg=lambda m, key=key: f"{key}: {m}")
    setup.check_calls()


@pytest.mark.parametrize("case", ["gen_s0", "gen_s2", "gen_mmd_only"])
def test_generator_update(golden: Golden, case: str) -> None:
    alone = case == "gen_mmd_only"
    setup = Setup(golden, case, ["student", "mmd"] if alone else ["student", "renoise", "mmd"])
    terms: dict[str, LossTerm] = {"mmd": MMD(blocks=(0,), features="fake")}
    if not alone:
        terms |= {"dmd": DMD(guidance_scale=7.0), "gan": gan(golden)}
        settle(terms)
    x0_hat = setup.x0_hat()
    leaf = x0_hat.detach().requires_grad_()
    step = GeneratorStep(
        setup.networks, setup.conditioning, setup.empty, leaf, setup.target, setup.draws,
        wanted(terms, "generator_pass"),
    )  # fmt: skip
    loss, gradient, metrics = generator_gradient(terms, step)
    (x0_hat * gradient).sum().backward()
    assert_close(loss, golden[f"e2e/{case}/loss"], **TOLERANCE)
    assert_close(metrics["mmd"], golden[f"e2e/{case}/mmd_loss"], **TOLERANCE)
    for name in ("a", "b"):
        assert_close(setup.networks.parameters[name].grad, golden[f"e2e/{case}/grad/{name}"], **TOLERANCE)
    assert setup.networks.parameters["e"].grad is None, "the generator's backward must not reach the fake network"
