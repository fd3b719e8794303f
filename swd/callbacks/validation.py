"""Losses on data that are held out, by size and level, with fixed draws."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from swd.callbacks.measurement import Measurement
from swd.callbacks.ranks import Share, attempt, gather
from swd.callbacks.training_metrics import size_name
from swd.data.held_out import HeldOut, held_out_of
from swd.diffusion import IndexRange
from swd.io import limits
from swd.losses.base import Predictors
from swd.losses.update import student_input
from swd.metrics.bootstrap import Resamples, interval, mean_of, ratio_parts
from swd.modules.distiller import Distiller
from swd.modules.inputs import Inputs
from swd.modules.run_values import log_values
from swd.types import Conditioning, Draws, Role, SeededDraws, UserError


class Validation(Measurement):
    """Says how a training is going where its losses cannot: on data that are held out, always with the same draws.

    Logged for each step of the schedule, under its size in pixels and its number, each with the ends `_low` and `_high`
    of a 95% interval over the samples:

    * `monitor/x0_error/SIZE_stepN`: squared error of the student's `x0_hat` over that of the teacher, without guidance,
      on the same noised input. A student that predicts the mean of what is possible has 1, one that draws from it has
      2 (for Gaussian data exactly). Near 1 is blur, far above 2 and rising is collapse. It is no target to minimise.
    * `monitor/fake_fresh/SIZE_stepN`: error of the fake network on the student's present predictions, noised.
    * `monitor/fake_before/SIZE_stepN`: the same on the student's predictions of `every` iterations ago, with the same
      noise; and `monitor/fake_lag/SIZE_stepN`: the first less the second, paired. Above 0 the fake network still
      knows the former student better than the present one.

    Samples are `data.validation`'s. The teacher's errors are computed once. Every process takes its share. Where there
    is a fake network, checkpoints hold the student's predictions of the last measurement, `pictures` latents of each
    step, so that a run which goes on measures what a straight one would.

    Args:
        every: iterations between measurements; there is one at the start, and one at the end.
        pictures: how many samples.
        batch_size: samples that one process takes at once.
        seed: of the draws.
    """

    def __init__(self, every: int = 100, pictures: int = 64, batch_size: int = 16, seed: int = 0) -> None:
        for key, value, least in (("every", every, 1), ("pictures", pictures, 2), ("batch_size", batch_size, 1)):
            limits.number(f"callbacks.validation.{key}", value, least=least)
        self.every = every
        self.pictures = pictures
        self.batch_size = batch_size
        self.seed = seed
        self._teacher: dict[int, Tensor] = {}
        self._before: dict[int, Tensor] = {}  # predictions on all samples, by step
        self._measured: int | None = None  # the iteration that they are of

    def state_dict(self) -> dict[str, Any]:
        return {"before": dict(self._before), "measured": self._measured, "draws": [self.pictures, self.seed]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["draws"] == [self.pictures, self.seed]:  # else they are of other samples or noise
            self._before = dict(state_dict["before"])
            self._measured = state_dict["measured"]

    def check_fit(self, task: LightningModule, data: Any) -> None:
        """Refuse, before any model is loaded, what could not be measured.

        Raises:
            UserError: for another task than a distillation, or too few samples that are held out.
        """
        if not isinstance(task, Distiller):
            raise UserError("callbacks.validation measures a distillation; leave it out: ~callbacks.validation")
        held = held_out_of(data)
        if held is None:
            raise UserError(
                "callbacks.validation measures samples that are never trained on, and there are none; give a share, "
                "e.g. data.validation=0.01, or data of their own"
            )
        held.check(self.pictures, "callbacks.validation.pictures")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that goes on measures here what it had not when its checkpoint was written.
        due = trainer.global_step % self.every == 0 and self._measured != trainer.global_step
        if self._measured is None or due:
            self.measure(trainer, pl_module)

    def measure(self, trainer: Trainer, task: LightningModule) -> dict[str, float]:
        """Measure on all processes, and log the values; empty if it failed."""
        if not isinstance(task, Distiller):
            return {}
        held: HeldOut = cast(Any, trainer).datamodule.held_out()
        row: dict[str, float] = {}
        fresh: dict[int, Tensor] = {}
        for step in task.steps:
            size = task.schedule.sizes[step]
            what = f"validation of iteration {trainer.global_step}"
            found = attempt(trainer, partial(self._step, trainer, task, held, step), what)
            if found is None:
                return {}
            if "fake" in task.roles:
                fresh[step] = gather(trainer, found.pop("x0_hat"), self.pictures)
            errors = {name: gather(trainer, values, self.pictures) for name, values in found.items()}
            self._teacher[step] = found["teacher"]
            suffix = f"{size_name(task.model.pixel_size(size))}_step{step + 1}"
            row |= {f"monitor/{name}/{suffix}{end}": value for (name, end), value in summary(errors).items()}
        self._before = fresh
        self._measured = trainer.global_step
        log_values(trainer, row)
        return row

    @torch.no_grad()
    def _step(self, trainer: Trainer, task: Distiller, held: HeldOut, step: int) -> dict[str, Tensor]:
        """Errors `[n]` of this process's samples at one step, on the CPU, by name.

        Where there is a fake network, also the student's predictions `x0_hat` `[n, C, *size]`.
        """
        parts: dict[str, list[Tensor]] = {}
        for places, inputs in self._inputs(trainer, task, held, step):
            x0_hat, errors = student_errors(task.networks, inputs, with_teacher=step not in self._teacher)
            if "fake" in task.roles:
                parts.setdefault("x0_hat", []).append(x0_hat.cpu())
                fake = partial(fake_errors, task.networks, conditioning=inputs.conditioning, draws=inputs.draws)
                errors["fake_fresh"] = fake(x0_hat)
                if step in self._before:
                    errors["fake_before"] = fake(self._before[step][places].to(task.device))
            for name, values in errors.items():
                parts.setdefault(name, []).append(values.double().cpu())
        found = {name: torch.cat(values) for name, values in parts.items()}
        return {"teacher": self._teacher.get(step, torch.empty(0))} | found

    def _inputs(
        self, trainer: Trainer, task: Distiller, held: HeldOut, step: int
    ) -> Iterator[tuple[list[int], Inputs]]:
        """This process's samples in batches: their places, and the inputs at one step, with fixed draws."""
        for places in Share.of(trainer, self.pictures).batches(self.batch_size):
            batch: Any = held.batch(places, step).to(task.device)
            draws = SeededDraws(self.seed, iteration=step, first=places[0])
            yield places, task.inputs.build(batch, step, draws)


def student_errors(networks: Predictors, inputs: Inputs, with_teacher: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's prediction `[B, C, *size]`, and mean squared errors `[B]` of it and the teacher's by role."""
    noised = student_input(networks.process, inputs.interval, inputs.source, inputs.draws)
    roles: tuple[Role, ...] = ("student", "teacher") if with_teacher else ("student",)
    x0 = {role: networks.x0(role, noised.x_t, noised.sigma, inputs.conditioning)[0] for role in roles}
    return x0["student"], {role: squared(each - inputs.target) for role, each in x0.items()}


def fake_errors(networks: Predictors, x0_hat: Tensor, conditioning: Conditioning, draws: Draws) -> Tensor:
    """Mean squared errors `[B]` of the fake network on noised predictions of the student, which DMD's critic trains."""
    process = networks.process
    indices: IndexRange = process.ranges.whole
    sigma = process.level(draws.index("validation/index", *indices, len(x0_hat))).to(x0_hat.device)
    x_t = process.add_noise(x0_hat, draws.noise("validation/noise", x0_hat), sigma)
    return squared(networks.x0("fake", x_t, sigma, conditioning)[0] - x0_hat)


def squared(difference: Tensor) -> Tensor:
    """Mean square of each row, `[B]`."""
    return difference.float().square().flatten(1).mean(1)


def summary(errors: dict[str, Tensor]) -> dict[tuple[str, str], float]:
    """Values by name and ending: "" for the value, "_low" and "_high" for the ends of its 95% interval.

    Args:
        errors: `[N]` each, of the student and the teacher, and of the fake network where there is one.
    """
    parts = {"x0_error": ratio_parts(errors["student"], errors["teacher"])}
    parts |= {name: values for name, values in errors.items() if name.startswith("fake")}
    if "fake_before" in errors:
        parts["fake_lag"] = errors["fake_fresh"] - errors["fake_before"]
    resamples = Resamples(range(len(errors["student"])))
    found: dict[tuple[str, str], float] = {}
    for name, values in parts.items():
        ends = interval(mean_of(values), resamples)
        found |= {(name, ""): ends.value, (name, "_low"): ends.low, (name, "_high"): ends.high}
    return found
