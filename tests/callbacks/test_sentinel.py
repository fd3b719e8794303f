"""Each fault is noticed within the iterations that the sentinel states; healthy trainings raise nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from processes import train_on_two
from tiny import composed, overrides
from torch import Tensor

from swd.callbacks import Sentinel
from swd.callbacks.sentinel import COLLAPSED, VISITS, WINDOW
from swd.commands.train import fit
from swd.losses import GeneratorStep, LossTerm
from swd.losses.base import Metrics
from swd.modules.checkpoint_files import read_checkpoint
from swd.modules.distiller import Distiller
from swd.modules.inputs import InputBuilder, Inputs
from swd.types import UserError

WATCHED = ["callbacks=[checkpoint,sentinel]", "logger=none", "data.batch_size=2", "task.critic_updates=1"]
STEPS = 3


def run(arguments: list[str], *more: Callback) -> tuple[Distiller, Trainer, list[str]]:
    """Train; also the sentences of the sentinel."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task, trainer = fit(composed(arguments), *more)
    assert isinstance(task, Distiller)
    said = [str(each.message) for each in caught if each.filename.endswith("sentinel.py")]
    return task, trainer, said


def tiny(model: Path, folder: Path, iterations: int, *arguments: str, **more: Any) -> list[str]:
    return [*overrides(model, folder, trainer__max_steps=iterations, **more), *WATCHED, *arguments]


def shrink(monkeypatch: pytest.MonkeyPatch, factor: Callable[[int], float]) -> None:
    """Draw the student's predictions towards the mean over the batch, by a factor of the iteration from 0."""
    original = Distiller._student_x0

    def collapsed(self: Distiller, inputs: Inputs) -> Tensor:
        x0_hat = original(self, inputs)
        mean = x0_hat.mean(0, keepdim=True)
        return mean + (x0_hat - mean) * factor(inputs.draws.iteration)

    monkeypatch.setattr(Distiller, "_student_x0", collapsed)


@pytest.mark.parametrize(("loss", "seed"), [("swd", 11), ("mmd", 12), ("dmd_mmd", 13)])
def test_healthy_trainings_raise_nothing(tiny_model: Path, tmp_path: Path, loss: str, seed: int) -> None:
    *_, said = run(tiny(tiny_model, tmp_path, 2 * VISITS * STEPS, f"seed={seed}", loss=loss))
    assert said == []


def test_a_frozen_critic_is_noticed_within_ten_iterations(tiny_model: Path, tmp_path: Path) -> None:
    """AdamW moves weights by nothing at this rate, which is the smallest that a configuration may have."""
    *_, said = run(tiny(tiny_model, tmp_path, WINDOW, "task.critic_lr=1e-30", loss="dmd_mmd"))
    assert len(said) == 1 and said[0].startswith("iteration 10: the critic's weights change by ")
    assert "try task.critic_lr=0.0002" in said[0]


def test_parameters_that_do_not_change_are_noticed_whatever_the_rate(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Distiller._step
    monkeypatch.setattr(Distiller, "_step", lambda self, role: step(self, role) if role == "student" else None)
    *_, said = run(tiny(tiny_model, tmp_path, WINDOW, loss="dmd"))
    assert len(said) == 1 and "the critic's weights change by 0.0e+00 of what" in said[0]


def test_a_hundredfold_learning_rate_is_noticed_within_ten_iterations(tiny_model: Path, tmp_path: Path) -> None:
    *_, said = run(tiny(tiny_model, tmp_path, WINDOW, "task.lr=2e-2", loss="mmd"))
    assert len(said) == 1 and said[0].startswith("iteration 10: the student's weights change by "), said
    assert "try task.lr=0.00" in said[0]


def test_a_batch_with_nan_is_noticed_at_once(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = InputBuilder.latents

    def broken(self: InputBuilder, batch: Any, interval: Any, draws: Any) -> tuple[Tensor, Tensor]:
        source, target = original(self, batch, interval, draws)
        return source, target * (float("nan") if (draws.iteration, draws.update) == (2, 1) else 1)

    monkeypatch.setattr(InputBuilder, "latents", broken)
    task, _, said = run(tiny(tiny_model, tmp_path, 5, loss="dmd_mmd"))
    assert task.bad_steps.total == 1
    assert [text[:48] for text in said] == ["iteration 3: 1 update(s) of this iteration were "]


BEGINS = 18
"""Iterations before the student collapses."""
NOTICED = BEGINS + VISITS * STEPS
"""The iteration by which it is noticed: the schedule has been gone through five times."""


def collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, lambda iteration: 1.0 if iteration < BEGINS else 0.4)


@pytest.fixture(scope="module")
def collapsed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What is said in a training whose student collapses."""
    with pytest.MonkeyPatch.context() as patch:
        collapse(patch)
        *_, said = run(tiny(tiny_model, tmp_path_factory.mktemp("collapsed") / "run", NOTICED, loss="mmd"))
    return said


def test_a_collapsed_student_is_noticed_within_five_rounds_of_the_schedule(collapsed: list[str]) -> None:
    (said,) = collapsed
    assert "collapses to one picture" in said
    assert BEGINS < int(said.split(":")[0].removeprefix("iteration ")) <= NOTICED


def test_it_goes_back_to_a_checkpoint_before_the_fault_with_a_lower_rate(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student collapses as long as its rate is the first one."""
    weights: dict[int, Tensor] = {}

    class Notes(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            flat = [p.detach().flatten() for p in pl_module.networks.role_parameters("student")]
            weights[trainer.global_step] = torch.cat(flat).clone()
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            now["collapses"] = trainer.global_step >= 18 and rate == pytest.approx(2e-4)

    now = {"collapses": False}
    shrink(monkeypatch, lambda iteration: 0.4 if now["collapses"] else 1.0)
    options = ["callbacks.sentinel.rollback=true", "callbacks.checkpoint.every=4", "callbacks.checkpoint.keep=9"]
    _, trainer, said = run(tiny(tiny_model, tmp_path, 40, *options, loss="mmd"), Notes())
    assert [("collapses" in text, "went back" in text) for text in said] == [(True, False), (False, True)]
    noticed = int(said[0].split(":")[0].removeprefix("iteration "))
    good = (noticed - VISITS * STEPS) // 4 * 4
    assert f"iteration-{good}.ckpt, with learning rates times 0.1; iterations go on from {noticed}" in said[1]
    assert torch.equal(weights[noticed], weights[good]) and not torch.equal(weights[noticed], weights[noticed - 1])
    assert trainer.global_step == 40 and trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(2e-5)


@pytest.mark.parametrize(("every", "words"), [(4, "went back 1 times already"), (100, "no checkpoint of iteration ")])
def test_a_run_that_cannot_go_back_ends_in_one_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, words: str
) -> None:
    collapse(monkeypatch)
    options = [
        "callbacks.sentinel.rollback=true",
        "callbacks.sentinel.rollbacks=1",
        f"callbacks.checkpoint.every={every}",
    ]
    options.append("callbacks.checkpoint.keep=20")
    with pytest.raises(UserError, match=f"training stopped at iteration .*collapses to one picture.*{words}") as error:
        run(tiny(tiny_model, tmp_path, 60, *options, loss="mmd"))
    assert "\n" not in str(error.value)


def test_a_resumed_run_notices_what_the_straight_one_does(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collapsed: list[str]
) -> None:
    collapse(monkeypatch)
    run(tiny(tiny_model, tmp_path / "half", BEGINS + 2, loss="mmd"))
    *_, rest = run(tiny(tiny_model, tmp_path / "rest", NOTICED, loss="mmd", resume=tmp_path / "half"))
    assert rest == collapsed and len(rest) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollbacks": 0}, "callbacks.sentinel.rollbacks=0; use a finite number of 1 or more"),
        ({"lower_lr": 0.0}, "callbacks.sentinel.lower_lr=0.0; use a finite number above 0"),
        ({"lower_lr": 1.5}, "callbacks.sentinel.lower_lr=1.5; use a number above 0 and at most 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Sentinel(**options)
    assert str(error.value) == message


COLLAPSES_AT_THE_FIRST_RATE = """
from swd.commands.cli import launch
from swd.modules.distiller import Distiller

original = Distiller._student_x0

def collapsed(self, inputs):
    x0_hat = original(self, inputs)
    rate = self.trainer.optimizers[0].param_groups[0]["lr"]
    return x0_hat * (0.3 if inputs.draws.iteration >= 18 and rate > 1e-4 else 1)

Distiller._student_x0 = collapsed
launch("train")
"""


@pytest.mark.slow
def test_two_processes_go_back_together(tiny_model: Path, tmp_path: Path) -> None:
    arguments = tiny(
        tiny_model, tmp_path / "run", 40, "callbacks.sentinel.rollback=true", loss="mmd", trainer="ddp_cpu"
    )
    errors = train_on_two(
        [*arguments, "callbacks.checkpoint.every=4", "callbacks.checkpoint.keep=9"],
        tmp_path,
        COLLAPSES_AT_THE_FIRST_RATE,
    )
    assert errors.count("went back to the weights and optimizers of") == 1, errors
    stored = read_checkpoint(tmp_path / "run" / "checkpoints" / "iteration-40.ckpt")
    assert stored["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(2e-5)


# On the embedded teacher

SHAPES = ["model=shapes", "name=shapes", "trainer.accelerator=cpu", "model.rank=4", "model.precision=fp32"]
SHAPES += ["schedule.sigmas=[1.0,0.8]", "schedule.sizes=[4,6]", "data.dataset.resolution=64", *WATCHED]
FAULTS = {
    "frozen": (["loss=dmd_mmd", "task.critic_lr=1e-30"], "the critic's weights"),
    "rate": (["loss=swd", "task.lr=2e-2"], "the learning rate is far too high"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_on_shapes(tmp_path: Path, fault: str) -> None:
    arguments, words = FAULTS[fault]
    *_, said = run([*SHAPES, *arguments, f"folder={tmp_path}", f"trainer.max_steps={WINDOW}"])
    assert len(said) == 1 and words in said[0]


class Collapse(LossTerm):
    """Draws all predictions of a batch together, so that training itself makes one picture of them."""

    def generator(self, step: GeneratorStep) -> tuple[Tensor, Metrics]:
        loss = (step.x0_hat - step.x0_hat.mean(0, keepdim=True)).square().mean()
        return 20 * loss, {"collapse": loss.detach()}


class Spreads(Callback):
    """Notes the spread of each iteration's predictions."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.values.append(float(pl_module.last_metrics["monitor/x0_spread"]))


@pytest.mark.slow
def test_a_student_that_is_trained_to_collapse_on_shapes(tmp_path: Path) -> None:
    term = [f"allow=[{__name__}.Collapse]", f"+loss.collapse._target_={__name__}.Collapse", "task.lr=3e-3"]
    spreads = Spreads()
    arguments = [*SHAPES, "loss=mmd", *term, f"folder={tmp_path}", "trainer.max_steps=50"]
    *_, said = run(arguments, spreads)
    assert len(said) == 1 and "collapses to one picture" in said[0]
    noticed = int(said[0].split(":")[0].removeprefix("iteration "))
    visits = spreads.values[(noticed - 1) % 2 : noticed : 2]
    limit = COLLAPSED * median(visits[:VISITS])
    assert sum(value < limit for value in visits) <= VISITS


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "seed"), [("swd", 21), ("mmd", 22), ("dmd_mmd", 23)])
def test_healthy_trainings_on_shapes_raise_nothing(tmp_path: Path, loss: str, seed: int) -> None:
    *_, said = run([*SHAPES, f"loss={loss}", f"seed={seed}", f"folder={tmp_path}", "trainer.max_steps=40"])
    assert said == []
