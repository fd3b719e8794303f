"""Commands of docs/reproduce.md: all compose, build at real size on the meta device, and train on tiny pipelines."""

from __future__ import annotations

import importlib
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
import skeletons
import yaml
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from shards import make_pictures
from tiny import CONF, composed
from tiny_runs import tiny_task, train_two

from swd import config
from swd.commands import cli, evaluate, sample
from swd.commands.sweep import jobs
from swd.commands.train import build_task_and_data
from swd.modules import hub
from swd.modules.distiller import Distiller

TEXT = (Path(__file__).parents[1] / "docs" / "reproduce.md").read_text(encoding="utf-8")
PREFIXES = ("python train.py ", "swd ", "torchrun ")
BLOCKS = "\n".join(re.findall(r"```\n(.*?)```", TEXT, re.S)).splitlines()
WITHIN = [text for text in re.findall(r"`([^`\n]+)`", TEXT) if len(text.split()) > 2 and "=" in text]
LINES = [line for line in dict.fromkeys([*BLOCKS, *WITHIN]) if line.startswith(PREFIXES)]
"""The commands of the page, in blocks and within sentences."""
OF_THE_LINE = ("trainer.devices=", "data.dataset.path=")
"""Arguments of a training that do not decide what is built."""


def parsed(line: str) -> tuple[str, list[str]]:
    """The name of a command and its arguments, without launcher and flags."""
    words = shlex.split(line)
    if words[0] == "python":
        return "train", [word for word in words[2:] if word != "-m"]
    start = words.index("swd")
    return words[start + 1], words[start + 2 :]


def runs_of(line: str) -> list[list[str]]:
    """The arguments of each training that a command starts: several in a sweep."""
    _, arguments = parsed(line)
    if "-m" not in shlex.split(line):
        return [arguments]
    named = [argument.partition("=")[2] for argument in arguments if argument.startswith("experiment=")]
    files = [yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text()) for name in named]
    params = [file.get("hydra", {}).get("sweeper", {}).get("params", {}) for file in files]
    sweeper = {"params": {key: value for each in params for key, value in each.items()}}
    return jobs(OmegaConf.create({"hydra": {"overrides": {"task": arguments}, "sweeper": sweeper}}))


TRAININGS = {line: runs_of(line) for line in LINES if parsed(line)[0] == "train"}
OTHERS = [line for line in LINES if line not in TRAININGS]


def cases(fast: str) -> list[Any]:
    """Every training once; slow are those whose experiments do not begin with `fast`, and of a sweep all but the first.

    `test_experiments.py` has the others of a sweep too.
    """
    seen: set[tuple[str, ...]] = set()
    found = []
    for runs in TRAININGS.values():
        for number, run in enumerate(runs):
            key = tuple(sorted(argument for argument in run if not argument.startswith(OF_THE_LINE)))
            quick = number == 0 and any(argument.startswith(f"experiment={fast}") for argument in run)
            name = "-".join(argument.partition("=")[2] for argument in key)
            if key not in seen:
                found.append(pytest.param(run, id=name, marks=[] if quick else [pytest.mark.slow]))
            seen.add(key)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands name: pictures, videos and a cache. Only the picture is read."""
    root = tmp_path_factory.mktemp("world")
    for folder, name in (("pictures", "a.png"), ("videos", "a.mp4")):
        (root / folder).mkdir()
        (root / folder / "a.txt").write_text("a red star")
        (root / folder / name).write_text("not read")
    Image.new("RGB", (1024, 1024)).save(root / "pictures" / "a.png")
    make_pictures(root / "cache", 2)
    return root


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return skeletons.hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(autouse=True)
def _there(world: Path, snapshots: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    skeletons.build_once(monkeypatch)
    monkeypatch.chdir(world)
    monkeypatch.setattr(hub, "snapshot_download", snapshots)


@cache
def configuration(*arguments: str) -> DictConfig:
    return composed([*arguments, "folder=x", "name=y"])


@pytest.mark.parametrize("run", cases(fast=""))
@pytest.mark.filterwarnings("ignore:DMD is known to fail")
def test_a_training_builds_at_real_size(run: list[str]) -> None:
    cfg = configuration(*run)
    task, data = build_task_and_data(cfg)
    assert isinstance(task, Distiller) and data.batch_size == cfg.data.batch_size
    assert all(parameter.is_meta for parameter in task.model.meta_network.parameters())
    assert (task.schedule.sizes[-1] == task.model.size) == ("experiment=fixed_256" not in run)


# Two iterations


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def pipeline(name: str) -> Path:
        return families.save(name, tmp_path_factory.mktemp(name) / "pipeline")

    return pipeline


@pytest.mark.parametrize("run", cases(fast="paper_"))
@pytest.mark.filterwarnings("ignore:DMD is known to fail")
def test_a_training_trains_two_iterations(run: list[str], pipelines: Any, tmp_path: Path) -> None:
    train_two(tiny_task(configuration(*run).copy(), pipelines), tmp_path)


# Other commands


@pytest.mark.parametrize("line", OTHERS)
def test_a_command_composes(line: str, tmp_path: Path) -> None:
    command, arguments = parsed(line)
    if command in cli.POSITIONAL:
        arguments = cli.with_paths(arguments, cli.POSITIONAL[command])
    module = importlib.import_module(cli.COMMANDS[command][0])
    own = [f"folder={tmp_path}"] if command in ("sample", "spectra") and "folder=" not in line else []
    cfg = composed([*arguments, *own], command)
    if command == "import":
        assert module.prepare(cfg) is not None
        return
    config.check(cfg, module.ROOT)
    if command == "evaluate":
        evaluate.check_numbers(cfg, "evaluate")
        assert evaluate.metrics_of(cfg)[0] and all(evaluate.entry_of(each) for each in config.to_plain(cfg.models))
    elif "model" in cfg:
        assert config.build(cfg, "model").limits.native
    if command == "sample" and cfg.start is not None:
        cfg.n = 1
        job = sample.prepare(cfg)
        assert job.start is not None and job.start.levels is not None
        guidance, sides = (7.0, (64, 128)) if "sd35_medium" in line else (4.0, (8, 16))
        assert (job.model.drawing_guidance_scale, job.start.levels[0]) == (guidance, 0.6)
        assert (job.start.noised.source[0], job.start.noised.target[0]) == sides


def test_every_table_has_a_section() -> None:
    heads = "\n".join(re.findall(r"^## (.*)$", TEXT, re.M))
    for number in (1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12):
        assert re.search(rf"Tables? (\d+ and )?{number}\b", heads), f"table {number} has no section"
    assert "Figures 1 and 13" in heads


def test_the_page_names_every_experiment_of_the_paper() -> None:
    named = {word.partition("=")[2] for line in LINES for word in line.split() if word.startswith("experiment=")}
    shipped = {file.stem for file in (CONF / "experiment").glob("*.yaml")}
    assert {name for name in shipped if not name.startswith(("demo_", "shapes_"))} == named
