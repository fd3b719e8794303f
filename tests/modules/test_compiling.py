"""Blocks that are compiled give the values and gradients of others, and are traced once for each role and mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import tiny
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx.experimental import _config as fx_config
from torch.testing import assert_close

from swd.commands import train
from swd.losses import MMD
from swd.modules import compiling, distiller, flow_matching
from swd.modules.adapters import load, write_layouts
from swd.modules.compiling import GRAPHS, compile_blocks, compile_in_place
from swd.modules.distiller import Distiller
from swd.modules.flow_matching import FlowMatching
from swd.modules.networks import Networks
from swd.schedule import ScaleSchedule
from swd.types import Conditioning, Role, UserError

SIZES = ((4, 4), (6, 8))
OTHERS = [name for name in families.SIZES if name != "sd3"]


@pytest.fixture
def fresh() -> Iterator[None]:
    """Dynamo without graphs, and with its settings as they were."""
    dynamo = torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False)
    with dynamo, fx_config.patch(use_duck_shape=True):
        torch._dynamo.reset()
        counters.clear()
        yield
    torch._dynamo.reset()


def run(networks: Networks, text: Conditioning, role: Role, size: tuple[int, int], graph: bool) -> list[Tensor]:
    """The role's prediction, and on request the gradients of its square."""
    x_t = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0)).requires_grad_(graph)
    with torch.set_grad_enabled(graph):
        x0 = networks.x0(role, x_t, torch.tensor([0.9, 0.3]), text)[0]
        if not graph:
            return [x0]
        wanted = [x_t, *(networks.role_parameters(role) if role != "teacher" else [])]
        found = torch.autograd.grad(x0.square().mean(), wanted, allow_unused=True)
    return [x0.detach(), *(each for each in found if each is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_are_traced_once_for_each_role_and_mode(recompute: bool, tmp_path: Path, fresh: None) -> None:
    """`aot_eager` traces as the real backend does, forward and backward, and needs no compiler."""
    model = families.pretrained("sd3", families.save("sd3", tmp_path / "m"))
    networks = model.networks(("student", "fake"))
    if recompute:
        networks.enable_checkpointing()
    generator = torch.Generator().manual_seed(1)
    for role in networks.roles:
        for parameter in networks.role_parameters(role):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    text = model.backbone_class.random_conditioning(model.network_config, 2, 12)
    roles: tuple[Role, ...] = ("teacher", "student", "fake")
    cases: list[Any] = [(role, size, graph) for size in SIZES for role in roles for graph in (False, True)]
    expected = [run(networks, text, *case) for case in cases]

    compile_blocks(networks, "aot_eager")
    warm = {True: 0, False: 0}
    for number, (case, values) in enumerate(zip(cases * 2, expected * 2, strict=True)):
        for one, other in zip(run(networks, text, *case), values, strict=True):
            assert_close(one, other, rtol=1e-4, atol=1e-6)
        graphs = counters["stats"]["unique_graphs"]
        warm[number < len(cases) // len(SIZES)] = graphs
    # All graphs are there after one size, and no later size, role or mode adds one.
    assert warm[True] == warm[False] <= GRAPHS
    assert not counters["graph_break"]


class Block(nn.Module):
    """A layer and its activation, as a network repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.layer(x))


@torch.no_grad()
def test_blocks_that_are_alike_share_a_graph_and_their_hooks_stay_outside(fresh: None) -> None:
    blocks = [Block() for _ in range(3)]
    network = nn.Sequential(*blocks)
    inputs = [torch.randn(2, *size, 8) for size in ((4, 4), (4, 7))]  # a square first
    expected = [network(x) for x in inputs]
    inside: list[bool] = []
    blocks[1].register_forward_hook(lambda *_: inside.append(torch.compiler.is_compiling()))
    compile_in_place([*blocks, blocks[0]], "eager")
    for x, values in zip(inputs * 2, expected * 2, strict=True):
        assert_close(network(x), values)
    assert inside == [False] * 4
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("name", ["sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@torch.no_grad()
def test_a_compiled_block_is_one_graph(name: str, tmp_path: Path, fresh: None) -> None:
    """With a break in it, each part would be compiled and started alone."""
    model = families.pretrained(name, families.save(name, tmp_path / "m"))
    networks = model.networks(("student",))
    text = model.backbone_class.random_conditioning(model.network_config, 2, 12)
    x_t = torch.randn(2, model.channels, *model.size)
    expected = networks.x0("student", x_t, torch.tensor([0.9, 0.3]), text)[0]
    compile_blocks(networks, "eager")
    assert_close(networks.x0("student", x_t, torch.tensor([0.9, 0.3]), text)[0], expected, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]


@pytest.mark.slow
def test_a_compiled_training_on_a_base_with_adapters_moves_as_a_plain_one(tmp_path: Path, fresh: None) -> None:
    """By the real compiler."""
    folder = families.save("sd3", tmp_path / "m")
    style = tmp_path / "style"
    style.mkdir()
    model = families.pretrained("sd3", folder)
    write_layouts(style, families.random_state(model), "base", model.backbone_class.subfolder)

    def trained(name: str, adapters: str, compiled: str) -> dict[str, Tensor]:
        more = {"loss": "mmd", "callbacks": "adapter", "model__adapters": adapters, "task__compiled": compiled}
        train.run(tiny.composed(tiny.overrides(folder, tmp_path / name, **more)))
        return load(tmp_path / name / "adapter").state

    entry = f"[{{path:{style},weight:0.5}}]"
    without, plain = trained("without", "null", "false"), trained("plain", entry, "false")
    assert not counters["stats"]["unique_graphs"]
    compiled = trained("compiled", entry, "true")
    assert counters["stats"]["unique_graphs"]
    for key, value in plain.items():
        assert_close(compiled[key], value, rtol=1e-3, atol=1e-6)
    assert any((without[key] - value).abs().max() > 1e-4 for key, value in plain.items())


def test_a_task_compiles_its_networks_where_there_is_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = families.pretrained("sd3", families.save("sd3", tmp_path / "m"))
    schedule, terms = ScaleSchedule([1.0, 0.6], families.SIZES["sd3"][-2:]), {"mmd": MMD(blocks=(0,))}
    given: list[Networks] = []
    monkeypatch.setattr(distiller, "compile_blocks", given.append)
    tasks = [Distiller(model, schedule, terms, compiled=compiled) for compiled in (True, False)]
    for task in tasks:
        task.configure_model()
    assert given == [tasks[0].networks]
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(
        UserError, match=r"^task\.compiled=true needs a C compiler, and this machine has no .*leave it out$"
    ):
        Distiller(model, schedule, terms, compiled=True)
    Distiller(model, schedule, terms)


def test_pretraining_compiles_the_blocks_that_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.pretrained("sd3", families.save("sd3", tmp_path / "m"))
    task = FlowMatching(model, [4], out=str(tmp_path / "m"), compile=True)
    task.configure_model()
    monkeypatch.setattr(FlowMatching, "trainer", SimpleNamespace(is_global_zero=False))
    given: list[Any] = []
    monkeypatch.setattr(flow_matching, "compile_in_place", given.extend)
    task.on_fit_start()
    assert given == list(task.backbone.repeated_blocks) and given
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"^task\.compile=true needs a C compiler"):
        FlowMatching(model, [4], out=str(tmp_path / "m"), compile=True)
