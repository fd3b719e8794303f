"""Curves of a distillation: what they are on networks whose answers are known, and that they disturb nothing."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from processes import train_on_two
from tiny import SIZES, composed, overrides
from torch import Tensor
from torch.testing import assert_close

from swd.callbacks import Monitor
from swd.callbacks.monitor import Probe, matching_and_guidance
from swd.commands.train import fit
from swd.losses.functional import dmd_direction
from swd.modules.distiller import Distiller
from swd.types import SeededDraws, UserError

PROBED = ["callbacks=[checkpoint,monitor]", "callbacks.monitor.prompts=2", "callbacks.monitor.seeds=2"]


def train(model: Path, folder: Path, *arguments: str, **more: Any) -> tuple[Distiller, Trainer]:
    task, trainer = fit(composed([*overrides(model, folder, **more), *arguments]))
    assert isinstance(task, Distiller)
    return task, trainer


def rows(folder: Path) -> list[dict[str, float]]:
    with open(folder / "metrics.csv") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


CHEAP = {
    "interval",
    "gradient_norm_student",
    "gradient_norm_critic",
    "x0_std",
    "x0_spread",
    "saturation",
    "skipped",
    "memory_host",
}
PROBE = {"similarity", "similarity_first", "critic_error", "teacher_fake_cosine", "direction_over_velocity"}
PROBE |= {"matching_over_guidance", *(f"critic_error_step_{i}" for i in (1, 2, 3))}
TIMES = {"data", "inputs", "critic", "generator", "iteration", "samples_per_second"}


def test_values_are_in_the_rows_and_for_callbacks_at_their_iterations(tiny_model: Path, tmp_path: Path) -> None:
    _, trainer = train(tiny_model, tmp_path, *PROBED, "callbacks.monitor.every=2", loss="dmd", trainer__max_steps=3)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 3]
    for row in found:
        names = {name.removeprefix("monitor/") for name in row if name.startswith("monitor/")}
        levels = {name for name in names if name.startswith("critic_error_level_")}
        assert names - levels == (CHEAP | PROBE if row["step"] == 2 else CHEAP)
        assert len(levels) == (4 if row["step"] == 2 else 0)
        assert {name.removeprefix("time/") for name in row if name.startswith("time/")} == TIMES
        phases = sum(row[f"time/{name}"] for name in ("data", "inputs", "critic", "generator"))
        assert 0.5 * row["time/iteration"] < phases < row["time/iteration"]
        assert row["time/samples_per_second"] == pytest.approx(12 / row["time/iteration"], rel=1e-5)
    for name, value in found[1].items():
        if name != "step" and name not in found[2]:
            assert trainer.callback_metrics[name].item() == value, name


def test_a_probe_changes_no_training(tiny_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"loss": "swd", "trainer__max_steps": 3}
    task, _ = train(tiny_model, tmp_path / "probed", *PROBED, "callbacks.monitor.every=1", **options)
    plain, _ = train(tiny_model, tmp_path / "plain", **options)
    ours, theirs = (dict(each.named_parameters()) for each in (task, plain))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for probed, bare in zip(rows(tmp_path / "probed"), rows(tmp_path / "plain"), strict=True):
        assert {name: probed[name] for name in bare} == bare


def test_a_resumed_run_probes_the_same(tiny_model: Path, tmp_path: Path) -> None:
    more = [*PROBED, "callbacks.monitor.every=2"]
    train(tiny_model, tmp_path / "straight", *more, loss="dmd", trainer__max_steps=4)
    train(tiny_model, tmp_path / "half", *more, loss="dmd", trainer__max_steps=3)
    train(tiny_model, tmp_path / "rest", *more, loss="dmd", trainer__max_steps=4, resume=tmp_path / "half")
    (rest,), straight = rows(tmp_path / "rest"), rows(tmp_path / "straight")[-1]
    for name in PROBE:
        assert rest[f"monitor/{name}"] == straight[f"monitor/{name}"], name


def test_without_a_critic_there_is_nothing_of_it(tiny_model: Path, tmp_path: Path) -> None:
    train(tiny_model, tmp_path, *PROBED, "callbacks.monitor.every=1", loss="mmd", trainer__max_steps=1)
    (row,) = rows(tmp_path)
    probed = {name for name in row if "critic" in name or "fake" in name or "matching" in name}
    assert probed == set() and {"monitor/similarity", "monitor/similarity_first"} <= set(row)


# Values, on a task that was not trained: student, critic and teacher are the same network


@pytest.fixture
def probe(tiny_model: Path, tmp_path: Path) -> Probe:
    task, _ = train(tiny_model, tmp_path / "run", loss="dmd", trainer__max_steps=1, task__lr=1e-30)
    with torch.no_grad():
        for role in ("student", "fake"):
            for key, parameter in task.networks.named_parameters():
                if f"lora_B.{role}" in key:
                    parameter.zero_()
    data = task.trainer.datamodule
    inputs = task.inputs.build(data.last(2, 0), 0, SeededDraws(0, 0))
    return Probe(task, inputs, prompts=2, seeds=2)


def test_equal_networks_agree(probe: Probe) -> None:
    """The direction that is left is guidance alone; without it there is none."""
    dmd = next(iter(probe.task.terms.values()))
    assert probe.values()["monitor/matching_over_guidance"] == pytest.approx(0, abs=1e-4)
    dmd.guidance_scale, probe.totals = 1.0, {}
    found = probe.values()
    assert found["monitor/teacher_fake_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["monitor/direction_over_velocity"] == pytest.approx(0, abs=1e-4)
    assert "monitor/matching_over_guidance" not in found
    assert -1 <= found["monitor/similarity"] <= 1
    mean = torch.stack([found[f"monitor/critic_error_step_{i}"] for i in (1, 2, 3)]).mean()
    assert_close(found["monitor/critic_error"], mean)


def test_the_critic_s_error_is_that_of_its_prediction(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A critic that is off by 2 everywhere, and by more at higher levels."""
    levels: list[float] = []

    def x0(role: str, x_t: Tensor, sigma: Tensor, conditioning: Any, *args: Any) -> tuple[Tensor, list[Tensor]]:
        levels.extend(sigma.tolist())
        clean = torch.zeros_like(x_t)
        return clean + 1 + sigma.reshape(-1, 1, 1, 1), []

    monkeypatch.setattr(probe.task.networks, "x0", x0)
    drawn = torch.zeros(4, 4, *(SIZES[0],) * 2)
    probe.conditioning = probe.conditioning.rows([0, 1, 0, 1])
    probe._critic_error(drawn, 0, "here")
    expected = sorted((1 + level) ** 2 for level in levels)
    found = [probe.totals[f"critic_error_level_{i}"][0].item() for i in (1, 2, 3, 4)]
    assert found == pytest.approx(expected) and len(set(levels)) == 4
    assert probe.totals["critic_error_step_1"][0].item() == pytest.approx(sum(expected) / 4)


def test_matching_and_guidance_add_up_to_the_direction_of_dmd() -> None:
    generator = torch.Generator().manual_seed(0)
    with_prompt, without, fake, x0_hat = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(4))
    parts = matching_and_guidance(with_prompt, without, fake, guidance=4.5)
    guided = without + 4.5 * (with_prompt - without)
    scale = (x0_hat - guided).abs().mean((1, 2, 3), keepdim=True)
    assert_close((parts[0] + parts[1]) / scale, dmd_direction(x0_hat, guided, fake))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "callbacks.monitor.every=0; use 1 or more, or null for no probes"),
        ({"prompts": 0}, "callbacks.monitor.prompts=0; use 1 or more"),
        ({"seeds": 1}, "callbacks.monitor.seeds=1; use 2 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Monitor(**options)
    assert str(error.value) == message


def test_two_processes_probe_together(tiny_model: Path, tmp_path: Path) -> None:
    arguments = [*overrides(tiny_model, tmp_path / "run", loss="dmd", trainer="ddp_cpu"), *PROBED]
    train_on_two([*arguments, "callbacks.monitor.every=1"], tmp_path)
    two = rows(tmp_path / "run")
    train(
        tiny_model,
        tmp_path / "one",
        *PROBED[:1],
        "callbacks.monitor.every=1",
        "callbacks.monitor.prompts=4",
        "callbacks.monitor.seeds=2",
        loss="dmd",
    )
    for ours, theirs in zip(two, rows(tmp_path / "one"), strict=True):
        for name in ("similarity", "similarity_first", "critic_error", "teacher_fake_cosine", "x0_spread"):
            assert ours[f"monitor/{name}"] == pytest.approx(theirs[f"monitor/{name}"], rel=1e-3, abs=1e-5), name
