"""`swd demo`: distil, sample, evaluate and report on the embedded teacher."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from omegaconf import DictConfig

from swd.callbacks import SaveAdapter
from swd.callbacks.fixed_losses import FixedLosses
from swd.commands import keys, shared, train
from swd.commands.numbers import check_numbers
from swd.config import build, check, given_keys, node_of, overrides
from swd.modules.distiller import Distiller
from swd.modules.family_folder import resolve_asset
from swd.modules.pretrained import Pretrained
from swd.schedule import ScaleSchedule
from swd.shapes import contest
from swd.shapes.dataset import RESOLUTION
from swd.shapes.demo import (
    STORE_COMMAND,
    Clock,
    compare,
    pictures_drawn,
    results_and_page,
    setup_seconds,
    write_and_print,
)
from swd.shapes.judge import Judge
from swd.shapes.pace import Pace
from swd.types import UserError

ROOT = keys.DEMO
STORED = 1024
"""Pictures from which `store_teacher=true` computes the teacher's statistics."""
DISTILLER = "swd.modules.distiller.Distiller"


# The command


def run(cfg: DictConfig) -> float | None:
    """Do the whole demo; its files go to `cfg.folder`, copies of results and report beside that folder.

    Returns:
        As `train.run`.
    """
    clock = Clock(setup=setup_seconds())
    with clock.phase("start"):
        shared.quiet()
        judge_folder = prepare(cfg)
        judge = Judge.from_pretrained(judge_folder)
    if cfg.store_teacher:
        store_teacher(cfg, judge_folder)
        return None

    with clock.phase("distil"):
        fixed = FixedLosses()
        task, trainer = train.fit(cfg, fixed, *pace(cfg, clock, judge_folder), *missing_callbacks(cfg))
    value = None if cfg.optimized_metric is None else train.objective(cfg.optimized_metric, trainer, Path(cfg.folder))
    if not trainer.is_global_zero:
        return value
    assert isinstance(task, Distiller)
    task, judge = place(task, judge, trainer.strategy.root_device)
    measured = compare(cfg, task, judge, judge_folder, clock)
    with clock.phase("report"):
        results, page = results_and_page(cfg, task, judge, measured)
        results["fixed_losses"] = fixed.losses
    results["wall_seconds"] = clock.seconds()
    write_and_print(cfg, results, page)
    return value


def prepare(cfg: DictConfig) -> Path:
    """Check everything before anything is loaded, and return the judge's folder.

    Raises:
        UserError: naming the setting and the fix.
    """
    check(cfg, ROOT)
    if cfg.task._target_ != DISTILLER:
        raise UserError("the demo distils; leave out experiment= and task=, or train that with `swd train`")
    folder = check_settings(cfg)
    task, _ = train.prepare(cfg)
    assert isinstance(task, Distiller)
    check_size(task.model, task.schedule)
    return folder


def check_settings(cfg: DictConfig) -> Path:
    """Check the keys that the demo adds to those of training, and return the judge's folder.

    Raises:
        UserError: naming the setting and the fix.
    """
    check_numbers(cfg, "demo")
    if "encoded" in given_keys() and not cfg.data._target_.endswith(".EncodedPairs"):
        raise UserError(f"encoded={cfg.encoded} is of data=shapes_encoded, and these data are others; leave it out")
    return _judge_folder(cfg.judge)


def check_size(model: Pretrained, schedule: ScaleSchedule) -> None:
    """Raise UserError unless finished pictures have the size of those that the judge was trained on."""
    size = schedule.sizes[-1]
    if len(size) == 3 or model.pixel_size(size) != (RESOLUTION, RESOLUTION):
        raise UserError(
            f"schedule.sizes ends with {size}, but the judge reads pictures of {RESOLUTION}x{RESOLUTION} pixels; "
            f"end with {RESOLUTION // model.factor}, and use the model shapes"
        )


def _judge_folder(path: str) -> Path:
    try:
        folder = resolve_asset(path)
    except UserError:
        raise UserError(
            f"judge={path} does not ship with this installation; make it with python train.py experiment=shapes_judge"
        ) from None
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"judge={path} has no {name}; make it with python train.py experiment=shapes_judge")
    return folder


def missing_callbacks(cfg: DictConfig) -> list[SaveAdapter]:
    """The callback that writes the student, which the evaluation reads, if the configuration has left it out."""
    targets = [str(node["_target_"]) for node in node_of(cfg, "callbacks").values()]
    return [] if any(target.endswith(".SaveAdapter") for target in targets) else [SaveAdapter()]


def pace(cfg: DictConfig, clock: Clock, judge_folder: Path) -> list[Pace]:
    """What says that this machine is too slow for `minutes`; nothing if the configuration gives none."""
    if cfg.minutes is None:
        return []
    task: Distiller = build(cfg, "task")
    drawn = pictures_drawn(cfg, task, judge_folder)
    return [Pace(cfg.minutes, drawn, lambda: clock.seconds()["total"], "experiment=demo_ci" in overrides())]


def place(task: Distiller, judge: Judge, device: torch.device) -> tuple[Distiller, Judge]:
    """Everything on one device and in evaluation mode; training leaves the networks on the CPU."""
    task.to(device).eval()
    task.encoders.to(device)
    return task, judge.to(device).eval()


def store_teacher(cfg: DictConfig, judge_folder: Path) -> None:
    """Draw and judge the pictures of the teacher's rows, and keep their statistics beside the judge."""
    task: Distiller = build(cfg, "task")
    if not os.access(judge_folder, os.W_OK):
        raise UserError(f"{judge_folder} cannot be written; use a checkout of the repository, or judge=FOLDER")
    stores = contest.teacher_stores(task, judge_folder)
    for name, candidate in contest.teachers(task).items():
        store = stores[name]
        if store.why_not(STORED) is None:
            print(f"{name}: {store.path} holds them already; to make them anew, remove it")
            continue
        plan = contest.plan_of(Path(cfg.output) / cfg.name / candidate.name, candidate, STORED)
        plan.claim()
        contest.draw_pictures(plan)
        judged = contest.judged_pictures(plan, str(judge_folder))
        store.save(judged, STORE_COMMAND)
        accuracy = judged.accuracy()
        print(f"{name}: prompt accuracy {accuracy['mean']:.3f}, exact match {accuracy['exact_match']:.3f}")
        print(store.path)
