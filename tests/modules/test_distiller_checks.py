"""What a distillation refuses before its first iteration, and what its updates hand on about all processes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import families
import pytest
import torch
from layouts import Case, Encoded, a_task, a_trainer
from torch import Tensor

from swd.losses.update import generator_gradient
from swd.modules import distiller
from swd.modules.distiller import Distiller
from swd.modules.inputs import InputBuilder
from swd.types import SeededDraws, UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return families.settings("sd3", families.save("sd3", tmp_path_factory.mktemp("sd3") / "pipeline"))


def says(message: str) -> Any:
    """A UserError with exactly this message."""
    return pytest.raises(UserError, match=f"^{re.escape(message)}$")


def test_data_that_were_shrunk_in_another_way_are_refused(model: dict[str, Any]) -> None:
    changed = {"downscale": "cascade", "frames": "nearest"}
    task = a_task(Case("cascade", model=model, task=changed))
    with says(
        "task.downscale=cascade and task.frames=nearest is of pictures, and these data are a cache, made directly from "
        "full size and with blended frames; leave it out, or train on the pictures themselves"
    ):
        task.check_data(SimpleNamespace(is_cache=True))
    for fine in (SimpleNamespace(is_cache=False), SimpleNamespace()):
        task.check_data(fine)
    a_task(Case("plain", model=model)).check_data(SimpleNamespace(is_cache=True))


def test_a_batch_that_does_not_divide_is_refused_as_training_starts(model: dict[str, Any], tmp_path: Path) -> None:
    case = Case("parts", model=model, iterations=1, task={"accumulate": 3}, terms={"mmd": {"distance": "squared"}})
    task = a_task(case)
    data = Encoded(task)
    vars(data)["batch_size"] = 4
    with says("task.accumulate=3 does not divide 4 samples (data.batch_size=4); use a divisor"):
        a_trainer(case, tmp_path).fit(task, datamodule=data)


def test_an_update_says_how_many_share_its_batch_and_averages_over_all(
    model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = a_task(Case("shared", model=model, loss="mmd", task={"accumulate": 2}))
    task.configure_model()
    builder = InputBuilder(task.model, task.schedule)
    builder.cache = data = Encoded(task)
    inputs = builder.build(data[0], 1, SeededDraws(3, 1, 0))
    reduced: list[str] = []

    def reduce(value: Tensor, reduce_op: str) -> Tensor:
        reduced.append(reduce_op)
        return value

    trainer = SimpleNamespace(world_size=3, strategy=SimpleNamespace(reduce=reduce))
    monkeypatch.setattr(Distiller, "trainer", trainer)
    shares: list[int] = []

    def record(terms: Any, step: Any, checks: Any) -> Any:
        shares.append(step.shares)
        return generator_gradient(terms, step, checks)

    monkeypatch.setattr(distiller, "generator_gradient", record)
    part = task._generator_part(inputs)
    assert shares == [6], "three processes, each of which works in two parts"
    monkeypatch.setattr(task, "_descend", lambda *_: (part, torch.tensor(1.0)))
    task._generator_update(inputs)
    assert reduced and set(reduced) == {"mean"}
    # A process with one sample has others to compare it with.
    alone = replace(part, x0_hat=part.x0_hat[:1])
    monkeypatch.setattr(task, "_descend", lambda *_: (alone, torch.tensor(1.0)))
    single = replace(inputs, target=inputs.target[:1])
    assert "monitor/x0_spread" in task._generator_update(single)


def test_a_checkpoint_of_another_seed_does_not_fit(model: dict[str, Any]) -> None:
    task = a_task(Case("seeded", model=model, task={"seed": 5}))
    assert task.misfit({"swd": {"seed": 4}}) == "its draws are of seed 4 rather than 5"
    assert task.misfit(cast(Any, {"swd": {"seed": 5}, "global_step": "1"})) == "its global_step is no number"
    assert task.misfit(cast(Any, {"global_step": "1"})) == "its global_step is no number", "of a version without seeds"


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_checkpoint_is_as_large_as_its_weights_moments_and_average(model: dict[str, Any], ema: float | None) -> None:
    task = a_task(Case("sized", model=model, loss="dmd", task={"ema": ema}))
    expected = task.state_bytes()
    task.configure_model()
    student, fake = (
        sum(4 * weight.numel() for weight in task.networks.role_parameters(role)) for role in ("student", "fake")
    )
    assert expected == 3 * (student + fake) + (student if ema else 0)


def test_a_loss_of_the_whole_batch_is_taken_in_one_part(model: dict[str, Any]) -> None:
    terms = {"mmd": {"reduce": "batch"}}
    a_task(Case("set", model=model, terms=terms)).check_processes(1)
    with pytest.raises(UserError, match="cannot be done in 2 parts"):
        a_task(Case("set", model=model, terms=terms, task={"accumulate": 2})).check_processes(1)
