"""Blocks that are compiled give the values and gradients of others, and are traced once for each role and mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters
from torch.testing import assert_close

from swd.losses import MMD
from swd.modules import compiling, distiller
from swd.modules.compiling import GRAPHS, compile_blocks
from swd.modules.distiller import Distiller
from swd.modules.networks import Networks
from swd.schedule import ScaleSchedule
from swd.types import Conditioning, Role, UserError

SIZES = ((4, 4), (6, 8))


@pytest.fixture
def fresh() -> Iterator[None]:
    """Dynamo without graphs, and with its settings as they were."""
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
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
