"""Losses before and after training on the same draws."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import tiny
import torch

from swd.callbacks.fixed_losses import FixedLosses
from swd.commands import train
from swd.modules.distiller import Distiller


def run(tiny_model: Path, folder: Path, **more: object) -> tuple[FixedLosses, Distiller, L.Trainer]:
    fixed = FixedLosses(pictures=4)
    task, trainer = train.fit(tiny.composed(tiny.overrides(tiny_model, folder, **more)), fixed)
    assert isinstance(task, Distiller)
    return fixed, task, trainer


def test_training_is_measured_and_not_disturbed(tiny_model: Path, tmp_path: Path) -> None:
    fixed, task, trainer = run(tiny_model, tmp_path / "a", task__lr=1e-2)
    assert set(fixed.losses) == {"mmd", "fake_score"}
    for before, after in fixed.losses.values():
        assert before != after and min(before, after) >= 0
    # The same numbers again from the same weights: nothing random is left.
    assert fixed.measure(task, fixed.batches(trainer, task)) == fixed.measure(task, fixed.batches(trainer, task))
    plain, _ = train.fit(tiny.composed(tiny.overrides(tiny_model, tmp_path / "b", task__lr=1e-2)))
    for key, value in plain.networks.adapter_state("student").items():  # type: ignore[union-attr,operator]
        assert torch.equal(value, task.networks.adapter_state("student")[key]), key


def test_an_untrained_student_has_the_teachers_losses(tiny_model: Path, tmp_path: Path) -> None:
    fixed, _, _ = run(tiny_model, tmp_path / "a", task__lr=1e-12)
    assert fixed.losses["mmd"][1] == pytest.approx(fixed.losses["mmd"][0], rel=1e-5)
    assert fixed.losses["fake_score"][1] == pytest.approx(fixed.losses["fake_score"][0], rel=1e-5)


def test_mmd_alone_has_no_fake_score(tiny_model: Path, tmp_path: Path) -> None:
    fixed, _, _ = run(tiny_model, tmp_path / "a", loss="mmd")
    assert set(fixed.losses) == {"mmd"}
