"""Noise that a thread draws ahead has the values of noise that is drawn when it is asked for."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from lightning import Trainer

from swd.data.iterations import Iterations
from swd.losses import DMD, GAN, MMD
from swd.modules.distiller import Distiller
from swd.modules.noise_ahead import NoiseAhead
from swd.schedule import ScaleSchedule
from swd.types import PictureBatch, SeededDraws

CPU = torch.device("cpu")
STEPS = (0, 1)


class DrawsAhead(Distiller):
    """Draws ahead on the CPU too."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._noise_ahead = NoiseAhead(CPU)


def train(kind: type[Distiller], pipeline: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Weights after five iterations of a schedule of two steps, each batch in two parts."""
    model = families.pretrained("sd35_medium", pipeline)
    terms = {"dmd": DMD(), "mmd": MMD(blocks=(0,)), "gan": GAN(blocks=(0,))}
    sizes = families.SIZES["sd35_medium"][-2:]
    task = kind(model, ScaleSchedule([1.0, 0.7], sizes), terms, critic_updates=1, accumulate=2, lr=1e-3)
    shape = (4, 3, *model.pixel_size(model.size))
    batches = [
        PictureBatch(pixels=2 * torch.rand(shape, generator=torch.Generator().manual_seed(i)) - 1, prompts=["a"] * 4)
        for i in range(10)
    ]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_steps=5, accelerator="cpu", default_root_dir=str(folder), **quiet)
    trainer.fit(task, train_dataloaders=Iterations(batches, 2))
    assert task._noise_ahead is None  # closed
    return task.kept_state()


def test_a_training_that_draws_ahead_is_the_same_and_waits_for_no_draw_it_could_foresee(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = families.save("sd35_medium", tmp_path / "model")
    expected = train(Distiller, pipeline, tmp_path)

    drawn: list[tuple[str, int]] = []
    original = SeededDraws.drawn

    def noted(self: SeededDraws, *args: Any) -> torch.Tensor:
        drawn.append((threading.current_thread().name.split("_")[0], self.iteration))
        return original(self, *args)

    monkeypatch.setattr(SeededDraws, "drawn", noted)
    found = train(DrawsAhead, pipeline, tmp_path)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    # Each step of the schedule comes once before anything is known of it.
    assert {k for thread, k in drawn if thread != "noise"} == {0, 1}
    assert {k for thread, k in drawn if thread == "noise"} >= {2, 3, 4}


def noise(store: NoiseAhead, iteration: int, shape: tuple[int, ...], purpose: str = "a") -> torch.Tensor:
    draws = SeededDraws(3, iteration, 1, 4, store)
    with store.iteration(draws, STEPS):
        return draws.noise(purpose, torch.empty(shape))


def test_what_was_not_foreseen_is_drawn_when_it_is_asked_for() -> None:
    """Sizes of batches may change, and an iteration may ask for something else than the last one of its step."""
    store = NoiseAhead(CPU)
    for iteration, shape, purpose in (
        (0, (2, 4, 4), "a"),
        (1, (2, 4, 4), "a"),
        (2, (2, 6, 4), "a"),
        (4, (2, 6, 4), "b"),
    ):
        expected = SeededDraws(3, iteration, 1, 4).noise(purpose, torch.empty(shape))
        assert torch.equal(noise(store, iteration, shape, purpose), expected)
    assert set(store._drawn) == {4, 5}  # of iterations that are over nothing stays in memory
    store.close()


def test_outside_of_the_iteration_that_runs_nothing_is_taken_or_noted() -> None:
    store = NoiseAhead(CPU)
    noise(store, 0, (2, 4, 4))
    draws = SeededDraws(3, 0, 1, 4, store)
    assert store.take(draws, "a", (2, 4, 4)) is None
    with store.iteration(SeededDraws(3, 2), STEPS):
        assert store.take(draws, "b", (2, 4, 4)) is None  # of an earlier iteration
    assert store._asked[0] == []
    store.close()


def test_an_error_of_the_thread_is_raised_where_the_noise_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    store = NoiseAhead(CPU)
    noise(store, 0, (2, 4, 4))

    def fail(*_: Any) -> None:
        raise MemoryError("no pinned memory")

    monkeypatch.setattr(SeededDraws, "drawn", fail)
    with store.iteration(SeededDraws(3, 1), STEPS):
        pass
    with pytest.raises(MemoryError, match="no pinned memory"):
        noise(store, 2, (2, 4, 4))
    store.close()


def test_the_thread_uses_the_gpu_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory would be made in the first GPU's context otherwise, some hundred megabytes of it."""
    used: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: used.append((threading.current_thread().name.split("_")[0], device))
    )
    pinned: list[bool] = []
    monkeypatch.setattr(
        SeededDraws, "drawn", lambda self, purpose, shape, pin=False: pinned.append(pin) or torch.ones(shape)
    )
    store = NoiseAhead(torch.device("cuda", 3))
    noise(store, 0, (2, 4, 4))
    with store.iteration(SeededDraws(3, 1), STEPS):
        pass
    noise(store, 2, (2, 4, 4))
    assert used == [("noise", torch.device("cuda", 3))] and pinned == [False, True]
    store.close()
