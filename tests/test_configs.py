"""Every configuration file composes, passes the schema, and instantiates; no weights are loaded."""

from __future__ import annotations

import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import skeletons
import yaml
from lightning import Callback
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf
from shards import make_pictures
from tiny import CONF, composed

from swd import config
from swd.commands import cli, demo, encode, evaluate, export, generate, import_pictures, sample, train
from swd.config import build, check, with_schedules
from swd.diffusion import rectified_flow_table
from swd.losses import DMD, GAN, MMD
from swd.metrics.base import PictureMetric
from swd.modules import hub
from swd.modules.distiller import Distiller
from swd.modules.pretrained import Pretrained
from swd.scheduler import ScaleWiseScheduler
from swd.types import UserError, WrongProcess


def options(group: str) -> list[str]:
    """The options of a config group."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


# Groups that can be combined freely when a model is distilled; what belongs to other tasks comes with its experiment.
FREE = ("sheet", "loss", "schedule", "data", "trainer", "callbacks", "logger")
ONE_MEGAPIXEL = ("image_4step", "image_4step_wide", "image_6step", "full_4step", "full_2step")
SCHEDULES = {
    "shapes": ("shapes_4step", "shapes_6step", "full_4step", "full_2step"),
    "sd35_medium": ONE_MEGAPIXEL,
    "sd35_large": ONE_MEGAPIXEL,
    "flux_dev": ONE_MEGAPIXEL,
    "sdxl": ("sdxl_4step", "sdxl_full_4step", "sdxl_full_2step"),
    "wan21_1_3b": ("wan_4step", "full_4step", "full_2step"),
    "wan22_5b": ("wan22_4step", "full_4step", "full_2step"),
    "wan22_a14b_high": ("wan_4step", "full_4step"),
    "wan22_a14b_low": ("wan_4step", "full_4step"),
    "sana_1600m": ("sana_4step", "full_4step", "full_2step"),
    "qwen_image": ONE_MEGAPIXEL,
    "qwen_image_2512": ONE_MEGAPIXEL,
    "flux2_klein_4b": ONE_MEGAPIXEL,
    "z_image": ONE_MEGAPIXEL,
    "chroma1": ONE_MEGAPIXEL,
    "flux2_klein_9b": ONE_MEGAPIXEL,
    "flux2_dev": ONE_MEGAPIXEL,
}
DATA = {"shapes": ("shapes",), "wan21_1_3b": ("videos",), "wan22_5b": ("videos_720p",)}
DATA |= dict.fromkeys(("wan22_a14b_high", "wan22_a14b_low"), ("videos",))
TERMS = {"dmd": DMD, "mmd": MMD, "gan": GAN}


Choices = frozenset[tuple[str, str]]
"""Options of one or two groups, each with its group."""


def pairs(groups: dict[str, list[str]]) -> set[Choices]:
    """Every pair of options of any two groups."""
    return {
        frozenset({(a, x), (b, y)}) for a, b in itertools.combinations(groups, 2) for x in groups[a] for y in groups[b]
    }


def held(row: dict[str, str]) -> set[Choices]:
    """The options and the pairs of options in a combination."""
    return {frozenset(some) for count in (1, 2) for some in itertools.combinations(row.items(), count)}


def rows_with(missing: set[Choices], groups: dict[str, list[str]], welcome: set[Choices]) -> list[dict[str, str]]:
    """Few combinations that hold all of `missing`, and many of `welcome`; what they hold is removed from both."""
    rows = []
    while missing:
        row = dict(min(missing, key=sorted))
        for group in [group for group in groups if group not in row]:
            new = {option: [frozenset({(group, option), other}) for other in row.items()] for option in groups[group]}
            gains = {o: sum((pair in missing) + (pair in welcome) for pair in new[o]) for o in new}
            row[group] = max(new, key=lambda o: (frozenset({(group, o)}) in missing, gains[o]))
        missing -= held(row)
        welcome -= held(row)
        rows.append({group: row[group] for group in groups})
    return rows


def choices(model: str) -> dict[str, list[str]]:
    """The options that make sense with a model."""
    fitting = {"schedule": SCHEDULES[model], "data": DATA.get(model, ("images",))}
    if model != "shapes":  # other data hold nothing out unless they are told to
        fitting["callbacks"] = tuple(option for option in options("callbacks") if option != "validation")
    return {group: list(fitting.get(group, options(group))) for group in FREE}


def combinations(with_every_model: bool) -> list[dict[str, str]]:
    """Each option of a group with every model, and each pair of options of two groups once, with any model.

    Args:
        with_every_model: whether these pairs come with every model, but for those of `callbacks`, which know no model.
    """
    rows = []
    once = {
        pair
        for model in options("model")
        for pair in pairs(choices(model))
        if not with_every_model or any(group == "callbacks" for group, _ in pair)
    }
    for last in (False, True):
        for model in options("model"):
            groups = choices(model)
            others = {group: found for group, found in groups.items() if group != "callbacks"}
            single = {frozenset({(group, option)}) for group, found in groups.items() for option in found}
            wanted = single | pairs(others) if with_every_model else single
            missing = once & pairs(groups) if last else wanted
            rows += [{"model": model} | row for row in rows_with(missing, groups, once)]
    assert not once
    return rows


COMBINATIONS: list[Any] = combinations(with_every_model=False)
COMBINATIONS += [
    pytest.param(row, marks=pytest.mark.slow) for row in combinations(with_every_model=True) if row not in COMBINATIONS
]


@pytest.fixture(autouse=True)
def _hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(hub, "snapshot_download", skeletons.hub(tmp_path_factory.getbasetemp() / "hub"))
    skeletons.build_once(monkeypatch)


def arguments(tmp_path: Path, **groups: str) -> list[str]:
    return [f"folder={tmp_path}", "name=test", *(f"{group}={option}" for group, option in groups.items())]


def check_loss(cfg: DictConfig, option: str) -> None:
    names = set(TERMS) if option == "swd" else set(option.split("_"))
    assert set(cfg.loss) == names
    for name, term in config.build_node(config.to_plain(cfg.loss), "loss").items():
        assert isinstance(term, TERMS[name])


@pytest.mark.parametrize("row", COMBINATIONS, ids=lambda row: "-".join(row.values()))
@pytest.mark.filterwarnings("ignore:DMD is known to fail")
def test_every_combination_composes_and_instantiates(row: dict[str, str], tmp_path: Path, captioned: Path) -> None:
    cfg = composed([*arguments(tmp_path, **row), "trainer.accelerator=cpu"])
    if row["data"] in ("images", "videos", "videos_720p"):
        cfg.data.dataset.path = str(captioned)
    check(cfg, train.ROOT)
    check_loss(cfg, row["loss"])
    cfg.data.batch_size = 8
    task, data = train.prepare(cfg)
    assert isinstance(task, Distiller) and data.batch_size == 8
    assert len(task.schedule) == len(cfg.schedule.sigmas)
    assert task.critic_updates == (0 if row["loss"] == "mmd" else cfg.task.critic_updates)
    assert isinstance(task.scheduler(), ScaleWiseScheduler)
    assert task.schedule.sizes[-1] == task.model.size


PAPER = ("sd35_medium", "sd35_large", "flux_dev", "sdxl", "wan21_1_3b")


@pytest.mark.parametrize("model", options("model"))
def test_defaults_of_a_model_are_those_of_the_released_scripts(model: str, tmp_path: Path) -> None:
    cfg = composed(arguments(tmp_path, model=model))
    assert set(cfg.loss) == ({"mmd"} if model == "sdxl" or model.startswith("wan") else {"dmd", "mmd", "gan"})
    assert len(cfg.schedule.sigmas) == (6 if model == "sd35_medium" else 4)
    if model not in PAPER:
        return
    assert cfg.task.lr == 5e-6 and cfg.task.checkpointing
    assert cfg.trainer.max_steps == (4000 if model == "sd35_large" else 3000)
    batch = {"sd35_medium": 64, "sd35_large": 32, "flux_dev": 24, "sdxl": 64, "wan21_1_3b": 24, "wan22_5b": 24}
    batch |= {"wan22_a14b_high": 24, "wan22_a14b_low": 24}
    assert cfg.data.batch_size == batch[model]


GUIDANCE = {  # in DMD, when drawing, and as the network is fed it
    "shapes": (4.0, 4.0, None),
    "sd35_medium": (7.0, 4.5, None),
    "sd35_large": (4.5, 4.5, None),
    "flux_dev": (1.0, 1.0, 4.5),
    "sdxl": (7.5, 7.5, None),
    "wan21_1_3b": (5.0, 5.0, None),
    "sana_1600m": (4.5, 4.5, None),
    "wan22_5b": (5.0, 5.0, None),
    "wan22_a14b_high": (4.0, 4.0, None),
    "wan22_a14b_low": (3.0, 4.0, None),
    "qwen_image": (4.0, 4.0, None),
    "qwen_image_2512": (4.0, 4.0, None),
    "flux2_klein_4b": (4.0, 4.0, None),
    "z_image": (5.0, 5.0, None),
    "chroma1": (3.0, 3.0, None),
    "flux2_klein_9b": (4.0, 4.0, None),
    "flux2_dev": (1.0, 1.0, 4.0),
}


@pytest.mark.parametrize("experiment", [False, True])
@pytest.mark.parametrize("model", options("model"))
def test_guidance_of_dmd_and_of_drawing_are_two(model: str, experiment: bool, tmp_path: Path) -> None:
    dmd, drawing, fed = GUIDANCE[model]
    if experiment and f"paper_{model}" not in options("experiment"):
        pytest.skip("not in the paper")
    group = {"experiment": f"paper_{model}"} if experiment else {"model": model}
    cfg = composed([*arguments(tmp_path, **group), "+loss/term@loss.other=dmd"])
    assert cfg.loss.other.guidance_scale == cfg.model.dmd_guidance_scale == dmd
    assert cfg.model.drawing_guidance_scale == drawing and cfg.model.get("embedded_guidance") == fed
    assert "guidance_scale" not in cfg.model
    drawn = composed([f"model={model}", "prompts=x", "out=y"], "generate")
    assert drawn.model.drawing_guidance_scale == drawing and drawn.guidance_scale is None


def test_a_run_of_an_earlier_version_still_builds(tmp_path: Path) -> None:
    """Its config.yaml has one `model.guidance_scale` for both, and repeats in the task what the task is given."""
    cfg = OmegaConf.create(OmegaConf.to_container(composed(arguments(tmp_path, model="shapes")), resolve=True))
    for key in ("dmd_guidance_scale", "drawing_guidance_scale"):
        del cfg.model[key]
    cfg.model.guidance_scale = 3.0
    cfg.loss.dmd.guidance_scale = 3.0
    cfg.task.update({part: cfg[part] for part in ("model", "schedule", "loss")})
    cfg.trainer.accelerator = "cpu"
    task, _ = train.prepare(cfg)
    assert isinstance(task, Distiller) and task.terms["dmd"].guidance_scale == 3.0
    assert (task.model.dmd_guidance_scale, task.model.drawing_guidance_scale) == (3.0, 3.0)


@pytest.mark.parametrize("task", options("task"))
def test_model_schedule_and_loss_appear_once(task: str, tmp_path: Path) -> None:
    cfg = composed(arguments(tmp_path, task=task))
    assert not {"model", "schedule", "loss"} & set(cfg.task)
    assert OmegaConf.to_yaml(cfg, resolve=True).count("swd.modules.pretrained.Pretrained") == 1


def test_the_task_is_given_the_objects_of_the_groups(tmp_path: Path) -> None:
    task, _ = train.prepare(composed([*arguments(tmp_path, loss="mmd"), "model.rank=3", "loss.mmd.weight=0.5"]))
    assert isinstance(task, Distiller) and list(task.terms) == ["mmd"]
    assert (task.model.rank, task.terms["mmd"].weight, task.schedule.sizes[0]) == (3, 0.5, (6, 6))


@pytest.mark.parametrize("given", ["+task.model=sdxl", "+task.loss.mmd.weight=2", "+task.schedule={}"])
def test_what_the_task_is_given_is_not_set_in_it(given: str, tmp_path: Path) -> None:
    part = given.removeprefix("+task.").partition("=")[0].partition(".")[0]
    for step in (lambda cfg: check(cfg, train.ROOT), train.prepare):
        with pytest.raises(
            UserError, match=rf"task\.{part} is not set here.* choose {part}=NAME, or set {part}\.SETTING"
        ) as e:
            step(composed([*arguments(tmp_path), given]))
        assert "\n" not in str(e.value)


def test_a_task_without_a_model_says_so(tmp_path: Path) -> None:
    cfg = composed(arguments(tmp_path))
    del cfg.model
    cfg.loss = None
    with pytest.raises(UserError, match="model is missing; choose one with model=NAME"):
        config.build(cfg, "task")


def test_the_command_line_wins_over_a_models_defaults(tmp_path: Path) -> None:
    cfg = composed(arguments(tmp_path, model="sdxl", loss="dmd_gan", schedule="sdxl_full_2step"))
    assert set(cfg.loss) == {"dmd", "gan"} and list(cfg.schedule.sizes) == [128, 128]


@pytest.mark.parametrize(
    ("model", "schedule", "message"),
    [
        ("sdxl", "full_4step", "sdxl_full_4step"),
        ("sdxl", "full_2step", "sdxl_full_2step"),
        ("sdxl", "image_4step", "sdxl_4step"),
        ("flux_dev", "sdxl_4step", "image_4step"),
        ("sd35_large", "sdxl_full_2step", "full_2step"),
    ],
)
def test_a_schedule_of_another_process_is_refused(
    model: str, schedule: str, message: str, tmp_path: Path, captioned: Path
) -> None:
    cfg = composed([*arguments(tmp_path, model=model, schedule=schedule), f"data.dataset.path={captioned}"])
    with pytest.raises(UserError, match=rf"schedule\.process=.* use schedule=.*\b{message}\b") as caught:
        train.prepare(cfg)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("process", ["flow", "epsilon"])
@pytest.mark.parametrize("full_size", [False, True])
def test_schedules_that_are_recommended_exist_and_fit(process: str, full_size: bool) -> None:
    other = {"flow": "epsilon", "epsilon": "flow"}[process]
    message = str(with_schedules(WrongProcess(other, process, full_size)))
    names = re.findall(r"\w+_\dstep", message.partition("or use schedule=")[2])
    assert names
    for name in names:
        schedule = build(composed([f"schedule={name}"]), "schedule")
        assert schedule.process == process and (len(set(schedule.sizes)) == 1) == full_size


def test_levels_on_the_command_line_keep_the_process(tmp_path: Path, captioned: Path) -> None:
    own = ["schedule.sigmas=[1.0,0.7]", "schedule.sizes=[64,128]", f"data.dataset.path={captioned}"]
    task, _ = train.prepare(composed([*arguments(tmp_path, model="sdxl", schedule="sdxl_4step"), *own]))
    assert isinstance(task, Distiller)
    assert task.schedule.sigmas == (1.0, 0.7) and task.scheduler().timesteps.tolist() == [999, 700]


@pytest.mark.parametrize("option", options("schedule"))
def test_every_schedule_names_its_process(option: str, tmp_path: Path) -> None:
    cfg = composed(arguments(tmp_path, schedule=option))
    levels = {1.0, 0.8, 0.6, 0.4} if option.startswith("sdxl") else set(rectified_flow_table().tolist())
    assert cfg.schedule.process == ("epsilon" if option.startswith("sdxl") else "flow")
    assert all(any(abs(sigma - level) < 1e-6 for level in levels) for sigma in cfg.schedule.sigmas)


@pytest.mark.parametrize("option", options("callbacks"))
def test_callbacks_instantiate(option: str, tmp_path: Path) -> None:
    cfg = composed(arguments(tmp_path, callbacks=option))
    assert all(isinstance(built, Callback) for built in config.build(cfg, "callbacks").values())


@pytest.mark.parametrize("option", options("logger"))
@pytest.mark.parametrize("trainer", options("trainer"))
def test_a_trainer_is_built(trainer: str, option: str, tmp_path: Path) -> None:
    cfg = composed([*arguments(tmp_path, trainer=trainer, logger=option), "trainer.accelerator=cpu"])
    built = train.build_trainer(cfg, tmp_path)
    assert built.max_steps == cfg.trainer.max_steps and built.num_devices == (2 if trainer == "ddp_cpu" else 1)
    if trainer == "ddp_cpu":
        assert isinstance(built.strategy, DDPStrategy) and built.strategy._start_method == "popen"
        expected = {"find_unused_parameters": True, "broadcast_buffers": False, "gradient_as_bucket_view": True}
        assert built.strategy._ddp_kwargs == expected
    assert len(built.loggers) == {"none": 0, "csv": 1}.get(option, 2)  # metrics.csv is written beside the others


@pytest.mark.parametrize("option", options("experiment"))
def test_every_experiment_passes_the_schema(option: str, tmp_path: Path) -> None:
    command = demo if option.startswith("demo_") else train
    cfg = composed([f"folder={tmp_path}", "name=test", f"experiment={option}"], command.__name__.rpartition(".")[2])
    check(cfg, command.ROOT)
    assert cfg.trainer.max_steps > 0


@pytest.mark.parametrize("option", options("task"))
def test_every_task_passes_the_schema(option: str, tmp_path: Path) -> None:
    check(composed(arguments(tmp_path, task=option)), train.ROOT)


MADE_FROM = {"flow": ["task.out=trained"], "judge": ["data=judge"], "vae": ["data=shapes"]}
"""Arguments that a task needs beside a model."""


@pytest.mark.parametrize("task", options("task"))
@pytest.mark.parametrize("model", options("model"))
@pytest.mark.filterwarnings("ignore:DMD is known to fail")
def test_every_model_goes_with_every_task(model: str, task: str, tmp_path: Path, captioned: Path) -> None:
    given = [*arguments(tmp_path, model=model, task=task), *MADE_FROM.get(task, []), "trainer.accelerator=cpu"]
    if DATA.get(model) != ("shapes",) and task in ("distill", "flow"):
        given.append(f"data.dataset.path={captioned}")
    cfg = composed(given)
    check(cfg, train.ROOT)
    if task == "flow" and model.startswith("wan22_a14b"):
        with pytest.raises(UserError, match="is one of several experts"):
            train.prepare(cfg)
        return
    built, data = train.prepare(cfg)
    assert type(built).__name__ == cfg.task._target_.rpartition(".")[2]
    assert data.batch_size == cfg.data.batch_size and cfg.trainer.max_steps == cfg.recipe.iterations
    if task == "distill":
        assert (built.lr, built.checkpointing) == (cfg.recipe.lr, cfg.recipe.checkpointing)
    if task == "flow":
        assert built.lr == 1e-5  # of the task: a recipe is of a distillation


@pytest.mark.parametrize("model", options("model"))
def test_a_model_file_holds_arguments_alone(model: str) -> None:
    plain = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text())
    assert plain.pop("defaults")[::2] == ["/model_base@_here_", "_self_"]
    base = yaml.safe_load((CONF / "model_base.yaml").read_text())
    assert set(plain) | set(base) <= {"_target_", *inspect.signature(Pretrained).parameters}


def test_a_recipe_gives_way_to_the_command_line(tmp_path: Path) -> None:
    given = ["recipe.lr=1e-3", "data.batch_size=6", "recipe.iterations=9", "trainer.max_steps=8"]
    cfg = composed([*arguments(tmp_path, model="sdxl"), *given])
    assert (cfg.task.lr, cfg.data.batch_size, cfg.recipe.batch_size, cfg.trainer.max_steps) == (1e-3, 6, 64, 8)
    other = composed([*arguments(tmp_path, experiment="paper_sd35_large", model="sdxl", data="webdataset")])
    assert (other.task.lr, other.data.batch_size) == (4e-6, 24)  # of the experiment
    with pytest.raises(UserError, match=r"unknown key recipe\.batch; did you mean 'batch_size'"):
        check(composed([*arguments(tmp_path), "+recipe.batch=3"]), train.ROOT)
    with pytest.raises(UserError, match=r"recipe\.iterations=1\.5 is not valid; expected an integer"):
        check(composed([*arguments(tmp_path), "recipe.iterations=1.5", "trainer.max_steps=1"]), train.ROOT)


@pytest.mark.parametrize("option", options("data"))
def test_every_data_set_instantiates(option: str, tmp_path: Path, captioned: Path) -> None:
    cfg = composed(arguments(tmp_path, data=option))
    if option in ("images", "videos", "videos_720p"):
        cfg.data.dataset.path = str(captioned)
    if option == "webdataset":
        cfg.data.path = str(make_pictures(tmp_path / "shards", 2))
    assert config.build(cfg, "data").batch_size >= 1


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ([], (512, 3, 2, 150, 75)),
        (["experiment=demo_ci"], (64, 3, 1, 40, 40)),
        (["experiment=demo_full"], (1024, 15, 5, 700, 100)),
        (["experiment=demo_ci", "trainer.max_steps=9", "n_pictures=3"], (3, 3, 1, 9, 40)),
    ],
)
def test_an_experiment_wins_over_the_demos_own_numbers(
    given: list[str], numbers: tuple[int, ...], tmp_path: Path
) -> None:
    cfg = composed([*arguments(tmp_path), *given], "demo")
    check(cfg, demo.ROOT)
    found = (cfg.n_pictures, cfg.timing_batches, cfg.task.critic_updates, cfg.trainer.max_steps)
    assert (*found, cfg.callbacks.samples.every) == numbers


def test_the_import_passes_the_schema() -> None:
    assert import_pictures.prepare(composed(["source=a", "out=b"], "import")) == import_pictures.ImportPlan()


@pytest.mark.parametrize("option", options("metric"))
def test_every_metric_is_built_by_its_name(option: str) -> None:
    built, _ = evaluate.metrics_of(composed(["models=[teacher]", "prompts=x", f"metrics=[{option}]"], "evaluate"))
    (name,) = built
    assert name == option and isinstance(built[name], PictureMetric)


@pytest.mark.parametrize("option", options("model"))
def test_every_model_can_be_sampled(option: str, tmp_path: Path) -> None:
    cfg = composed(arguments(tmp_path, model=option), "sample")
    check(cfg, sample.ROOT)
    config.build(cfg, "model")


def test_the_default_run_distils_the_embedded_teacher_with_all_losses() -> None:
    cfg = composed(["folder=x", "name=y"])
    task, _ = train.prepare(cfg)
    assert isinstance(task, Distiller)
    assert set(task.terms) == {"dmd", "mmd", "gan"} and task.critic_updates == 5
    assert task.model.folder.name == "shapes-sd3"


FILES = sorted(file for file in CONF.rglob("*.yaml") if file.relative_to(CONF).parts[0] != "hydra")
"""All but those of Hydra's own groups, which name files of its plugins; `commands/test_sweeps.py` composes them."""


def included(file: Path) -> set[Path]:
    """Files that a file's defaults list names."""
    found = set()
    for entry in (yaml.safe_load(file.read_text()) or {}).get("defaults", []):
        key, option = (
            next(iter(entry.items())) if isinstance(entry, dict) else ("", entry.lstrip("/").partition("@")[0])
        )
        group = key.removeprefix("override ").split("@")[0].lstrip("/")
        for folder in (file.parent, CONF):
            if option and "$" not in option and (folder / group / f"{option}.yaml").is_file():
                found.add(folder / group / f"{option}.yaml")
    return found


def test_every_file_is_reached_by_a_test_above() -> None:
    primary = {CONF / f"{name}.yaml" for name in cli.COMMANDS}
    groups = (*FREE, "model", "recipe", "experiment", "task", "metric", "callbacks/metrics")
    reached = primary | {CONF / group / f"{option}.yaml" for group in groups for option in options(group)}
    while more := set().union(*map(included, reached)) - reached:
        reached |= more
    assert set(FILES) - reached == set()


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(CONF)))
def test_every_file_names_only_files_that_exist(file: Path) -> None:
    entries: list[Any] = (yaml.safe_load(file.read_text()) or {}).get("defaults", [])
    named = []
    for entry in entries:
        key, option = next(iter(entry.items())) if isinstance(entry, dict) else ("", entry)
        if option not in (None, "_self_") and "hydra/" not in key and "$" not in str(option):
            named.append(option)
    assert len(included(file)) == len(named)


@pytest.mark.parametrize(
    ("command", "needed", "unread"),
    [
        (sample, "folder=x", "+task.lr=1"),
        (sample, "folder=x", "+resume=auto"),
        (export, "to=x", "+seed=3"),
        (generate, "out=x", "schedule=image_4step"),
        (encode, "out=x", "loss=mmd"),
        (evaluate, "folder=x", "+frames=9"),
        (evaluate, "folder=x", "+task.lr=1"),
    ],
)
def test_a_key_that_a_command_does_not_read_is_refused(command: Any, needed: str, unread: str) -> None:
    name, more = command.__name__.rpartition(".")[2], ["prompts=y"] if command in (generate, evaluate) else []
    more += ["models=[teacher]", "metrics=[clip]"] if command is evaluate else []
    check(composed([needed, *more], name), command.ROOT)
    with pytest.raises(UserError, match="unknown key"):
        check(composed([needed, *more, unread], name), command.ROOT)


@pytest.mark.parametrize("group", ["data", "recipe"])
def test_encoding_has_one_batch_size(group: str) -> None:
    with pytest.raises(UserError, match=rf"{group}\.batch_size=4 is of a training; here it is batch_size=NUMBER"):
        encode.prepare(composed(["out=x", f"{group}.batch_size=4"], "encode"))
