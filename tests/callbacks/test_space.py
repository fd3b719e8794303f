"""A run that will not fit on its disk is refused before its first iteration."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import composed, overrides

from swd.callbacks.checkpoint import Checkpoint
from swd.callbacks.space import checkpoints_beside, student_bytes, students_of
from swd.callbacks.students import SaveAdapter, Students
from swd.commands.train import fit
from swd.modules.distiller import Distiller
from swd.types import UserError


class Steps:
    """What of a trainer is counted."""

    def __init__(self, done: int, most: int) -> None:
        self.global_step = done
        self.max_steps = most


@pytest.mark.parametrize(
    ("done", "most", "checkpoints", "all_students", "three_students"),
    [(0, 1000, 3, 10, 4), (0, 250, 3, 2, 2), (900, 1000, 1, 1, 1), (950, 1010, 2, 1, 1), (0, 50, 1, 0, 0)],
)
def test_what_will_lie_beside_each_other(
    done: int, most: int, checkpoints: int, all_students: int, three_students: int
) -> None:
    trainer: Any = Steps(done, most)
    assert checkpoints_beside(trainer, Checkpoint(every=100, keep=2)) == checkpoints
    assert students_of(trainer, Students(every=100)) == all_students
    assert students_of(trainer, Students(every=100, keep=3)) == three_students
    assert students_of(trainer, SaveAdapter()) == 1 and students_of(trainer, Checkpoint()) == 0


def test_checkpoints_and_students_that_will_not_fit_are_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"loss": "mmd", "trainer__max_steps": 4, "task__ema": 0.9}
    plain = [a for a in overrides(tiny_model, tmp_path / "run", **options) if not a.startswith("callbacks=")]
    arguments = [*plain, "callbacks=[checkpoint,adapter,students]", "callbacks.students.every=2"]
    task, _ = fit(composed(arguments))
    assert isinstance(task, Distiller)
    student = student_bytes(task)
    written = sum(file.stat().st_size for file in (tmp_path / "run" / "adapter").rglob("adapter_model.safetensors"))
    assert 0 <= written - student < 0.3 * written  # names and shapes, which weigh much in a tiny network
    needed = 2 * student + 3 * student  # one checkpoint (weights, two moments, the average), three students
    usage = shutil.disk_usage(tmp_path)
    again = [argument.replace(str(tmp_path / "run"), str(tmp_path / "again")) for argument in arguments]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(UserError, match=r"1 checkpoints and 3 students take about .* set callbacks\.students\.keep"):
        fit(composed(again))
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    fit(composed(again))
