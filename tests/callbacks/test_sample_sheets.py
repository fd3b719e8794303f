"""Sample sheets: drawn by all processes, with encoders that are there only while they are used."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from counted import Cache, Counted

from swd.callbacks.ranks import Share, attempt
from swd.callbacks.sample_sheets import Samples
from swd.commands import train
from swd.modules.distiller import Distiller

PROMPTS = ["a red star", "a blue ring", "a green heart"]


def trained(model: Path, folder: Path) -> tuple[Distiller, Any]:
    cfg = tiny.composed(tiny.overrides(model, folder, loss="mmd", callbacks="none", task__lr=1e-2))
    task, trainer = train.fit(cfg)
    assert isinstance(task, Distiller)
    return task, trainer


def test_with_cached_data_nothing_is_kept_and_pictures_are_equal(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, trainer = trained(tiny_model, tmp_path)
    seeds = [7, 8, 9]
    _, expected = task.sample(PROMPTS, seeds, keep_x0=True)
    task.inputs._encoders = None  # those of training with pictures
    task.inputs.cache = Cache()
    counted = Counted(monkeypatch)
    samples = Samples(PROMPTS, seed=7)
    samples.on_train_start(trainer, task)
    assert counted.text == [True] and not counted.alive
    for _ in range(2):
        sizes = samples._draw(trainer, task)
        assert [len(each) for each in sizes] == [3, 3, 3]
        for ours, theirs in zip(sizes, expected, strict=True):
            assert torch.equal(ours, theirs)
        assert not counted.alive
    assert counted.text == [True, False, False]  # text once, then the VAE alone for each drawing
    samples.write(trainer, task)
    assert (tmp_path / "samples" / "iteration-000002.png").is_file() and not counted.alive


def test_encoders_that_training_needs_are_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    task, trainer = trained(tiny_model, tmp_path)
    samples = Samples(PROMPTS)
    samples.on_train_start(trainer, task)
    samples.write(trainer, task)
    assert counted.text == [True] and counted.alive == len(counted.loaded)


@pytest.mark.parametrize("total", [1, 3, 8, 9])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_are_equal_in_number_and_hold_every_place_in_order(total: int, world: int) -> None:
    shares = [Share(total, rank, world) for rank in range(world)]
    assert len({len(share.places) for share in shares}) == 1
    every = [place for share in shares for place in share.places]
    assert every[:total] == list(range(total)) and set(every[total:]) <= {total - 1}
    assert [list(map(len, share.batches(2))) for share in shares] == [list(map(len, shares[0].batches(2)))] * world
    assert [place for batch in shares[-1].batches(2) for place in batch] == shares[-1].places


class OtherFailed:
    """A strategy of two processes, of which the second one failed."""

    root_device = torch.device("cpu")

    def all_gather(self, flag: torch.Tensor) -> torch.Tensor:
        return torch.stack([flag, torch.ones(1)])

    def broadcast(self, reason: Any, src: int) -> Any:
        return "out of memory" if src == 1 else reason


def test_what_fails_on_one_process_is_a_warning_on_all() -> None:
    trainer: Any = SimpleNamespace(world_size=2, strategy=OtherFailed())
    with pytest.warns(UserWarning, match="^no samples: out of memory$"):
        assert attempt(trainer, lambda: 1, "samples") is None
    with pytest.warns(UserWarning, match="^no samples: integer division"):
        assert attempt(trainer, lambda: 1 // 0, "samples") is None
