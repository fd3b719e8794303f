"""Passes that are made together give the values and gradients of separate ones, with fewer runs of blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from lightning import Trainer
from plain import BlockRuns, go_the_plain_way, one_by_one
from tiny import CHANNELS, build_conditioning, build_networks, build_transformer, in_float64
from torch import Tensor
from torch.testing import assert_close

from swd.data.iterations import Iterations
from swd.losses import DMD, GAN, MMD, CriticStep, LossTerm
from swd.losses.base import Step
from swd.losses.update import critic_loss, trainers, wanted
from swd.modules.ahead import with_predictions
from swd.modules.backbones.sd3 import SD3Backbone
from swd.modules.distiller import Distiller
from swd.modules.inputs import Inputs
from swd.modules.networks import Networks, SeparateCopies
from swd.schedule import Interval, ScaleSchedule
from swd.types import PictureBatch, SeededDraws

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


def noise(side: int, seed: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CHANNELS, side, side, generator=generator)


def shared() -> Networks:
    return in_float64(build_networks())


def checkpointed() -> Networks:
    return in_float64(build_networks(checkpointing=True))


def copies() -> Networks:
    networks = SeparateCopies(SD3Backbone(build_transformer())).double()
    for backbone in (networks.backbone, *networks.copies.values()):
        backbone._dtype = torch.float64
    return networks


def checkpointed_copies() -> Networks:
    networks = copies()
    networks.enable_checkpointing()
    return networks


TERMS: dict[str, Callable[[], dict[str, LossTerm]]] = {
    "dmd and gan": lambda: {"dmd": DMD(), "gan": GAN(blocks=(1,), discriminator_weight=0.5)},
    "at the first and the last block": lambda: {"dmd": DMD(), "gan": GAN(blocks=(0, 2))},
    "gan alone": lambda: {"gan": GAN(blocks=(1, 0))},
}
RUNS = {"dmd and gan": ([4], [4], [2]), "at the first and the last block": ([4], [4], [4]), "gan alone": ([4], [4], [])}
"""Samples of each run of the three blocks where two samples and their data go together."""


def critic_update(build: Callable[[], Networks], terms: str) -> tuple[list[Tensor], BlockRuns]:
    """Loss, metrics and all gradients of a critic update, and the runs of blocks in its forward pass."""
    networks = build()
    loss_terms = TERMS[terms]()
    for term in loss_terms.values():
        torch.manual_seed(0)
        term.build(16)
    runs = BlockRuns(networks.backbone_of("fake").block_list)
    asked = wanted(trainers(loss_terms), "critic_pass")
    text = build_conditioning()
    step = CriticStep(networks, text, build_conditioning(1), noise(8, 0), noise(8, 1), SeededDraws(0), asked)
    loss, metrics = critic_loss(loss_terms, step)
    samples = [list(each) for each in runs.samples]
    loss.backward()
    runs.samples = samples
    parameters = [*networks.role_parameters("fake"), *(p for term in loss_terms.values() for p in term.parameters())]
    gradients = [p.grad if p.grad is not None else torch.zeros(1) for p in parameters]
    assert sum(bool(gradient.any()) for gradient in gradients) > 10
    assert all(p.grad is None for p in networks.role_parameters("student"))
    return [loss.detach(), *metrics.values(), *gradients], runs


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("build", [shared, checkpointed, copies, checkpointed_copies])
def test_noised_fake_and_real_share_a_pass(
    build: Callable[[], Networks], terms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, runs = critic_update(build, terms)
    assert tuple(runs.samples) == RUNS[terms]
    monkeypatch.setattr(Step, "_joins", lambda step: False)
    apart, more = critic_update(build, terms)
    assert more.runs > runs.runs and sum(map(sum, more.samples)) == sum(map(sum, runs.samples))
    for a, b in zip(together, apart, strict=True):
        assert_close(a, b, **EXACT)


@pytest.mark.parametrize("build", [shared, checkpointed, copies, checkpointed_copies])
def test_text_goes_no_further_than_it_is_read(build: Callable[[], Networks]) -> None:
    """Behind the last features a block's text MLP runs for the samples that go on, and features stay as they are."""
    networks = build()
    backbone = networks.backbone_of("fake")
    seen: list[tuple[int, int]] = []
    for number in range(2):  # the last of three blocks makes no text
        mlp = backbone.block_list[number].get_submodule("ff_context.net")[2]
        mlp.register_forward_hook(lambda module, args, output, number=number: seen.append((number, len(output))))
    ends: list[int] = []
    backbone.network.get_submodule("proj_out").register_forward_hook(lambda module, args, out: ends.append(len(out)))
    x, sigma, text = noise(8, 0, batch=4).double(), torch.full((4,), 0.5), build_conditioning(4)
    whole = networks.x0("fake", x, sigma, text, (0, 1))
    assert seen == [(0, 4), (1, 4)]
    seen.clear()
    exits = networks.features("fake", x, sigma, text, (0, 1))
    assert seen == [(0, 4), (1, 0)]
    seen.clear()
    some = networks.x0("fake", x, sigma, text, (1,), rows=3)
    assert seen == [(0, 4), (1, 3)] and len(some[0]) == 3 and ends == [4, 3]
    assert_close(some[0], whole[0][:3], **EXACT)
    detached = networks.x0("fake", x, sigma, text, (0, 1), grad_to_features_only=True)
    assert_close(detached[0], whole[0], **EXACT)
    weights = networks.role_parameters("fake")
    found = []
    for features in (whole[1], exits, detached[1]):
        loss = torch.stack([feature.square().mean() for feature in features]).sum()
        gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        found.append([*features, *gradients])
    for ways in zip(*found, strict=True):
        assert_close(ways[1], ways[0], **EXACT)
        assert_close(ways[2], ways[0], **EXACT)


def test_a_compiled_block_is_left_whole() -> None:
    """Its code is made for the hooks in it: for new ones in each pass it would be made again and again."""
    networks = shared()
    block: Any = networks.backbone.block_list[0]
    graphs: list[object] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    block.forward = torch.compile(block.forward, backend=backend)
    x, sigma, text = noise(8, 0).double(), torch.full((2,), 0.5), build_conditioning()
    expected = shared().x0("fake", x, sigma, text, (0,))
    with torch.no_grad():
        networks.features("fake", x, sigma, text, (0,))
        made = len(graphs)
        assert_close(networks.x0("fake", x, sigma, text, (0,))[0], expected[0], **EXACT)
        networks.features("fake", x, sigma, text, (0,))
    assert len(graphs) == made > 0


def updates() -> list[Inputs]:
    """Four updates of which one has another size, and one another length of text."""
    found = []
    for number, (side, tokens) in enumerate(((8, 12), (6, 12), (8, 12), (8, 5))):
        text = build_conditioning(4, seed=number)
        text = type(text)(text.embeds[:, :tokens], text.pooled)
        interval = Interval(1, 0.8, (side - 2,) * 2, (side,) * 2)
        source = noise(side - 2, number, batch=4)
        found.append(Inputs(interval, source, noise(side, 9, 4), text, text.rows([0]), SeededDraws(3, 1, number)))
    return found


@pytest.mark.parametrize("parts", [1, 2])
@torch.no_grad()
def test_predictions_made_ahead_are_those_of_each_update(parts: int) -> None:
    networks = shared()
    runs = BlockRuns(networks.backbone.block_list)
    ahead = with_predictions(networks, updates(), parts)
    assert [sorted(each) for each in runs.samples] == [[4 // parts] * 2 * parts + [8 // parts] * parts] * 3
    for a, b, given in zip(ahead, one_by_one(networks, updates()), updates(), strict=True):
        assert_close(a.x0_hat, b.x0_hat, rtol=1e-6, atol=1e-6)  # float32, after a network in float64
        assert torch.equal(a.source, given.source) and a.draws == given.draws
        halves = a.parts(2)
        assert torch.equal(torch.cat([half.x0_hat for half in halves]), a.x0_hat)
        assert a.first().x0_hat is None


def trained(model: Any, folder: Path) -> tuple[dict[str, Tensor], BlockRuns, dict[str, Tensor]]:
    """Weights in float64 and metrics after an iteration of two critic updates, and its runs of blocks."""
    terms = {"dmd": DMD(), "mmd": MMD(blocks=(0,)), "gan": GAN(blocks=(0,))}
    task = Distiller(model, ScaleSchedule(families.SIGMAS, families.SIZES["sd3"]), terms, critic_updates=2, lr=1e-4)
    task.configure_model()
    in_float64(task.networks)
    generator = torch.Generator().manual_seed(4)
    for role in ("student", "fake"):
        for parameter in task.networks.role_parameters(role):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    runs = BlockRuns(task.networks.backbone.block_list)
    shape = (2, 3, *model.pixel_size(model.size))
    pixels = [torch.rand(shape, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(3)]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_steps=1, accelerator="cpu", default_root_dir=str(folder), **quiet)
    trainer.fit(task, Iterations([PictureBatch(each, prompts=["a star", "a circle"]) for each in pixels], 3))
    return dict(task.networks.named_parameters()), runs, task.last_metrics


def test_an_iteration_is_that_of_the_plain_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.pretrained("sd3", families.save("sd3", tmp_path / "pipeline"))
    weights, runs, metrics = trained(model, tmp_path)
    # By block: student ahead; critic twice; student, fake, teacher with guidance, features of fake and real.
    assert runs.samples == [[4, 4, 4, 2, 2, 4, 2, 2], *[[4, 2, 2, 2, 2, 4]] * 2]
    go_the_plain_way(monkeypatch, norms=False)
    expected, more, known = trained(model, tmp_path)
    assert (runs.runs, more.runs) == (20, 25)
    for name, value in known.items():
        assert_close(metrics[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    for name, parameter in weights.items():  # a step is at most the learning rate
        assert_close(parameter, expected[name], rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
