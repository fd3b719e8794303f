"""Every experiment of the paper composes, fits its model at real size, and trains on a tiny pipeline of its family."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import families
import pytest
import skeletons
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from tiny import CONF, composed
from tiny_runs import tiny_task, train_two

from swd import config
from swd.commands import train
from swd.commands.cli import hydra_options
from swd.commands.sweep import jobs
from swd.modules import hub
from swd.modules.distiller import Distiller

EXPERIMENTS = sorted(
    file.stem for file in (CONF / "experiment").glob("*.yaml") if not file.stem.startswith(("demo_", "shapes_"))
)


def runs(experiment: str) -> list[list[str]]:
    """The command lines of an experiment: one, or those of its sweep."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), **hydra_options(initialize_config_dir)):
        given = [f"experiment={experiment}", "folder=x", "name=y"]
        cfg = compose("train", given, return_hydra_config=True)
        cfg.hydra.overrides.task = given
        return jobs(cfg)


RUNS = {f"{name}-{i}": line for name in EXPERIMENTS for i, line in enumerate(runs(name))}


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return skeletons.hub(tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("run", RUNS)
def test_fits_its_model(run: str, captioned: Path, snapshots: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", snapshots)
    skeletons.build_once(monkeypatch)
    cfg = composed([*RUNS[run], f"data.dataset.path={captioned}", "trainer.accelerator=cpu"])
    config.check(cfg, train.ROOT)
    task, data = train.prepare(cfg)
    assert isinstance(task, Distiller) and len(task.schedule) == len(cfg.schedule.sigmas)
    assert data.batch_size == cfg.data.batch_size


def test_sweeps_have_their_rows() -> None:
    found = {name: sum(run.rpartition("-")[0] == name for run in RUNS) for name in EXPERIMENTS}
    swept = {"mmd_only": 3, "steps_sd35_medium": 6, "steps_flux_dev": 4}
    swept |= {"ablation_losses": 3, "ablation_kernels": 2, "ablation_sizes": 3}
    assert found == {name: swept.get(name, 1) for name in EXPERIMENTS}


def test_what_experiments_say_is_in_force() -> None:
    of = {name: composed(RUNS[f"{name}-0"]) for name in EXPERIMENTS}
    for name, cfg in of.items():
        assert cfg.task.downscale == ("cascade" if name.startswith("released_") else "direct")
        form = (cfg.loss.mmd.features, cfg.loss.mmd.distance)
        kinds = {"paper": ("teacher", "squared"), "released": ("fake", "pseudo_huber")}
        assert form == kinds.get(name.partition("_")[0], (None, "pseudo_huber"))
        assert cfg.task.lr == (5e-6 if name.startswith("released_") else 4e-6)  # trainings of the paper have its own
    assert [list(of[f"released_sd35_{size}"].schedule.sizes) for size in ("medium", "large")] == [[64, 80, 96, 128]] * 2
    large = {kind: of[f"{kind}_sd35_large"] for kind in ("paper", "released")}
    assert {kind: (cfg.data.batch_size, cfg.trainer.max_steps) for kind, cfg in large.items()} == {
        "paper": (24, 3000),
        "released": (32, 4000),
    }
    assert {next(iter(size)) for size in of["spatial_wan21_1_3b"].schedule.sizes} == {21}


# Training


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[str, Path] = {}

    def pipeline(name: str) -> Path:
        if name not in known:
            known[name] = families.save(name, tmp_path_factory.mktemp(name) / "pipeline")
        return known[name]

    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_trains_two_iterations(run: str, pipelines: Any, tmp_path: Path) -> None:
    train_two(tiny_task(composed(RUNS[run]), pipelines), tmp_path)


# Sources


@pytest.mark.parametrize("file", sorted((CONF / "schedule").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_schedule_says_where_it_is_from(file: Path) -> None:
    head = "".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"\bpaper\b|\bREADME\b|\bours\b|baseline of", head, re.IGNORECASE), head


@pytest.mark.parametrize(("model", "schedule"), [("sdxl", "sdxl_2step"), ("wan21_1_3b", "wan_2step")])
def test_two_steps_fit(
    model: str, schedule: str, captioned: Path, snapshots: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "snapshot_download", snapshots)
    given = [f"model={model}", f"schedule={schedule}", "folder=x", "name=y", f"data.dataset.path={captioned}"]
    task, _ = train.prepare(composed([*given, "trainer.accelerator=cpu"]))
    assert isinstance(task, Distiller) and len(task.schedule) == 2


def test_baselines_have_the_levels_of_their_schedules() -> None:
    def levels(name: str) -> list[float]:
        return list(yaml.safe_load((CONF / "schedule" / f"{name}.yaml").read_text())["sigmas"])

    pairs = {"full_6step": "image_6step", "full_4step": "image_4step", "full_4step_wide": "image_4step_wide"}
    pairs |= {"full_2step": "image_2step", "full_2step_wide": "image_2step_wide", "wan_spatial_4step": "wan_4step"}
    pairs |= {"sdxl_full_4step": "sdxl_4step", "sdxl_full_2step": "sdxl_2step"}
    assert {name: levels(name) for name in pairs} == {name: levels(other) for name, other in pairs.items()}
    assert [round(1000 * sigma) for sigma in levels("full_4step_wide")] == [1000, 945, 790, 602]
