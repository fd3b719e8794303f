"""Lightning's callbacks and a sweep's objective on logged metrics, by configuration alone."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from lightning import Callback
from tiny import composed, overrides

from swd.commands import train
from swd.commands.cli import launch
from swd.modules.checkpoint_files import read_checkpoint
from swd.modules.run_values import log_values
from swd.types import UserError


class Measure(Callback):
    """Logs a metric of its own every so many iterations, as one that draws pictures does."""

    def __init__(self, values: list[float], every: int) -> None:
        self.values = values
        self.every = every

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        number, rest = divmod(trainer.global_step, self.every)
        if not rest and number <= len(self.values):
            pl_module.log("metrics/fid", self.values[number - 1], logger=False)


def fit(model: Path, folder: Path, *arguments: str, more: tuple[Callback, ...] = (), **options: Any) -> Any:
    return train.fit(composed([*overrides(model, folder, **{"loss": "mmd"} | options), *arguments]), *more)


STOP = ("callbacks=[checkpoint,adapter,early_stopping]", "callbacks.early_stopping.monitor=metrics/fid")


@pytest.mark.parametrize(("patience", "last"), [(1, 6), (2, 8)])
def test_early_stopping_counts_measurements(
    tiny_model: Path, tmp_path: Path, patience: int, last: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third measurement, after iteration 6, is the first that is no better."""
    measure = Measure([9.0, 5.0, 6.0, 7.0, 8.0, 9.0], every=2)
    arguments = [*STOP, f"callbacks.early_stopping.patience={patience}"]
    _, trainer = fit(tiny_model, tmp_path / "run", *arguments, more=(measure,), trainer__max_steps=20)
    assert trainer.global_step == last
    assert f"iteration {last} is the last: Monitored metric metrics/fid did not improve" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "checkpoints" / f"iteration-{last}.ckpt").is_file()


class Reported(Measure):
    """The same in the way of the callbacks that draw, which reaches the loggers at once."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        number, rest = divmod(trainer.global_step, self.every)
        if not rest and number <= len(self.values):
            log_values(trainer, {"metrics/fid": self.values[number - 1]})


@pytest.mark.parametrize(("patience", "broken", "last"), [(2, 6, 8), (2, 7, 8), (1, 6, 6)])
def test_a_resumed_run_stops_where_a_straight_one_does(
    tiny_model: Path, tmp_path: Path, patience: int, broken: int, last: int
) -> None:
    """Its checkpoint is written before the measurement of its iteration is looked at; nothing is looked at twice."""
    values = [9.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    arguments = [*STOP, f"callbacks.early_stopping.patience={patience}", "logger=csv", "callbacks.checkpoint.every=1"]
    fit(tiny_model, tmp_path / "a", *arguments, more=(Reported(values, 2),), trainer__max_steps=broken)
    arguments.append(f"resume={tmp_path / 'a'}")
    _, trainer = fit(tiny_model, tmp_path / "b", *arguments, more=(Reported(values, 2),), trainer__max_steps=20)
    assert trainer.global_step == last


def test_early_stopping_by_a_threshold_of_a_loss(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["callbacks=early_stopping", "+callbacks.early_stopping.stopping_threshold=1e9"]
    _, trainer = fit(tiny_model, tmp_path / "run", *arguments, trainer__max_steps=20)
    assert trainer.global_step == 1


def test_early_stopping_on_what_is_never_logged_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"callbacks: Early stopping conditioned on metric `metrics/fid` .*`loss/mmd`"):
        fit(tiny_model, tmp_path / "run", *STOP)


def test_the_checkpoint_of_the_best_value_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["callbacks=[best,checkpoint]", "callbacks.best.monitor=metrics/fid"]
    arguments.append("callbacks.best.every_n_train_steps=1")
    run = tmp_path / "run"
    measure = Measure([9.0, 3.0, 8.0, 7.0], every=1)
    fit(tiny_model, run, *arguments, more=(measure,), trainer__max_steps=4)
    (best,) = (run / "best").iterdir()
    assert best.name == "iteration-2.ckpt"
    assert read_checkpoint(best)["global_step"] == 2
    assert [file.name for file in sorted((run / "checkpoints").iterdir())] == ["iteration-4.ckpt"]


def last_loss(run: Path) -> float:
    with open(run / "metrics.csv") as stream:
        return float(list(csv.DictReader(stream))[-1]["loss/mmd"])


def test_the_objective_of_a_sweep_is_a_logged_metric(tiny_model: Path, tmp_path: Path) -> None:
    arguments = overrides(tiny_model, tmp_path / "run", loss="mmd", optimized_metric="loss/mmd")
    value = train.run(composed(arguments))
    assert value == pytest.approx(last_loss(tmp_path / "run"), rel=1e-6) and value
    again = train.run(composed([*arguments, f"resume={tmp_path / 'run'}", f"folder={tmp_path / 'next'}"]))
    assert again == pytest.approx(value, rel=1e-6)  # the run was done
    assert train.run(composed(overrides(tiny_model, tmp_path / "none", loss="mmd"))) is None
    with pytest.raises(UserError, match=r"optimized_metric=loss/nothing was not logged; .*loss/mmd"):
        train.run(composed(overrides(tiny_model, tmp_path / "b", loss="mmd", optimized_metric="loss/nothing")))


def test_hydra_gets_the_objective_of_each_job(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: list[float] = []
    ended = Callbacks.on_job_end
    monkeypatch.setattr(
        Callbacks,
        "on_job_end",
        lambda self, config, config_name=None, **more: (
            values.append(more["job_return"].return_value)
            or ended(self, config=config, config_name=config_name, **more)
        ),
    )
    GlobalHydra.instance().clear()
    arguments = [a for a in overrides(tiny_model, Path("x"), loss="mmd") if not a.startswith("folder=")]
    arguments += ["optimized_metric=loss/mmd", f"output={tmp_path}", "seed=1,2", f"hydra.sweep.dir={tmp_path}/s"]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *arguments])
    try:
        launch("train")
    finally:
        HydraConfig.instance().cfg = None
    assert values == [pytest.approx(last_loss(run), rel=1e-6) for run in sorted((tmp_path / "s").glob("[01]_*"))]
    assert len(set(values)) == 2
