"""Every configuration file composes, passes the schema, and instantiates; no weights are loaded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate
from lightning import Callback
from omegaconf import DictConfig
from tiny import CONF, composed

from swd import demo, sample, train
from swd.config import check
from swd.losses import DMD, GAN, MMD
from swd.modules.distiller import Distiller
from swd.scheduler import ScaleWiseScheduler


def options(group: str) -> list[str]:
    """The options of a config group."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


# Groups that can be combined freely when a model is distilled; what belongs to other tasks comes with its experiment.
FREE = ("loss", "schedule", "model", "data", "trainer", "callbacks", "logger")
OTHER_TASKS = {"data": {"judge"}}
TERMS = {"dmd": DMD, "mmd": MMD, "gan": GAN}


def pairwise(groups: dict[str, list[str]]) -> list[dict[str, str]]:
    """Few combinations that hold every pair of options of any two groups."""
    missing = {
        frozenset({(a, x), (b, y)}) for a, b in itertools.combinations(groups, 2) for x in groups[a] for y in groups[b]
    }
    rows = []
    while missing:
        row = dict(min(missing, key=sorted))
        for group in groups:
            if group not in row:
                row[group] = max(
                    groups[group], key=lambda o: sum(frozenset({(group, o), pair}) in missing for pair in row.items())
                )
        missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append({group: row[group] for group in groups})
    return rows


COMBINATIONS = pairwise({g: [o for o in options(g) if o not in OTHER_TASKS.get(g, set())] for g in FREE})


def arguments(tmp_path: Path, **groups: str) -> list[str]:
    return [f"folder={tmp_path}", "name=test", *(f"{group}={option}" for group, option in groups.items())]


def check_loss(cfg: DictConfig, option: str) -> None:
    names = set(TERMS) if option == "swd" else set(option.split("_"))
    assert set(cfg.loss) == names
    for name, term in instantiate(cfg.loss, _convert_="all").items():
        assert isinstance(term, TERMS[name])


@pytest.mark.parametrize("row", COMBINATIONS, ids=lambda row: "-".join(row.values()))
def test_every_combination_composes_and_instantiates(row: dict[str, str], tmp_path: Path) -> None:
    cfg = composed([*arguments(tmp_path, **row), "trainer.accelerator=cpu"])
    check(cfg, train.ROOT)
    check_loss(cfg, row["loss"])
    cfg.data.batch_size = 8
    task, data = train.prepare(cfg)
    assert isinstance(task, Distiller) and data.batch_size == 8
    assert len(task.schedule) == len(cfg.schedule.sigmas)
    assert task.critic_updates == (0 if row["loss"] == "mmd" else cfg.task.critic_updates)
    assert isinstance(task.scheduler(), ScaleWiseScheduler)


@pytest.mark.parametrize("option", options("callbacks"))
def test_callbacks_instantiate(option: str, tmp_path: Path) -> None:
    cfg = composed(arguments(tmp_path, callbacks=option))
    assert all(isinstance(instantiate(node, _convert_="all"), Callback) for node in (cfg.callbacks or {}).values())


@pytest.mark.parametrize("option", options("logger"))
@pytest.mark.parametrize("trainer", options("trainer"))
def test_a_trainer_is_built(trainer: str, option: str, tmp_path: Path) -> None:
    cfg = composed([*arguments(tmp_path, trainer=trainer, logger=option), "trainer.accelerator=cpu"])
    built = train.build_trainer(cfg, tmp_path)
    assert built.max_steps == cfg.trainer.max_steps and built.num_devices == (2 if trainer == "ddp_cpu" else 1)
    assert len(built.loggers) == (0 if option == "none" else 1)


@pytest.mark.parametrize("option", options("experiment"))
def test_every_experiment_passes_the_schema(option: str, tmp_path: Path) -> None:
    cfg = composed([f"folder={tmp_path}", f"experiment={option}"])
    check(cfg, train.ROOT)
    assert cfg.trainer.max_steps > 0


@pytest.mark.parametrize("option", options("task"))
def test_every_task_passes_the_schema(option: str, tmp_path: Path) -> None:
    check(composed(arguments(tmp_path, task=option)), train.ROOT)


@pytest.mark.parametrize("option", options("data"))
def test_every_data_set_instantiates(option: str, tmp_path: Path) -> None:
    assert instantiate(composed(arguments(tmp_path, data=option)).data, _convert_="all").batch_size >= 1


@pytest.mark.parametrize("option", options("preset"))
def test_every_preset_of_the_demo_passes_the_schema(option: str, tmp_path: Path) -> None:
    check(composed(arguments(tmp_path, preset=option), "demo"), demo.ROOT)


@pytest.mark.parametrize("option", options("model"))
def test_every_model_can_be_sampled(option: str, tmp_path: Path) -> None:
    cfg = composed(arguments(tmp_path, model=option), "sample")
    check(cfg, sample.ROOT)
    instantiate(cfg.model, _convert_="all")


def test_the_default_run_distils_the_embedded_teacher_with_all_losses() -> None:
    cfg = composed(["folder=x", "name=y"])
    task, _ = train.prepare(cfg)
    assert isinstance(task, Distiller)
    assert set(task.terms) == {"dmd", "mmd", "gan"} and task.critic_updates == 5
    assert task.model.folder.name == "shapes-sd3"


def included(file: Path) -> set[Path]:
    """Files that a file's defaults list names."""
    found = set()
    for entry in (yaml.safe_load(file.read_text()) or {}).get("defaults", []):
        key, option = next(iter(entry.items())) if isinstance(entry, dict) else ("", entry)
        group = key.removeprefix("override ").split("@")[0].lstrip("/")
        for folder in (file.parent, CONF):
            if option and (folder / group / f"{option}.yaml").is_file():
                found.add(folder / group / f"{option}.yaml")
    return found


def test_every_file_is_reached_by_a_test_above() -> None:
    primary = {CONF / f"{name}.yaml" for name in ("train", "sample", "demo")}
    groups = (*FREE, "experiment", "task", "preset")
    reached = primary | {CONF / group / f"{option}.yaml" for group in groups for option in options(group)}
    while more := set().union(*map(included, reached)) - reached:
        reached |= more
    assert set(CONF.rglob("*.yaml")) - reached == set()


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda f: str(f.relative_to(CONF)))
def test_every_file_names_only_files_that_exist(file: Path) -> None:
    entries: list[Any] = (yaml.safe_load(file.read_text()) or {}).get("defaults", [])
    named = []
    for entry in entries:
        key, option = next(iter(entry.items())) if isinstance(entry, dict) else ("", entry)
        if option not in (None, "_self_") and "hydra/" not in key and "$" not in str(option):
            named.append(option)
    assert len(included(file)) == len(named)
