"""What holds before the first update of a run that goes on: everything that it depends on is as in the run that was not
interrupted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from processes import train_on_two
from tiny import composed, overrides
from torch import Tensor

from swd.callbacks.checkpoint import Checkpoint, written
from swd.commands.train import fit
from swd.modules.checkpoint_files import read_checkpoint, tensors
from swd.modules.distiller import Distiller
from swd.modules.inputs import Inputs

OPTIONS = {"loss": "swd", "task__ema": 0.9, "task__lr": 1e-4, "trainer__max_steps": 4}
CALLBACKS = ("callbacks=[checkpoint,sentinel]", "callbacks.checkpoint.every=100", "callbacks.checkpoint.keep=9")


@dataclass
class State(Callback):
    """What an iteration begins with, taken when its first update has its batch."""

    iteration: int
    values: dict[str, Any] = field(default_factory=dict)

    def on_train_start(self, trainer: Any, pl_module: Distiller) -> None:
        update = pl_module._critic_update

        def noted(inputs: Inputs) -> Any:
            if pl_module.global_step == self.iteration and not self.values:
                self.values = {"inputs": copied(vars(inputs) | {"draws": vars(inputs.draws)}), **state(trainer)}
            return update(inputs)

        pl_module._critic_update = noted  # type: ignore[method-assign]

    @property
    def state_key(self) -> str:
        return "state"

    def __hash__(self) -> int:
        return id(self)


def copied(value: Any) -> Any:
    """Plain values and copies of tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [copied(inner) for inner in value]
    return copied(vars(value)) if hasattr(value, "__dataclass_fields__") else value


def state(trainer: Any) -> dict[str, Any]:
    task: Distiller = trainer.lightning_module
    progress = trainer.fit_loop.epoch_loop.batch_progress
    counters = (task.global_step, task.updates, trainer.current_epoch, vars(progress.total), vars(progress.current))
    return {
        "parameters": copied(task.kept_state()),
        "optimizers": [copied(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "counters": counters,
        "bad steps": copied(task.bad_steps.state_dict()),
        "callbacks": {c.state_key: copied(c.state_dict()) for c in trainer.callbacks if c.state_dict()},
    }


def assert_same(a: Any, b: Any, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{path}: {text}")
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{path}/{i}")
    else:
        assert a == b, path


class BetweenIterations(Callback):
    """Writes a checkpoint when the third iteration begins, before anything of it is done."""

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            next(c for c in trainer.callbacks if isinstance(c, Checkpoint)).save(trainer)


@pytest.fixture(scope="module")
def straight(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of four iterations with a checkpoint of the second one, and what the third began with."""
    torch.set_num_threads(1)  # as for every test: sums of several threads are rounded in another way
    folder = tmp_path_factory.mktemp("straight") / "run"
    spy = State(2)
    fit(composed([*overrides(tiny_model, folder, **OPTIONS), *CALLBACKS]), BetweenIterations(), spy)
    return folder, spy.values


def test_a_resumed_run_begins_with_what_the_other_one_had(
    tiny_model: Path, tmp_path: Path, straight: tuple[Path, dict[str, Any]]
) -> None:
    folder, expected = straight
    spy = State(2)
    resume = f"resume={folder / 'checkpoints' / 'iteration-2.ckpt'}"
    fit(composed([*overrides(tiny_model, tmp_path / "rest", **OPTIONS), *CALLBACKS, resume]), spy)
    for part, value in expected.items():
        assert_same(spy.values[part], value, part)
    assert expected["counters"][:2] == (2, 6) and any(True for _ in tensors(expected["optimizers"]))
    ours, theirs = (read_checkpoint(run / "checkpoints" / "iteration-4.ckpt") for run in (tmp_path / "rest", folder))
    assert_same(ours, theirs)
    assert [file.name for file in written(folder)] == ["iteration-2.ckpt", "iteration-4.ckpt"]


def test_two_processes_go_on_with_the_data_and_draws_of_one_and_say_so(
    tiny_model: Path, tmp_path: Path, straight: tuple[Path, dict[str, Any]]
) -> None:
    folder = straight[0]
    arguments = [*overrides(tiny_model, tmp_path / "two", **OPTIONS, trainer="ddp_cpu"), *CALLBACKS]
    said = train_on_two([*arguments, f"resume={folder / 'checkpoints' / 'iteration-2.ckpt'}"], tmp_path)
    (line,) = (line for line in said.splitlines() if "going on" in line)
    assert "processes 1 x cpu, one device, now 2 x cpu, a whole copy each" in line
    assert "data, their order and all draws stay the same" in line
    ours, theirs = (read_checkpoint(run / "checkpoints" / "iteration-4.ckpt") for run in (tmp_path / "two", folder))
    assert ours["made_by"]["processes"].startswith("2 x ") and theirs["made_by"]["processes"].startswith("1 x ")
    for key, value in theirs["state_dict"].items():
        torch.testing.assert_close(
            ours["state_dict"][key], value, rtol=0, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )
