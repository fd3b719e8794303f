"""Too little memory ends a training in one line that says what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import composed, overrides

from swd.commands.train import fit, memory_advice
from swd.io.memory import out_of_memory
from swd.modules.distiller import Distiller
from swd.types import UserError


def test_too_little_memory_is_one_line_with_advice_in_order(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Distiller.training_step

    def big(self: Distiller, batches: Any, number: int) -> None:
        step(self, batches, number)
        if self.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\n 1 GiB left")

    monkeypatch.setattr(Distiller, "training_step", big)
    options = {"loss": "mmd", "trainer__max_steps": 9, "callbacks__checkpoint__every": 1}
    with pytest.raises(UserError) as error:
        fit(composed(overrides(tiny_model, tmp_path / "run", **options)))
    assert str(error.value) == (
        "training stopped at iteration 3: out of memory, 2.00 GiB more were asked for; try, in this order, a smaller "
        "data.batch_size (now 4), task.accumulate=2 (now 1), task.checkpointing=true (now false), "
        "model.precision=bf16 (now fp32), model.quantization=int8 or fp8 (now null); last good checkpoint: "
        f"{tmp_path / 'run' / 'checkpoints' / 'iteration-1.ckpt'}"
    )


def test_what_saves_already_is_not_advised(tiny_model: Path, tmp_path: Path) -> None:
    frugal = {"data__batch_size": 1, "task__checkpointing": "true", "model__precision": "bf16"}
    cfg = composed([*overrides(tiny_model, tmp_path, **frugal), "model.quantization=int8"])
    assert memory_advice(cfg) == "use a smaller model"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000 bytes."
         " Error code 12 (Cannot allocate memory)"), "out of memory, 4 GB more were asked for"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
         "out of memory, 20.00 MiB more were asked for"),
        (OSError(12, "Cannot allocate memory"), "out of memory"),
        (ValueError("out of memory is what this text is about"), None),
        (RuntimeError("shapes do not match"), None),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_which_errors_are_of_memory(error: Exception, words: str | None) -> None:
    assert out_of_memory(error) == words
    outer = RuntimeError("in a hook")
    outer.__cause__ = error
    assert out_of_memory(outer) == words


@pytest.mark.parametrize(("parts", "part"), [(1, "task.accumulate=2 (now 1)"), (2, "task.accumulate=3"), (3, "=6 (")])
def test_parts_that_divide_the_batch_are_advised(tiny_model: Path, tmp_path: Path, parts: int, part: str) -> None:
    cfg = composed(overrides(tiny_model, tmp_path, data__batch_size=6, task__accumulate=parts))
    assert part in memory_advice(cfg)
