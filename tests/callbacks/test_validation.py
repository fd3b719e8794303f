"""Losses on data that are held out: what they are for networks whose errors are known in closed form."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from swd.callbacks.validation import Validation, fake_errors, student_errors, summary
from swd.commands import train
from swd.diffusion import RectifiedFlow
from swd.metrics.bootstrap import ratio_parts
from swd.modules.distiller import Distiller
from swd.modules.inputs import Inputs
from swd.schedule import Interval
from swd.types import Conditioning, Role, SeededDraws, UserError

SIZE = (8, 8)
TEXT = Conditioning(torch.zeros(1, 1, 1))


class Gaussian:
    """Networks for data of independent standard normal numbers.

    The teacher predicts the posterior mean of `x0`, which has a closed form. The student adds `spread` posterior
    standard deviations of noise to it: 0 is the mean itself, 1 a draw. The fake network predicts the posterior mean for
    data of standard deviation `known`.
    """

    process = RectifiedFlow()

    def __init__(self, spread: float = 0.0, known: float = 1.0) -> None:
        self.spread = spread
        self.known = known
        self.generator = torch.Generator().manual_seed(3)

    def x0(self, role: Role, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> tuple[Tensor, list[Tensor]]:
        level = sigma.view(-1, 1, 1, 1)
        variance = self.known**2 if role == "fake" else 1.0
        total = (1 - level) ** 2 * variance + level**2
        mean = (1 - level) * variance / total * x_t
        if role != "student":
            return mean, []
        noise = torch.randn(x_t.shape, generator=self.generator)
        return mean + self.spread * level / total.sqrt() * noise, []


def inputs(count: int, sigma: float) -> Inputs:
    target = torch.randn(count, 4, *SIZE, generator=torch.Generator().manual_seed(0))
    return Inputs(Interval(0, sigma, SIZE, SIZE), target, target, TEXT, TEXT, SeededDraws(1))


@pytest.mark.parametrize("sigma", [0.4, 0.8, 1.0])
@pytest.mark.parametrize(("spread", "expected"), [(0.0, 1.0), (1.0, 2.0), (2.0, 5.0)])
def test_the_posterior_mean_has_1_and_a_posterior_draw_2(sigma: float, spread: float, expected: float) -> None:
    networks: object = Gaussian(spread)
    _, errors = student_errors(networks, inputs(500, sigma), with_teacher=True)  # type: ignore[arg-type]
    assert errors["teacher"].mean() == pytest.approx(sigma**2 / ((1 - sigma) ** 2 + sigma**2), rel=0.02)
    found = summary(errors)
    assert found["x0_error", ""] == pytest.approx(expected, rel=0.02)
    assert found["x0_error", "_low"] <= found["x0_error", ""] <= found["x0_error", "_high"]
    assert found["x0_error", "_high"] - found["x0_error", "_low"] < 0.04 * expected


def test_a_fake_network_that_knows_the_former_student_lags() -> None:
    # The former student's pictures have standard deviation 0.5, the present one's 1.5; the fake knows the former.
    networks: object = Gaussian(known=0.5)
    unit = torch.randn(400, 4, *SIZE, generator=torch.Generator().manual_seed(0))
    error = {
        std: fake_errors(networks, std * unit, TEXT, SeededDraws(0)).double()  # type: ignore[arg-type]
        for std in (0.5, 1.5)
    }
    everywhere = torch.ones(400, dtype=torch.double)
    found = summary({"student": everywhere, "teacher": everywhere, "fake_before": error[0.5], "fake_fresh": error[1.5]})
    assert found["fake_lag", ""] == pytest.approx(float((error[1.5] - error[0.5]).mean()))
    assert found["fake_lag", "_low"] > 0
    # One that knows the present student has a lower error there than one that knows the former.
    aware: object = Gaussian(known=1.5)
    assert fake_errors(aware, 1.5 * unit, TEXT, SeededDraws(0)).mean() < error[1.5].mean()  # type: ignore[arg-type]


def test_the_interval_of_a_ratio_covers_it() -> None:
    # Of 200 sets of samples with a known ratio, about 95% of the intervals hold it.
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        below = torch.rand(60, generator=generator, dtype=torch.double) + 0.5
        above = 1.5 * below + 0.3 * torch.randn(60, generator=generator, dtype=torch.double)
        assert ratio_parts(above, below).mean() == pytest.approx(float(above.sum() / below.sum()))
        found = summary({"student": above, "teacher": below})
        covered += found["x0_error", "_low"] <= 1.5 <= found["x0_error", "_high"]
    assert 180 <= covered <= 198


def test_an_untrained_student_has_1_and_values_are_logged(tiny_model: Path, tmp_path: Path) -> None:
    options = ["callbacks=[checkpoint,validation]", "callbacks.validation.every=1", "callbacks.validation.pictures=6"]
    options += ["callbacks.validation.batch_size=4", "data.validation.resolution=64", "logger=csv"]
    cfg = tiny.composed([*tiny.overrides(tiny_model, tmp_path, loss="dmd", task__lr=1e-2), *options])
    task, trainer = train.fit(cfg)
    assert isinstance(task, Distiller)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["monitor/x0_error/64_step3"]]
    assert [int(row["step"]) for row in rows] == [0, 1, 2]
    names = [name for name in rows[0] if name.startswith("monitor/x0_error/") and name[-1].isdigit()]
    assert sorted(names) == [f"monitor/x0_error/{side}_step{k}" for side, k in ((32, 1), (48, 2), (64, 3))]
    assert all(float(rows[0][name]) == pytest.approx(1, abs=1e-5) for name in names)  # LoRA begins at zero
    assert all(float(rows[2][name]) != pytest.approx(1, abs=1e-4) for name in names)
    assert not rows[0]["monitor/fake_lag/64_step3"] and float(rows[1]["monitor/fake_lag/64_step3"]) != 0
    assert float(trainer.callback_metrics["monitor/x0_error/64_step3"]) == float(rows[2]["monitor/x0_error/64_step3"])
    # The same numbers again from the same weights; and measuring changed no weight.
    again = next(each for each in trainer.callbacks if isinstance(each, Validation))  # type: ignore[attr-defined]
    expected = float(rows[2]["monitor/x0_error/64_step3"])
    assert again.measure(trainer, task)["monitor/x0_error/64_step3"] == pytest.approx(expected, rel=1e-6)
    plain, _ = train.fit(tiny.composed(tiny.overrides(tiny_model, tmp_path / "b", loss="dmd", task__lr=1e-2)))
    for key, value in plain.networks.adapter_state("student").items():  # type: ignore[union-attr,operator]
        assert torch.equal(value, task.networks.adapter_state("student")[key]), key


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["data.validation=null"], ["callbacks.validation", "data.validation"]),
        (["data.validation=0.5"], ["data.validation=0.5", "endless"]),
        (["data.validation.length=9"], ["callbacks.validation.pictures=64", "9 samples"]),
        (["callbacks.validation.every=0"], ["callbacks.validation.every=0"]),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_loads(
    tiny_model: Path, tmp_path: Path, options: Sequence[str], words: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Distiller, "configure_model", lambda self: pytest.fail("a model was loaded"))
    cfg = tiny.composed([*tiny.overrides(tiny_model, tmp_path, callbacks="[checkpoint,validation]"), *options])
    with pytest.raises(UserError) as raised:
        train.fit(cfg)
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value)
