"""Activation checkpointing chosen by size: the same gradients, and recomputation only where it is needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import families
import pytest
import torch
from skeletons import options
from tiny import composed, overrides

from swd.callbacks import memory_budget
from swd.callbacks.memory_budget import MemoryBudget, permanent_bytes
from swd.commands.train import fit
from swd.losses import MMD
from swd.modules.distiller import Distiller
from swd.modules.iteration_cost import IterationCost, iteration_costs
from swd.modules.pretrained import Pretrained
from swd.schedule import ScaleSchedule
from swd.types import UserError

CACHE = SimpleNamespace(is_cache=True, batch_size=8)
TRAINER = cast(Any, SimpleNamespace(datamodule=CACHE, world_size=1, strategy=None))


COSTS: dict[tuple[Any, ...], list[IterationCost]] = {}
"""Costs of iterations by what is trained: several tests ask for the same ones, and counting takes seconds."""


def counted(model: Pretrained, schedule: ScaleSchedule, terms: Any, *numbers: Any) -> list[IterationCost]:
    """`iteration_costs`, counted once."""
    key = (model.path, model.tuning, schedule.sizes, schedule.sigmas, tuple(terms), *numbers)
    if key not in COSTS:
        COSTS[key] = iteration_costs(model, schedule, terms, *numbers)
    return COSTS[key]


@pytest.fixture(autouse=True)
def _counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "iteration_costs", counted)


def a_task(**more: Any) -> Distiller:
    model = Pretrained(**options("shapes"))
    schedule = ScaleSchedule([1.0, 0.9, 0.6], [6, 12, 16])
    return Distiller(model, schedule, {"mmd": MMD(blocks=(1,))}, **{"checkpointing": True} | more)


def test_sizes_that_do_not_fit_are_recomputed(capsys: pytest.CaptureFixture[str]) -> None:
    task = a_task(accumulate=2)
    terms = dict(task.terms.items())
    peaks = [4 * cost.peak for cost in counted(task.model, task.schedule, terms, 0, False)]
    permanent = permanent_bytes(TRAINER, task, CACHE)
    task.networks = cast(Any, SimpleNamespace(recompute=None))
    # Just what the first two sizes take, with a tenth of the memory left free.
    budget = MemoryBudget((permanent + peaks[1] + 1) / 0.9e9)
    budget.on_fit_start(TRAINER, task)
    assert budget.recomputed == [False, False, True] and peaks[1] < peaks[2]
    assert "recomputed at 16x16: 4 samples at a time" in capsys.readouterr().err
    for step, expected in enumerate([False, False, True, False]):
        budget.on_train_batch_start(TRAINER, cast(Any, SimpleNamespace(networks=task.networks, global_step=step)))
        assert task.networks.recompute is expected

    MemoryBudget(1).on_fit_start(TRAINER, task)
    assert "at no size" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=r"GB more than trainer\.memory_gb=0\.001 even where"):
        MemoryBudget(0.001).on_fit_start(TRAINER, task)
    assert "at every size" in capsys.readouterr().err


def test_one_of_several_experts_counts_the_steps_that_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    task = a_task()
    terms = dict(task.terms.items())
    peaks = [8 * cost.peak for cost in counted(task.model, task.schedule, terms, 0, False)]
    task.steps = (1, 2)
    task.networks = cast(Any, SimpleNamespace(recompute=None))
    budget = MemoryBudget((permanent_bytes(TRAINER, task, CACHE) + peaks[1] + 1) / 0.9e9)
    budget.on_fit_start(TRAINER, task)
    assert "recomputed at 16x16: 8 samples" in capsys.readouterr().err
    found = []
    for step in range(3):
        budget.on_train_batch_start(TRAINER, cast(Any, SimpleNamespace(networks=task.networks, global_step=step)))
        found.append(task.networks.recompute)
    assert found == [False, True, False]


def test_encoders_count_where_pictures_are_encoded() -> None:
    task = a_task()
    with_cache, without = (permanent_bytes(TRAINER, task, data) for data in (CACHE, None))
    encoders = task.model.encoders()
    expected = sum(p.numel() * p.element_size() for p in encoders.parameters())
    assert without - with_cache in (expected, expected // 2)  # bf16 where the machine has none


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"trainer\.memory_gb=0; give the GB"):
        MemoryBudget(0)
    with pytest.raises(UserError, match=r"trainer\.memory_gb=nan; give the GB"):
        MemoryBudget(float("nan"))
    with pytest.raises(UserError, match=r"task\.checkpointing=false recomputes none; leave one of them out"):
        MemoryBudget(80).check_fit(a_task(checkpointing=False), CACHE)
    MemoryBudget(80).check_fit(a_task(), CACHE)


def test_a_training_is_given_it(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"loss": "mmd", "task__checkpointing": "true", "trainer__memory_gb": 5}
    task, trainer = fit(composed(overrides(tiny_model, tmp_path / "run", **given)))
    assert "recomputed at no size: 4 samples at a time, trainer.memory_gb=5" in capsys.readouterr().err
    assert trainer.global_step == 2 and isinstance(task, Distiller) and not task.networks.recompute


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_gradients_are_the_same_and_blocks_run_again_only_where_they_must(tuning: str, tmp_path: Path) -> None:
    model = families.pretrained("sd35_medium", families.save("sd35_medium", tmp_path / "m"), tuning=tuning)
    networks = model.networks(("student",))
    networks.enable_checkpointing()
    text = model.backbone_class.random_conditioning(model.network_config, 2, 12)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    runs: list[int] = []
    block = networks.backbone_of("student").block_list[0]
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    found = []
    for recompute in (True, False, True):
        runs.clear()
        networks.recompute = recompute
        networks.zero_grad()
        networks.x0("student", x, torch.tensor([0.9, 0.3]), text)[0].square().mean().backward()
        assert len(runs) == 1 + recompute
        found.append([p.grad.clone() for p in networks.role_parameters("student") if p.grad is not None])
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], each, strict=True))
