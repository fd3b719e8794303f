"""`swd demo`: distil, sample, evaluate and report on the embedded teacher."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from omegaconf import DictConfig

from swd.callbacks import SaveAdapter
from swd.callbacks.fixed_losses import FixedLosses
from swd.commands import shared, train
from swd.config import build, check, node_of
from swd.modules.distiller import Distiller
from swd.modules.family_folder import resolve_asset
from swd.modules.pretrained import Pretrained
from swd.schedule import ScaleSchedule
from swd.shapes import contest
from swd.shapes.dataset import RESOLUTION
from swd.shapes.demo import STORE_COMMAND, Clock, compare, results_and_page, setup_seconds, write_and_print
from swd.shapes.judge import Judge
from swd.types import UserError

ROOT = train.ROOT | {
    "judge": str,
    "n_pictures": int,
    "shown": int,
    "timing_batches": int,
    "recompute": bool,
    "store_teacher": bool,
}
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
        task, trainer = train.fit(cfg, fixed, *missing_callbacks(cfg))
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
    for key, least in (("n_pictures", 2), ("shown", 1), ("timing_batches", 1)):
        if cfg[key] < least:
            raise UserError(f"{key}={cfg[key]}; use at least {least}")
    if cfg.shown > cfg.n_pictures:
        raise UserError(f"shown={cfg.shown} is more than n_pictures={cfg.n_pictures}; use at most that many")
    if cfg.trainer.max_steps < 1:
        raise UserError(f"trainer.max_steps={cfg.trainer.max_steps}; the demo distils for at least 1 iteration")
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


def place(task: Distiller, judge: Judge, device: torch.device) -> tuple[Distiller, Judge]:
    """Everything on one device and in evaluation mode; training leaves the networks on the CPU."""
    task.to(device).eval()
    task.encoders.to(device)
    return task, judge.to(device).eval()


def store_teacher(cfg: DictConfig, judge_folder: Path) -> None:
    """Draw and judge the teacher's full-length pictures, and keep the statistics beside the judge."""
    task: Distiller = build(cfg, "task")
    if not os.access(judge_folder, os.W_OK):
        raise UserError(f"{judge_folder} cannot be written; use a checkout of the repository, or judge=FOLDER")
    store = contest.teacher_store(task, judge_folder)
    candidate = next(iter(contest.teachers(task).values()))
    plan = contest.plan_of(Path(cfg.output) / cfg.name / "teacher", candidate, STORED)
    plan.claim()
    contest.draw_pictures(plan)
    judged = contest.judged_pictures(plan, str(judge_folder))
    store.save(judged, STORE_COMMAND)
    accuracy = judged.accuracy()
    print(f"prompt accuracy {accuracy['mean']:.3f}, exact match {accuracy['exact_match']:.3f}")
    print(store.path)
